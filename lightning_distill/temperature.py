"""Temperatures of distillation: numbers from formulas, and rules that read a batch.

The functions are pure and their results carry no gradient. A *rule* is a callable ``rule(step)`` over one of them that
a module takes as its ``temperature`` in place of a number. Temperatures have no unit; entropies are in nats.
"""

from __future__ import annotations

import difflib
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import Direction, kl_divergence, softened_log_softmax
from lightning_distill.outputs import Step

AnnealingShape = Literal["exponential", "linear", "cosine"]

VOCABULARY_TEMPERATURES = {"gpt-50k": (15.0, 25.0), "llama-32k": (12.0, 20.0), "chinese-100k": (20.0, 30.0)}
"""Ranges one finds quoted for language models. No single ``tau_base`` gives them, and practice is 1 to 4."""

TASK_TEMPERATURES = {"factual": (5.0, 10.0), "dialogue": (10.0, 15.0), "creative": (15.0, 25.0)}
"""Ranges one finds quoted by what is generated: untested, and at odds with those by vocabulary."""


# ---------------------------------------------------------------- numbers that need no batch


def annealed_temperature(
    progress: float,
    tau_max: float,
    tau_min: float = 1.0,
    *,
    shape: AnnealingShape = "exponential",
    gamma: float | None = None,
) -> float:
    r"""Temperature that falls from ``tau_max`` to ``tau_min`` while ``progress`` goes from 0 to 1, and then stays.

    .. math::
        \text{exponential:}\;\tau_{max}\,e^{-\gamma t}, \qquad
        \text{linear:}\;\tau_{max} + (\tau_{min} - \tau_{max})\,t, \qquad
        \text{cosine:}\;\tau_{min} + (\tau_{max} - \tau_{min})\tfrac{1 + \cos \pi t}{2}

    Annealing the temperature is due to Jafari et al. (2021), https://arxiv.org/abs/2104.07163, with a staircase.

    Args:
        progress: Fraction ``t`` of the annealing that is done, not negative; from 1 on the value stays.
        tau_max: Temperature at ``progress`` 0, no unit.
        tau_min: Lowest temperature; positive, at most ``tau_max``. The exponential is clamped here.
        shape: ``"exponential"``, ``"linear"`` or ``"cosine"``.
        gamma: Rate of the exponential, not negative; by default ``log(tau_max / tau_min)``, which ends at ``tau_min``.
            A smaller rate ends above it, a larger one gets there early.

    Returns:
        A temperature in ``[tau_min, tau_max]``.

    Raises:
        ValueError: If an argument is outside its range, or ``gamma`` is given for another shape.

    Example:
        >>> [round(annealed_temperature(t, 8.0), 3) for t in (0.0, 0.25, 0.5, 1.0)]
        [8.0, 4.757, 2.828, 1.0]
    """
    if not progress >= 0:  # also rejects NaN, here and below
        raise ValueError(f"`progress` must not be negative, got {progress}.")
    _require_range(tau_min, tau_max)
    if gamma is not None and shape != "exponential":
        raise ValueError(f"`gamma` is a rate of the exponential shape alone, got {gamma} with shape {shape!r}.")
    if gamma is not None and not 0 <= gamma < math.inf:
        raise ValueError(f"`gamma` must not be negative, got {gamma}; to raise the temperature, exchange its ends.")
    t = min(progress, 1.0)
    if shape == "exponential":
        rate = math.log(tau_max / tau_min) if gamma is None else gamma
        return max(tau_max * math.exp(-rate * t), tau_min)
    if shape == "linear":
        return tau_max + (tau_min - tau_max) * t
    if shape == "cosine":
        return tau_min + (tau_max - tau_min) * (1 + math.cos(math.pi * t)) / 2
    raise ValueError(f"`shape` must be 'exponential', 'linear' or 'cosine', got {shape!r}.")


def capacity_temperature(
    *,
    student_parameters: float,
    teacher_parameters: float,
    kappa: float = 4.0,
    tau_min: float = 1.0,
    tau_max: float = 20.0,
) -> float:
    r"""Heuristic :math:`\kappa \sqrt{C_T / C_S}` on parameter counts, clamped to ``[tau_min, tau_max]``.

    A starting point for a scan, not a law: Hinton et al. (2015, section 3) report the opposite direction, 2.5 to 4
    as best for the smallest students and anything above 8 as fine for large ones.

    Args:
        student_parameters: ``C_S``, positive.
        teacher_parameters: ``C_T``, positive.
        kappa: Temperature for equal sizes, positive.
        tau_min: Lowest result, positive.
        tau_max: Highest result.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(capacity_temperature(student_parameters=66e6, teacher_parameters=110e6), 3)
        5.164
    """
    _require_positive(student_parameters=student_parameters, teacher_parameters=teacher_parameters, kappa=kappa)
    _require_range(tau_min, tau_max)
    return _clamp(kappa * math.sqrt(teacher_parameters / student_parameters), tau_min, tau_max)


