"""Losses and weights of tokens for language models: sampled targets, and trust in the teacher token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import check_same_shape, softened_log_softmax
from lightning_distill.losses.targets import cross_entropy
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Outputs, Step

Proposal = Literal["teacher", "student", "uniform"]


class SampledKD(NamedTuple):
    """An estimate of the soft cross-entropy from a few classes, and how good it can be.

    Attributes:
        values: Estimate of each item, shape ``(items...)``; only it has a graph.
        effective_samples: How many samples from the teacher itself would be worth as much as those drawn, same shape;
            from 0 to ``num_samples``. A value far below 1 means that the proposal hardly ever draws what matters.
    """

    values: Tensor
    effective_samples: Tensor


def sampled_kd(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    *,
    proposal: Proposal | Tensor = "teacher",
    num_samples: int = 32,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = True,
    generator: torch.Generator | None = None,
) -> SampledKD:
    r"""Unbiased estimate of the soft cross-entropy of each item from classes that are drawn, in nats, times ``T ** 2``.

    .. math::
        -\frac{T^2}{n} \sum_{i=1}^{n} w_i \log q(v_i), \qquad v_i \sim r, \quad w_i = \frac{p(v_i)}{r(v_i)}

    with teacher ``p``, student ``q`` and proposal ``r``. Value and gradient have those of
    :func:`~lightning_distill.losses.soft_cross_entropy` as expectation, for every proposal that reaches all that the
    teacher can say. Drawn from the teacher itself, the weights are 1. See Anshumann et al. (2025), "Sparse Logit
    Sampling", https://arxiv.org/abs/2503.16870, for why this beats keeping the top ``k`` without a tail.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        teacher_log_probs: The teacher's log-probabilities *at the given temperature*, same shape.
        proposal: ``"teacher"``, ``"student"``, ``"uniform"``, or log-probabilities of shape ``(C,)`` or
            ``(items..., C)``.
        num_samples: ``n``, drawn per item, with replacement.
        temperature: ``T > 0``, softens the student; a number, or one value per item.
        scale_by_t2: Whether to multiply by ``T ** 2``.
        generator: Source of randomness; the global one by default.

    Returns:
        The estimate, in float32 or wider, and the effective number of samples ``n / sum(p ** 2 / r)``. That is computed
        from the distributions, not from the draw: a draw that missed all that matters looks perfect to itself.

    Raises:
        ValueError: If ``num_samples`` is below 1, ``proposal`` is unknown or has a wrong shape, the shapes of student
            and teacher differ, or ``temperature`` is not positive and finite.

    Example:
        >>> teacher = torch.tensor([[0.0, -torch.inf, -torch.inf]])  # always says the first
        >>> sampled_kd(torch.zeros(1, 3), teacher, num_samples=2).values
        tensor([1.0986])
    """
    if not num_samples >= 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    check_same_shape(student_logits, teacher_log_probs)
    log_q = softened_log_softmax(student_logits, temperature)
    log_p = teacher_log_probs.detach().to(log_q.dtype)
    log_r = _proposal(proposal, log_p, log_q.detach())
    classes = log_p.shape[-1]
    drawn = torch.multinomial(log_r.exp().reshape(-1, classes), num_samples, replacement=True, generator=generator)
    drawn = drawn.reshape(*log_p.shape[:-1], num_samples)
    weights = (log_p.gather(-1, drawn) - log_r.gather(-1, drawn)).exp()
    values = -(weights * log_q.gather(-1, drawn)).mean(dim=-1)
    return SampledKD(values * temperature**2 if scale_by_t2 else values, num_samples * effective_share(log_p, log_r))


def effective_share(log_probs: Tensor, proposal_log_probs: Tensor) -> Tensor:
    r"""What a sample from a proposal is worth compared with one from the distribution itself, in [0, 1].

    .. math:: \frac{(\sum_v r_v w_v)^2}{\sum_v r_v w_v^2} = \frac{1}{\sum_v p_v^2 / r_v}, \qquad w_v = p_v / r_v

    The effective sample size of Kish (1965) over the number of samples, in expectation. 0 where the proposal never
    draws something that can happen.

    Args:
        log_probs: Of ``p``, shape ``(items..., C)``.
        proposal_log_probs: Of ``r``, broadcastable to it.

    Returns:
        Shape ``(items...)``.

    Example:
        >>> effective_share(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log())
        tensor(0.3600)
    """
    ratio = torch.where(log_probs > -math.inf, 2 * log_probs - proposal_log_probs, -math.inf)
    return (-ratio.logsumexp(dim=-1)).exp()


class SampledTargets(Term):
    """Soft cross-entropy with the teacher's predictions, estimated from a few classes per item.

    Its gradient is, in expectation, that of :class:`~lightning_distill.losses.SoftTargets`, with noise that falls as
    ``1 / num_samples``. Useful to compare with a teacher of which only samples are known; with all logits at hand the
    full loss costs as much and has no noise. The draws come from the global generator, which resumes exactly. The mean
    effective number of samples is logged as ``"effective_samples"``.

    Args:
        num_samples: Classes drawn per item.
        proposal: From what: ``"teacher"``, ``"student"`` or ``"uniform"``.
        scale_by_t2: Whether to multiply by the square of the temperature.

    Raises:
        ValueError: If ``num_samples`` is below 1 or ``proposal`` is unknown.
    """

    def __init__(self, num_samples: int = 32, proposal: Proposal = "teacher", scale_by_t2: bool = True) -> None:
        super().__init__()
        if not num_samples >= 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
        _check_proposal(proposal)
        self.num_samples = num_samples
        self.proposal = proposal
        self.scale_by_t2 = scale_by_t2

    def forward(self, step: Step) -> Tensor:
        """Estimated soft cross-entropy of each item, nats."""
        student, teacher = step.student.logits, teacher_outputs(step).logits
        result = sampled_kd(
            student,
            softened_log_softmax(teacher.detach(), step.temperature),
            proposal=self.proposal,
            num_samples=self.num_samples,
            temperature=step.temperature,
            scale_by_t2=self.scale_by_t2,
        )
        self.parts = {"effective_samples": result.effective_samples.detach().mean()}
        return result.values


def adaptive_beta(log_prob: Tensor, *, beta0: float = 0.5) -> Tensor:
    r"""Weight of the teacher's loss on a token: high where the teacher is sure of it.

    .. math:: \beta = \beta_0 \exp(-\mathrm{NLL}_T(x)) = \beta_0 \, p_T(x)

    the inverse of the teacher's perplexity of the token.

    Args:
        log_prob: The teacher's log-probability of the token, at temperature 1; or minus its entropy, which is what
            it expects that to be. Any shape.
        beta0: Weight where the teacher is certain, at least 0.

    Returns:
        Same shape, in [0, beta0]; detached.

    Raises:
        ValueError: If ``beta0`` is negative or not finite.

    Example:
        >>> adaptive_beta(torch.tensor([0.05, 0.5, 0.95]).log(), beta0=0.5)
        tensor([0.0250, 0.2500, 0.4750])
    """
    _check_beta0(beta0)
    return beta0 * log_prob.detach().exp()


class AdaptiveTokenWeight:
    """Weigh each item by the teacher's probability of its label: ``item_weights={"soft": AdaptiveTokenWeight()}``.

    See :func:`adaptive_beta`. An item without a label keeps the weight ``beta0``.

    Args:
        beta0: Weight where the teacher is certain of the label, at least 0.

    Raises:
        ValueError: If ``beta0`` is negative or not finite; when called, if the step has no teacher.
    """

    def __init__(self, beta0: float = 1.0) -> None:
        _check_beta0(beta0)
        self.beta0 = beta0

    @torch.no_grad()
    def __call__(self, step: Step) -> Tensor:
        """Weight of each item, shape of the items; a scalar if there are no labels at all."""
        teacher = teacher_outputs(step)
        labels = step.labels
        if labels is None:
            return torch.tensor(self.beta0)
        return adaptive_beta(
            _in_parts(teacher, lambda logits, part: -cross_entropy(logits, labels[part])), beta0=self.beta0
        )


class EntropyTokenWeight:
    """Weigh each item by how sure the teacher is: ``item_weights={"soft": EntropyTokenWeight()}``.

    ``beta0 * exp(-H)`` with the teacher's entropy ``H`` at temperature 1, that is, ``beta0`` over the effective number
    of classes among which it hesitates. It needs no labels.

    Args:
        beta0: Weight where the teacher is certain, at least 0.

    Raises:
        ValueError: If ``beta0`` is negative or not finite; when called, if the step has no teacher.
    """

    def __init__(self, beta0: float = 1.0) -> None:
        _check_beta0(beta0)
        self.beta0 = beta0

    @torch.no_grad()
    def __call__(self, step: Step) -> Tensor:
        """Weight of each item, shape of the items."""
        return adaptive_beta(_in_parts(teacher_outputs(step), _negentropy), beta0=self.beta0)


def _in_parts(teacher: Outputs, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """A function of the logits of each item, shape of the items, without all of the logits at once."""
    values = [function(logits, part) for part, logits in teacher.chunks()]
    return torch.cat(values) if values else function(teacher.logits, slice(None))  # if nothing counts, no parts


def _negentropy(logits: Tensor, part: slice) -> Tensor:
    entropy: Tensor = torch.special.entr(softened_log_softmax(logits, 1.0).exp()).sum(dim=-1)
    return -entropy


def _proposal(proposal: Proposal | Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log-probabilities of the proposal, of the teacher's shape."""
    if isinstance(proposal, Tensor):
        if proposal.shape not in (log_p.shape, log_p.shape[-1:]):
            raise ValueError(
                f"`proposal` must have the shape of the teacher's log-probabilities, {tuple(log_p.shape)}, or of one "
                f"item's, {tuple(log_p.shape[-1:])}, got {tuple(proposal.shape)}."
            )
        return proposal.detach().to(log_p.dtype).expand_as(log_p)
    _check_proposal(proposal)
    if proposal == "teacher":
        return log_p
    return log_q if proposal == "student" else torch.full_like(log_p, -math.log(log_p.shape[-1]))


def _check_proposal(proposal: object) -> None:
    if proposal not in ("teacher", "student", "uniform"):
        raise ValueError(
            f"`proposal` must be 'teacher', 'student', 'uniform' or a tensor of log-probabilities, got {proposal!r}."
        )


def _check_beta0(beta0: float) -> None:
    if not 0 <= beta0 < math.inf:
        raise ValueError(f"`beta0` must be at least 0 and finite, got {beta0}.")
