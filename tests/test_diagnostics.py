import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import entropy, ttest_1samp
from sklearn.metrics import mutual_info_score

from lightning_distill.diagnostics import (
    Estimate,
    bootstrap_mean,
    cross_entropy_parts,
    dark_information_gap,
    dark_information_gap_from_joint,
    dark_knowledge,
    empirical_rademacher,
    gradient_scale_curve,
    sample_efficiency_curve,
    synergy,
    transfer_efficiency,
)
from lightning_distill.losses.soft_targets import kl_divergence

API = "lightning_distill.diagnostics."


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.3, "supported"), (-0.3, -0.1, "refuted"), (-0.1, 0.3, "undecided")]
)
def test_verdict_needs_the_whole_interval(low, high, expected):
    assert Estimate(0.5 * (low + high), low, high, 5).verdict() == expected
    assert Estimate(0.5 * (low + high) + 7, low + 7, high + 7, 5).verdict(7.0) == expected


def test_bootstrap_interval_agrees_with_student_t_for_many_values():
    values = logits(200, scale=3.0) + 1.5
    estimate = bootstrap_mean(values)
    expected = ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.n == 200
    assert estimate.low == pytest.approx(expected.low, abs=0.05)
    assert estimate.high == pytest.approx(expected.high, abs=0.05)
    assert bootstrap_mean(values) == estimate
    wider = bootstrap_mean(values, confidence=0.99)
    assert wider.low < estimate.low < estimate.high < wider.high


def test_one_value_has_no_interval():
    assert bootstrap_mean([0.5]) == Estimate(0.5, -math.inf, math.inf, 1)
    assert bootstrap_mean([0.5]).verdict() == "undecided"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "`values` must be one or more finite numbers"),
        ({"values": [1.0, math.nan]}, "`values` must be one or more finite numbers"),
        ({"values": [1.0], "resamples": 0}, "`resamples` must be positive, got 0"),
        ({"values": [1.0], "confidence": 1.0}, "`confidence` must be between 0 and 1, got 1.0"),
    ],
)
def test_bootstrap_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(**arguments)


# ---------------------------------------------------------------- soft labels


@pytest.mark.chapter("A05", api=API + "cross_entropy_parts")
def test_soft_cross_entropy_is_teacher_entropy_plus_divergence():
    student, teacher = logits(6, 4, seed=1), logits(6, 4, seed=2)
    parts = cross_entropy_parts(student, teacher, temperature=3.0)
    p, q = softmax(teacher.numpy() / 3, axis=-1), softmax(student.numpy() / 3, axis=-1)
    assert parts.cross_entropy == pytest.approx(-(p * np.log(q)).sum(axis=-1).mean(), rel=1e-12)
    assert parts.teacher_entropy == pytest.approx(entropy(p, axis=-1).mean(), rel=1e-12)
    assert parts.divergence == pytest.approx(rel_entr(p, q).sum(axis=-1).mean(), rel=1e-12)
    assert parts.cross_entropy == pytest.approx(parts.teacher_entropy + parts.divergence, rel=1e-12)
    assert cross_entropy_parts(teacher, teacher).divergence == pytest.approx(0, abs=1e-15)


@pytest.mark.chapter("A06", api=API + "dark_knowledge")
def test_dark_knowledge_matches_golden(golden):
    case = golden("dark_knowledge_entropy")
    label = torch.tensor([int(case.inputs["target"])])
    for unit, scale in (("nats", 1.0), ("bits", 1 / math.log(2))):
        report = dark_knowledge(case.inputs["p_teacher"][None], label, unit)
        assert report.entropy.item() == pytest.approx(case.expected[f"entropy_{unit}"], rel=1e-9)
        assert report.target_entropy.item() == pytest.approx(scale * case.expected["binary_entropy"], rel=1e-9)
        assert report.nontarget_entropy.item() == pytest.approx(scale * case.expected["nontarget_entropy"], rel=1e-9)
        assert report.dark.item() == pytest.approx(scale * case.expected["dark_nats"], rel=1e-9)


