"""Weights of the terms by a policy that learns which ones are rewarded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_distill.weighting.search.result import Objective, WeightSearch


def expected_reward_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    r"""Gradient :math:`\pi_i (r_i - \sum_j \pi_j r_j)` of the expected reward of a categorical policy.

    What REINFORCE estimates from samples, exactly; for policies over few actions, and to test the estimate.

    Args:
        logits: Of the policy, shape ``(A,)``.
        rewards: Of each action, shape ``(A,)``.

    Returns:
        Shape ``(A,)``; sums to zero.

    Raises:
        ValueError: If the shapes differ.
    """
    if logits.shape != rewards.shape or logits.ndim != 1:
        raise ValueError(
            f"`logits` and `rewards` must have one shape (A,), got {tuple(logits.shape)} and {tuple(rewards.shape)}."
        )
    policy = logits.softmax(dim=0)
    return policy * (rewards - policy.dot(rewards))


def reinforce_gradient(logits: Tensor, actions: Tensor, rewards: Tensor, *, baseline: float = 0.0) -> Tensor:
    r"""Estimate :math:`\frac1n \sum (r - b) \nabla \log \pi(a)` of :func:`expected_reward_gradient` (Williams 1992).

    Unbiased for every ``baseline`` that does not depend on the actions; a good one lowers the variance.

    Args:
        logits: Of the policy, shape ``(A,)``.
        actions: Drawn from it, shape ``(n,)``.
        rewards: That they got, shape ``(n,)``.
        baseline: ``b``.

    Returns:
        Shape ``(A,)``.
    """
    chosen = torch.nn.functional.one_hot(actions, len(logits)).to(logits.dtype)
    return ((rewards - baseline)[:, None] * (chosen - logits.softmax(dim=0))).mean(dim=0)


def reinforce_search(
    objective: Objective,
    choices: Mapping[str, Sequence[float]],
    *,
    budget: int = 50,
    lr: float = 0.5,
    baseline_momentum: float = 0.8,
    seed: int = 0,
) -> WeightSearch:
    """Learn a policy over the weights of the terms: one softmax over ``choices`` per term.

    The reward is minus the validation loss, standardised by the spread of the losses so far, over a baseline that is
    their running mean. A choice that was tried before is not trained again.

    Args:
        objective: Validation loss of a training with the given weights.
        choices: Weights among which the policy chooses, at least one for each term.
        budget: Number of draws, positive; no more trainings than that.
        lr: Learning rate of the policy, positive.
        baseline_momentum: Share of the old baseline after a draw, in [0, 1).
        seed: Of the draws.

    Returns:
        The trials, and what the policy prefers when it is done.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if not choices or any(len(values) == 0 for values in choices.values()):
        raise ValueError(f"`choices` must have at least one weight for each of one or more terms, got {choices!r}.")
    if not budget >= 1:
        raise ValueError(f"`budget` must be at least one draw, got {budget}.")
    if not 0 < lr < math.inf:
        raise ValueError(f"`lr` must be positive, got {lr}.")
    if not 0 <= baseline_momentum < 1:
        raise ValueError(f"`baseline_momentum` must be in [0, 1), got {baseline_momentum}.")
    generator = torch.Generator().manual_seed(seed)
    logits = {name: torch.zeros(len(values), dtype=torch.float64) for name, values in choices.items()}
    known: dict[tuple[int, ...], float] = {}
    result = WeightSearch()

    def loss_of(actions: tuple[int, ...]) -> float:
        if actions not in known:
            weights = {name: float(choices[name][a]) for name, a in zip(choices, actions, strict=True)}
            known[actions] = result.note(weights, objective(weights))
        return known[actions]

    baseline: float | None = None
    for _ in range(budget):
        actions = tuple(
            int(torch.multinomial(policy.softmax(dim=0), 1, generator=generator)) for policy in logits.values()
        )
        loss = loss_of(actions)
        if not math.isfinite(loss):
            continue
        finite = [value for value in known.values() if math.isfinite(value)]
        spread = torch.tensor(finite, dtype=torch.float64).std(correction=0).item() or 1.0
        reward = -loss / spread
        baseline = reward if baseline is None else baseline
        for policy, action in zip(logits.values(), actions, strict=True):
            drawn, rewarded = torch.tensor([action]), torch.tensor([reward], dtype=torch.float64)
            policy += lr * reinforce_gradient(policy, drawn, rewarded, baseline=baseline)
        baseline = baseline_momentum * baseline + (1 - baseline_momentum) * reward
    result.preferred = {name: float(choices[name][int(policy.argmax())]) for name, policy in logits.items()}
    return result
