"""What the library costs: a distillation step side by side with a hand-written loop and with peers, in one run.

Rules: main-process CPU time; variants round-robin over several rounds, medians reported; the hand-written loop runs
twice, and the difference between the two is the noise floor; every variant must compute the same loss before anything
is timed. Overheads are absolute (they do not depend on the model), the whole is a ratio on a step of realistic length.

    python scripts/benchmark.py                  # overheads per step, then the ratio on a larger step
    python scripts/benchmark.py --rounds 9
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import rich
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table
from torch import Tensor, nn

from lightning_distill import KD
from lightning_distill.comparison.quiet import quiet_lightning

TEMPERATURE, ALPHA = 4.0, 0.5
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A student, a teacher and batches; all variants start from the same weights."""

    name: str
    sizes: tuple[int, ...]
    teacher_sizes: tuple[int, ...]
    batch_size: int
    steps: int

    def networks(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return mlp(self.sizes), mlp(self.teacher_sizes).requires_grad_(False).eval()

    def batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(8, self.batch_size, self.sizes[0], generator=generator)
        y = torch.randint(0, self.sizes[-1], (8, self.batch_size), generator=generator)
        return [(x[i % 8], y[i % 8]) for i in range(self.steps)]


SMALL = Workload("small", (64, 32, 10), (64, 128, 10), 64, 600)
LARGE = Workload("large", (784, 1024, 1024, 1024, 10), (784, 1024, 1024, 10), 256, 24)


def mlp(sizes: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def kd_by_hand(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    with torch.no_grad():
        target = F.log_softmax(teacher(x) / TEMPERATURE, dim=-1)
    logits = student(x)
    soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=-1), target, reduction="batchmean", log_target=True)
    return ALPHA * F.cross_entropy(logits, y) + (1 - ALPHA) * TEMPERATURE**2 * soft


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)  # type: ignore[arg-type]


def loop(loss_of: Callable[[nn.Module, nn.Module, Batch], Tensor]) -> Callable[[Workload], float]:
    """A training loop without a Trainer; returns the first loss, the timing is the caller's."""

    def run(work: Workload) -> float:
        student, teacher = work.networks()
        optimizer, first = sgd(student.parameters()), float("nan")
        for step, batch in enumerate(work.batches()):
            optimizer.zero_grad()
            loss = loss_of(student, teacher, batch)
            loss.backward()
            optimizer.step()
            if step == 0:
                first = loss.item()
        return first

    return run


def our_pipeline(work: Workload) -> float:
    """Our module's step in a plain loop: task, taps, terms, weighting."""
    student, teacher = work.networks()
    module = KD(student, teacher, TEMPERATURE, ALPHA)
    optimizer, first = sgd(student.parameters()), float("nan")
    for step, batch in enumerate(work.batches()):
        optimizer.zero_grad()
        loss = module.weighting(module.losses(module.observe(batch)))
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.item()
    return first