@pytest.mark.chapter("A06")
@pytest.mark.erratum("ERR-04")
def test_entropy_of_a_soft_label_never_exceeds_that_of_a_hard_label_but_its_dark_part_tells_teachers_apart():
    p = torch.distributions.Dirichlet(torch.full((10,), 0.5, dtype=torch.float64)).sample((20_000,))
    labels = p.argmax(dim=-1)
    report = dark_knowledge(p, labels)
    assert 0.5 * math.log(10) < report.entropy.max() < math.log(10)  # "extra" information would need more than log K
    torch.testing.assert_close(report.entropy, report.target_entropy + report.dark)
    # Two teachers of nearly equal entropy: one is torn between two classes, the other ranks all the wrong ones.
    torn = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]])
    ranking = torch.tensor([[0.842, 0.0395, 0.0395, 0.0395, 0.0395]])
    first, second = (dark_knowledge(q.double(), torch.tensor([0])) for q in (torn, ranking))
    assert first.entropy.item() > 0.6
    assert second.entropy.item() == pytest.approx(first.entropy.item(), rel=0.1)
    assert first.dark.item() == 0.0
    assert second.dark.item() > 0.2


@pytest.mark.chapter("A06")
def test_dark_knowledge_at_the_ends():
    classes = 7
    onehot = torch.eye(classes, dtype=torch.float64)
    report = dark_knowledge(onehot, torch.arange(classes))
    assert torch.stack([report.entropy, report.nontarget_entropy, report.dark]).abs().max() == 0
    uniform = torch.full((2, classes), 1 / classes, dtype=torch.float64)
    expected = (classes - 1) / classes * math.log(classes - 1)
    torch.testing.assert_close(dark_knowledge(uniform, torch.tensor([0, 3])).dark, torch.full((2,), expected).double())
    assert dark_knowledge(torch.ones(1, 1), torch.tensor([0])).dark.tolist() == [0.0]
    tiny = torch.tensor([[1.0, 1e-300, 1e-300]], dtype=torch.float64)
    assert dark_knowledge(tiny, torch.tensor([0])).nontarget_entropy.item() == pytest.approx(math.log(2))


def test_dark_knowledge_leaves_unlabelled_items_out_and_takes_half_precision():
    p = logits(2, 3, 5).softmax(dim=-1)
    labels = torch.tensor([[0, -100, 2], [-100, 4, 1]])
    report = dark_knowledge(p, labels)
    keep = labels != -100
    torch.testing.assert_close(report.dark, dark_knowledge(p[keep], labels[keep]).dark)
    assert report.mean().n == 4
    assert report.mean().low <= report.mean().value <= report.mean().high
    torch.testing.assert_close(dark_knowledge(p.bfloat16(), labels).dark, report.dark, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("p", "labels", "unit", "message"),
    [
        (torch.ones(2, 3), torch.zeros(2, dtype=torch.long), "nats", r"must hold probabilities .*\.softmax\(dim=-1\)"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), "nats", "must hold probabilities"),
        (torch.tensor([[math.nan, 1.0]]), torch.tensor([0]), "nats", "must hold probabilities"),
        (torch.ones(2, 1), torch.zeros(3, dtype=torch.long), "nats", r"`labels` must have the shape .* \(2,\), got"),
        (torch.ones(1, 1), torch.tensor([1]), "nats", r"`labels` must be in \[0, 1\), got 1 to 1"),
        (torch.ones(1, 1), torch.tensor([-100]), "nats", "`labels` must label at least one item, but all are -100"),
        (torch.ones(1, 1), torch.tensor([0]), "bit", "`unit` must be 'nats' or 'bits', got 'bit'"),
    ],
)
def test_dark_knowledge_rejects(p, labels, unit, message):
    with pytest.raises(ValueError, match=message):
        dark_knowledge(p, labels, unit)


# ---------------------------------------------------------------- information


