"""Distillation of a student that computes with few bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from lightning_distill.losses.term import Term
from lightning_distill.modules.arguments import ItemWeights, OptimizerFactory, SchedulerFactory, Temperature, build_task
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.modules.kd import KD
from lightning_distill.outputs import Step
from lightning_distill.quantization.network import (
    Overrides,
    calibrate,
    full_precision,
    prepare,
    quantized_layers,
)
from lightning_distill.quantization.quantized_layer import STEPS
from lightning_distill.quantization.spec import QuantSpec
from lightning_distill.quantization.terms import FLOAT_LOGITS, QUANTIZED_LAYERS, QuantizationError
from lightning_distill.tasks import Task
from lightning_distill.teachers.build import TeacherLike
from lightning_distill.weighting import Weighting

SELF = "self"


class QADModule(KD):
    """Quantization-aware distillation: train a student that computes with few bits on what a teacher says.

    ``loss = alpha * hard + (1 - alpha) * soft + quant_weight * quant`` (Mishra and Marr 2018, Apprentice; Polino et al.
    2018). The student's layers compute with fake-quantized weights and inputs, as
    :func:`~lightning_distill.quantization.prepare` makes them, and gradients go to the weights in floating point and to
    the steps. Everything that is measured, predicted and exported is the quantized student.

    Before training, ``setup`` finds the ranges of what layers read on ``calibration_samples`` of the data module's
    training set. Where loaders are handed to ``fit`` instead, call :meth:`calibrate`. Steps are trained without weight
    decay.

    With ``alpha=0`` no labels are needed: data without any will do. For a chain of teachers with fewer and fewer bits,
    give the student of one ``QADModule`` to the next as ``teacher``; see ``docs/quantization.md``.

    Args:
        student: See :class:`~lightning_distill.DistillationModule`, as for all arguments not listed here. A trained
            network; quantized in place unless it is quantized already. Of one with a PEFT adapter the base is
            quantized, the adapter and the base's steps are trained.
        teacher: As for every module, or ``"self"``: a copy of ``student`` as it was before quantization. ``None``
            trains on labels alone, with ``alpha=1``.
        spec: How layers are quantized. Default: 8-bit weights. A student that is quantized already has its own.
        overrides: Other specs, or bits of the weights, by name of a layer or pattern; the precision plan.
        skip: Names or patterns of layers that stay in floating point.
        temperature: Of the soft targets.
        alpha: Weight of the labels' loss, in [0, 1]; the teacher's gets ``1 - alpha``.
        quant_weight: Weight of :class:`~lightning_distill.quantization.QuantizationError`, the term ``"quant"``, which
            draws weights to their levels. 0 leaves it out.
        calibration_samples: How many samples of the training set the ranges are found on, at least 1.

    Raises:
        ValueError: If an argument is outside its range, ``teacher`` is ``"self"`` for a student that is quantized
            already, and as :func:`~lightning_distill.quantization.prepare`; at the start of the training if ranges are
            not known.

    Example:
        >>> from lightning_distill.quantization import QuantSpec
        >>> module = QADModule(nn.Linear(4, 3), spec=QuantSpec(weights=4), alpha=0.0)
        >>> module.weighting.weights()
        {'hard': 0.0, 'soft': 1.0}
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: TeacherLike = SELF,
        spec: QuantSpec | None = None,
        *,
        overrides: Overrides | None = None,
        skip: Sequence[str] = (),
        temperature: Temperature = 1.0,
        alpha: float = 0.3,
        quant_weight: float = 0.0,
        calibration_samples: int = 256,
        terms: Mapping[str, Term] | None = None,
        weights: Mapping[str, float] | Weighting | None = None,
        task: Task | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Any], Any] | None = None,
        item_weights: ItemWeights | None = None,
    ) -> None:
        if not 0 <= quant_weight < float("inf"):
            raise ValueError(f"`quant_weight` must be at least 0 and finite, got {quant_weight}.")
        if not calibration_samples >= 1:
            raise ValueError(f"`calibration_samples` must be at least 1, got {calibration_samples}.")
        task = build_task(task)
        network = task.load(student).train() if isinstance(student, str) else student
        teacher, network = _prepared(network, teacher, spec, overrides, skip)
        more = dict(terms or {})
        if quant_weight > 0:
            more["quant"] = QuantizationError()
            if not isinstance(weights, Weighting):
                weights = {"quant": float(quant_weight)} | dict(weights or {})
        super().__init__(
            network,
            teacher,
            temperature=temperature,
            alpha=alpha,
            terms=more,
            weights=weights,
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            item_weights=item_weights,
        )
        self.calibration_samples = calibration_samples
        self._float_logits = any(getattr(term, "needs_float_logits", False) for term in self.terms.values())

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Find the steps of the weights, and the ranges of what layers read, on ``batches``.

        ``fit`` does it by itself with samples of a data module.
        """
        calibrate(self.student, batches, run=self.task.run)

    def observe(self, batch: Any) -> Step:
        """Let teacher and student speak about ``batch``; the student also without quantization, if a term asks."""
        step = super().observe(batch)
        step.extras[QUANTIZED_LAYERS] = quantized_layers(self.student)
        if self._float_logits:
            with full_precision(self.student), _statistics_kept(self.student):
                step.extras[FLOAT_LOGITS] = self.task.run(self.student, batch).logits
        return step

    def setup(self, stage: str) -> None:
        """Find the ranges that are not known; build what waits for a first batch."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and datamodule is not None and self._unknown_ranges():
            self.calibrate([first_samples(datamodule.train_dataloader(), self.calibration_samples)])
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Refuse a run whose layers do not know what they read."""
        if unknown := self._unknown_ranges():
            raise ValueError(
                f"The ranges of what the layers {unknown} read are not known. Pass a data module to `fit`, or call "
                "`module.calibrate(batches)` before it."
            )
        super().on_fit_start()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Steps apart from the weights, without weight decay."""
        steps = {id(p): p for p in self.step_parameters()}
        groups = super().parameter_groups()
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in steps]
        trained = [p for p in steps.values() if p.requires_grad]
        return groups + ([{"params": trained, "weight_decay": 0.0}] if trained else [])

    def step_parameters(self) -> list[nn.Parameter]:
        """The parameters of the quantizers: what is trained beside the weights."""
        return [
            parameter
            for layer in quantized_layers(self.student).values()
            for name, parameter in layer.named_parameters(recurse=False)
            if name in STEPS
        ]

    def _unknown_ranges(self) -> list[str]:
        return [name for name, layer in quantized_layers(self.student).items() if not layer.is_calibrated]


def _prepared(
    student: nn.Module,
    teacher: TeacherLike,
    spec: QuantSpec | None,
    overrides: Overrides | None,
    skip: Sequence[str],
) -> tuple[TeacherLike, nn.Module]:
    """The teacher as the student was, and the quantized student."""
    if quantized_layers(student):
        if spec is not None or overrides or skip:
            raise ValueError(
                "`student` is quantized already: leave out `spec`, `overrides` and `skip`, and change its bits with "
                "`set_bits(student, plan)`."
            )
        if teacher == SELF:
            raise ValueError(
                "`teacher` is 'self', but `student` is quantized already. Pass the network before quantization, or "
                "another teacher."
            )
        return teacher, student
    before = copy.deepcopy(student) if isinstance(teacher, str) and teacher == SELF else teacher
    return before, prepare(student, spec, overrides=overrides, skip=skip)


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Within this context batch normalization in training does not change its running statistics."""
    tracking = [m for m in network.modules() if m.training and getattr(m, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True  # type: ignore[assignment]
