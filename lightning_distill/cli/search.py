"""A search for settings described in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import rich
import yaml

from lightning_distill.cli.commands import call_with_options
from lightning_distill.cli.comparison import (
    ConfiguredMethod,
    experiment_parser,
    filled,
    merged,
    parse_method,
)
from lightning_distill.cli.unparsed import Unparsed
from lightning_distill.comparison import Experiment
from lightning_distill.files import write_text

if TYPE_CHECKING:
    from lightning_distill.search import Parameter, Search

CONFIRM = "compare.yaml"
CONFIRM_SEEDS = 5
MOST_OF_FRONT = 4


def run_search(arguments: Sequence[str]) -> None:
    """Run ``search -c SEARCH.yaml``, print the best trials and how to confirm them."""
    found = call_with_options(search_configured, arguments, errors=(ValueError, TypeError, OSError, ImportError))
    rich.print(found)
    rich.print(f"All trials and plots are in [bold]{found.folder}[/bold].")
    if found.complete:
        rich.print(
            "Whether it is better than what you had, new seeds and test data tell:\n"
            f"  [bold]lightning-distill compare -c {found.folder / CONFIRM}[/bold]"
        )


def search_configured(
    base: Unparsed,
    space: Unparsed,
    folder: str,
    reference: Unparsed | None = None,
    metric: str | list[str] = "val/accuracy",
    mode: Literal["max", "min"] | list[Literal["max", "min"]] = "max",
    trials: int = 20,
    seeds: int | list[int] = 1,
    sampler: Literal["tpe", "cmaes", "nsga2", "random"] | None = None,
    pruner: Literal["median", "halving", "none"] | None = None,
    seed: int = 0,
    title: str | None = None,
    max_bytes: float | None = None,
    max_latency: float | None = None,
    max_energy: float | None = None,
    cost_samples: int = 1,
    cost_model: str | None = None,
    fresh: bool = False,
) -> Search:
    """Search for the settings that do best on the validation data.

    The search can be killed and called again; it goes on where it was. Several processes may share a folder. It writes
    `compare.yaml` into the folder: a comparison of the best trial with the setting in `base`, on new seeds and on test
    data.

    Args:
        base: What all trials share: `model`, `data` and `trainer`, each as in a configuration of `fit`. In its texts
            `{seed}` stands for the seed, and `{folder}` for the folder. Its own setting is the first trial, if it
            gives a value to everything in `space`.
        space: What is varied, by dotted path (`model.init_args.temperature`): a list of choices, or a range `{low:
            1.0, high: 10.0}` with `log: true` for ratios, `step: 0.5`, `integer: true`.
        folder: Where everything is kept.
        reference: What is trained once before the trials, merged into `base`; its student is then in
            `{folder}/<name>/student.safetensors`.
        metric: Name of the validation metric that counts, or of several.
        mode: Whether more (max) or less (min) of it is better, of each.
        trials: How many trials there shall be, with those that are in the folder.
        seeds: Seeds of the trainings of each trial, or how many.
        sampler: Who proposes: tpe (the default for one metric), cmaes, nsga2 (for several metrics) or random.
        pruner: How hopeless trials are stopped: median (the default for one metric), halving or none.
        seed: Of the proposals.
        title: Heading of table and plots.
        max_bytes: Most bytes of a student's weights, quantized ones packed. A trial over a limit is not trained.
        max_latency: Most seconds of a student for cost_samples samples, as cost_model says.
        max_energy: Most joules of a student for cost_samples samples, as cost_model says.
        cost_samples: Samples that latency and energy are those of.
        cost_model: ideal, compute, or the file that `lightning-distill cost` has written.
        fresh: Delete the search in the folder and start over.

    Raises:
        ValueError: If a configuration is not valid; the message names the setting.
        ImportError: If Optuna is not installed.
    """
    from lightning_distill.search import Limits, read_space, search

    limited = any(limit is not None for limit in (max_bytes, max_latency, max_energy))
    limits = Limits(max_bytes, max_latency, max_energy, cost_samples, cost_model) if limited else None

    parameters = read_space(space)
    references = {name: merged(base, change) for name, change in (reference or {}).items()}
    parser = experiment_parser()
    for name, configuration in {"base": base, **references}.items():
        if name != "base" or _present(base, parameters) is not None:  # `base` may lack what is varied
            parse_method(parser, name, filled(configuration, seed=0, folder=folder))
    for parameter in parameters:  # before the first hour is spent
        others = {other.name: other.examples()[0] for other in parameters}
        for value in parameter.examples():
            changed = with_settings(base, others | {parameter.name: value})
            parse_method(parser, f"{parameter.name} = {value}", filled(changed, seed=0, folder=folder))

    def build(settings: Mapping[str, Any], seed: int) -> Experiment:
        return ConfiguredMethod("trial", with_settings(base, settings), folder)(seed)

    found = search(
        build,
        space,
        folder=folder,
        metric=metric,
        mode=mode,
        trials=trials,
        seeds=seeds,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        start=_present(base, parameters),
        reference={name: ConfiguredMethod(name, configuration, folder) for name, configuration in references.items()},
        configuration={"base": base, "reference": references},
        limits=limits,
        fresh=fresh,
        title=title,
    )
    if found.complete:
        text = yaml.safe_dump(confirmation(found, base), sort_keys=False, allow_unicode=True, width=120)
        write_text(found.folder / CONFIRM, f"# lightning-distill compare -c {found.folder / CONFIRM}\n{text}")
    return found


def confirmation(found: Search, base: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison of the best trial (of several metrics: of the front) with ``base``, on seeds that are new."""
    folder = str(found.folder)
    best = [found.best] if len(found.metrics) == 1 else found.front[:MOST_OF_FRONT]
    first = max(found.seeds) + 1
    metric = found.metrics[0].replace("val", "test", 1)
    return {
        "title": f"{found.title}: is what was found better on new seeds?",
        "folder": str(found.folder / "confirmation"),
        "control": "base",
        "metric": metric,
        "mode": found.modes[0],
        "seeds": list(range(first, first + CONFIRM_SEEDS)),
        "common": _in_folder(base, folder),
        "methods": {
            "base": {},
            **{f"trial {trial.number}": _in_folder(with_settings({}, trial.settings), folder) for trial in best},
        },
    }


def with_settings(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with each dotted path set; mappings are merged as those of a comparison's methods.

    Example:
        >>> with_settings({"model": {"init_args": {"alpha": 0.5}}}, {"model.init_args.temperature": 2.0})
        {'model': {'init_args': {'alpha': 0.5, 'temperature': 2.0}}}
    """
    result: Any = dict(base)
    for path, value in settings.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        result = merged(result, value)
    return dict(result)


def _present(base: Mapping[str, Any], parameters: Sequence[Parameter]) -> dict[str, Any] | None:
    """What ``base`` itself has for each setting; ``None`` if it lacks one, or is outside the space."""
    found: dict[str, Any] = {}
    for parameter in parameters:
        value: Any = base
        for key in parameter.name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        try:
            parameter.label_of(value)
        except ValueError:
            return None
        found[parameter.name] = value
    return found


def _in_folder(value: Any, folder: str) -> Any:
    """``value`` with ``{folder}`` filled in, and ``{seed}`` left to the comparison."""
    if isinstance(value, Mapping):
        return {key: _in_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_folder(item, folder) for item in value]
    return value.replace("{folder}", folder) if isinstance(value, str) else value
