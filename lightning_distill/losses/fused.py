"""Labels and teacher in one term, from hidden states where the vocabulary is large."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lightning_distill.losses.big_vocabulary import fused_linear_cross_entropy, fused_linear_kd
from lightning_distill.losses.soft_targets import SoftTargets, check_same_shape
from lightning_distill.losses.targets import cross_entropy
from lightning_distill.losses.term import Term, reduce_items, teacher_outputs
from lightning_distill.outputs import Outputs, Step

PLAIN_BYTES = 256 * 2**20  # up to here the seven matrices of the plain loss cost less than going in chunks


class FusedKD(Term):
    """``alpha * hard + (1 - alpha) * soft`` as one term, without the matrix of tokens times vocabulary.

    Where student and teacher give hidden states and output layers (:class:`~lightning_distill.tasks.CausalLM`) and the
    logits would take much memory, both losses and their gradients are computed together, in chunks of tokens
    (:func:`~lightning_distill.losses.fused_linear_kd`); otherwise from the logits. Both ways give the same gradient.
    The parts are logged as ``"hard"`` and ``"soft"``. Because the weights go into the computation, a weighting sees one
    term; to balance the parts by a rule, use :class:`CrossEntropy` and :class:`SoftTargets` instead.

    Args:
        alpha: Weight of the labels' loss, in [0, 1]; the teacher's gets ``1 - alpha``.
        beta: Divergence, in [0, 1]: 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence.
        skew: Bounds the KL divergence, in [0, 1); see :func:`~lightning_distill.losses.skewed_kl_divergence`. Only with
            ``beta`` 0 or 1.
        vocabulary: True size of a vocabulary that the two models pad to different sizes; needed only then.
        chunk_size: Tokens per chunk; by default chosen by memory.

    Raises:
        ValueError: If ``alpha``, ``beta`` or ``skew`` is outside its range.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.0,
        vocabulary: int | None = None,
        chunk_size: int | None = None,
        *,
        skew: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"alpha": alpha, "beta": beta}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
        self.alpha = alpha
        self.beta = beta
        self.skew = skew
        self._soft = SoftTargets(beta, skew)  # checks the values
        self.vocabulary = vocabulary
        self.chunk_size = chunk_size

    def forward(self, step: Step) -> Tensor:
        """Mean over the items that count; scalar."""
        student, teacher = step.student, teacher_outputs(step)
        if not (worth_fusing(student) and _has_linear_head(student) and _has_linear_head(teacher)):
            return self._plain(step, student, teacher)
        student_head, teacher_head = linear_head_of(student), linear_head_of(teacher)
        result = fused_linear_kd(
            _given(student.hidden),
            student_head.weight,
            _given(teacher.hidden),
            teacher_head.weight,
            step.labels,
            temperature=step.temperature,
            alpha=self.alpha,
            beta=self.beta,
            skew=self.skew,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            mask=step.mask,
            vocabulary=self.vocabulary,
            chunk_size=self.chunk_size,
        )
        self.parts = {"hard": result.hard, "soft": result.soft}
        return result.loss

    def _plain(self, step: Step, student: Outputs, teacher: Outputs) -> Tensor:
        logits, target = student.logits[..., : self.vocabulary], teacher.logits[..., : self.vocabulary]
        check_same_shape(logits, target)
        soft = reduce_items(self._soft.divergence(logits, target, step.temperature), step.mask)
        if step.labels is None:
            hard = soft.new_zeros(())
        else:
            hard = reduce_items(cross_entropy(logits, step.labels), step.mask)
        self.parts = {"hard": hard.detach(), "soft": soft.detach()}
        return self.alpha * hard + (1 - self.alpha) * soft


class FusedCrossEntropy(Term):
    """Cross-entropy against the labels without the matrix of tokens times vocabulary: the control group of FusedKD.

    :func:`~lightning_distill.losses.fused_linear_cross_entropy` where the student gives hidden states and an output
    layer and its logits would take much memory; otherwise the mean of :class:`CrossEntropy` over the items that count.

    Args:
        vocabulary: True size, if the student's output layer is padded.
        chunk_size: Tokens per chunk; by default chosen by memory.
    """

    needs_teacher = False

    def __init__(self, vocabulary: int | None = None, chunk_size: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.chunk_size = chunk_size

    def forward(self, step: Step) -> Tensor:
        """Mean over the items that count; scalar."""
        student = step.student
        if step.labels is None:
            raise ValueError("`FusedCrossEntropy` learns from labels alone, but the batch has none. Add a teacher.")
        if not worth_fusing(student):
            logits = student.logits[..., : self.vocabulary]
            return reduce_items(cross_entropy(logits, step.labels), step.mask)
        head = linear_head_of(student)
        return fused_linear_cross_entropy(
            _given(student.hidden),
            head.weight,
            step.labels,
            bias=head.bias,
            mask=step.mask,
            vocabulary=self.vocabulary,
            chunk_size=self.chunk_size,
        )


def worth_fusing(outputs: Outputs) -> bool:
    """Whether the logits do not exist yet and would take much memory."""
    if not unprojected(outputs):
        return False
    return 7 * 4 * math.prod(outputs.item_shape) * linear_head_of(outputs).out_features > PLAIN_BYTES


def unprojected(outputs: Outputs) -> bool:
    """Whether there are hidden states and a linear output layer in the place of logits."""
    return not outputs.has_logits and _has_linear_head(outputs)


def _has_linear_head(outputs: Outputs) -> bool:
    head: Any = outputs.head
    # A strategy may leave an empty weight behind until the layer itself is called (DeepSpeed's ZeRO-3).
    # A subclass that computes otherwise, such as a quantized layer, has to be called.
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return outputs.hidden is not None and plain and len(head.weight) == head.out_features


def linear_head_of(outputs: Outputs) -> nn.Linear:
    """The output layer, where it is known to be linear."""
    head: Any = outputs.head
    assert isinstance(head, nn.Linear)
    return head


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