class Loader:
    """Ready batches; a bare list would be taken for a list of loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Bare(L.LightningModule):
    """The hand-written loss in a LightningModule."""

    def __init__(self, student: nn.Module, teacher: nn.Module, log: bool = False) -> None:
        super().__init__()
        self.student, self._teacher = student, [teacher]
        self.log_terms = log
        self.first: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = kd_by_hand(self.student, self._teacher[0], batch)
        self.first = loss.detach() if self.first is None else self.first
        if self.log_terms:  # what most code does
            self.log_dict({f"train/{name}": loss.detach() for name in "abcd"}, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.student.parameters())


class FirstLoss(KD):
    """Remembers the first loss."""

    first: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.first = loss.detach() if self.first is None else self.first
        return loss


def fit(build: Callable[[nn.Module, nn.Module], L.LightningModule], log: bool = False) -> Callable[[Workload], float]:
    def run(work: Workload) -> float:
        module = build(*work.networks())
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                logger=CSVLogger(folder) if log else False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=50 if log else 10**6,
                default_root_dir=folder,
            )
            trainer.fit(module, Loader(work.batches()))
        return float(module.first)  # type: ignore[arg-type]

    return run


def torchdistill_loss() -> Callable[[nn.Module, nn.Module, Batch], Tensor]:
    losses = importlib.import_module("torchdistill.losses.mid_level")
    criterion = losses.KDLoss("", "output", "", "output", temperature=TEMPERATURE, alpha=ALPHA, reduction="batchmean")

    def loss_of(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        with torch.no_grad():
            said = teacher(x)
        loss: Tensor = criterion({"": {"output": student(x)}}, {"": {"output": said}}, y)
        return loss

    return loss_of


def textbrewer_loss() -> Callable[[nn.Module, nn.Module, Batch], Tensor]:
    losses = importlib.import_module("textbrewer.losses")

    def loss_of(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        with torch.no_grad():
            said = teacher(x)
        logits = student(x)
        soft = losses.kd_ce_loss(logits, said, temperature=TEMPERATURE)
        entropy = -(F.softmax(said / TEMPERATURE, -1) * F.log_softmax(said / TEMPERATURE, -1)).sum(-1).mean()
        return ALPHA * F.cross_entropy(logits, y) + (1 - ALPHA) * TEMPERATURE**2 * (soft - entropy)

    return loss_of


def variants() -> dict[str, Callable[[Workload], float]]:
    found = {
        "hand-written loop": loop(kd_by_hand),
        "hand-written loop again (noise floor)": loop(kd_by_hand),
        "KD's step in a plain loop": our_pipeline,
        "Trainer, bare LightningModule": fit(Bare),
        "Trainer, KD, no logger": fit(lambda s, t: FirstLoss(s, t, TEMPERATURE, ALPHA, optimizer=sgd)),
        "Trainer, KD, CSV log of every term": fit(
            lambda s, t: FirstLoss(s, t, TEMPERATURE, ALPHA, optimizer=sgd), log=True
        ),
        "Trainer, bare, CSV, self.log of 4 per step": fit(lambda s, t: Bare(s, t, log=True), log=True),
    }
    for package, build in {"torchdistill": torchdistill_loss, "textbrewer": textbrewer_loss}.items():
        try:
            found[f"{package}'s loss in a plain loop"] = loop(build())
        except Exception as error:  # a peer that does not import here is reported and left out
            rich.print(f"{package} is left out: {type(error).__name__}: {error}")
    return found


def measure(work: Workload, rounds: int) -> dict[str, float]:
    """Median CPU seconds per step of each variant, start-up subtracted by comparing two lengths."""
    short = Workload(work.name, work.sizes, work.teacher_sizes, work.batch_size, max(work.steps // 6, 2))
    runs = variants()
    losses = {name: run(short) for name, run in runs.items()}
    wrong = {name: loss for name, loss in losses.items() if abs(loss - losses["hand-written loop"]) > 1e-4}
    if wrong:
        raise SystemExit(f"These variants compute another loss than {losses['hand-written loop']}: {wrong}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    for number in range(rounds):
        random.Random(number).shuffle(order)  # no variant always runs first, or after the same other
        for name, run in order:
            spent = []
            for length in (short, work):
                begin = time.process_time()
                run(length)
                spent.append(time.process_time() - begin)
            seconds[name].append((spent[1] - spent[0]) / (work.steps - short.steps))
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(work: Workload, seconds: dict[str, float], rounds: int) -> None:
    base = seconds["hand-written loop"]
    title = f"{work.name}: {work.sizes} taught by {work.teacher_sizes}, batch {work.batch_size}, {rounds} rounds"
    table = Table("variant", "ms / step", "µs over the loop", "ratio", title=title)
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.3f}", f"{(value - base) * 1e6:+.0f}", f"{value / base:.3f}")
    rich.print(table)


def versions() -> str:
    found = []
    for package in ("torch", "lightning", "torchdistill", "textbrewer"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    machine = f"Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} thread"
    return f"{', '.join(found)}; {machine}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    with quiet_lightning():
        for work in (SMALL, LARGE):
            show(work, measure(work, rounds), rounds)
    print(versions())


if __name__ == "__main__":
    main()
