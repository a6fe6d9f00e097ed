"""What a configuration's student costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from lightning_distill.cli.commands import use_configuration
from lightning_distill.cli.trainer import DistillationCLI
from lightning_distill.files import write_text
from lightning_distill.hardware import calibrate_cost_model, calibrate_onnx, cost_model
from lightning_distill.hardware.plot import plot_costs
from lightning_distill.modules import DistillationModule


class CostCLI(DistillationCLI):
    """Reads a configuration of ``fit``, and how its student's cost shall be estimated."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of ``cost``."""
        parser.add_argument(
            "--cost.model",
            type=str,
            default="calibrate",
            help="'calibrate' (measure some networks on this CPU, and write the model to the folder), the file of an "
            "earlier calibration, or a preset: 'ideal' or 'compute'.",
        )
        parser.add_argument(
            "--cost.runtime",
            type=Literal["torch", "onnx"],
            default="torch",
            help="What 'calibrate' measures: PyTorch's eager mode (ten seconds), or ONNX Runtime, with the integer "
            "kernels of quantized networks (some minutes; needs the extra 'onnx').",
        )
        parser.add_argument("--cost.folder", type=str, default="runs/cost", help="Where table and picture are written.")
        for name in ("ckpt_path", "weights_only"):  # a configuration of `fit` may have them
            parser.add_argument(f"--{name}", type=Any, default=None, help="Of `fit`; not used.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """One that nothing is run with."""
        return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)


def run_cost(arguments: Sequence[str]) -> None:
    """Run ``cost -c CONFIG.yaml``: estimate latency, energy and size of the student for one training batch."""
    use_configuration(CostCLI, arguments, _estimate)


def _estimate(cli: CostCLI) -> None:
    module, options = cli.model, cli.config["cost"]
    if not isinstance(module, DistillationModule):
        raise ValueError(f"the configuration's {type(module).__name__} has no student.")
    folder = Path(options["folder"])
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    if options["model"] == "calibrate":
        model = calibrate_onnx() if options["runtime"] == "onnx" else calibrate_cost_model()
        model.save(folder / "cost_model.json")
    else:
        model = cost_model(options["model"])
    report = model.estimate(module.student, batch, run=module.task.run)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "cost.txt", f"{report}\n")
    plot_costs(report, folder / "cost.png")
    print(f"{report}\nA batch of {module.task.batch_size(batch)}. Table and picture are in {folder}.")
