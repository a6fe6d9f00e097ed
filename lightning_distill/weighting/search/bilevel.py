"""Weights of the terms by descent of the validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_distill.weighting.search.implicit import Solver, implicit_hypergradient
from lightning_distill.weighting.search.result import WeightSearch, require_weights

Train = Callable[[Mapping[str, float]], Sequence[Tensor]]
TrainLoss = Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]
ValidationLoss = Callable[[Sequence[Tensor]], Tensor]


def bilevel_search(
    train: Train,
    train_loss: TrainLoss,
    validation_loss: ValidationLoss,
    initial: Mapping[str, float],
    *,
    budget: int = 20,
    lr: float = 0.1,
    solver: Solver = "cg",
    iterations: int = 20,
    damping: float = 1e-3,
    step_size: float = 0.1,
    tolerance: float = 1e-6,
) -> WeightSearch:
    r"""Find :math:`\arg\min_\lambda L_{val}(\theta^*(\lambda))`, where :math:`\theta^*` minimises the training loss.

    Each trial trains to convergence, takes the gradient by the implicit function theorem, and makes a step of Adam in
    the logarithm of the weights, which keeps them positive. The validation data must not be the training data: on
    those, the weights that fit best win.

    Args:
        train: Trains with the given weights and returns the parameters it found; it may start where it stopped.
        train_loss: Loss as a function of parameters and weights, differentiable twice.
        validation_loss: Loss as a function of parameters.
        initial: Weights to start from, positive, by term name.
        budget: Number of trainings, positive.
        lr: Learning rate of Adam on the logarithms, positive; it falls to zero along a half cosine.
        solver: See :func:`~lightning_distill.weighting.search.implicit_hypergradient`, as for the three below.
        iterations: Products with the Hessian per trial.
        damping: Added to the Hessian's diagonal.
        step_size: Of the Neumann series.
        tolerance: Stop where the gradient's norm, in the logarithms, is below.

    Raises:
        ValueError: If an argument is outside its range.
    """
    require_weights(initial)
    if not budget >= 1:
        raise ValueError(f"`budget` must be at least one training, got {budget}.")
    if not 0 < lr < math.inf:
        raise ValueError(f"`lr` must be positive, got {lr}.")
    names, result = list(initial), WeightSearch()
    logs = torch.tensor([math.log(initial[name]) for name in names], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget)
    for _ in range(budget):
        values = dict(zip(names, logs.detach().exp().tolist(), strict=True))
        parameters = [p.detach().requires_grad_() for p in train(values)]
        weights = logs.detach().exp().to(parameters[0]).requires_grad_()
        loss = validation_loss(parameters)
        result.note(values, loss.item())
        gradient = implicit_hypergradient(
            train_loss(parameters, dict(zip(names, weights.unbind(), strict=True))),
            loss,
            parameters,
            weights,
            solver=solver,
            iterations=iterations,
            damping=damping,
            step_size=step_size,
        )
        logs.grad = (gradient * weights.detach()).to(logs)  # by the logarithm
        if not float(logs.grad.norm()) >= tolerance:
            break
        optimizer.step()
        schedule.step()
    return result
