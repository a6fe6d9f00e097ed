"""Theory of distillation, measured: functions that return a value, an interval and a number of observations.

Everything is computed on the CPU in float64, without gradients. Entropies and informations are in nats unless said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import kl_divergence, soft_cross_entropy, softened_log_softmax
from lightning_distill.outputs import UNLABELLED
from lightning_distill.temperature import softened_entropy

Verdict = Literal["supported", "refuted", "undecided"]
Unit = Literal["nats", "bits"]


@dataclass(frozen=True)
class Estimate:
    """A measured quantity.

    Attributes:
        value: The estimate.
        low: Lower end of its confidence interval; minus infinity where there is nothing to estimate it from.
        high: Upper end.
        n: Number of observations behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def verdict(self, threshold: float = 0.0) -> Verdict:
        """Whether the claim that the quantity is above ``threshold`` is supported: the whole interval decides."""
        if self.low > threshold:
            return "supported"
        return "refuted" if self.high < threshold else "undecided"


def bootstrap_mean(
    values: Tensor | Sequence[float],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Mean of ``values`` with a percentile bootstrap interval (Efron 1979).

    The interval is too narrow for a handful of values; a single one has none, and its ends are infinite.

    Args:
        values: Independent observations, shape ``(n,)``, ``n >= 1``.
        resamples: Number of bootstrap samples, positive.
        confidence: Coverage of the interval, between 0 and 1, both excluded.
        generator: Source of randomness; by default one with a fixed seed, so that the same values give the same
            interval.

    Raises:
        ValueError: If there are no values, one is not finite, or an argument is outside its range.

    Example:
        >>> bootstrap_mean([1.0, 1.0, 1.0])
        Estimate(value=1.0, low=1.0, high=1.0, n=3)
    """
    observations = _float64(torch.as_tensor(values, dtype=torch.float64)).flatten()
    if observations.numel() == 0 or not bool(observations.isfinite().all()):
        raise ValueError(f"`values` must be one or more finite numbers, got {observations.tolist()[:5]}.")
    if not resamples >= 1:
        raise ValueError(f"`resamples` must be positive, got {resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    n, value = observations.numel(), observations.mean().item()
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    generator = _generator(generator)
    means = torch.stack(
        [observations[torch.randint(n, (n,), generator=generator)].mean() for _ in range(resamples)]
    )  # one at a time: an index matrix of all samples would not fit for large n
    ends = means.quantile(torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64))
    return Estimate(value, ends[0].item(), ends[1].item(), n)


# ---------------------------------------------------------------- what a soft label holds


@dataclass(frozen=True)
class CrossEntropyParts:
    """``cross_entropy = teacher_entropy + divergence``, mean over the items, nats.

    Attributes:
        cross_entropy: Of the student against the teacher's soft labels.
        teacher_entropy: The part that no student can remove.
        divergence: KL(teacher || student), 0 for a student that matches.
    """

    cross_entropy: float
    teacher_entropy: float
    divergence: float


@torch.no_grad()
def cross_entropy_parts(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0
) -> CrossEntropyParts:
    """Split the soft cross-entropy into the teacher's entropy and the divergence that training can remove.

    The entropy does not depend on the student, so that minimising the divergence is maximising the likelihood that
    the teacher expects.

    Args:
        student_logits: Shape ``(items..., C)``.
        teacher_logits: Same shape.
        temperature: Positive; the parts are not multiplied by its square.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    student, teacher = _float64(student_logits), _float64(teacher_logits)
    return CrossEntropyParts(
        cross_entropy=soft_cross_entropy(student, teacher, temperature=temperature, scale_by_t2=False).mean().item(),
        teacher_entropy=softened_entropy(teacher, temperature=temperature).mean().item(),
        divergence=kl_divergence(student, teacher, temperature=temperature, scale_by_t2=False).mean().item(),
    )


@dataclass(frozen=True)
class DarkKnowledge:
    """Entropy of soft labels and its parts, one value for each labelled item.

    ``entropy = target_entropy + dark`` and ``dark = (1 - p_target) * nontarget_entropy``.

    Attributes:
        entropy: Of the whole prediction, at most ``log C``.
        target_entropy: Of the choice between the target and the rest; says how difficult the item is.
        nontarget_entropy: Of the distribution over the other classes alone; 0 where they have no probability.
        dark: What the soft label says about the other classes, weighted by how often they come up.
    """

    entropy: Tensor
    target_entropy: Tensor
    nontarget_entropy: Tensor
    dark: Tensor

    def mean(self) -> Estimate:
        """Mean of ``dark`` over the items with its 95 % bootstrap interval."""
        return bootstrap_mean(self.dark)


@torch.no_grad()
def dark_knowledge(p_teacher: Tensor, labels: Tensor, unit: Unit = "nats") -> DarkKnowledge:
    r"""What a teacher's probabilities say about the classes that an item does *not* have.

    .. math:: H(p) = H_b(p_t) + (1 - p_t) \, H(p_{\setminus t} / (1 - p_t))

    The last term is the dark knowledge. The whole entropy is no measure of it: it counts how unsure the teacher is of
    the target, and is at most ``log C``, which a hard label can carry too. The split is that of decoupled
    distillation (Zhao et al. 2022, section 3.1, https://arxiv.org/abs/2203.08679).

    Args:
        p_teacher: Probabilities, shape ``(items..., C)``; rows sum to one.
        labels: Class indices, shape ``(items...)``. Items labelled ``-100`` are left out.
        unit: ``"nats"`` or ``"bits"``.

    Returns:
        Tensors of shape ``(n,)`` for the ``n`` labelled items.

    Raises:
        ValueError: If the shapes do not fit, a row is no distribution, a label is out of range, no item is labelled,
            or the unit is unknown.

    Example:
        >>> dark_knowledge(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([0])).dark
        tensor([0.3466], dtype=torch.float64)
    """
    if unit not in ("nats", "bits"):
        raise ValueError(f"`unit` must be 'nats' or 'bits', got {unit!r}.")
    p, y = _labelled("p_teacher", p_teacher, labels)
    # Also rejects NaN. The tolerance is that of probabilities that were rounded to bfloat16.
    if not bool((p >= 0).all()) or not bool(((p.sum(dim=-1) - 1).abs() < 0.02).all()):
        raise ValueError("`p_teacher` must hold probabilities that sum to 1; of logits take `.softmax(dim=-1)` first.")
    p = p / p.sum(dim=-1, keepdim=True)
    target = p.gather(-1, y[:, None])
    others = p.scatter(-1, y[:, None], 0.0)
    rest = others.sum(dim=-1, keepdim=True)  # 1 - p_target would round away what a sure teacher leaves
    nontarget = torch.special.entr(others / rest.clamp_min(torch.finfo(p.dtype).tiny)).sum(dim=-1)
    scale = 1.0 if unit == "nats" else 1 / math.log(2)
    return DarkKnowledge(
        entropy=scale * torch.special.entr(p).sum(dim=-1),
        target_entropy=scale * (torch.special.entr(target) + torch.special.entr(rest)).squeeze(-1),
        nontarget_entropy=scale * nontarget,
        dark=scale * rest.squeeze(-1) * nontarget,
    )


@dataclass(frozen=True)
class InformationGap:
    """What a teacher's output tells about the label beyond its decision, nats.

    Attributes:
        output_information: Mutual information of label and (discretised) output.
        decision_information: Mutual information of label and decision, the class with the highest output.
        gap: Their difference.
        null_gaps: Gaps after permuting the labels among items of equal decision, shape ``(permutations,)``; empty if
            none were asked for. Finite samples make gaps positive without any information, and these show how much.
        n: Number of items; 0 for a table of probabilities.
    """

    output_information: float
    decision_information: float
    gap: float
    null_gaps: Tensor
    n: int

    @property
    def p_value(self) -> float:
        """Share of permutations, counting the data as one, with a gap as large as the one seen; 1 if there are none."""
        as_large = int((self.null_gaps >= self.gap - 1e-12).sum())
        return (1 + as_large) / (1 + self.null_gaps.numel())

    def verdict(self, significance: float = 0.05) -> Verdict:
        """Whether the output holds information beyond the decision. Absence of evidence is no refutation."""
        return "supported" if self.p_value <= significance else "undecided"


@torch.no_grad()
def dark_information_gap(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    bins: int = 4,
    miller_madow: bool = False,
    permutations: int = 200,
    generator: torch.Generator | None = None,
) -> InformationGap:
    r"""Information gap :math:`I(Y; Z) - I(Y; \hat Y) = I(Y; Z | \hat Y) \ge 0` of a teacher on labelled data.

    Neither term is conditioned on the input: given the input, a teacher's output is a constant and holds no
    information at all. Logits are discretised by what a soft label adds to a hard one: the decision, the runner-up,
    and the quantile of the margin between them. Coarser cells lose information, so the true gap is larger; small
    samples make it look larger than it is, which is what the permutations are for.

    Args:
        teacher_logits: Shape ``(items..., C)``, ``C >= 2``.
        labels: Class indices, shape ``(items...)``. Items labelled ``-100`` are left out.
        bins: Number of quantiles of the margin, positive.
        miller_madow: Correct the plug-in informations for the number of cells; the gap may then be negative.
        permutations: Number of permutations of the labels, not negative.
        generator: Source of randomness; by default one with a fixed seed.

    Raises:
        ValueError: If the shapes do not fit, a label is out of range, no item is labelled, or an argument is outside
            its range.
    """
    if not bins >= 1:
        raise ValueError(f"`bins` must be positive, got {bins}.")
    if not permutations >= 0:
        raise ValueError(f"`permutations` must not be negative, got {permutations}.")
    z, y = _labelled("teacher_logits", teacher_logits, labels)
    n, classes = z.shape
    if classes < 2:
        raise ValueError(f"`teacher_logits` must have at least two classes, got {classes}.")
    highest, order = z.topk(2, dim=-1)
    rank = (highest[:, 0] - highest[:, 1]).argsort(stable=True).argsort()
    decision, runner_up, margin_bin = order[:, 0], order[:, 1], rank * bins // n
    cell = ((decision * classes + runner_up) * bins + margin_bin).unique(return_inverse=True)[1]

    def informations(y: Tensor) -> tuple[float, float]:
        joints = (_counts(y, cell, classes), _counts(y, decision, classes))
        output, decided = (_mutual_information(joint / n) for joint in joints)
        if miller_madow:
            output, decided = output + _miller_madow(joints[0]), decided + _miller_madow(joints[1])
        return output, decided

    def permuted() -> Tensor:
        # Among items of equal decision: a null hypothesis that keeps how good the decisions are.
        shuffled = torch.randperm(n, generator=generator)
        shuffled = shuffled[decision[shuffled].argsort(stable=True)]
        result = torch.empty_like(y)
        result[decision.argsort(stable=True)] = y[shuffled]
        return result

    generator = _generator(generator)
    output, decided = informations(y)
    null = []
    for _ in range(permutations):
        null_output, null_decided = informations(permuted())
        null.append(null_output - null_decided)
    return InformationGap(output, decided, output - decided, torch.tensor(null, dtype=torch.float64), n)


@torch.no_grad()
def dark_information_gap_from_joint(joint: Tensor, decisions: Tensor) -> InformationGap:
    r"""Information gap :math:`I(Y; Z) - I(Y; \hat Y)` where the joint distribution of label and output is known.

    Args:
        joint: Probabilities, shape ``(labels, outputs)``; sums to one.
        decisions: Index of the decision that each output leads to, shape ``(outputs,)``.

    Raises:
        ValueError: If the shapes do not fit or ``joint`` is no distribution.

    Example:
        >>> joint = torch.tensor([[0.4, 0.1, 0.0], [0.0, 0.1, 0.4]])
        >>> round(dark_information_gap_from_joint(joint, torch.tensor([0, 1, 1])).gap, 4)
        0.1317
    """
    table = _float64(joint)
    if table.ndim != 2 or decisions.shape != table.shape[1:]:
        raise ValueError(
            "`joint` must have shape (labels, outputs) and `decisions` (outputs,), got "
            f"{tuple(joint.shape)} and {tuple(decisions.shape)}."
        )
    if not bool((table >= 0).all()) or not abs(table.sum().item() - 1) < 1e-4:
        raise ValueError(f"`joint` must hold probabilities that sum to 1, got a sum of {table.sum().item():g}.")
    table = table / table.sum()
    index = decisions.detach().cpu().long().unique(return_inverse=True)[1]
    decided = torch.zeros(len(table), int(index.max()) + 1, dtype=torch.float64).index_add_(1, index, table)
    output, decision = _mutual_information(table), _mutual_information(decided)
    return InformationGap(output, decision, output - decision, torch.empty(0, dtype=torch.float64), 0)


@dataclass(frozen=True)
class TransferEfficiency:
    """Share of the teacher's class information that the student's predictions hold.

    Attributes:
        joint: Mean of ``p_teacher p_student^T`` over the items, shape ``(C_teacher, C_student)``.
        mutual_information: Of that joint distribution, nats.
        teacher_entropy: Of its teacher marginal, nats.
        efficiency: Their ratio, in [0, 1]; 0 for a teacher that always says the same class.
    """

    joint: Tensor
    mutual_information: float
    teacher_entropy: float
    efficiency: float


@torch.no_grad()
def transfer_efficiency(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0
) -> TransferEfficiency:
    r"""Transfer efficiency :math:`\eta = I(J) / H(J_T)` of the joint :math:`J = E_x[p_T(\tau) \, p_S(\tau)^T]`.

    That is: draw an input, a class from the teacher, a class from the student; how much does the second say about the
    first? The efficiency falls towards 0 as the temperature grows, since the draws become uniform. (The mutual
    information of the *logits* is the same at every temperature, and their entropy may be negative, so that their
    ratio says nothing about temperature.)

    Args:
        student_logits: Shape ``(items..., C_student)``.
        teacher_logits: Shape ``(items..., C_teacher)``.
        temperature: Positive.

    Raises:
        ValueError: If the items differ or there are none, or the temperature is not positive.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1] or teacher_logits.shape[:-1].numel() == 0:
        raise ValueError(
            "`student_logits` and `teacher_logits` must be about the same items, and at least one, got shapes "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    q, p = (
        softened_log_softmax(_float64(z), temperature).exp().reshape(-1, z.shape[-1])
        for z in (student_logits, teacher_logits)
    )
    joint = p.T @ q / len(p)
    information = max(_mutual_information(joint), 0.0)  # rounding may leave a little below
    teacher_entropy = torch.special.entr(joint.sum(dim=1)).sum().item()
    efficiency = min(information / teacher_entropy, 1.0) if teacher_entropy > 1e-12 else 0.0
    return TransferEfficiency(joint, information, teacher_entropy, efficiency)


# ---------------------------------------------------------------- how much a student may fit


@torch.no_grad()
def empirical_rademacher(
    predictions: Tensor, *, draws: int = 2**16, generator: torch.Generator | None = None
) -> Estimate:
    r"""Empirical Rademacher complexity :math:`E_\sigma \max_h \frac1n \sum_i \sigma_i h(x_i)` of finitely many ``h``.

    How well the set of hypotheses fits random signs on these points: 1 if it fits all of them, near 0 for a poor set.
    (Bartlett and Mendelson 2002.) A subset never has a larger one; how much smaller it is must be measured.

    Args:
        predictions: Value of each hypothesis on each point, shape ``(H, n)``, usually in [-1, 1].
        draws: All ``2 ** n`` sign vectors are used if there are no more than this, and the result is exact;
            otherwise so many random ones.
        generator: Source of randomness; by default one with a fixed seed.

    Returns:
        The complexity; its interval is the 95 % interval of the random draws (a point if the result is exact), and
        ``n`` the number of sign vectors.

    Raises:
        ValueError: If ``predictions`` has another shape or is empty, or ``draws`` is below 2.
    """
    values = _float64(predictions)
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"`predictions` must have shape (hypotheses, points), got {tuple(predictions.shape)}.")
    if not draws >= 2:
        raise ValueError(f"`draws` must be at least 2, got {draws}.")
    n = values.shape[1]
    exact = n < 63 and 2**n <= draws
    total = 2**n if exact else draws
    generator = _generator(generator)
    bits = torch.arange(n)
    maxima = []
    for start in range(0, total, 4096):  # in parts, so that many hypotheses fit into memory
        count = min(4096, total - start)
        if exact:
            ones = torch.arange(start, start + count)[:, None] >> bits & 1
        else:
            ones = torch.randint(2, (count, n), generator=generator)
        maxima.append(((2 * ones - 1).double() @ values.T).amax(dim=1) / n)
    best = torch.cat(maxima)
    value = best.mean().item()
    margin = 0.0 if exact else 1.96 * best.std().item() / math.sqrt(total)
    return Estimate(value, value - margin, value + margin, total)


@dataclass(frozen=True)
class SampleEfficiency:
    """Test errors of training alone and of distillation by number of training samples.

    Attributes:
        sizes: Numbers of training samples.
        control_errors: Shape ``(sizes, seeds)``.
        distilled_errors: Shape ``(sizes, seeds)``.
        gains: Error of the control minus error of distillation, paired by seed, for each size.
        control_rate: ``b`` of the least-squares fit ``error = a * n ** -b`` in logarithms; NaN if an error is 0.
        distilled_rate: The same for distillation.
    """

    sizes: tuple[int, ...]
    control_errors: Tensor
    distilled_errors: Tensor
    gains: tuple[Estimate, ...]
    control_rate: float
    distilled_rate: float


def sample_efficiency_curve(
    fit_control: Callable[[int, int], float],
    fit_distilled: Callable[[int, int], float],
    sizes: Sequence[int],
    seeds: Sequence[int],
) -> SampleEfficiency:
    """Does a teacher save samples? Train with and without it on more and more of them, and compare.

    Args:
        fit_control: Trains on labels alone with ``(samples, seed)`` and returns the test error.
        fit_distilled: Trains with the teacher in the same way.
        sizes: Two or more increasing numbers of training samples.
        seeds: One or more seeds; both functions get each of them.

    Raises:
        ValueError: If ``sizes`` does not increase or is too short, or there is no seed.
    """
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"`sizes` must be two or more increasing positive numbers, got {list(sizes)}.")
    if len(seeds) == 0:
        raise ValueError("`seeds` must hold at least one seed, got none.")
    control, distilled = (
        torch.tensor([[fit(size, seed) for seed in seeds] for size in sizes], dtype=torch.float64)
        for fit in (fit_control, fit_distilled)
    )
    gains = tuple(bootstrap_mean(difference) for difference in control - distilled)
    return SampleEfficiency(tuple(sizes), control, distilled, gains, _decay(sizes, control), _decay(sizes, distilled))


def _decay(sizes: Sequence[int], errors: Tensor) -> float:
    """Exponent ``b`` of ``a * n ** -b``, fitted to the mean errors in logarithms."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x, y = x - x.mean(), errors.mean(dim=1).log()
    return -((x * y).sum() / x.square().sum()).item()


# ---------------------------------------------------------------- what temperature does to gradients


@dataclass(frozen=True)
class GradientScale:
    """Mean norm over the items of the gradient of the forward KL with respect to the student's logits.

    Attributes:
        temperatures: Where it was measured.
        scaled: Norm for ``T^2 KL``.
        unscaled: Norm for the plain KL; the same as ``T^2 KL`` with a weight of ``1 / T^2``.
    """

    temperatures: tuple[float, ...]
    scaled: tuple[float, ...]
    unscaled: tuple[float, ...]

    def spread(self, low: float = 2.0, high: float = 20.0) -> float:
        """Largest over smallest scaled norm among the temperatures in ``[low, high]``; 1 is perfectly flat.

        Raises:
            ValueError: If no temperature is in the interval.
        """
        inside = [norm for tau, norm in zip(self.temperatures, self.scaled, strict=True) if low <= tau <= high]
        if not inside:
            raise ValueError(f"No temperature of {list(self.temperatures)} is in [{low}, {high}].")
        return 1.0 if max(inside) == 0 else max(inside) / max(min(inside), torch.finfo(torch.float64).tiny)


@torch.no_grad()
def gradient_scale_curve(
    student_logits: Tensor, teacher_logits: Tensor, temperatures: Sequence[float]
) -> GradientScale:
    r"""How large the gradient of the soft-target loss is, by temperature.

    The gradient is :math:`\tau (p_S - p_T)` with the factor :math:`\tau^2` and :math:`(p_S - p_T) / \tau` without it
    (Hinton et al. 2015, section 2.1, https://arxiv.org/abs/1503.02531). The first tends to the centred difference of
    the logits divided by ``C``, the second vanishes.

    Args:
        student_logits: Shape ``(items..., C)``.
        teacher_logits: Same shape.
        temperatures: One or more, positive.

    Raises:
        ValueError: If the shapes differ, or a temperature is missing or not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`student_logits` and `teacher_logits` must have the same shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    if len(temperatures) == 0:
        raise ValueError("`temperatures` must hold at least one temperature, got none.")
    student, teacher = _float64(student_logits), _float64(teacher_logits)
    taus = tuple(float(tau) for tau in temperatures)
    distances = [
        (softened_log_softmax(student, tau).exp() - softened_log_softmax(teacher, tau).exp()).norm(dim=-1).mean().item()
        for tau in taus
    ]
    return GradientScale(
        taus,
        tuple(tau * distance for tau, distance in zip(taus, distances, strict=True)),
        tuple(distance / tau for tau, distance in zip(taus, distances, strict=True)),
    )


# ---------------------------------------------------------------- two changes at once


def synergy(
    base: float | Sequence[float],
    kd: float | Sequence[float],
    quant: float | Sequence[float],
    joint: float | Sequence[float],
    n_boot: int = 2000,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Whether two changes together do more than the sum of what each does alone: ``joint - kd - quant + base``.

    The interaction of a 2 x 2 design over seeds. ``verdict()`` says whether it is above zero.

    Args:
        base: Score without either change, a number or one per seed; higher is better.
        kd: Score with the first change (distillation), for the same seeds.
        quant: Score with the second change (quantization), for the same seeds.
        joint: Score with both.
        n_boot: Number of bootstrap samples, positive.
        generator: Source of randomness; by default one with a fixed seed.

    Raises:
        ValueError: If the numbers of seeds differ.

    Example:
        >>> round(synergy([0.76, 0.75], [0.75, 0.76], [0.73, 0.72], [0.735, 0.75]).value, 4)
        0.0175
    """
    scores = [torch.as_tensor(values, dtype=torch.float64).flatten() for values in (base, kd, quant, joint)]
    if len({values.numel() for values in scores}) != 1:
        raise ValueError(
            "`base`, `kd`, `quant` and `joint` must hold one score for each of the same seeds, got "
            f"{[values.numel() for values in scores]} scores."
        )
    return bootstrap_mean(scores[3] - scores[1] - scores[2] + scores[0], resamples=n_boot, generator=generator)


# ---------------------------------------------------------------- helpers


def _float64(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _generator(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _labelled(name: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(n, C)`` and labels ``(n,)`` of the labelled items."""
    if values.ndim < 1 or labels.shape != values.shape[:-1]:
        raise ValueError(
            f"`labels` must have the shape of the items of `{name}`, {tuple(values.shape[:-1])}, got "
            f"{tuple(labels.shape)}."
        )
    rows, y = _float64(values).reshape(-1, values.shape[-1]), labels.detach().cpu().long().reshape(-1)
    rows, y = rows[y != UNLABELLED], y[y != UNLABELLED]
    if len(y) == 0:
        raise ValueError(f"`labels` must label at least one item, but all are {UNLABELLED}.")
    if int(y.min()) < 0 or int(y.max()) >= rows.shape[1]:
        raise ValueError(f"`labels` must be in [0, {rows.shape[1]}), got {int(y.min())} to {int(y.max())}.")
    return rows, y


def _counts(rows: Tensor, columns: Tensor, classes: int) -> Tensor:
    """Contingency table, shape ``(classes, number of columns)``."""
    width = int(columns.max()) + 1
    return torch.bincount(rows * width + columns, minlength=classes * width).reshape(classes, width).double()


def _mutual_information(joint: Tensor) -> float:
    """Mutual information of the two indices of a probability table, nats."""
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent).log(), 0).sum().item()


def _miller_madow(counts: Tensor) -> float:
    """What the plug-in mutual information of a table of counts is corrected by (Miller 1955)."""
    rows, columns, cells = (int((c > 0).sum()) for c in (counts.sum(dim=1), counts.sum(dim=0), counts))
    return (rows + columns - cells - 1) / (2 * counts.sum().item())
