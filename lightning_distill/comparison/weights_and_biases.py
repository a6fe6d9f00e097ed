"""One W&B group per comparison: a run per method and seed, and one with the table."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_distill.comparison.files import PLOTS, slug

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

    from lightning_distill.comparison.comparison import Comparison

Mode = Literal["offline", "online", "off"]
REPORTING = "WANDB_ERROR_REPORTING"


@dataclass(frozen=True)
class Group:
    """The W&B group of a comparison.

    Attributes:
        folder: Folder of the comparison; offline runs go to ``folder/wandb`` (upload them with ``wandb sync``).
        identifier: Of the comparison; with it a run that was killed has the same W&B identifier when it is resumed.
        mode: ``"offline"`` uses no network, ``"online"`` uploads.
    """

    folder: Path
    identifier: str
    mode: Literal["offline", "online"]

    def logger(self, method: str, seed: int) -> WandbLogger:
        """Logger of a run; call ``logger.experiment.finish()`` when it ends."""
        from lightning.pytorch.loggers import WandbLogger

        identifier = f"{self.identifier}-{slug(method)}-seed{seed}"
        self._remove_attempt(identifier)
        # `WandbLogger(offline=True)` would set WANDB_MODE for the rest of the process.
        return WandbLogger(
            name=f"{method}-seed{seed}",
            id=identifier,
            job_type=method,
            config={"method": method, "seed": seed},
            save_dir=self.folder,
            **self._arguments(),
        )

    def log_summary(self, comparison: Comparison) -> None:
        """Log the table, the runs and the plots as a run of their own, which replaces an earlier one."""
        import wandb

        identifier = f"{self.identifier}-summary"
        self._remove_attempt(identifier)
        run = wandb.init(
            name="summary", id=identifier, job_type="summary", dir=str(self.folder), resume="allow", **self._arguments()
        )
        try:
            tables: dict[str, Sequence[Mapping[str, Any]]] = {
                "summary": [asdict(line) for line in comparison.summary()],
                "runs": [*comparison.runs, *comparison.references],
            }
            images = {name.removesuffix(".png"): self.folder / name for name in PLOTS if (self.folder / name).exists()}
            run.log({name: _table(rows) for name, rows in tables.items()})
            run.log({name: wandb.Image(str(path)) for name, path in images.items()})
        finally:
            run.finish()

    def _arguments(self) -> dict[str, Any]:
        import wandb

        # Measured with wandb 0.31, offline: 0.03 s for a run with these settings, 0.17 s without.
        settings = wandb.Settings(
            console="off",
            silent=self.mode == "offline",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        return {
            "project": os.environ.get("WANDB_PROJECT", "lightning-distill"),
            "group": self.folder.resolve().name,
            "mode": self.mode,
            "settings": settings,
        }

    def _remove_attempt(self, identifier: str) -> None:
        """Offline, a second attempt makes a second folder, and both would be uploaded into one run."""
        if self.mode == "offline":
            for attempt in (self.folder / "wandb").glob(f"offline-run-*-{identifier}"):
                shutil.rmtree(attempt)


def open_group(folder: Path, identifier: str, mode: Mode) -> Group | None:
    """The W&B group, or ``None`` for ``"off"``, in which case W&B is not even imported.

    Raises:
        ValueError: If ``mode`` is unknown.
        RuntimeError: If a W&B run is in progress, which would swallow all those of the comparison.
    """
    if mode == "off":
        return None
    if mode not in ("offline", "online"):
        raise ValueError(f"`wandb` must be 'offline', 'online' or 'off', got {mode!r}.")
    import wandb

    if wandb.run is not None:
        raise RuntimeError(
            "A W&B run is in progress, and the runs of the comparison would all be logged to it. Call "
            "`wandb.finish()` first, or pass `wandb='off'`."
        )
    return Group(folder, identifier, mode)


@contextlib.contextmanager
def no_telemetry(mode: Mode) -> Iterator[None]:
    """Keep W&B from reporting about itself to its server, which it does from offline runs too (0.31)."""
    before = os.environ.get(REPORTING)
    if mode == "offline":
        os.environ[REPORTING] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[REPORTING] = before
        elif mode == "offline":
            del os.environ[REPORTING]


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns=[*columns], data=[[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
