"""A teacher of which the largest logits and the mass of all others are known: what a cache of kind "top_k" holds."""

from __future__ import annotations

from torch import Tensor

from lightning_distill.losses.big_vocabulary import sparse_kd, sparse_kd_items
from lightning_distill.losses.fused import linear_head_of, unprojected, worth_fusing
from lightning_distill.losses.targets import cross_entropy
from lightning_distill.losses.term import Term, reduce_items, teacher_outputs
from lightning_distill.losses.top_k import topk_kl
from lightning_distill.outputs import Outputs, Step
from lightning_distill.top_k import TopKLogProbs, decode_top_k


class TopKTargets(Term):
    """Divergence from the teacher over its ``k`` most probable classes and the tail of all others, times ``T ** 2``.

    At most the divergence over all classes, and equal to it for ``k = C``: see
    :func:`~lightning_distill.losses.topk_kl`. Where the student gives hidden states and an output layer and its logits
    would take much memory, they are computed in chunks and not kept
    (:func:`~lightning_distill.losses.sparse_kd_items`).

    The mass of the tail at one temperature does not follow from that at another, so the distillation temperature must
    be one that the cache was written for.

    Args:
        beta: In [0, 1]; 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence.
        add_tail: Whether the tail is an outcome of its own. Without it the kept probabilities are renormalised, which
            teaches the student that nothing else ever happens.
        vocabulary: True size of a vocabulary that the student pads; its logits from there on take no part. It must be
            the number of classes in the cache.
        chunk_size: Items per chunk; by default chosen by memory.

    Raises:
        ValueError: If ``beta`` is outside [0, 1], or is 1 without a tail.

    Example:
        >>> import torch
        >>> from lightning_distill.outputs import Outputs, Step
        >>> from lightning_distill.top_k import encode_top_k
        >>> student, teacher = torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1]]), torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]])
        >>> known = Outputs(top_k=encode_top_k(teacher.log(), k=2))
        >>> TopKTargets()(Step(None, Outputs(student.log()), known))
        tensor([0.0880])
    """

    def __init__(
        self,
        beta: float = 0.0,
        add_tail: bool = True,
        vocabulary: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_beta(beta, add_tail)
        self.beta = beta
        self.add_tail = add_tail
        self.vocabulary = vocabulary
        self.chunk_size = chunk_size

    def forward(self, step: Step) -> Tensor:
        """Divergence of each item, nats."""
        student = step.student
        known = _known(step, self.vocabulary)
        tail = known.tail_log_prob if self.add_tail else None
        if not worth_fusing(student):
            logits = student.logits[..., : self.vocabulary]
            return topk_kl(logits, known.ids, known.log_probs, tail, temperature=step.temperature, beta=self.beta)
        head = linear_head_of(student)
        assert student.hidden is not None
        return sparse_kd_items(
            student.hidden,
            head.weight,
            known.ids,
            known.log_probs,
            tail,
            temperature=step.temperature,
            beta=self.beta,
            student_bias=head.bias,
            mask=step.mask,
            vocabulary=self.vocabulary,
            chunk_size=self.chunk_size,
        ).soft


class SparseKD(Term):
    """``alpha * hard + (1 - alpha) * soft`` as one term, against a teacher's ``k`` most probable classes and its tail.

    What :class:`FusedKD` is for a teacher that gives everything. From hidden states and an output layer both losses and
    their gradients are computed at once, in chunks of tokens, whatever their number
    (:func:`~lightning_distill.losses.sparse_kd`): that takes about as long as the cross-entropy alone. For language
    models: ``KD(..., alpha=0.3, terms={"kd": SparseKD(alpha=0.3)})``. The parts are logged as ``"hard"`` and
    ``"soft"``. The gradient is used up by the first ``backward``; rules that need several take :class:`CrossEntropy`
    and :class:`TopKTargets`.

    Args:
        alpha: Weight of the labels' loss, in [0, 1]; the teacher's gets ``1 - alpha``.
        beta: See :class:`TopKTargets`, as all that follow.
        add_tail: …
        vocabulary: …
        chunk_size: …

    Raises:
        ValueError: If ``alpha`` or ``beta`` is outside [0, 1], or ``beta`` is 1 without a tail.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.0,
        add_tail: bool = True,
        vocabulary: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], got {alpha}.")
        _check_beta(beta, add_tail)
        self.alpha = alpha
        self.beta = beta
        self.add_tail = add_tail
        self.vocabulary = vocabulary
        self.chunk_size = chunk_size

    def forward(self, step: Step) -> Tensor:
        """Mean over the items that count; scalar."""
        student = step.student
        known = _known(step, self.vocabulary)
        tail = known.tail_log_prob if self.add_tail else None
        if not unprojected(student):
            return self._plain(step, known, tail)
        head = linear_head_of(student)
        assert student.hidden is not None
        result = sparse_kd(
            student.hidden,
            head.weight,
            known.ids,
            known.log_probs,
            tail,
            step.labels,
            temperature=step.temperature,
            alpha=self.alpha,
            beta=self.beta,
            student_bias=head.bias,
            mask=step.mask,
            vocabulary=self.vocabulary,
            chunk_size=self.chunk_size,
        )
        self.parts = {"hard": result.hard, "soft": result.soft}
        return result.loss

    def _plain(self, step: Step, known: TopKLogProbs, tail: Tensor | None) -> Tensor:
        logits = step.student.logits[..., : self.vocabulary]
        soft = topk_kl(logits, known.ids, known.log_probs, tail, temperature=step.temperature, beta=self.beta)
        soft = reduce_items(soft, step.mask)
        hard = soft.new_zeros(())
        if step.labels is not None:
            hard = reduce_items(cross_entropy(logits, step.labels), step.mask)
        self.parts = {"hard": hard.detach(), "soft": soft.detach()}
        return self.alpha * hard + (1 - self.alpha) * soft


def _known(step: Step, vocabulary: int | None) -> TopKLogProbs:
    """The teacher's side at the temperature of the step."""
    top_k = teacher_outputs(step).top_k
    if top_k is None:
        raise ValueError(
            "This loss term reads a teacher's largest logits, but the teacher gives all of them. Use `SoftTargets` "
            "(for language models `FusedKD`), or a `CachedTeacher` whose cache was written with `kind='top_k'`."
        )
    size = _classes(step.student) if vocabulary is None else vocabulary
    if top_k.classes != size:
        raise ValueError(
            f"The student has {size} classes, the teacher's cache {top_k.classes}. Both must be equal: give the "
            "student as many outputs as the teacher. If they share a tokenizer and the surplus is padding, write the "
            "cache with `vocabulary=` the true size, and pass the same `vocabulary=` to this term."
        )
    return decode_top_k(top_k, temperature=_number(step.temperature))


def _classes(student: Outputs) -> int:
    return linear_head_of(student).out_features if unprojected(student) else student.logits.shape[-1]


def _number(temperature: float | Tensor) -> float:
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(
            f"`temperature` must be one number for a teacher of which the largest logits are stored, got one per item, "
            f"of shape {tuple(temperature.shape)}. Use a constant temperature, or a cache of `kind='dense'`."
        )
    return float(temperature)


def _check_beta(beta: float, add_tail: bool) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"`beta` must be in [0, 1], got {beta}.")
    if beta == 1 and not add_tail:
        raise ValueError("`beta=1` (reverse KL) is infinite without the tail. Use `add_tail=True`, or `beta` below 1.")
