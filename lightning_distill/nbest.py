"""A model's best candidates as soft labels: weights, distributions of tokens, and the loss on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import softened_log_softmax
from lightning_distill.losses.term import Term
from lightning_distill.outputs import UNLABELLED, Step
from lightning_distill.tasks import CausalLM


class NBest(NamedTuple):
    """Candidates as soft labels.

    Attributes:
        weights: Of the candidates, shape ``(..., N)``; they sum to 1.
        marginals: Probability of each token at each position, shape ``(..., T, V)``; a row sums to 1, or is 0 where no
            candidate has a token.
    """

    weights: Tensor
    marginals: Tensor


def nbest_weights(log_scores: Tensor, *, tau: float = 1.0) -> Tensor:
    """``softmax(log_scores / tau)`` over candidates: a model's distribution, restricted to them and softened.

    Args:
        log_scores: Log-probabilities of the candidates, shape ``(..., N)``.
        tau: Positive; ``math.inf`` weighs all alike, which is right for samples (they come as often as they should).

    Returns:
        Shape ``(..., N)``.

    Raises:
        ValueError: If ``tau`` is not positive.
    """
    if not tau > 0:
        raise ValueError(f"`tau` must be positive, got {tau}.")
    return torch.softmax(log_scores / tau, dim=-1)


def nbest_targets(sequences: Tensor, log_scores: Tensor, *, vocabulary: int, tau: float = 1.0) -> NBest:
    r"""Weights of candidate sequences, and the distribution of the token at each position that they make.

    .. math::
        w_n = \mathrm{softmax}(s / \tau)_n, \qquad
        p_t(v) = \frac{\sum_n w_n [y_{n,t} = v]}{\sum_n w_n [y_{n,t} \text{ exists}]}

    Candidates whose beginnings differ vote at the same position all the same. For a student that reads what it has
    written, take :func:`prefix_weights` instead.

    Args:
        sequences: Tokens, shape ``(..., N, T)``, ``-100`` after the end of a candidate.
        log_scores: Log-probabilities of the candidates, shape ``(..., N)``.
        vocabulary: ``V``, number of tokens that there are.
        tau: Softens the weights, positive; see :func:`nbest_weights`.

    Returns:
        Both, in the dtype of ``log_scores``.

    Raises:
        ValueError: If ``tau`` is not positive, or a token is outside the vocabulary.

    Example:
        >>> nbest_targets(torch.tensor([[1, 2], [1, 0]]), torch.tensor([0.75, 0.25]).log(), vocabulary=3).marginals
        tensor([[0.0000, 1.0000, 0.0000],
                [0.2500, 0.0000, 0.7500]])
    """
    exists = sequences != UNLABELLED
    wrong = sequences[exists & ((sequences < 0) | (sequences >= vocabulary))]
    if wrong.numel() > 0:
        raise ValueError(f"`sequences` has the token {wrong[0].item()}, outside the `vocabulary` of {vocabulary}.")
    weights = nbest_weights(log_scores, tau=tau)
    votes = (weights.unsqueeze(-1) * exists).transpose(-1, -2)  # (..., T, N)
    mass = votes.new_zeros(*votes.shape[:-1], vocabulary)
    mass.scatter_add_(-1, sequences.clamp_min(0).transpose(-1, -2), votes)
    return NBest(weights, _normalised(mass))


def prefix_weights(sequences: Tensor, weights: Tensor, prefix: Tensor) -> Tensor:
    r"""Weight of each candidate at each position among those that began as ``prefix`` did.

    The next token of a model that is known by its candidates alone, given what it has written:
    ``p(y_t | y_<t)``. Over all candidates, the divergences from it add up to the divergence of whole sequences,
    :math:`\sum_n w_n \sum_t \mathrm{KL}_t(y_n) = \mathrm{KL}(w \,\|\, p_S)`.

    Args:
        sequences: Tokens, shape ``(..., N, T)``, ``-100`` where a candidate has none.
        weights: Of the candidates, shape ``(..., N)``.
        prefix: What was written, shape ``(..., T)``, ``-100`` where ``sequences`` has none; position ``t`` looks at
            what is before it.

    Returns:
        Shape ``(..., T, N)``; sums to 1 over candidates, or is 0 where none began in this way.
    """
    same = (sequences == prefix.unsqueeze(-2)).cumprod(dim=-1)
    same = torch.cat([torch.ones_like(same[..., :1]), same[..., :-1]], dim=-1)
    return _normalised((weights.unsqueeze(-1) * same * (sequences != UNLABELLED)).transpose(-1, -2))


def nbest_divergence(student_logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    r"""KL divergence of the student from a few weighted tokens, of each item, in nats.

    .. math:: \sum_v p(v) \log \frac{p(v)}{q(v)}, \qquad p(v) = \sum_n w_n [y_n = v]

    with student ``q``, at temperature 1: candidates are softened by ``tau`` of their weights, not by a division of
    logits. With one candidate it is the cross-entropy.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., V)``; the only input that gets a gradient.
        tokens: Of the candidates, shape ``(items..., N)``; they may be equal.
        weights: Same shape, none negative; a row sums to 1, or is 0, and then its item has the value 0.

    Returns:
        Shape ``(items...)``, in float32 or wider.

    Example:
        >>> nbest_divergence(torch.zeros(1, 4), torch.tensor([[2, 3]]), torch.tensor([[0.5, 0.5]]))
        tensor([0.6931])
    """
    log_q = softened_log_softmax(student_logits, 1.0)
    weights = weights.detach().to(log_q.dtype)
    together = ((tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) * weights.unsqueeze(-2)).sum(dim=-1)
    likelihood = log_q.gather(-1, tokens.clamp_min(0))
    return (torch.xlogy(weights, together) - weights * likelihood).sum(dim=-1)


class NBestTargets(Term):
    """Divergence of the student from a model's best candidates: what decoding knows, distilled into single tokens.

    The batch holds under ``"targets"`` what :func:`~lightning_distill.decoding.teacher_nbest` and
    :func:`~lightning_distill.decoding.collate` put there: ``tokens``
    ``(B, N, T)`` and ``weights`` ``(B, N)``. At each token of the best candidate, the student is compared with all
    candidates that had begun in the same way. Beams that the student itself wrote before the training make this
    self-distillation. It needs no teacher during the training.

    Args:
        task: The module's own task, where that is not the plain :class:`~lightning_distill.tasks.CausalLM`.

    Raises:
        ValueError: When called, if the batch has no such targets.
    """

    needs_teacher = False

    def __init__(self, task: CausalLM | None = None) -> None:
        super().__init__()
        self.task = task or CausalLM()

    def forward(self, step: Step) -> Tensor:
        """Divergence of each token that counts, nats."""
        targets = step.batch.get("targets")
        if not isinstance(targets, Mapping) or not {"tokens", "weights"} <= targets.keys():
            raise ValueError(
                "NBestTargets reads `targets` with `tokens` and `weights` from the batch, which has "
                f"{list(step.batch)}. Make the data with `teacher_nbest` and the batches with `collate`, both of "
                "`lightning_distill.decoding`."
            )
        keep, tokens = self.task.counts(step.batch), targets["tokens"]
        weights = prefix_weights(tokens, targets["weights"], step.batch["labels"])[:, 1:][keep]
        return nbest_divergence(step.student.logits, tokens.transpose(-1, -2)[:, 1:][keep], weights)


def _normalised(mass: Tensor) -> Tensor:
    """``mass`` over its sum along the last dimension; 0 where there is none."""
    total = mass.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, mass / total, 0)
