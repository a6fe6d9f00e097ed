"""What the library costs: a distillation step side by side with a hand-written loop and with peers, in one run.

Rules: main-process CPU time; variants round-robin over several rounds, medians reported; the hand-written loop runs
twice, and the difference between the two is the noise floor; every variant must train to the same weights before
anything is timed. Overheads are absolute (they do not depend on the model), the whole is a ratio on a step of realistic
length. Peers (torchdistill, TextBrewer) take part where they are installed.

    python scripts/benchmark.py                  # overheads per step, then the ratio on a larger step
    python scripts/benchmark.py --rounds 9 --only small
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import rich
import torch
import torch.nn.functional as F
from benchmark_peers import Batch, TrainStep, textbrewer_step, torchdistill_step
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table
from torch import Tensor, nn

from lightning_distill import KD
from lightning_distill.comparison.quiet import quiet_lightning

TEMPERATURE, ALPHA = 4.0, 0.5
Run = Callable[["Workload"], nn.Module]


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
WORKLOADS = (SMALL, LARGE)


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


def loop(build: Callable[[nn.Module, nn.Module], TrainStep]) -> Run:
    """A training loop without a Trainer over the steps that ``build`` makes of student and teacher."""

    def run(work: Workload) -> nn.Module:
        student, teacher = work.networks()
        step = build(student, teacher)
        for batch in work.batches():
            step(batch)
        return student

    return run


def hand_written(student: nn.Module, teacher: nn.Module) -> TrainStep:
    optimizer = sgd(student.parameters())

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        kd_by_hand(student, teacher, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(student: nn.Module, teacher: nn.Module) -> TrainStep:
    """Our module's step in a plain loop: task, taps, terms, weighting."""
    module, optimizer = KD(student, teacher, TEMPERATURE, ALPHA), sgd(student.parameters())

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss, _ = module.loss(module.observe(batch))
        loss.backward()
        optimizer.step()

    return step


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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = kd_by_hand(self.student, self._teacher[0], batch)
        if self.log_terms:  # what most code does
            self.log_dict({f"train/{name}": loss.detach() for name in "abcd"}, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.student.parameters())


def fit(build: Callable[[nn.Module, nn.Module], L.LightningModule], log: bool = False) -> Run:
    def run(work: Workload) -> nn.Module:
        student, teacher = work.networks()
        module = build(student, teacher)
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
        return student

    return run


def variants() -> dict[str, Run]:
    kd = partial(KD, temperature=TEMPERATURE, alpha=ALPHA, optimizer=sgd)
    found = {
        "hand-written loop": loop(hand_written),
        "hand-written loop again (noise floor)": loop(hand_written),
        "KD's step in a plain loop": loop(ours),
        "Trainer, bare LightningModule": fit(Bare),
        "Trainer, KD, no logger": fit(kd),
        "Trainer, bare, CSV logger, nothing logged": fit(Bare, log=True),
        "Trainer, KD, CSV log of every term": fit(kd, log=True),
        "Trainer, bare, CSV, self.log of 4 per step": fit(partial(Bare, log=True), log=True),
    }
    for name, build in {"torchdistill": torchdistill_step, "textbrewer": textbrewer_step}.items():
        step = partial(build, optimizer=sgd, temperature=TEMPERATURE, alpha=ALPHA)
        try:
            step(*SMALL.networks())
        except Exception as error:  # a peer that does not work here is reported and left out
            rich.print(f"{name} is left out: {type(error).__name__}: {error}")
        else:
            found[f"{name}'s pipeline in a plain loop"] = loop(step)
    return found


def measure(work: Workload, rounds: int) -> dict[str, float]:
    """Median CPU seconds per step of each variant, start-up subtracted by comparing two lengths."""
    short = Workload(work.name, work.sizes, work.teacher_sizes, work.batch_size, max(work.steps // 6, 2))
    runs = variants()
    trained = {name: nn.utils.parameters_to_vector(run(short).parameters()) for name, run in runs.items()}
    right = trained["hand-written loop"]
    if wrong := [name for name, weights in trained.items() if not torch.allclose(weights, right, atol=1e-5)]:
        raise SystemExit(f"These variants train to other weights than the hand-written loop: {wrong}")
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
    parser.add_argument("--only", choices=[work.name for work in WORKLOADS], help="one of the two workloads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    with quiet_lightning():
        for work in WORKLOADS:
            if arguments.only in (None, work.name):
                show(work, measure(work, arguments.rounds), arguments.rounds)
    print(versions())


if __name__ == "__main__":
    main()
