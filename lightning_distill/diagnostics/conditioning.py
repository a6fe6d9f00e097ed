"""Curvature of a loss: eigenvalues, and whether distillation is better conditioned than cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distill.losses.soft_targets import softened_log_softmax
from lightning_distill.modes import inference

LARGEST_EXACT = 2000  # parameters of which a whole Hessian is made
NULL = 1e-8  # eigenvalues below this share of the largest count as zero


@dataclass(frozen=True)
class Conditioning:
    """Eigenvalues of the curvature of two losses at the same weights; ascending, float64.

    The losses are the cross-entropy with labels and ``T^2`` times the KL divergence from a teacher at the temperature
    ``T``. The Gauss-Newton part of their Hessians depends neither on the labels nor on the teacher.

    Attributes:
        temperature: ``T``.
        cross_entropy: Eigenvalues for the cross-entropy.
        distillation: Eigenvalues for the divergence.
    """

    temperature: float
    cross_entropy: Tensor
    distillation: Tensor

    @property
    def conditions(self) -> tuple[float, float]:
        """Condition numbers of cross-entropy and distillation where their curvature is not zero."""
        return condition_number(self.cross_entropy), condition_number(self.distillation)

    @property
    def ratio(self) -> float:
        """Condition number of the cross-entropy over that of distillation; above 1, distillation is better off."""
        first, second = self.conditions
        return first / second


def condition_number(eigenvalues: Tensor, *, null: float = NULL) -> float:
    """Largest over smallest eigenvalue among those that are not zero.

    Args:
        eigenvalues: Of a positive semi-definite matrix, any order.
        null: Below this share of the largest they count as zero.

    Raises:
        ValueError: If none is positive.
    """
    largest = float(eigenvalues.max()) if eigenvalues.numel() else 0.0
    if not largest > 0:
        raise ValueError(f"There is no positive eigenvalue, so that there is no condition number; got {eigenvalues}.")
    return largest / float(eigenvalues[eigenvalues > null * largest].min())


def compare_conditioning(
    network: nn.Module, inputs: Tensor, *, temperature: float, parameters: Iterable[Tensor] | None = None
) -> Conditioning:
    """Conditioning of distillation against that of the cross-entropy, at the present weights of ``network``.

    A statement about these weights and inputs, not about training as a whole: at an undecided student (all logits
    equal) both are the same, at a confident one a high temperature flattens the spectrum.

    Args:
        network: Maps ``inputs`` to logits ``(N, C)``; run in eval mode.
        inputs: ``N`` samples.
        temperature: Of the distillation, positive.
        parameters: With respect to which; by default all that are trained.

    Raises:
        ValueError: If ``temperature`` is not positive, or there is nothing to differentiate.
    """
    chosen = _chosen(network, parameters)
    plain = ggn_spectrum(network, inputs, parameters=chosen)
    soft = ggn_spectrum(network, inputs, temperature=temperature, parameters=chosen)
    return Conditioning(temperature, plain, soft * temperature**2)


def ggn_spectrum(
    network: nn.Module, inputs: Tensor, *, temperature: float = 1.0, parameters: Iterable[Tensor] | None = None
) -> Tensor:
    r"""Eigenvalues of the Gauss-Newton matrix of cross-entropy or KL divergence at a temperature.

    .. math:: G = \frac1N \sum_n J_n^\top \frac{\mathrm{diag}(p_n) - p_n p_n^\top}{T^2} J_n, \quad p = \sigma(z_S / T)

    It is the Hessian without the second derivatives of the logits: the whole of it for a linear model, and near a
    minimum, where the student says what the teacher says. The probabilities are the *student's*.

    Args:
        network: Maps ``inputs`` to logits ``(N, C)``; run in eval mode.
        inputs: ``N`` samples.
        temperature: ``T``, positive.
        parameters: With respect to which; by default all that are trained.

    Returns:
        Ascending, float64, ``min(P, N C)`` of the ``P`` eigenvalues; the others are 0. Memory: ``N C P`` numbers.

    Raises:
        ValueError: If ``temperature`` is not positive, or there is nothing to differentiate.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
    chosen = _chosen(network, parameters)
    with inference(network), torch.enable_grad():
        logits = network(inputs)
        p = softened_log_softmax(logits.detach().double(), temperature).exp()
        # diag(p) - p p^T = B B^T with B = diag(sqrt p) - p sqrt(p)^T
        root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # (N, C, C)
        rows = [
            _slope((logits[n] * root[n, :, c].to(logits.dtype)).sum(), chosen)
            for n in range(len(logits))
            for c in range(logits.shape[1])
        ]
    factor = torch.stack(rows) / (temperature * math.sqrt(len(logits)))  # (N C, P)
    gram = factor @ factor.T if factor.shape[0] <= factor.shape[1] else factor.T @ factor
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues


def hessian(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The matrix of second derivatives of a loss, float64, shape ``(P, P)``.

    Args:
        loss: Computes it anew, a scalar, from the parameters.
        parameters: With respect to which; at most 2000 numbers.

    Raises:
        ValueError: If there are more, or none.
    """
    size = _size(parameters)
    if size > LARGEST_EXACT:
        raise ValueError(
            f"A Hessian of {size} parameters does not fit; the limit is {LARGEST_EXACT}. Pass `k` to "
            "`hessian_spectrum` for its largest eigenvalues, or fewer `parameters`."
        )
    product = hessian_product(loss, parameters)
    matrix = torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])
    return (matrix + matrix.T) / 2


def hessian_spectrum(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    k: int | None = None,
    steps: int = 60,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Eigenvalues of the Hessian of a loss, ascending, float64.

    Args:
        loss: Computes it anew, a scalar, from the parameters.
        parameters: With respect to which.
        k: How many of the largest; ``None`` for all, by the whole matrix.
        steps: Of the Lanczos iteration for ``k``: one product of the Hessian with a vector each. The largest
            eigenvalues converge first, and in float32 to about 1e-5 of the largest.
        generator: Of its start; by default seeded with 0.

    Raises:
        ValueError: If there are no parameters, too many for all eigenvalues, or fewer than ``k`` steps.
    """
    if k is None:
        eigenvalues: Tensor = torch.linalg.eigvalsh(hessian(loss, parameters))
        return eigenvalues
    size = _size(parameters)
    if not 1 <= k <= min(steps, size):
        raise ValueError(f"`k` must be between 1 and the smaller of `steps`, {steps}, and {size} parameters, got {k}.")
    return lanczos(hessian_product(loss, parameters), size, steps=steps, generator=generator)[-k:]


def hessian_product(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function ``v -> H v`` of flat float64 vectors, for the Hessian ``H`` of a loss at the present parameters."""
    _size(parameters)
    with torch.enable_grad():
        slopes = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
    flat = torch.cat([_or_zero(slope, of) for slope, of in zip(slopes, parameters, strict=True)])

    def product(vector: Tensor) -> Tensor:
        if not flat.requires_grad:  # a linear function
            return torch.zeros_like(vector)
        along = torch.autograd.grad(flat @ vector.to(flat), parameters, retain_graph=True, allow_unused=True)
        return (
            torch.cat([_or_zero(part, of) for part, of in zip(along, parameters, strict=True)]).detach().cpu().double()
        )

    return product


def lanczos(
    product: Callable[[Tensor], Tensor], size: int, *, steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Ritz values of a symmetric matrix that is known by its products; ascending, float64, at most ``steps``.

    Every new direction is made orthogonal to all before it, so that no eigenvalue shows up twice.

    Args:
        product: ``v -> A v`` of vectors of shape ``(size,)``, float64.
        size: Of the matrix.
        steps: Products that are spent.
        generator: Of the first direction; by default seeded with 0.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    direction = torch.randn(size, generator=generator, dtype=torch.float64)
    basis = [direction / direction.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(min(steps, size)):
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan)
            image = image - known.T @ (known @ image)
        length = float(image.norm())
        if length <= 1e-10 * max(map(abs, diagonal)):
            break  # the directions so far are closed under the matrix
        off.append(length)
        basis.append(image / length)
    n = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if n > 1:
        beside = torch.tensor(off[: n - 1], dtype=torch.float64)
        tridiagonal = tridiagonal + torch.diag(beside, 1) + torch.diag(beside, -1)
    values: Tensor = torch.linalg.eigvalsh(tridiagonal)
    return values


def _chosen(network: nn.Module, parameters: Iterable[Tensor] | None) -> list[Tensor]:
    chosen = [p for p in (network.parameters() if parameters is None else parameters) if p.requires_grad]
    _size(chosen)
    return chosen


def _size(parameters: Sequence[Tensor]) -> int:
    size = sum(p.numel() for p in parameters)
    if size == 0:
        raise ValueError("There are no parameters with `requires_grad` to differentiate with respect to.")
    return size


def _or_zero(part: Tensor | None, of: Tensor) -> Tensor:
    return (torch.zeros_like(of) if part is None else part).flatten()


def _slope(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([_or_zero(part, of) for part, of in zip(parts, parameters, strict=True)]).cpu().double()