def labels_and_logits(n, *, informative, seed=0):
    """A teacher of three classes whose runner-up is the label where the decision is wrong, or says nothing."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.4
    shift = torch.randint(1, 3, (n,), generator=generator)
    decision = torch.where(wrong, (y + shift) % 3, y)
    random_other = (decision + torch.randint(1, 3, (n,), generator=generator)) % 3
    runner_up = torch.where(wrong, y, random_other) if informative else random_other
    z = torch.zeros(n, 3, dtype=torch.float64)
    z[torch.arange(n), runner_up] = 1.0
    z[torch.arange(n), decision] = 2.0 + torch.rand(n, generator=generator, dtype=torch.float64)
    return z, y


@pytest.mark.chapter("A07", api=API + "dark_information_gap")
def test_information_gap_of_a_known_joint_matches_golden(golden):
    case = golden("dark_information_gap")
    report = dark_information_gap_from_joint(case.inputs["joint_Y_Z"], case.inputs["yhat_of_z"].long())
    assert report.output_information == pytest.approx(case.expected["I_Y_Z"], rel=1e-9)
    assert report.decision_information == pytest.approx(case.expected["I_Y_Yhat"], rel=1e-9)
    assert report.gap == pytest.approx(case.expected["dark"], rel=1e-9)
    merged = torch.tensor([[0.4, 0.1], [0.1, 0.4]])
    assert dark_information_gap_from_joint(merged, torch.tensor([5, 9])).gap == pytest.approx(0, abs=1e-15)


@pytest.mark.chapter("A07")
def test_information_gap_of_samples_matches_sklearn():
    z, y = labels_and_logits(500, informative=True)
    report = dark_information_gap(z, y, bins=1, permutations=0)
    order = z.argsort(dim=-1, descending=True)
    cell = order[:, 0] * 3 + order[:, 1]
    assert report.output_information == pytest.approx(mutual_info_score(y, cell), rel=1e-12)
    assert report.decision_information == pytest.approx(mutual_info_score(y, order[:, 0]), rel=1e-12)
    assert report.n == 500
    assert report.p_value == 1.0
    margin = z.topk(2, dim=-1).values.diff(dim=-1).squeeze(-1).neg().numpy()
    quartile = np.searchsorted(np.quantile(margin, [0.25, 0.5, 0.75]), margin)
    finer = dark_information_gap(z, y, bins=4, permutations=0)
    assert finer.output_information == pytest.approx(mutual_info_score(y, cell.numpy() * 4 + quartile), rel=1e-12)
    assert finer.gap > report.gap


@pytest.mark.chapter("A07")
def test_information_gap_is_told_from_chance_by_permutation():
    informative = dark_information_gap(*labels_and_logits(600, informative=True), permutations=99)
    assert informative.verdict() == "supported"
    assert informative.p_value == pytest.approx(0.01)
    assert informative.gap > 3 * informative.null_gaps.max()
    chance = dark_information_gap(*labels_and_logits(600, informative=False), permutations=99)
    assert chance.gap > 0  # a finite sample always shows a gap
    assert chance.verdict() == "undecided"
    assert chance.null_gaps.min() < chance.gap < chance.null_gaps.max()


def test_permutations_keep_the_information_of_the_decision():
    """The null gaps therefore have the mean of a chi-square: (labels - 1) * (extra cells) / (2 n)."""
    z, y = labels_and_logits(900, informative=False)
    report = dark_information_gap(z, y, bins=1, permutations=200)
    expected = (3 - 1) * 3 / (2 * 900)  # one more cell in each of three decisions
    assert report.null_gaps.mean().item() == pytest.approx(expected, rel=0.2)
    corrected = dark_information_gap(z, y, bins=1, permutations=200, miller_madow=True)
    assert abs(corrected.null_gaps.mean().item()) < 0.2 * expected


def test_permutations_leave_a_teacher_that_is_always_right_without_any_gap():
    z, _ = labels_and_logits(300, informative=False)
    right = dark_information_gap(z, z.argmax(dim=-1), permutations=20)
    assert right.gap == pytest.approx(0, abs=1e-12)
    assert right.null_gaps.abs().max() < 1e-12
    assert right.p_value == 1.0


def test_miller_madow_corrects_each_entropy_by_its_occupied_cells():
    z, y = labels_and_logits(200, informative=True)
    order = z.argsort(dim=-1, descending=True)
    cell = order[:, 0] * 3 + order[:, 1]

    def corrected(values):  # Miller (1955): plug-in entropy plus (cells - 1) / (2 n)
        counts = np.unique(values.numpy(), return_counts=True)[1]
        return entropy(counts / 200) + (len(counts) - 1) / 400

    report = dark_information_gap(z, y, bins=1, permutations=0, miller_madow=True)
    for found, other in ((report.output_information, cell), (report.decision_information, order[:, 0])):
        assert found == pytest.approx(corrected(y) + corrected(other) - corrected(y * 100 + other), rel=1e-12)


@pytest.mark.chapter("A07")
@pytest.mark.erratum("ERR-05")
def test_printed_information_gap_is_zero_for_every_teacher(golden):
    """I(Y; Z | X) with a teacher that is a function of X: within each X there is one Z, and no information."""
    joint = golden("dark_information_gap").inputs["joint_Y_Z"]
    inputs = joint.shape[1]  # one input for each output of the teacher
    conditional = 0.0
    for x in range(inputs):
        table = np.zeros((2, inputs))
        table[:, x] = joint[:, x] / joint[:, x].sum()  # the joint of Y and Z given X = x
        independent = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True)
        conditional += joint[:, x].sum().item() * rel_entr(table, independent).sum()
    assert conditional == pytest.approx(0, abs=1e-15)
    assert dark_information_gap_from_joint(joint, torch.arange(inputs) > 0).gap > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 0}, "`bins` must be positive, got 0"),
        ({"permutations": -1}, "`permutations` must not be negative, got -1"),
        ({"teacher_logits": torch.zeros(4, 1)}, "must have at least two classes, got 1"),
        ({"labels": torch.full((4,), -100)}, "must label at least one item"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"must have the shape of the items of `teacher_logits`, \(4,\)"),
    ],
)
def test_information_gap_rejects(arguments, message):
    valid = {"teacher_logits": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        dark_information_gap(**valid | arguments)


@pytest.mark.parametrize(
    ("joint", "decisions", "message"),
    [
        (torch.full((2, 2), 0.3), torch.tensor([0, 1]), "must hold probabilities that sum to 1, got a sum of 1.2"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0, 1]), "must hold probabilities that sum to 1"),
        (
            torch.full((2, 2), 0.25),
            torch.tensor([0]),
            r"must have shape \(labels, outputs\) .* got \(2, 2\) and \(1,\)",
        ),
    ],
)
def test_information_gap_from_joint_rejects(joint, decisions, message):
    with pytest.raises(ValueError, match=message):
        dark_information_gap_from_joint(joint, decisions)


@pytest.mark.chapter("A11", api=API + "transfer_efficiency")
def test_transfer_efficiency_matches_golden(golden):
    case = golden("information_transfer_efficiency")
    report = transfer_efficiency(
        case.inputs["student_logits"], case.inputs["teacher_logits"], temperature=case.inputs["tau"]
    )
    torch.testing.assert_close(report.joint, case.expected["joint"], rtol=1e-9, atol=1e-11)
    assert report.mutual_information == pytest.approx(case.expected["mutual_information"], rel=1e-9)
    assert report.teacher_entropy == pytest.approx(case.expected["teacher_marginal_entropy"], rel=1e-9)
    assert report.efficiency == pytest.approx(case.expected["eta"], rel=1e-9)


@pytest.mark.chapter("A11")
def test_transfer_efficiency_at_the_ends():
    sure = 1e4 * torch.eye(4, dtype=torch.float64)
    assert transfer_efficiency(sure, sure).efficiency == pytest.approx(1.0)
    assert transfer_efficiency(sure[:, [1, 0, 3, 2]], sure).efficiency == pytest.approx(1.0)  # renamed classes
    assert transfer_efficiency(torch.zeros(4, 4), sure).efficiency == pytest.approx(0.0, abs=1e-12)
    assert transfer_efficiency(sure, sure[:1].expand(4, 4)).efficiency == 0.0  # nothing to transfer
    assert 0 <= transfer_efficiency(logits(2, 3, 5, seed=1), logits(2, 3, 4, seed=2)).efficiency <= 1
    with pytest.raises(ValueError, match=r"about the same items, and at least one, got shapes \(2, 3\) and \(3, 3\)"):
        transfer_efficiency(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least one, got shapes"):
        transfer_efficiency(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.chapter("A11")
@pytest.mark.erratum("ERR-07")
def test_printed_transfer_efficiency_does_not_depend_on_temperature_and_ours_falls_with_it(golden):
    inputs = golden("information_transfer_efficiency").inputs
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    # Mutual information is the same for Z and Z / tau: here of ranks of one logit, by the plug-in estimate.
    z = logits(400, 2, seed=3)
    ranked = [[np.digitize(v, np.quantile(v, [0.25, 0.5, 0.75])) for v in (z / tau).T.numpy()] for tau in (1.0, 10.0)]
    assert mutual_info_score(*ranked[0]) == mutual_info_score(*ranked[1])
    # A differential entropy can be negative, and a ratio to it then means nothing: a Gaussian logit at tau = 20.
    assert 0.5 * math.log(2 * math.pi * math.e * (2 / 20) ** 2) < 0
    etas = [transfer_efficiency(student, teacher, temperature=tau).efficiency for tau in (0.1, 1.0, 4.0, 1000.0)]
    assert etas == sorted(etas, reverse=True)
    expected = []
    for tau in (0.1, 1.0, 4.0, 1000.0):
        joint = softmax(teacher.numpy() / tau, axis=-1).T @ softmax(student.numpy() / tau, axis=-1) / 3
        rows, columns = joint.sum(axis=1), joint.sum(axis=0)
        expected.append(rel_entr(joint, np.outer(rows, columns)).sum() / entropy(rows))
    assert etas == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert etas == pytest.approx([1.0, 0.2323, 0.0031, 0.0], abs=1e-4)


# ---------------------------------------------------------------- hypothesis sets


@pytest.mark.chapter("A08", api=API + "empirical_rademacher")
def test_rademacher_complexity_matches_golden_and_enumeration(golden):
    case = golden("empirical_rademacher")
    result = empirical_rademacher(case.inputs["predictions"])
    assert result == Estimate(pytest.approx(case.expected["rademacher"], rel=1e-9), result.value, result.value, 16)
    values = logits(5, 7).numpy()
    expected = np.mean([np.max(values @ np.array(signs)) / 7 for signs in itertools.product((-1, 1), repeat=7)])
    assert empirical_rademacher(torch.from_numpy(values)).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.chapter("A08")
def test_random_signs_agree_with_all_of_them():
    values = logits(30, 12).tanh()
    exact = empirical_rademacher(values)
    sampled = empirical_rademacher(values, draws=4000)
    assert (exact.n, sampled.n) == (4096, 4000)
    assert exact.low == exact.high
    assert sampled.low < exact.value < sampled.high
    assert sampled.high - sampled.low < 0.02
    assert 0 < empirical_rademacher(logits(3, 100).tanh(), draws=500).value < 0.2  # more points than bits in a word


@pytest.mark.chapter("A08")
def test_a_subset_is_never_more_complex():
    values = logits(12, 8).sign()
    complexities = [empirical_rademacher(values[:k]).value for k in range(1, 13)]
    assert complexities == sorted(complexities)
    assert complexities[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.chapter("A08")
@pytest.mark.erratum("ERR-06")
def test_staying_close_to_the_teacher_need_not_shrink_the_hypothesis_set():
    """Where the teacher says 0.5, every labelling of the points is 2e-4 nats away."""
    delta = 0.01
    everything = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    p_one = 0.5 + delta * everything  # probability of the positive class on six points, one row per hypothesis
    student = torch.stack([p_one, 1 - p_one], dim=-1).log()
    divergence = kl_divergence(student, torch.zeros_like(student))
    assert divergence.max().item() == pytest.approx(2.0e-4, rel=0.01)
    in_ball = (divergence < 3e-4).all(dim=1)
    assert in_ball.all()
    assert empirical_rademacher((p_one[in_ball] - 0.5).sign()).value == 1.0  # all labellings: shattered as before


@pytest.mark.parametrize(
    ("predictions", "draws", "message"),
    [
        (torch.ones(3), 100, r"must have shape \(hypotheses, points\), got \(3,\)"),
        (torch.ones(0, 3), 100, r"must have shape \(hypotheses, points\), got \(0, 3\)"),
        (torch.ones(1, 3), 1, "`draws` must be at least 2, got 1"),
    ],
)
def test_rademacher_rejects(predictions, draws, message):
    with pytest.raises(ValueError, match=message):
        empirical_rademacher(predictions, draws=draws)


@pytest.mark.chapter("A08", api=API + "sample_efficiency_curve")
def test_sample_efficiency_finds_rates_and_paired_gains():
    def control(n, seed):
        return 0.9 * n**-0.5 * (1 + 0.01 * seed)

    def distilled(n, seed):
        return 0.5 * n**-0.4 * (1 + 0.01 * seed) if n < 1000 else control(n, seed) + 0.05

    report = sample_efficiency_curve(control, distilled, sizes=[10, 100, 1000], seeds=[0, 1, 2, 3])
    assert report.control_rate == pytest.approx(0.5)
    assert report.control_errors.shape == report.distilled_errors.shape == (3, 4)
    assert report.control_errors[1, 3].item() == control(100, 3)
    assert [gain.verdict() for gain in report.gains] == ["supported", "supported", "refuted"]
    assert report.gains[2].value == pytest.approx(-0.05)
    assert report.distilled_rate < report.control_rate


@pytest.mark.parametrize("sizes", [[10], [10, 10], [20, 10], [0, 10]])
def test_sample_efficiency_rejects_sizes(sizes):
    with pytest.raises(ValueError, match="`sizes` must be two or more increasing positive numbers"):
        sample_efficiency_curve(lambda n, seed: 0.5, lambda n, seed: 0.5, sizes=sizes, seeds=[0])
    with pytest.raises(ValueError, match="`seeds` must hold at least one seed"):
        sample_efficiency_curve(lambda n, seed: 0.5, lambda n, seed: 0.5, sizes=[1, 2], seeds=[])


# ---------------------------------------------------------------- gradients


@pytest.mark.chapter("A04", "A54", api=API + "gradient_scale_curve")
def test_gradient_scale_is_that_of_autograd():
    student, teacher = logits(3, 6, seed=1).requires_grad_(), logits(3, 6, seed=2)
    taus = [0.5, 1.0, 4.0, 50.0]
    curve = gradient_scale_curve(student, teacher, taus)
    for i, tau in enumerate(taus):
        for found, scaled in ((curve.scaled, True), (curve.unscaled, False)):
            loss = kl_divergence(student, teacher, temperature=tau, scale_by_t2=scaled).sum()
            (gradient,) = torch.autograd.grad(loss, student)
            assert found[i] == pytest.approx(gradient.norm(dim=-1).mean().item(), rel=1e-9)


@pytest.mark.chapter("A54")
def test_gradient_scale_is_flat_with_the_squared_temperature_and_vanishes_without():
    student, teacher = logits(32, 10, seed=1), logits(32, 10, seed=2)
    curve = gradient_scale_curve(student, teacher, [1, 2, 4, 8, 16, 20, 1e4])
    assert 1 < curve.spread() < 3
    assert curve.unscaled[5] < curve.unscaled[1] / 50
    difference = student - teacher
    limit = (difference - difference.mean(dim=-1, keepdim=True)).norm(dim=-1).mean().item() / 10
    assert curve.scaled[-1] == pytest.approx(limit, rel=1e-3)
    assert gradient_scale_curve(teacher, teacher, [2.0, 4.0]).spread() == 1.0
    with pytest.raises(ValueError, match=r"No temperature of \[1.0, 30.0\] is in \[2.0, 20.0\]"):
        gradient_scale_curve(student, teacher, [1, 30]).spread()


@pytest.mark.parametrize(
    ("teacher", "temperatures", "message"),
    [
        (torch.zeros(2, 4), [1.0], r"must have the same shape, got \(2, 3\) and \(2, 4\)"),
        (torch.zeros(2, 3), [], "`temperatures` must hold at least one temperature"),
        (torch.zeros(2, 3), [0.0], "`temperature` must be positive and finite, got 0.0"),
    ],
)
def test_gradient_scale_rejects(teacher, temperatures, message):
    with pytest.raises(ValueError, match=message):
        gradient_scale_curve(torch.zeros(2, 3), teacher, temperatures)


# ---------------------------------------------------------------- two changes at once


@pytest.mark.chapter("S01", api=API + "synergy")
def test_synergy_matches_golden_and_needs_more_than_one_seed(golden):
    case = golden("synergy")
    effect = synergy(**case.inputs)
    assert effect.value == pytest.approx(case.expected["synergy"], rel=1e-9)
    assert effect.verdict() == "undecided"


@pytest.mark.chapter("S01")
@pytest.mark.parametrize(("interaction", "verdict"), [(0.05, "supported"), (0.0, "undecided"), (-0.05, "refuted")])
def test_synergy_finds_an_interaction_under_seed_noise(interaction, verdict):
    noise = logits(4, 10, seed=7, scale=0.005).numpy()
    seeds = logits(10, seed=8, scale=0.1).numpy()  # differences between seeds cancel, as they are paired
    base, kd, quant, joint = 0.7 + seeds + noise
    effect = synergy(base, kd + 0.02, quant - 0.03, joint + 0.02 - 0.03 + interaction)
    assert effect.n == 10
    assert effect.value == pytest.approx(interaction, abs=0.01)
    assert effect.verdict() == verdict


def test_synergy_rejects_different_numbers_of_seeds():
    with pytest.raises(ValueError, match=r"one score for each of the same seeds, got \[2, 1, 1, 1\] scores"):
        synergy([0.1, 0.2], 0.1, 0.1, 0.1)
