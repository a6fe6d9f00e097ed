"""A comparison described in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import rich
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

import lightning_distill.callbacks
import lightning_distill.datamodules
import lightning_distill.embedding
import lightning_distill.layer_maps
import lightning_distill.losses
import lightning_distill.modules
import lightning_distill.networks
import lightning_distill.teachers  # noqa: F401  (with the rooms imported, YAML may use class names without their path)
from lightning_distill.cli.building import ConfigurationError, build_plainly
from lightning_distill.cli.commands import call_with_options
from lightning_distill.cli.unparsed import Unparsed
from lightning_distill.comparison import Comparison, Experiment, compare

PARTS = ("model", "data", "trainer")


def run_comparison(arguments: Sequence[str]) -> None:
    """Run ``compare -c COMPARISON.yaml`` and print the table."""
    comparison = call_with_options(compare_configured, arguments)
    rich.print(comparison)
    rich.print(f"Table, plots and runs are in [bold]{comparison.folder}[/bold].")


def compare_configured(
    methods: Unparsed,
    control: str,
    folder: str,
    common: Unparsed | None = None,
    reference: Unparsed | None = None,
    seeds: int | list[int] = 5,
    metric: str = "test/accuracy",
    mode: Literal["max", "min"] = "max",
    title: str | None = None,
    fresh: bool = False,
    wandb: Literal["offline", "online", "off"] = "offline",
) -> Comparison:
    """Compare methods with a control group over several seeds.

    A method is a mapping with ``model``, ``data`` and ``trainer``, each as in a configuration of ``fit``; it is merged
    into ``common`` (another ``class_path`` replaces what was there). In its texts ``{seed}`` stands for the seed, and
    ``{folder}`` for the folder of the comparison.

    Args:
        methods: Methods by name.
        control: Name of the method that the others are compared with.
        folder: Where everything is kept; its name is the W&B group.
        common: What all methods and references share.
        reference: What is trained once before the methods; its student is then in
            ``{folder}/<name>/student.safetensors``.
        seeds: The seeds, or how many.
        metric: Name of the test metric that is compared.
        mode: Whether more (max) or less (min) of it is better.
        title: Heading of table and plots.
        fresh: Delete the comparison in the folder and start over.
        wandb: Log runs for Weights & Biases without using the network (offline), upload them (online), or not (off).

    Raises:
        ValueError: If a method's configuration is not valid; the message names the method.
    """
    described = {name: merged(common or {}, method) for name, method in methods.items()}
    references = {name: merged(common or {}, method) for name, method in (reference or {}).items()}
    parser = experiment_parser()
    for name, configuration in (described | references).items():
        parse_method(parser, name, filled(configuration, seed=0, folder=folder))  # before the first hour is spent
    return compare(
        {name: ConfiguredMethod(name, configuration, folder) for name, configuration in described.items()},
        reference={name: ConfiguredMethod(name, configuration, folder) for name, configuration in references.items()},
        control=control,
        folder=folder,
        seeds=seeds,
        metric=metric,
        mode=mode,
        title=title,
        fresh=fresh,
        wandb=wandb,
        configuration={"methods": described, "reference": references},
    )


class ConfiguredMethod:
    """Builds an experiment from a configuration: a method of :func:`~lightning_distill.comparison.compare`.

    Args:
        name: For error messages.
        configuration: With ``model``, ``trainer`` and, unless the module has its own loaders, ``data``.
        folder: What ``{folder}`` stands for.
    """

    def __init__(self, name: str, configuration: Mapping[str, Any], folder: str) -> None:
        self.name = name
        self.configuration = configuration
        self.folder = folder

    def __call__(self, seed: int) -> Experiment:
        """Build module, data module and the Trainer's arguments for ``seed``."""
        chosen = filled(self.configuration, seed=seed, folder=self.folder)
        parser = experiment_parser()
        parsed = parse_method(parser, self.name, chosen)
        try:
            built = build_plainly(lambda: parser.instantiate_classes(parsed))
        except ConfigurationError as error:
            raise ConfigurationError(f"In {self.name!r}: {error}") from error
        given = chosen.get("trainer", {})
        return Experiment(
            module=built.model,
            datamodule=built.get("data"),
            trainer={name: value for name, value in built.trainer.as_dict().items() if name in given},
        )


def experiment_parser() -> LightningArgumentParser:
    """Parser of ``model``, ``data`` and ``trainer``, as ``fit`` has them."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    return parser


def parse_method(
    parser: LightningArgumentParser, name: str, configuration: Mapping[str, Any], *, kind: str = "method"
) -> Namespace:
    """``configuration`` as ``parser`` understands it.

    Raises:
        ValueError: If it is not valid; the message says that it is the method (or other ``kind``) ``name``.
    """
    if unknown := [key for key in configuration if key not in PARTS]:
        raise ValueError(f"The {kind} {name!r} has the keys {unknown}; expected {', '.join(PARTS)}.")
    try:
        parsed: Namespace = parser.parse_object(dict(configuration))
    except Exception as error:  # jsonargparse raises its own and argparse's errors
        raise ValueError(f"The configuration of the {kind} {name!r} is not valid: {error}") from error
    return parsed


def merged(base: Any, change: Any) -> Any:
    """``base`` with ``change`` merged in, mapping by mapping; another class takes none of the old one's arguments."""
    if not isinstance(base, Mapping) or not isinstance(change, Mapping):
        return change
    if "class_path" in change and change["class_path"] != base.get("class_path"):
        return dict(change)
    return {**base, **{key: merged(base[key], value) if key in base else value for key, value in change.items()}}


def filled(value: Any, *, seed: int, folder: str) -> Any:
    """``value`` with the placeholders in its texts replaced; a text that is ``{seed}`` alone becomes a number."""
    if isinstance(value, Mapping):
        return {key: filled(item, seed=seed, folder=folder) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, seed=seed, folder=folder) for item in value]
    if not isinstance(value, str):
        return value
    return seed if value == "{seed}" else value.replace("{seed}", str(seed)).replace("{folder}", folder)
