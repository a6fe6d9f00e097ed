"""How a validation loss changes with a training loss's weights, by the implicit function theorem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["cg", "neumann"]
Product = Callable[[Tensor], Tensor]


def implicit_hypergradient(
    train_loss: Tensor,
    validation_loss: Tensor,
    parameters: Sequence[Tensor],
    weights: Tensor,
    *,
    solver: Solver = "cg",
    iterations: int = 20,
    damping: float = 0.0,
    step_size: float = 0.1,
) -> Tensor:
    r"""Gradient of the validation loss with respect to ``weights``, through the trained parameters.

    .. math:: \frac{dL_{val}}{d\lambda} = \frac{\partial L_{val}}{\partial\lambda}
        - \nabla_\theta L_{val}^T \, (H + \epsilon I)^{-1} \,
        \frac{\partial^2 L_{train}}{\partial\theta\,\partial\lambda}, \qquad H = \nabla_\theta^2 L_{train}

    It is right where the training has converged, to a minimum that is not flat. The Hessian is never formed: the
    system is solved with products of it and a vector, by conjugate gradients or by the Neumann series
    (Lorraine, Vicol and Duvenaud 2020, https://arxiv.org/abs/1911.02590, section 4).

    Args:
        train_loss: Scalar with a graph to ``parameters`` and ``weights``.
        validation_loss: Scalar with a graph to ``parameters``, and perhaps to ``weights``.
        parameters: What was trained.
        weights: What the training loss is weighted with, any shape, requires a gradient.
        solver: ``"cg"``, exact after as many iterations as there are parameters where the Hessian is positive definite;
            or ``"neumann"``, which needs ``step_size`` below two over the largest eigenvalue.
        iterations: At most this many products with the Hessian, positive.
        damping: Added to the Hessian's diagonal, not negative; helps where it is nearly singular, and biases.
        step_size: Of the Neumann series, positive.

    Returns:
        Shape of ``weights``.

    Raises:
        ValueError: If an argument is outside its range, the training loss does not depend on the parameters, or the
            Neumann series diverges.
    """
    if solver not in ("cg", "neumann"):
        raise ValueError(f"`solver` must be 'cg' or 'neumann', got {solver!r}.")
    if not iterations >= 1:
        raise ValueError(f"`iterations` must be positive, got {iterations}.")
    if not 0 <= damping < math.inf:
        raise ValueError(f"`damping` must not be negative, got {damping}.")
    if not 0 < step_size < math.inf:
        raise ValueError(f"`step_size` must be positive, got {step_size}.")
    found = torch.autograd.grad(train_loss, parameters, create_graph=True, allow_unused=True)
    slope = _flat(found, parameters)
    if not slope.requires_grad:
        raise ValueError("`train_loss` has no second derivative with respect to `parameters`; is it linear in them?")

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(slope, parameters, vector, retain_graph=True, allow_unused=True)
        return _flat(parts, parameters) + damping * vector

    inputs = [*parameters, weights]
    *outer, direct = torch.autograd.grad(validation_loss, inputs, retain_graph=True, allow_unused=True)
    right = _flat(outer, parameters)
    solution = (
        conjugate_gradients(product, right, iterations)
        if solver == "cg"
        else neumann_series(product, right, iterations, step_size)
    )
    (mixed,) = torch.autograd.grad(slope, weights, solution, allow_unused=True)
    total = torch.zeros_like(weights) if mixed is None else -mixed
    return total if direct is None else total + direct


def conjugate_gradients(product: Product, right: Tensor, iterations: int, *, tolerance: float = 1e-10) -> Tensor:
    """Solve ``A x = right`` for a symmetric positive definite ``A`` given by its products with vectors.

    Args:
        product: Maps ``x`` to ``A x``.
        right: Shape ``(n,)``.
        iterations: At most this many products.
        tolerance: Stop at a residual of this size, relative to ``right``.

    Returns:
        Shape ``(n,)``. Where a direction of negative curvature comes up (``A`` is not positive definite), the solution
        so far.
    """
    x = torch.zeros_like(right)
    residual = direction = right
    square = residual.dot(residual)
    enough = tolerance**2 * float(square)
    for _ in range(iterations):
        if float(square) <= enough:
            break
        image = product(direction)
        curvature = direction.dot(image)
        if not float(curvature) > 0:
            break
        step = square / curvature
        x, residual = x + step * direction, residual - step * image
        square, before = residual.dot(residual), square
        direction = residual + square / before * direction
    return x


def neumann_series(product: Product, right: Tensor, iterations: int, step_size: float) -> Tensor:
    r"""Solve ``A x = right`` by :math:`x = s \sum_j (I - s A)^j \, right`.

    Args:
        product: Maps ``x`` to ``A x``.
        right: Shape ``(n,)``.
        iterations: Number of terms, the first of which needs no product.
        step_size: ``s``, below two over the largest eigenvalue of ``A``.

    Raises:
        ValueError: If the series grows without bound.
    """
    term, total = right, right.clone()
    limit = 1e6 * float(right.norm()) + 1e-30
    for _ in range(iterations - 1):
        term = term - step_size * product(term)
        total = total + term
        if not float(term.norm()) < limit:
            raise ValueError(
                f"The Neumann series diverges with `step_size` {step_size}: it must be below two over the largest "
                "eigenvalue of the Hessian. Use a smaller one, or `solver='cg'`."
            )
    return step_size * total


def _flat(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    full = [torch.zeros_like(p) if part is None else part for part, p in zip(parts, like, strict=True)]
    return torch.cat([part.reshape(-1) for part in full])
