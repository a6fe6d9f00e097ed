"""Learning rates for the methods of a comparison, chosen on the validation data and with seeds of their own.

    python scripts/choose_rates.py examples/qad_mnist1d.yaml --rates 0.001 0.003 0.01 0.03 --seeds 100 101

Every method that trains gets each rate: its optimizer's, and the highest of its schedule. The test data are not read.
References are trained once, with the first seed. What does best stands at the end, to be written into the YAML file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from rich import print
from rich.table import Table

from lightning_distill.cli.comparison import ConfiguredMethod, merged
from lightning_distill.comparison.quiet import quiet_lightning

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def with_rate(configuration: dict[str, Any], rate: float) -> dict[str, Any]:
    """The configuration with another learning rate, also in its schedule."""
    change: dict[str, Any] = {"optimizer": {"init_args": {"lr": rate}}}
    if "max_lr" in configuration["model"]["init_args"].get("lr_scheduler", {}).get("init_args", {}):
        change["lr_scheduler"] = {"init_args": {"max_lr": rate}}
    found: dict[str, Any] = merged(configuration, {"model": {"init_args": change}})
    return found


def trained(name: str, configuration: dict[str, Any], folder: Path, seed: int) -> tuple[L.Trainer, Any]:
    """Trainer and experiment after the training."""
    L.seed_everything(seed, workers=True, verbose=False)
    experiment = ConfiguredMethod(name, configuration, str(folder))(seed)
    trainer = L.Trainer(**{**experiment.trainer, **QUIET, "limit_val_batches": 1.0, "check_val_every_n_epoch": 10**6})
    trainer.fit(experiment.module, datamodule=experiment.datamodule)
    return trainer, experiment


def validated(name: str, configuration: dict[str, Any], folder: Path, seed: int, metric: str) -> float:
    trainer, experiment = trained(name, configuration, folder, seed)
    (found,) = trainer.validate(experiment.module, datamodule=experiment.datamodule, verbose=False)
    return found[metric]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="a YAML file of `lightning-distill compare`")
    parser.add_argument("--methods", nargs="+", help="the methods that are tried; all that train, if not given")
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101], help="other ones than those compared")
    parser.add_argument("--metric", default="val/accuracy", help="the larger the better")
    parser.add_argument("--folder", type=Path, default=Path("runs/choose_rates"), help="where references are kept")
    arguments = parser.parse_args()

    described = yaml.safe_load(arguments.comparison.read_text())
    common, methods = described.get("common", {}), described["methods"]
    chosen = {name: merged(common, methods[name]) for name in arguments.methods or methods}
    chosen = {name: method for name, method in chosen.items() if method["trainer"].get("max_steps") != 0}
    with quiet_lightning():
        for name, method in described.get("reference", {}).items():
            _, experiment = trained(name, merged(common, method), arguments.folder, arguments.seeds[0])
            experiment.module.export(arguments.folder / name / "student.safetensors", overwrite=True)
        table = Table("method", *map(str, arguments.rates), title=f"{arguments.metric}, mean of {arguments.seeds}")
        best = {}
        for name, method in chosen.items():
            means = []
            for rate in arguments.rates:
                with_it = with_rate(method, rate)
                values = [validated(name, with_it, arguments.folder, s, arguments.metric) for s in arguments.seeds]
                means.append(sum(values) / len(values))
                print(f"{name}, rate {rate}: {', '.join(f'{value:.2f}' for value in values)}", flush=True)
            table.add_row(name, *(f"{mean:.2f}" for mean in means))
            best[name] = arguments.rates[means.index(max(means))]
    print(table)
    for name, rate in best.items():
        print(f"{name}: {rate}")


if __name__ == "__main__":
    main()