def vocabulary_temperature(vocabulary: int, *, tau_base: float = 2.0) -> float:
    r"""Heuristic :math:`\tau_{base} \log V / \log 1000` for a vocabulary of ``V`` tokens.

    Args:
        vocabulary: ``V``, at least 2.
        tau_base: Temperature for 1000 tokens, positive. 2 gives 3 to 3.3 for vocabularies of 32 to 100 thousand.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(vocabulary_temperature(32_000), 3)
        3.003
    """
    if not vocabulary >= 2:
        raise ValueError(f"`vocabulary` must be at least 2, got {vocabulary}.")
    _require_positive(tau_base=tau_base)
    return tau_base * math.log(vocabulary) / math.log(1000)


def task_temperature(task: str, *, position: float = 0.5) -> float:
    """Temperature in the range of :data:`TASK_TEMPERATURES` for ``task``.

    Args:
        task: ``"factual"``, ``"dialogue"`` or ``"creative"``.
        position: 0 for the lower end of the range, 1 for the upper.

    Raises:
        ValueError: If the task is unknown or ``position`` is outside [0, 1].

    Example:
        >>> task_temperature("dialogue")
        12.5
    """
    if task not in TASK_TEMPERATURES:
        near = difflib.get_close_matches(task, TASK_TEMPERATURES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`task` must be one of {', '.join(map(repr, TASK_TEMPERATURES))}, got {task!r}.{hint}")
    if not 0 <= position <= 1:
        raise ValueError(f"`position` must be in [0, 1], got {position}.")
    low, high = TASK_TEMPERATURES[task]
    return low + (high - low) * position


def layer_temperatures(layers: int, *, tau_base: float = 2.0, beta: float = 0.5) -> list[float]:
    r"""Temperature :math:`\tau_{base} (1 + \beta l / L)` of each layer ``l = 1 .. L`` that emits a distribution.

    Args:
        layers: ``L``, at least 1.
        tau_base: Positive.
        beta: Growth up to the last layer, above -1; negative lets the temperature fall with depth.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> layer_temperatures(4)
        [2.25, 2.5, 2.75, 3.0]
    """
    if not layers >= 1:
        raise ValueError(f"`layers` must be at least 1, got {layers}.")
    _require_positive(tau_base=tau_base)
    if not -1 < beta < math.inf:
        raise ValueError(f"`beta` must be above -1, so that every temperature is positive, got {beta}.")
    return [tau_base * (1 + beta * layer / layers) for layer in range(1, layers + 1)]


# ---------------------------------------------------------------- what temperature does to a softmax


def softened_entropy(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Entropy :math:`-\sum_c p_c \log p_c` of ``softmax(logits / temperature)`` in nats.

    Args:
        logits: Shape ``(items..., C)``.
        temperature: Positive; a number, or one value per item.

    Returns:
        Shape ``(items...)``, in ``[0, log C]``, float32 or wider.

    Example:
        >>> softened_entropy(torch.zeros(4))
        tensor(1.3863)
    """
    entropy: Tensor = torch.special.entr(softened_log_softmax(logits, temperature).exp()).sum(dim=-1)
    return entropy


def softmax_taylor(logits: Tensor, *, temperature: float | Tensor, order: Literal[1, 2] = 1) -> Tensor:
    r"""High-temperature expansion of ``softmax(logits / temperature)``, for diagnosis.

    With :math:`u = (z - \bar z) / \tau`, of the first order :math:`(1 + u_i) / N`, of the second
    :math:`(1 + u_i + (u_i^2 - \overline{u^2}) / 2) / N`. The error is of order :math:`\tau^{-2}` or :math:`\tau^{-3}`.
    See Hinton et al. (2015), section 2.1, https://arxiv.org/abs/1503.02531.

    Args:
        logits: Shape ``(items..., N)``.
        temperature: Positive; a number, or one value per item.
        order: 1 or 2.

    Returns:
        Shape ``(items..., N)``; sums to one, but single values may be negative where the temperature is low.

    Raises:
        ValueError: If ``order`` is neither 1 nor 2, or the temperature is not positive.

    Example:
        >>> softmax_taylor(torch.tensor([5.0, 2.0, 1.0]), temperature=50.0)
        tensor([0.3489, 0.3289, 0.3222])
    """
    if order not in (1, 2):
        raise ValueError(f"`order` must be 1 or 2, got {order}.")
    logits = _upcast(logits)
    u = (logits - logits.mean(dim=-1, keepdim=True)) / _over_classes(temperature)
    if order == 2:
        squares = u.square()
        u = u + (squares - squares.mean(dim=-1, keepdim=True)) / 2
    return (1 + u) / logits.shape[-1]


def softmax_jacobian(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Jacobian :math:`(\mathrm{diag}(p) - p p^T) / \tau` of ``p = softmax(logits / temperature)``, for small ``N``.

    Args:
        logits: Shape ``(items..., N)``.
        temperature: Positive; a number, or one value per item.

    Returns:
        Shape ``(items..., N, N)``: symmetric, positive semidefinite, rows that sum to zero.

    Raises:
        ValueError: If the temperature is not positive.
    """
    p = softened_log_softmax(logits, temperature).exp()
    jacobian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    scale = _over_classes(temperature)
    return jacobian / (scale[..., None] if isinstance(scale, Tensor) else scale)


# ---------------------------------------------------------------- temperatures from logits and gradients


@torch.no_grad()
def entropy_temperature(
    teacher_logits: Tensor, *, tau0: float = 4.0, alpha: float = 0.5, normalise: bool = False
) -> Tensor:
    r"""Temperature :math:`\tau_0 (1 + \alpha H(p))` of each item, higher where the teacher is unsure.

    ``p`` is the teacher's softmax at temperature 1. A loss with a factor :math:`\tau^2` must apply it item by item,
    before any mean.

    Args:
        teacher_logits: Shape ``(items..., C)``.
        tau0: Temperature of an item that the teacher is certain of, positive.
        alpha: Growth per nat, not negative.
        normalise: Divide the entropy by ``log C``, so that the result is in ``[tau0, tau0 * (1 + alpha)]`` whatever
            the number of classes.

    Returns:
        Shape ``(items...)``, float32 or wider.

    Raises:
        ValueError: If ``tau0`` or ``alpha`` is outside its range.

    Example:
        >>> entropy_temperature(torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]]), normalise=True)
        tensor([6., 4.])
    """
    _require_positive(tau0=tau0)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"`alpha` must not be negative, got {alpha}.")
    entropy = softened_entropy(teacher_logits)
    if normalise:
        entropy = entropy / math.log(max(teacher_logits.shape[-1], 2))  # a single class has entropy 0 anyway
    return tau0 * (1 + alpha * entropy)


@torch.no_grad()
def temperature_for_entropy(
    teacher_logits: Tensor, target_nats: float, *, tau_min: float = 1e-2, tau_max: float = 1e3
) -> Tensor:
    r"""Temperature at which the teacher's softened prediction has the entropy ``target_nats``, item by item.

    The entropy rises with the temperature, :math:`dH/d\tau = \mathrm{Var}_p(z) / \tau^3 \ge 0`, so there is one
    solution; it is found by bisection of :math:`\log\tau` (27 softmaxes in float32, 57 in float64).

    Args:
        teacher_logits: Shape ``(items..., C)``.
        target_nats: Between 0 and ``log C``, both excluded.
        tau_min: Lowest result, positive; returned where the entropy is above the target even there (tied logits).
        tau_max: Highest result; returned where the entropy is below the target even there.

    Returns:
        Shape ``(items...)``, float32 or wider.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> temperature_for_entropy(torch.tensor([[5.0, 2.0, 1.0, -2.0]]), 1.0)
        tensor([2.5258])
    """
    _require_range(tau_min, tau_max)
    classes = teacher_logits.shape[-1]
    if not 0 < target_nats < math.log(classes):
        raise ValueError(
            f"`target_nats` must be between 0 and log(C) = {math.log(classes):.4f} for {classes} classes, got "
            f"{target_nats}. Entropy is in nats: one bit is {math.log(2):.4f}."
        )
    logits = _upcast(teacher_logits)
    low = torch.full_like(logits[..., 0], math.log(tau_min))
    high = torch.full_like(low, math.log(tau_max))
    # Halve until the bracket is as narrow as the rounding of its ends.
    halvings = math.ceil(math.log2(max(math.log(tau_max / tau_min), 1e-6) / torch.finfo(low.dtype).eps))
    for _ in range(halvings):
        middle = (low + high) / 2
        too_low = softened_entropy(logits, temperature=middle.exp()) < target_nats
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return ((low + high) / 2).exp()


@torch.no_grad()
def optimal_temperature(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    direction: Direction = "forward",
    grid: Sequence[float] | None = None,
    mask: Tensor | None = None,
) -> float:
    r"""The temperature of ``grid`` with the highest mean of :math:`H(p_\tau) - \beta \tau^2 D(\tau)` over the items.

    ``p`` is the teacher's softened prediction, ``D`` the KL divergence between it and the student's. Without the
    factor :math:`\tau^2` the search would mean nothing: ``H`` rises and the divergence vanishes as the temperature
    grows, so the upper end wins for every ``beta``. Even with it an end may win; then there is no optimum in sight,
    and a warning says so.

    Args:
        student_logits: Shape ``(items..., C)``.
        teacher_logits: Same shape.
        beta: Price of the divergence, not negative.
        direction: ``"forward"``, KL(teacher || student), or ``"reverse"``.
        grid: Increasing positive temperatures, at least three; by default 33 from 1 to 20 in equal ratios.
        mask: Which items count, boolean, shape ``(items...)``; ``None`` for all.

    Returns:
        One temperature for the whole batch.

    Raises:
        ValueError: If the shapes differ or an argument is outside its range.

    Warns:
        UserWarning: If the result is the first or the last value of ``grid``.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`student_logits` and `teacher_logits` must have the same shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    grid = _optimal_temperature_grid(beta, direction, grid)
    student, teacher = _upcast(student_logits), _upcast(teacher_logits)
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    scores = torch.stack([_entropy_minus_divergence(student, teacher, tau, beta, direction) for tau in grid])
    best = int(scores.argmax())
    if best in (0, len(grid) - 1):
        warnings.warn(
            f"The best temperature is an end of the grid, {grid[best]:g}: with `beta`={beta:g} there is no optimum "
            f"inside [{grid[0]:g}, {grid[-1]:g}]. Change `beta`, or use a target entropy.",
            UserWarning,
            stacklevel=2,
        )
    return grid[best]


def _entropy_minus_divergence(
    student: Tensor, teacher: Tensor, tau: float, beta: float, direction: Direction
) -> Tensor:
    """Mean objective of :func:`optimal_temperature` at ``tau``; 0 for no items."""
    divergence = kl_divergence(student, teacher, temperature=tau, direction=direction)
    values = softened_entropy(teacher, temperature=tau) - beta * divergence
    return values.sum() / max(values.numel(), 1)


def _optimal_temperature_grid(beta: float, direction: Direction, grid: Sequence[float] | None) -> list[float]:
    """``grid`` or the default one, after checking all three."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"`beta` must not be negative, got {beta}.")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
    if grid is None:
        return [20 ** (i / 32) for i in range(33)]
    values = [float(tau) for tau in grid]
    increasing = all(low < high for low, high in itertools.pairwise(values))
    if not (len(values) >= 3 and increasing and values[0] > 0 and values[-1] < math.inf):
        raise ValueError(f"`grid` must hold at least three increasing positive temperatures, got {values}.")
    return values


@torch.no_grad()
def gradient_variance_temperature(
    hard_gradients: Tensor, soft_gradients: Tensor, *, tau0: float = 4.0, tau_min: float = 1.0, tau_max: float = 20.0
) -> float:
    r"""Temperature :math:`\tau_0 \sqrt{\mathrm{Var}\,g_{hard} / \mathrm{Var}\,g_{soft}}`, clamped.

    The variance is taken over micro-batches and summed over coordinates. The soft gradients must be those of the loss
    *with* the factor :math:`\tau^2`: without it their variance falls as the temperature rises, which raises the
    temperature further. Smooth the result over steps before using it; one estimate from a few micro-batches is noisy.

    Args:
        hard_gradients: Gradients of the loss on labels, one row per micro-batch, shape ``(M, P)``, ``M >= 2``.
        soft_gradients: Gradients of the soft-target loss, same shape.
        tau0: Temperature for equal variances, positive.
        tau_min: Lowest result, positive.
        tau_max: Highest result; returned where the soft gradients do not vary at all.

    Returns:
        A temperature in ``[tau_min, tau_max]``; ``tau0``, clamped, if neither gradient varies.

    Raises:
        ValueError: If the shapes do not fit, a gradient is not finite, or an argument is outside its range.
    """
    _require_positive(tau0=tau0)
    _require_range(tau_min, tau_max)
    if hard_gradients.shape != soft_gradients.shape or hard_gradients.ndim != 2 or len(hard_gradients) < 2:
        raise ValueError(
            "`hard_gradients` and `soft_gradients` must have the same shape (M, P) with one row for each of M >= 2 "
            f"micro-batches, got {tuple(hard_gradients.shape)} and {tuple(soft_gradients.shape)}."
        )
    variances = [_upcast(g).var(dim=0).sum().item() for g in (hard_gradients, soft_gradients)]
    if not all(math.isfinite(variance) for variance in variances):
        raise ValueError(
            "`hard_gradients` and `soft_gradients` must be finite; skip steps whose gradients overflowed "
            f"(variances {variances[0]} and {variances[1]})."
        )
    hard, soft = variances
    if soft == 0:
        return _clamp(tau0 if hard == 0 else tau_max, tau_min, tau_max)
    return _clamp(tau0 * math.sqrt(hard / soft), tau_min, tau_max)


# ---------------------------------------------------------------- rules


class EntropyTemperature:
    """Rule: :func:`entropy_temperature` of the teacher, one value per item.

    Args:
        tau0: Temperature of an item that the teacher is certain of, positive.
        alpha: Growth per nat, not negative.
        normalise: Divide the entropy by ``log C``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(self, tau0: float = 4.0, alpha: float = 0.5, *, normalise: bool = False) -> None:
        entropy_temperature(torch.zeros(2), tau0=tau0, alpha=alpha)  # checks the values
        self.tau0 = tau0
        self.alpha = alpha
        self.normalise = normalise

    def __call__(self, step: Step) -> Tensor:
        """Temperature of each item of ``step``, shape of the items."""
        return entropy_temperature(
            _teacher_logits(step, self), tau0=self.tau0, alpha=self.alpha, normalise=self.normalise
        )


class TargetEntropyTemperature:
    """Rule: :func:`temperature_for_entropy` of the teacher, one value per item.

    Costs about thirty softmaxes of the teacher's logits per step, which is little for classes and much for a large
    vocabulary.

    Args:
        target_nats: Entropy of every softened prediction, positive, below ``log C``.
        tau_min: Lowest temperature, positive.
        tau_max: Highest temperature.

    Raises:
        ValueError: If an argument is outside its range; at the first step if ``target_nats`` is not below ``log C``.
    """

    def __init__(self, target_nats: float, *, tau_min: float = 0.5, tau_max: float = 20.0) -> None:
        _require_positive(target_nats=target_nats)
        _require_range(tau_min, tau_max)
        self.target_nats = target_nats
        self.tau_min = tau_min
        self.tau_max = tau_max

    def __call__(self, step: Step) -> Tensor:
        """Temperature of each item of ``step``, shape of the items."""
        logits = _teacher_logits(step, self)
        return temperature_for_entropy(logits, self.target_nats, tau_min=self.tau_min, tau_max=self.tau_max)


class OptimalTemperature:
    """Rule: :func:`optimal_temperature` of the batch, one value for all of its items that count.

    Args:
        beta: Price of the divergence, not negative.
        direction: ``"forward"``, KL(teacher || student), or ``"reverse"``.
        grid: Increasing positive temperatures, at least three; by default 33 from 1 to 20 in equal ratios.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        beta: float = 0.5,
        *,
        direction: Direction = "forward",
        grid: Sequence[float] | None = None,
    ) -> None:
        self.grid = _optimal_temperature_grid(beta, direction, grid)
        self.beta = beta
        self.direction = direction

    def __call__(self, step: Step) -> float:
        """Temperature of the whole batch."""
        return optimal_temperature(
            step.student.logits,
            _teacher_logits(step, self),
            beta=self.beta,
            direction=self.direction,
            grid=self.grid,
            mask=step.mask,
        )


def _teacher_logits(step: Step, rule: object) -> Tensor:
    if step.teacher is None:
        raise ValueError(
            f"{type(rule).__name__} reads the teacher's logits, but there is no teacher. Pass `teacher=...` to the "
            "module, or a number as `temperature`."
        )
    return step.teacher.logits


# ---------------------------------------------------------------- helpers


def _upcast(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _over_classes(temperature: float | Tensor) -> float | Tensor:
    """``temperature`` ready to divide logits, after checking it."""
    positive = (temperature > 0).all() if isinstance(temperature, Tensor) else temperature > 0
    if not positive:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    return temperature[..., None] if isinstance(temperature, Tensor) else temperature


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:  # also rejects NaN
            raise ValueError(f"`{name}` must be positive and finite, got {value}.")


def _require_range(tau_min: float, tau_max: float) -> None:
    if not 0 < tau_min <= tau_max < math.inf:
        raise ValueError(f"`tau_min` and `tau_max` must satisfy 0 < tau_min <= tau_max, got {tau_min} and {tau_max}.")


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
