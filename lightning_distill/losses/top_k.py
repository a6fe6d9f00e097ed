"""Divergence from a teacher of which only the most probable classes are known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.soft_targets import jensen_shannon_divergence, softened_log_softmax

NOTHING = -1e30  # logarithm of a probability that is 0: finite, so that 0 * NOTHING is 0


def topk_kl(
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail_log_prob: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    beta: float = 0.0,
    scale_by_t2: bool = True,
) -> Tensor:
    r"""Divergence of each item from a teacher of which ``k`` classes are known, in nats, times ``T ** 2``.

    Both distributions are coarsened to ``k + 1`` outcomes, the kept classes ``K`` and the tail ``R`` of all others:

    .. math::
        T^2 \left[ \sum_{c \in K} p_c \log \frac{p_c}{q_c} + p_R \log \frac{p_R}{q_R} \right], \qquad
        q_R = \sum_{c \notin K} q_c

    This is at most the divergence of the full distributions, and equal to it for ``k = C``. Without the tail
    (``tail_log_prob=None``) the kept probabilities are renormalised. The student is then taught that nothing outside
    ``K`` ever happens, so prefer the tail. (The plain sum over ``K`` has the same minimum, and is not offered.)

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        ids: The kept classes, integers of shape ``(items..., k)``; no class twice in an item.
        log_probs: The teacher's log-probabilities of these *at the given temperature*, same shape.
        tail_log_prob: Logarithm of the teacher's probability of all other classes together, shape of the items,
            ``-inf`` if it is 0; or ``None`` to renormalise. :func:`top_k_log_probs` computes both.
        temperature: ``T > 0``, softens the student; a number, or one value per item.
        beta: In [0, 1]; 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence, of the
            coarsened distributions.
        scale_by_t2: Whether to multiply by ``T ** 2``.

    Returns:
        Shape ``(items...)``, in float32 or wider.

    Raises:
        ValueError: If shapes do not fit, a number is outside its range, or ``beta=1`` comes without a tail.

    Example:
        >>> student, teacher = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1]), torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
        >>> topk_kl(student.log(), torch.tensor([0, 1]), teacher[:2].log(), teacher[2:].sum().log())
        tensor(0.0880)
    """
    teacher = coarse_log_probs(student_logits.shape[:-1], ids, log_probs, tail_log_prob, beta=beta)
    log_q = softened_log_softmax(student_logits, temperature)
    ids = ids.long()
    tail = log_q.scatter(-1, ids, NOTHING).logsumexp(dim=-1, keepdim=True)
    student = torch.cat([log_q.gather(-1, ids), tail], dim=-1)
    divergence = jensen_shannon_divergence(student, teacher.to(log_q.dtype), beta=beta)
    return divergence * temperature**2 if scale_by_t2 else divergence


def top_k_log_probs(logits: Tensor, logsumexp: Tensor, *, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    r"""Log-probabilities of kept classes and of the tail, from kept logits and the normaliser of all.

    .. math:: \log p_c = z_c / T - \mathrm{lse}_T, \qquad \log p_R = \log\Big(1 - \sum_{c \in K} p_c\Big)

    ``lse_T`` is the logsumexp of *all* logits over ``T``. It does not follow from that of another temperature, so a
    cache has to store one for each temperature that will be trained with.

    Args:
        logits: Of the kept classes, shape ``(items..., k)``; relative to any constant of the item, such as the maximum,
            to which ``logsumexp`` is relative too.
        logsumexp: ``logsumexp(logits of all classes / T)``, shape of the items.
        temperature: ``T > 0``; a number, or one value per item.

    Returns:
        ``log_probs``, shape ``(items..., k)``, and ``tail_log_prob``, shape of the items, ``-inf`` where rounding
        leaves nothing for the tail; in float32 or wider.

    Raises:
        ValueError: If ``temperature`` is not positive, or the shapes do not fit.

    Example:
        >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
        >>> log_probs, tail = top_k_log_probs(logits[:2], (logits / 4).logsumexp(0), temperature=4.0)
        >>> log_probs.exp(), tail.exp()
        (tensor([0.3499, 0.2725]), tensor(0.3775))
    """
    if logsumexp.shape != logits.shape[:-1]:
        raise ValueError(
            f"`logsumexp` must have the shape of the items, {tuple(logits.shape[:-1])}, got {tuple(logsumexp.shape)}."
        )
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.to(wide) / divisor - logsumexp.to(wide).unsqueeze(-1)
    return log_probs, torch.log1p(-log_probs.exp().sum(dim=-1).clamp_max(1.0))


def coarse_log_probs(
    items: torch.Size, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, *, beta: float = 0.0
) -> Tensor:
    """The teacher over ``k + 1`` outcomes, exactly normalised (what a cache stores in float16 is not); detached.

    Args:
        items: Shape of the items.
        ids: Shape ``(items..., k)``.
        log_probs: Shape ``(items..., k)``.
        tail_log_prob: Shape of the items, or ``None``.
        beta: Of the divergence that the result is for.

    Returns:
        Shape ``(items..., k + 1)``, in float32 or wider, at least ``NOTHING``.

    Raises:
        ValueError: If the shapes do not fit, ``ids`` are no integers, or ``beta=1`` comes without a tail.
    """
    if ids.shape != log_probs.shape or ids.shape[:-1] != items:
        raise ValueError(
            f"`ids` and `log_probs` must have the shape (items..., k) with items {tuple(items)}, got "
            f"{tuple(ids.shape)} and {tuple(log_probs.shape)}."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"`ids` must be integers, got {ids.dtype}. The order is `ids`, then `log_probs`.")
    wide = torch.promote_types(log_probs.dtype, torch.float32)
    log_probs = log_probs.detach().to(wide)
    if tail_log_prob is None:
        if beta == 1:
            raise ValueError(
                "`beta=1` (reverse KL) is infinite without `tail_log_prob`: the student has probability where the "
                "renormalised teacher has none. Pass the tail, or `beta` below 1."
            )
        tail_log_prob = torch.full_like(log_probs[..., 0], NOTHING)
    if tail_log_prob.shape != items:
        raise ValueError(
            f"`tail_log_prob` must have the shape of the items, {tuple(items)}, got {tuple(tail_log_prob.shape)}."
        )
    coarse = torch.cat([log_probs, tail_log_prob.detach().to(wide).unsqueeze(-1)], dim=-1)
    return F.log_softmax(coarse.clamp_min(NOTHING), dim=-1)
