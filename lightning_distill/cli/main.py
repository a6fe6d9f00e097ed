"""Which command was meant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lightning_distill.cli.cache import run_cache
from lightning_distill.cli.check import run_check
from lightning_distill.cli.comparison import run_comparison
from lightning_distill.cli.cost import run_cost
from lightning_distill.cli.export import run_export
from lightning_distill.cli.pipeline import run_asynchronous_pipeline, run_pipeline
from lightning_distill.cli.search import run_search
from lightning_distill.cli.trainer import run_trainer

TRAINER_COMMANDS = {
    "fit": "train, and validate while training",
    "validate": "measure a checkpoint on the validation set",
    "test": "measure a checkpoint on the test set",
    "predict": "what the student says about the prediction set",
}
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    **{name: (text, run_trainer) for name, text in TRAINER_COMMANDS.items()},
    "cache": ("run a teacher over the training set once, to train from what it said", run_cache),
    "compare": ("methods times seeds, with a control group: table, plots, wandb", run_comparison),
    "export": ("a trained student for ONNX Runtime, torchao or in few bytes: size, exactness, speed", run_export),
    "cost": ("latency, energy and size of the student, estimated layer by layer: table, plot", run_cost),
    "check": ("does the student suit a machine: formats, channels, fusion, memory; status 1 if not", run_check),
    "pipeline": ("stages that build on each other, resumable: table, plot", run_pipeline),
    "pipeline-async": ("its stages all at once, each a process that follows the one before", run_asynchronous_pipeline),
    "search": ("settings that do best on the validation data: trials, table, plots", run_search),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lightning-distill``.

    Args:
        arguments: What stands behind the program's name; by default that of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return
    name = given[0]
    if name not in COMMANDS:
        sys.exit(f"lightning-distill: unknown command {name!r}\n\n{_usage()}")
    _, run = COMMANDS[name]
    run(given)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning-distill COMMAND -c CONFIG.yaml [--model.temperature 2 ...]",
            "",
            *lines,
            "",
            "lightning-distill COMMAND --help tells a command's options.",
        ]
    )
