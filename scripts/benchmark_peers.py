"""The whole training steps of torchdistill and TextBrewer, for `benchmark.py`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Optimizer = Callable[[Any], torch.optim.Optimizer]
TrainStep = Callable[[Batch], object]


def torchdistill_step(
    student: nn.Module, teacher: nn.Module, optimizer: Optimizer, temperature: float, alpha: float
) -> TrainStep:
    """`DistillationBox` with `WeightedSumLoss` over `KDLoss`, as its configuration files build it."""
    with _without_torchvision():
        box_class = importlib.import_module("torchdistill.core.distillation").DistillationBox
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    said = {f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in _LOGITS.items()}
    kd = {"key": "KDLoss", "kwargs": said | {"temperature": temperature, "alpha": alpha, "reduction": "batchmean"}}
    configuration = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"model_term": {}, "sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }
    box = box_class(teacher, student, {}, configuration, torch.device("cpu"), None, False, 1.0)
    box.optimizer, box.grad_accum_step, box.max_grad_norm, box.lr_scheduler = (
        optimizer(student.parameters()),
        1,
        None,
        None,
    )

    def step(batch: Batch) -> None:
        x, y = batch
        box.pre_forward_process()
        box.post_forward_process(loss=box.forward_process(sample_batch=x, targets=y, supp_dict=None))

    return step


def textbrewer_step(
    student: nn.Module, teacher: nn.Module, optimizer: Optimizer, temperature: float, alpha: float
) -> TrainStep:
    """`GeneralDistiller.train_on_batch` and the rest of its loop, without the log that it writes in every step.

    Its loss is the soft cross-entropy without the square of the temperature: the weight makes up for the latter, and
    the teacher's entropy, which has no gradient, is left in.
    """
    brewer = importlib.import_module("textbrewer")
    logging.getLogger("textbrewer").setLevel(logging.WARNING)
    student, teacher = (TakesLabels(*network.children()).train(network.training) for network in (student, teacher))
    distiller = brewer.GeneralDistiller(
        brewer.TrainingConfig(device="cpu", log_dir=None, output_dir="."),
        brewer.DistillationConfig(
            temperature=temperature,
            kd_loss_type="ce",
            kd_loss_weight=(1 - alpha) * temperature**2,
            hard_label_weight=alpha,
        ),
        teacher,
        student,
        lambda batch, said: {"logits": said},
        lambda batch, said: {"logits": said, "losses": F.cross_entropy(said, batch[1])},
    )
    own = optimizer(student.parameters())

    def step(batch: Batch) -> None:
        loss, _ = distiller.train_on_batch(batch, {})
        loss.backward()
        own.step()
        own.zero_grad()

    return step


class TakesLabels(nn.Sequential):
    """TextBrewer calls a network with the whole batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Logits of ``x``."""
        return super().forward(x)  # type: ignore[no-any-return]


_LOGITS = {"path": ".", "io": "output"}


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let torchdistill be imported where torchvision is not: its pipeline needs none of the zoo that it lists."""
    stand_ins = [] if importlib.util.find_spec("torchvision") else [types.ModuleType(name) for name in _TORCHVISION]
    for module in stand_ins:
        module.__getattr__ = _anything  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
    try:
        yield
    finally:
        for module in stand_ins:
            del sys.modules[module.__name__]


_TORCHVISION = (
    "torchvision",
    *(f"torchvision.{room}" for room in ("datasets", "models", "models.densenet", "models.resnet")),
)


def _anything(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (nn.Module,), {})
