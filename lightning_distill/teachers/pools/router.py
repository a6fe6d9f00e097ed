"""A mixture of teachers whose shares are learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import UNLABELLED, Step
from lightning_distill.teachers.pools.choices import Choice
from lightning_distill.teachers.pools.panel import Panel, PoolOutputs


def route(logits: Tensor, *, top_k: int | None = None) -> Tensor:
    """Shares of the teachers: ``softmax`` over all, or over the ``top_k`` highest, the others getting 0.

    Args:
        logits: Shape ``(B, T)``; all equal gives equal shares.
        top_k: At least 1; ``None`` for all.

    Returns:
        Shape ``(B, T)``, float32 or wider; each row sums to 1.

    Example:
        >>> route(torch.tensor([[1.0, 1.0, 0.0]]), top_k=2)
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1).indices
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
        logits = logits.masked_fill(outside, -math.inf)
    return logits.softmax(dim=-1)


def load_balance(weights: Tensor) -> Tensor:
    r"""How unevenly a batch is spread over the teachers: :math:`T \sum_i f_i P_i`.

    ``f_i`` is the fraction of samples in which teacher ``i`` has the highest share, ``P_i`` its mean share; only the
    second has a gradient. 1 if both are even, ``T`` if one teacher gets everything. Fedus, Zoph and Shazeer (2021,
    equation 4, https://arxiv.org/abs/2101.03961), after Shazeer et al. (2017, https://arxiv.org/abs/1701.06538).

    Args:
        weights: Shares, shape ``(B, T)``.

    Returns:
        Scalar.

    Example:
        >>> load_balance(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor(2.)
    """
    teachers = weights.shape[-1]
    first = nn.functional.one_hot(weights.argmax(dim=-1), teachers).to(weights.dtype).mean(dim=0)
    return teachers * (first * weights.mean(dim=0)).sum()


def mixture_nll(weights: Tensor, members: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of the label under the mixture, nats; 0 without a label.

    Args:
        weights: Shares, shape ``(B, T)``.
        members: Log-probabilities of the teachers, shape ``(T, B, C)``; not read where the share is 0.
        labels: Class indices, ``-100`` for none, shape ``(B,)``; or class probabilities ``(B, C)``.

    Returns:
        Shape ``(B,)``.
    """
    if labels.is_floating_point():  # the expectation over the label
        per_class = torch.stack(
            [mixture_nll(weights, members, torch.full_like(labels[:, c], c).long()) for c in range(labels.shape[-1])]
        )
        return (labels.T * per_class).sum(dim=0)
    known = labels != UNLABELLED
    place = torch.where(known, labels, 0).expand(len(members), -1).unsqueeze(-1)
    label = members.gather(-1, place).squeeze(-1).T  # (B, T)
    label = label.masked_fill(weights.detach() == 0, -math.inf)
    highest = label.amax(dim=-1, keepdim=True)
    ratio = (weights * (label - highest).exp()).sum(dim=-1)
    tiny = torch.finfo(ratio.dtype).tiny
    return torch.where(known, -(ratio.clamp_min(tiny).log() + highest.squeeze(-1)), 0.0)


class TeacherRouter(Choice):
    """Shares by a small network that is trained with the student: a mixture of experts over frozen teachers.

    The router is part of the module: in its optimizer and its checkpoints, and gone at export. What trains it is the
    loss term :class:`RouterLoss`, which must be there. (Trained on the student's own distillation loss it would prefer
    the teachers that say what the student says already.) Jacobs et al. (1991); Shazeer et al. (2017).

    Args:
        network: From the inputs to one score per teacher, run as the task runs the student; for vectors of ``d``
            numbers ``MLP([d, T])`` is linear. Zero weights give equal shares.
        top_k: How many teachers share a sample; the others are not run on it. ``None`` for all. With 1 the shares have
            no gradient and only the balance would be learned, so at least 2.
        noise: Standard deviation of Gaussian noise on the scores in training, not negative: exploration.

    Raises:
        ValueError: If a number is outside its range; from the pool, if ``top_k`` exceeds its size; when called, if
            the network has another number of outputs than there are teachers.
    """

    learned = True

    def __init__(self, network: nn.Module, top_k: int | None = None, noise: float = 0.0) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"`network` must be a `torch.nn.Module`, got {type(network).__name__}.")
        if top_k is not None and top_k < 2:
            raise ValueError(f"`top_k` must be None or at least 2 (1 gives the shares no gradient), got {top_k}.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"`noise` must be finite and not negative, got {noise}.")
        self.network = network
        self.top_k = top_k
        self.noise = noise

    def bind(self, members: Any) -> None:
        """Check that there are enough teachers."""
        if self.top_k is not None and self.top_k > len(members):
            raise ValueError(f"`top_k` is {self.top_k}, but the pool has {len(members)} teachers.")

    def forward(self, panel: Panel) -> Tensor:
        """Shares, with a graph."""
        logits = panel.task.run(self.network, panel.batch).logits
        if logits.shape != (panel.size, len(panel)):
            raise ValueError(
                f"The router's network returned scores of shape {tuple(logits.shape)} for {panel.size} samples and "
                f"{len(panel)} teachers, expected {(panel.size, len(panel))}. Give it one output per teacher."
            )
        if panel.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        return route(logits, top_k=self.top_k)


class RouterLoss(Term):
    """Trains a :class:`TeacherRouter`: the mixture should give the label a high probability, and use all teachers.

    ``mixture_nll + balance * load_balance``. Samples without a label only count for the balance, which is computed per
    micro-batch, not per step. The student has no gradient from this term.

    Args:
        balance: Weight of the load balance, not negative. It is a restraint, no aim: where one teacher is the best
            everywhere, a large one keeps the router from saying so.

    Raises:
        ValueError: If ``balance`` is negative; when called, if the teacher is no pool with a router.
    """

    def __init__(self, balance: float = 0.01) -> None:
        super().__init__()
        if not 0 <= balance < math.inf:
            raise ValueError(f"`balance` must be finite and not negative, got {balance}.")
        self.balance = balance

    def forward(self, step: Step) -> Tensor:
        """Loss of each sample, nats; shape ``(B,)``."""
        said = teacher_outputs(step)
        if not isinstance(said, PoolOutputs) or not said.learned:
            raise ValueError(
                "`RouterLoss` trains the router of a `TeacherPool(members, choice=TeacherRouter(...))`, but the "
                "teacher is none. Leave the term out, or pass such a teacher."
            )
        said.awaits_loss = False
        if step.labels is None:
            nll = said.weights.new_zeros(len(said.weights))
        else:
            nll = mixture_nll(said.weights, said.members, step.labels)
        return nll + self.balance * load_balance(said.weights)
