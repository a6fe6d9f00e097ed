"""Distances against numbers computed elsewhere and against their definitions, written anew in NumPy."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import cdist, pdist
from scipy.stats import norm

from lightning_distill.losses.distances import (
    CKA,
    CRD,
    MMD,
    RKD,
    VID,
    ContentPosition,
    Correlation,
    HierarchicalContext,
    LowRank,
    PooledSequence,
    Procrustes,
    Spectrum,
    angle_relation,
    attention_transfer,
    cosine,
    critic_loss,
    distance_relation,
    dual_norm,
    feature_correlation,
    gaussian_nll,
    layer_norm,
    linear_cka,
    low_rank_distance,
    metric_matching_transform,
    mmd2,
    mse,
    neuron_selectivity,
    normalized_mse,
    pool_sequence,
    probabilistic_transfer,
    procrustes,
    relations,
    similarity_preserving,
    spectral_distance,
    split_content_position,
    top_right_singular_vectors,
)

API = "lightning_distill.losses.distances."


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value, expected, rtol=1e-9, atol=1e-11):
    value, expected = (torch.as_tensor(side, dtype=torch.float64) for side in (value, expected))
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- at every position


@pytest.mark.chapter("A36", api=API + "mse")
def test_hidden_states_match_golden(golden):
    case = golden("hidden_l2")
    projected = case.inputs["H_S"] @ case.inputs["W"].T
    values = mse(projected, case.inputs["H_T"])
    close(values.mean(), case.expected["mean"])
    close(values * 6, case.expected["sum_per_token"])
    close(values[case.inputs["mask"].bool()].mean(), case.expected["masked_mean"])


@pytest.mark.chapter("A37", api=API + "cosine")
def test_cosines_match_golden(golden):
    case = golden("hidden_cosine")
    projected = case.inputs["H_S"] @ case.inputs["W"].T
    close(cosine(projected, case.inputs["H_T"]), case.expected["per_token"])
    close(cosine(3 * projected, 0.1 * case.inputs["H_T"]).mean(), case.expected["mean"])


@pytest.mark.chapter("A36", "A37", api=API + "normalized_mse")
def test_squared_distance_of_unit_vectors_is_twice_the_cosine_distance():
    student, teacher = features(4, 3, 5, seed=1), features(4, 3, 5, seed=2)
    close(normalized_mse(student, teacher), 2 * cosine(student, teacher))


def test_a_vector_without_direction_is_no_target_and_gets_no_gradient():
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    values = cosine(student, teacher)
    values.sum().backward()
    assert values.tolist() == [1.0, 0.0]
    assert student.grad.abs().max() == 0


@pytest.mark.chapter("A36")
@pytest.mark.erratum("ERR-15")
def test_a_projection_of_the_teacher_can_bring_the_loss_to_zero_and_one_of_the_student_cannot():
    """Printed: |H_S - W H_T|, with W on the teacher's side; weight decay takes both sides to nothing."""
    teacher = features(64, 6)

    def trained(loss_of, weight_shape):
        hidden, weight = (
            (0.5 * features(*shape, seed=seed)).requires_grad_() for seed, shape in ((1, (64, 4)), (2, weight_shape))
        )
        optimizer = torch.optim.SGD([hidden, weight], lr=0.5, weight_decay=0.02)
        for _ in range(2000):
            optimizer.zero_grad()
            loss_of(hidden, weight).backward()
            optimizer.step()
        return hidden.detach().norm(), loss_of(hidden, weight).item()

    printed = trained(lambda h, w: (h - teacher @ w).square().mean(), (6, 4))
    ours = trained(lambda h, w: mse(h @ w, teacher).mean(), (4, 6))
    assert printed[0] < 1e-6  # the student knows nothing
    assert printed[1] < 1e-12  # and the loss does not see it
    assert ours[0] > 1
    assert ours[1] > 0.01


@pytest.mark.chapter("A42", api=API + "layer_norm")
def test_layer_norm_matches_golden(golden):
    case = golden("layer_norm")
    close(
        layer_norm(*(case.inputs[name] for name in ("H", "gamma", "beta")), eps=case.inputs["eps"]), case.expected["y"]
    )


@pytest.mark.chapter("A43", "A42", api=API + "dual_norm")
def test_dual_norm_matches_golden_and_is_blind_to_scale_without_its_first_part(golden):
    case = golden("dual_norm_distillation")
    student, teacher = case.inputs["H_S"], case.inputs["H_T"]
    for alpha, part in ((0.3, "total"), (1.0, "pre"), (0.0, "post")):
        close(dual_norm(student, teacher, alpha=alpha).mean(), case.expected[part])
    close(dual_norm(3 * student + 7, teacher, alpha=0.0), dual_norm(student, teacher, alpha=0.0), rtol=1e-4)
    with pytest.raises(ValueError, match=r"`alpha`, .*, must be in \[0, 1\], got 1.5"):
        dual_norm(student, teacher, alpha=1.5)


# ---------------------------------------------------------------- sets of vectors


@pytest.mark.chapter("A38", api=API + "mmd2")
def test_mmd_matches_golden(golden):
    case = golden("mmd_rbf")
    student, teacher = case.inputs["F_S"], case.inputs["F_T"]
    close(mmd2(student, teacher, sigma=1.0), case.expected["biased"])
    close(mmd2(student, teacher, sigma=1.0, unbiased=True), case.expected["unbiased"])
    close(mmd2(student, teacher), case.expected["biased_median"])
    close(mmd2(student, teacher, sigma=case.expected["sigma_median"]), case.expected["biased_median"])
    close(mmd2(student, teacher, kernel="linear"), case.expected["linear_kernel"])


@pytest.mark.chapter("A38")
def test_mmd_with_several_bandwidths_is_the_mean_over_them():
    student, teacher = features(5, 3, seed=1), features(7, 3, seed=2)

    def kernel(x, y, sigma):
        return np.exp(-cdist(x, y, "sqeuclidean") / (2 * sigma**2)).mean()

    s, t = student.numpy(), teacher.numpy()
    each = [kernel(s, s, w) + kernel(t, t, w) - 2 * kernel(s, t, w) for w in (0.7, 1.4, 2.8)]
    close(mmd2(student, teacher, sigma=1.4, bandwidths=(0.5, 1.0, 2.0)), np.mean(each))
    poly = (s @ s.T + 1).__pow__(3).mean() + (t @ t.T + 1).__pow__(3).mean() - 2 * (s @ t.T + 1).__pow__(3).mean()
    close(mmd2(student, teacher, kernel="poly", degree=3, offset=1.0), poly)


@pytest.mark.chapter("A38")
def test_mmd_masks_are_smaller_sets_and_batches_are_independent():
    student, teacher = features(2, 6, 3, seed=1), features(2, 6, 3, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]]).bool()
    at_once = mmd2(student, teacher, unbiased=True, student_mask=mask, teacher_mask=mask)
    alone = [mmd2(student[i][mask[i]], teacher[i][mask[i]], unbiased=True) for i in range(2)]
    close(at_once, torch.stack(alone))
    per_sample = MMD(over="positions", bandwidths=(1.0,), unbiased=True)(student, teacher, mask)
    close(per_sample, at_once)
    pooled = MMD(bandwidths=(1.0,))(student, teacher)
    close(pooled, mmd2(student.mean(1), teacher.mean(1)))


@pytest.mark.chapter("A38")
def test_unbiased_mmd_is_zero_on_average_and_the_biased_is_not():
    draws = features(400, 2, 8, 3)
    unbiased = mmd2(draws[:, 0], draws[:, 1], sigma=1.5, unbiased=True)
    assert unbiased.mean().abs() < 4 * unbiased.std() / 20
    assert mmd2(draws[:, 0], draws[:, 1], sigma=1.5).min() > 0.01
    close(mmd2(draws[0, 0], draws[0, 0].flip(0)), 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "cubic"}, "`kernel` must be 'rbf', 'linear' or 'poly', got 'cubic'"),
        ({"sigma": 0.0}, "`sigma` must be positive and finite or 'median', got 0.0"),
        ({"sigma": "mean"}, "`sigma` must be positive and finite or 'median', got 'mean'"),
        ({"bandwidths": ()}, r"`bandwidths` must be one or more positive factors of `sigma`, got \[\]"),
        ({"over": "all"}, "`over` must be 'samples' or 'positions', got 'all'"),
    ],
)
def test_mmd_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        MMD(**arguments)


@pytest.mark.chapter("A38", api=API + "neuron_selectivity")
@pytest.mark.parametrize("positions", [3, 9])
def test_neuron_selectivity_matches_its_definition(positions):
    """Huang and Wang (2017): MMD between channels with the kernel (x . y)^2 of maps of length 1."""
    student, teacher = features(2, positions, 4, seed=1), features(2, positions, 5, seed=2)
    for value, s, t in zip(neuron_selectivity(student, teacher), student.numpy(), teacher.numpy(), strict=True):
        s, t = (side / np.linalg.norm(side, axis=0) for side in (s, t))
        expected = ((s.T @ s) ** 2).mean() + ((t.T @ t) ** 2).mean() - 2 * ((s.T @ t) ** 2).mean()
        close(value, expected)


# ---------------------------------------------------------------- relations


@pytest.mark.chapter("A62", api=API + "Correlation")
def test_correlation_matches_golden(golden):
    case = golden("correlation_regulariser")
    student, teacher = case.inputs["F_S"], case.inputs["F_T"]
    close(Correlation(over="features")(student, teacher) * 9, case.expected["features"])
    close(Correlation(over="samples")(student, case.inputs["F_T_wide"]) * 36, case.expected["samples"])
    close(feature_correlation(student), np.corrcoef(student.numpy().T))
    close(feature_correlation(student, over="samples"), np.corrcoef(student.numpy()))


@pytest.mark.chapter("A62")
@pytest.mark.erratum("ERR-25")
def test_correlations_between_features_need_equal_widths_and_those_between_samples_do_not(golden):
    """Printed: Corr(F_S) - Corr(F_T) of any two networks."""
    case = golden("correlation_regulariser")
    student, wide = case.inputs["F_S"], case.inputs["F_T_wide"]
    with pytest.raises(RuntimeError, match="must match"):
        feature_correlation(student) - feature_correlation(wide)
    with pytest.raises(ValueError, match=r"got 3 for the student and 5 for the teacher.*over='samples'"):
        Correlation(over="features")(student, wide)
    assert Correlation(over="samples")(student, wide) > 0
    shifted = student * torch.tensor([2.0, 0.5, 3.0]) + torch.tensor([1.0, -4.0, 0.0])
    close(Correlation(over="features")(shifted, student), 0.0, atol=1e-12)


@pytest.mark.parametrize(
    "call", [lambda: Correlation(over="rows"), lambda: feature_correlation(features(3, 2), over="rows")]
)
def test_correlation_refuses_an_unknown_axis(call):
    with pytest.raises(ValueError, match="`over` must be 'samples' or 'features', got 'rows'"):
        call()


@pytest.mark.chapter("A62", api=API + "similarity_preserving")
def test_similarity_preserving_matches_the_paper():
    student, teacher = features(5, 2, 3, seed=1), features(5, 4, 6, seed=2)

    def normalized(side):
        flat = side.numpy().reshape(5, -1)
        gram = flat @ flat.T
        return gram / np.linalg.norm(gram, axis=1, keepdims=True)

    expected = ((normalized(student) - normalized(teacher)) ** 2).sum() / 25
    close(similarity_preserving(student, teacher), expected)


@pytest.mark.chapter("A62", api=API + "RKD")
def test_relational_distillation_matches_the_paper():
    student, teacher = features(5, 3, seed=1), features(5, 6, seed=2)

    def huber(x):
        return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)

    def distances(side):
        found = cdist(side, side)
        return found / pdist(side).mean()

    def angles(side):
        result = np.zeros((5, 5, 5))
        for j in range(5):
            for i in range(5):
                for k in range(5):
                    if i != j != k:
                        a, b = side[i] - side[j], side[k] - side[j]
                        result[j, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return result

    s, t = student.numpy(), teacher.numpy()
    distance, angle = huber(distances(s) - distances(t)).mean(), huber(angles(s) - angles(t)).mean()
    close(distance_relation(student, teacher), distance)
    close(angle_relation(student, teacher), angle)
    close(RKD(distance=25.0, angle=50.0)(student, teacher), 25 * distance + 50 * angle)


@pytest.mark.chapter("A62")
def test_angles_in_chunks_are_the_angles(monkeypatch):
    student, teacher = features(7, 3, seed=1).requires_grad_(), features(7, 6, seed=2)
    whole = angle_relation(student, teacher)
    (gradient,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(relations, "CHUNK_ELEMENTS", 2 * 7 * 16)
    in_chunks = angle_relation(student, teacher)
    close(in_chunks, whole.detach())
    close(torch.autograd.grad(in_chunks, student)[0], gradient)


@pytest.mark.chapter("A62", api=API + "probabilistic_transfer")
def test_probabilistic_transfer_matches_the_paper():
    def neighbours(side):
        side = side / np.linalg.norm(side, axis=1, keepdims=True)
        kernel = (side @ side.T + 1) / 2
        np.fill_diagonal(kernel, 0)
        return kernel / kernel.sum(1, keepdims=True)

    student, teacher = features(6, 3, seed=1), features(6, 5, seed=2)
    q, p = neighbours(student.numpy()), neighbours(teacher.numpy())
    off = ~np.eye(6, dtype=bool)
    close(probabilistic_transfer(student, teacher), (p[off] * np.log(p[off] / q[off])).sum() / 6)


@pytest.mark.chapter("A62", api=API + "linear_cka")
@pytest.mark.parametrize("width", [3, 20])
def test_cka_matches_its_definition_and_knows_rotations(width):
    student, teacher = features(8, width, seed=1), features(8, 5, seed=2)
    centre = np.eye(8) - 1 / 8
    k, m = (centre @ side.numpy() @ side.numpy().T @ centre for side in (student, teacher))
    close(linear_cka(student, teacher), (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    rotation = torch.linalg.qr(features(width, width, seed=3)).Q
    close(linear_cka(5 * student @ rotation + 2, student), 1.0)
    close(CKA()(student, teacher), 1 - linear_cka(student, teacher))


@pytest.mark.chapter("A62")
def test_debiased_cka_of_independent_features_is_zero_on_average_and_the_plain_one_is_near_one():
    draws = features(300, 2, 6, 40)
    debiased = torch.stack([linear_cka(a, b, debiased=True) for a, b in draws])
    plain = torch.stack([linear_cka(a, b) for a, b in draws])
    assert debiased.mean().abs() < 0.05
    assert plain.mean() > 0.7
    k, m = ((draws[0, i] @ draws[0, i].T).numpy() for i in (0, 1))
    for gram in (k, m):
        np.fill_diagonal(gram, 0)
    one = np.ones(6)
    first = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / (5 * 4) - 2 / 4 * (one @ k @ m @ one)

    def own(g):
        return np.trace(g @ g) + (one @ g @ one) ** 2 / (5 * 4) - 2 / 4 * (one @ g @ g @ one)

    close(debiased[0], first / math.sqrt(own(k) * own(m)))
    with pytest.raises(ValueError, match="`debiased` needs four samples, got 3"):
        linear_cka(features(3, 2), features(3, 2), debiased=True)


# ---------------------------------------------------------------- maps and sequences


@pytest.mark.chapter("A29", api=API + "attention_transfer")
def test_attention_transfer_matches_the_paper():
    student, teacher = features(3, 4, 4, 2, seed=1), features(3, 4, 4, 7, seed=2)

    def attention(side):
        energy = (side.numpy() ** 2).mean(-1).reshape(3, -1)
        return energy / np.linalg.norm(energy, axis=1, keepdims=True)

    close(attention_transfer(student, teacher), ((attention(student) - attention(teacher)) ** 2).mean(1))
    close(attention_transfer(3 * student, teacher), attention_transfer(student, teacher))


@pytest.mark.chapter("A36", api=API + "HierarchicalContext")
def test_hierarchical_context_matches_the_authors_formula():
    student, teacher = features(2, 8, 8, 3, seed=1), features(2, 8, 8, 3, seed=2)
    s, t = (side.movedim(-1, 1) for side in (student, teacher))
    loss, total, weight = (s - t).square().mean((1, 2, 3)), 1.0, 1.0
    for level in (4, 2, 1):
        weight /= 2
        pools = [torch.nn.functional.adaptive_avg_pool2d(side, level) for side in (s, t)]
        loss = loss + (pools[0] - pools[1]).square().mean((1, 2, 3)) * weight
        total += weight
    close(HierarchicalContext()(student, teacher), loss / total)
    small = HierarchicalContext()(student[:, :2, :2], teacher[:, :2, :2])  # levels 4 and 2 are no coarser
    difference = (student - teacher)[:, :2, :2]
    expected = difference.square().mean((1, 2, 3)) + 0.5 * difference.mean((1, 2)).square().mean(1)
    close(small, expected / 1.5)


@pytest.mark.chapter("A47", api=API + "spectral_distance")
def test_magnitudes_match_golden_and_do_not_see_shifts(golden):
    case = golden("rope_fft_loss")
    student, teacher = case.inputs["H_S"], case.inputs["H_T"]
    close(spectral_distance(student, teacher).sum() * student[0].numel(), case.expected["magnitude_sum"])
    close(spectral_distance(student.roll(2, 1), teacher), spectral_distance(student, teacher))
    assert spectral_distance(student, student.roll(2, 1)).abs().max() < 1e-12
    odd = spectral_distance(student[:, :5], teacher[:, :5])
    spectra = [np.abs(np.fft.fft(side[:, :5].numpy(), axis=1, norm="ortho")) for side in (student, teacher)]
    close(odd, ((spectra[0] - spectra[1]) ** 2).mean((1, 2)))


@pytest.mark.chapter("A47")
@pytest.mark.erratum("ERR-18")
def test_the_distance_of_the_printed_transform_is_that_of_the_features(golden):
    """Printed: |FFT(H_S) - FFT(H_T)|^2 sees more than |H_S - H_T|^2. By Parseval it is the same times the length."""
    case = golden("rope_fft_loss")
    student, teacher = case.inputs["H_S"], case.inputs["H_T"]
    spectra = [torch.fft.fft(side, dim=1) for side in (student, teacher)]
    printed = (spectra[0] - spectra[1]).abs().square().sum()
    close(printed, case.expected["fft_backward_sum"])
    close(printed / (student - teacher).square().sum(), 6.0)
    close(case.expected["fft_ortho_sum"], case.expected["time_domain_sum"])
    close(spectral_distance(student, teacher, compare="complex"), mse(student, teacher).mean(1))


@pytest.mark.chapter("A47")
def test_bands_are_weighted_apart_and_add_up():
    student, teacher = features(3, 16, 2, seed=1), features(3, 16, 2, seed=2)
    bands = [spectral_distance(student, teacher, band_weights=w) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    close(sum(bands), spectral_distance(student, teacher))
    smooth = torch.sin(torch.arange(16) * 2 * math.pi / 16).reshape(1, 16, 1).double()
    assert spectral_distance(smooth, 0 * smooth, band_weights=(1, 0)) > 0.4
    close(spectral_distance(smooth, 0 * smooth, band_weights=(0, 1)), torch.zeros(1).double(), atol=1e-12)
    maps = features(2, 6, 5, 3, seed=1), features(2, 6, 5, 3, seed=2)
    close(spectral_distance(*maps, compare="complex"), mse(*maps).mean((1, 2)))
    grid = torch.outer(torch.cos(torch.arange(8) * math.pi), torch.ones(8)).reshape(1, 8, 8, 1).double()
    close(spectral_distance(grid, 0 * grid, band_weights=(1, 0)), torch.zeros(1).double(), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compare": "phase"}, "`compare` must be 'magnitude' or 'complex', got 'phase'"),
        ({"band_weights": (1.0, -1.0)}, "`band_weights` must be one or more weights, none negative"),
        ({"band_weights": ()}, "`band_weights` must be one or more weights, none negative"),
    ],
)
def test_spectrum_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        Spectrum(**arguments)


@pytest.mark.chapter("A46", api=API + "split_content_position")
def test_content_and_position_match_golden(golden):
    case = golden("content_position_split")
    content, position = split_content_position(case.inputs["H_BTD"])
    close(position, case.expected["position"])
    close(content, case.expected["content"])
    close(content.mean(0), case.expected["content_position_mean"])
    close(content + position, case.inputs["H_BTD"])


@pytest.mark.chapter("A46")
def test_masked_content_has_a_constant_mean_over_the_positions():
    values, mask = features(4, 5, 3), torch.ones(4, 5, dtype=torch.bool)
    mask[0, 2:] = mask[1, 4:] = mask[:, 4] = False
    content, position = split_content_position(values, mask)
    for t in range(4):
        close(content[mask[:, t], t].mean(0), values[mask].mean(0))
    assert position[4].abs().max() == 0
    weighted = ContentPosition(content=2.0, position=3.0)(values, torch.zeros_like(values), mask)
    close(weighted, 2 * content.square().mean(-1) + 3 * position.square().mean(-1))


@pytest.mark.chapter("A49", api=API + "pool_sequence")
def test_pooling_matches_golden(golden):
    case = golden("sequence_pooling")
    values, mask = case.inputs["H"], case.inputs["mask"].bool()
    close(pool_sequence(values, 3)[0], case.expected["floor_mode"])
    pooled, counted = pool_sequence(values, 3, mask, ceil=True)
    close(pooled, case.expected["masked_ceil_mode"])
    assert torch.equal(counted, torch.as_tensor(case.expected["masked_valid"]).bool())
    close(pool_sequence(values, 1)[0], values)
    close(pool_sequence(torch.full((1, 7, 2), 3.0), 3, ceil=True)[0], torch.full((1, 3, 2), 3.0))
    with pytest.raises(ValueError, match="`stride` must be positive, got 0"):
        pool_sequence(values, 0)


@pytest.mark.chapter("A49", api=API + "PooledSequence")
def test_pooled_distance_is_that_of_the_pooled():
    student, teacher = features(2, 7, 3, seed=1), features(2, 7, 3, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()
    values = PooledSequence(3)(student, teacher, mask)
    windows = mse(*(pool_sequence(side, 3, mask, ceil=True)[0] for side in (student, teacher)))
    close(values, torch.stack([windows[0].mean(), windows[1, :2].mean()]))
    close(PooledSequence(3, CKA())(student, teacher), CKA()(student.mean(1), teacher.mean(1)), rtol=1, atol=1)
    with pytest.raises(ValueError, match="`stride` must be positive, got -1"):
        PooledSequence(-1)


# ---------------------------------------------------------------- subspaces and alignments


@pytest.mark.chapter("A50", api=API + "low_rank_distance")
def test_low_rank_matches_golden(golden):
    case = golden("low_rank_match")
    student, teacher = case.inputs["H_S"], case.inputs["H_T"]
    rank = int(case.inputs["rank"])
    basis = top_right_singular_vectors(teacher, rank)
    close(low_rank_distance(student, teacher, basis).mean(), case.expected["loss"])
    close((teacher - teacher @ basis @ basis.T).norm(), case.expected["eckart_young_error"])
    close((teacher @ basis).square().sum() / teacher.square().sum(), case.expected["energy"])
    flipped = basis @ torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    close(low_rank_distance(student, teacher, flipped), low_rank_distance(student, teacher, basis))
    close(low_rank_distance(student, teacher, top_right_singular_vectors(teacher, 5)), mse(student, teacher))
    with pytest.raises(ValueError, match="`rank` must be from 1 to the width 5, got 6"):
        top_right_singular_vectors(teacher, 6)


@pytest.mark.chapter("A50")
@pytest.mark.erratum("ERR-19")
def test_factors_of_equal_features_can_be_far_apart_and_their_projections_cannot():
    """Printed: match the low-rank factors U and V themselves."""
    teacher = features(9, 5)
    u, s, vh = torch.linalg.svd(teacher, full_matrices=False)
    factor, other = u[:, :2] * s[:2], vh[:2]
    mixed = torch.tensor([[0.0, 3.0], [-1.0, 1.0]], dtype=torch.float64)
    close(factor @ other, (factor @ mixed) @ (torch.linalg.inv(mixed) @ other))  # one and the same approximation
    assert (factor - factor @ mixed).square().mean() > 1
    assert low_rank_distance(teacher, teacher, top_right_singular_vectors(teacher, 2)).abs().max() == 0


@pytest.mark.chapter("A50", api=API + "LowRank")
def test_basis_is_refreshed_every_few_training_steps_and_kept_between():
    distance = LowRank(rank=2, every=2)
    first, second = features(4, 6, 5, seed=1).float(), features(4, 6, 5, seed=2).float()
    distance.build(first.shape, first.shape)
    before = distance.basis.clone()
    with torch.no_grad():
        distance(first, first)
    assert torch.equal(distance.basis, before)  # evaluation leaves it alone

    def span(teacher):
        basis = top_right_singular_vectors(teacher.flatten(0, 1), 2)
        return basis @ basis.T

    for teacher, expected in ((first, first), (second, first), (second, second)):
        distance(first, teacher)
        torch.testing.assert_close(distance.basis @ distance.basis.T, span(expected))
    loaded = LowRank(rank=2, every=2)
    loaded.load_state_dict(distance.state_dict())
    assert torch.equal(loaded.basis, distance.basis)
    assert loaded.passes == 3
    with pytest.raises(ValueError, match="`rank` must be at most the teacher's width 5, got 6"):
        LowRank(rank=6).build((0, 5), (0, 5))
    with pytest.raises(ValueError, match="`every` must be positive, got 0"):
        LowRank(rank=1, every=0)


@pytest.mark.chapter("A28", api=API + "procrustes")
def test_procrustes_matches_golden(golden):
    case = golden("procrustes_orthogonal")
    student, teacher = case.inputs["F_S"], case.inputs["F_T"]
    plain = procrustes(student, teacher, center=False)
    scaled = procrustes(student, teacher, center=False, scale=True)
    close(plain.rotation, case.expected["T"])
    close((plain(student) - teacher).norm(), case.expected["residual"])
    close(scaled.scale, case.expected["scale"])
    close((scaled(student) - teacher).norm(), case.expected["scaled_residual"])
    least = (student @ torch.linalg.lstsq(student, teacher).solution - teacher).norm()
    assert least <= (scaled(student) - teacher).norm() <= (plain(student) - teacher).norm()
    close((student.T @ teacher @ plain.rotation.T).trace(), case.expected["nuclear_norm"])


@pytest.mark.chapter("A28")
@pytest.mark.erratum("ERR-13")
def test_printed_procrustes_solution_is_the_product_of_the_features_and_worse_than_nothing(golden):
    """Printed: T = U Sigma V^T, which is F_S^T F_T itself."""
    case = golden("procrustes_as_written")
    student, teacher = case.inputs["F_S"], case.inputs["F_T"]
    u, sigma, vh = torch.linalg.svd(student.T @ teacher)
    printed = u @ torch.diag(sigma) @ vh
    close(printed, case.expected["T"])
    close(printed, student.T @ teacher)
    close((student @ printed - teacher).norm(), case.expected["residual"])
    assert (student @ printed - teacher).norm() > 10 * case.expected["residual_of_zero"]
    assert (procrustes(student, teacher, center=False)(student) - teacher).norm() < 0.33


@pytest.mark.chapter("A28")
@pytest.mark.parametrize(("width", "target"), [(3, 5), (5, 3), (4, 4)])
def test_procrustes_finds_a_known_movement_of_any_widths(width, target):
    student = features(30, width)
    rotation = torch.linalg.qr(features(max(width, target), max(width, target), seed=1)).Q[:width, :target]
    if width > target:
        student = student @ (rotation @ rotation.T)  # what cannot be seen from the other side
    teacher = 2.5 * student @ rotation + features(target, seed=2)
    found = procrustes(student, teacher, scale=True)
    close(found(student), teacher, rtol=1e-7, atol=1e-9)
    close(found.scale, 2.5)
    small = found.rotation.T @ found.rotation if width >= target else found.rotation @ found.rotation.T
    close(small, torch.eye(min(width, target), dtype=torch.float64), atol=1e-9)
    if width == target:
        close(procrustes(student, teacher, center=False).rotation, orthogonal_procrustes(student, teacher)[0])
    with pytest.raises(ValueError, match="of the same N rows"):
        procrustes(student, teacher[:-1])


@pytest.mark.chapter("A28", api=API + "Procrustes")
def test_transform_fits_every_few_steps_under_a_mask_and_lets_gradients_through():
    rotation = torch.linalg.qr(features(4, 4, seed=1)).Q.float()
    student = features(6, 5, 4).float()
    teacher = student @ rotation + 1
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 3:] = False
    teacher[:, 3:] = 1e3
    transform = Procrustes(every=2)
    transform.build(student.shape, teacher.shape)
    transform.fit(student, teacher, mask)
    torch.testing.assert_close(transform(student)[mask], teacher[mask])
    transform.fit(student, -teacher, mask)  # not its turn
    torch.testing.assert_close(transform(student)[mask], teacher[mask])
    transform.fit(student, torch.full_like(teacher, torch.nan), mask)  # its turn, but nothing to align
    torch.testing.assert_close(transform(student)[mask], teacher[mask])
    loaded = Procrustes(every=2)
    loaded.load_state_dict(transform.state_dict())
    assert torch.equal(loaded(student), transform(student))
    student.requires_grad_()
    transform(student).sum().backward()
    assert student.grad.abs().min() > 0
    assert list(transform.parameters()) == []
    with pytest.raises(ValueError, match="`every` must be positive, got 0"):
        Procrustes(every=0)


@pytest.mark.chapter("A27", api=API + "metric_matching_transform")
def test_metric_matching_matches_golden(golden):
    case = golden("metric_matching_transform")
    student, teacher = case.inputs["g_S"], case.inputs["g_T"]
    found = metric_matching_transform(student, teacher, eps=0.0)
    close(found, case.expected["T"], rtol=1e-7, atol=1e-9)
    close(found.T @ teacher @ found, student)
    assert metric_matching_transform(torch.ones(2, 2), torch.zeros(2, 2)).isfinite().all()
    with pytest.raises(ValueError, match="for different widths use `procrustes`"):
        metric_matching_transform(student, torch.eye(2))


@pytest.mark.chapter("A27")
@pytest.mark.erratum("ERR-12")
def test_a_metric_of_parameters_fits_no_features_and_one_of_features_leaves_every_rotation_free(golden):
    """Printed: g over the parameters (P x P), with a map of the features (d x d) that minimizes |g_S - T^T g_T T|."""
    weight = torch.zeros(3, 4, requires_grad=True)
    inputs = features(8, 4).float()
    rows = [torch.autograd.grad((inputs @ weight.T)[i].sum(), weight)[0].flatten() for i in range(8)]
    metric = torch.stack(rows).T @ torch.stack(rows) / 8
    assert metric.shape == (12, 12)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.eye(3) @ metric @ torch.eye(3)
    case = golden("metric_matching_transform")
    student, teacher = case.inputs["g_S"], case.inputs["g_T"]
    rotation = torch.linalg.qr(features(3, 3, seed=4)).Q
    other = metric_matching_transform(student, teacher, rotation=rotation, eps=0.0)
    close(other.T @ teacher @ other, student)  # as good as the unit matrix
    assert (other - case.expected["T"]).norm() > 1


# ---------------------------------------------------------------- with parameters


@pytest.mark.chapter("A36", api=API + "VID")
def test_variational_information_matches_a_normal_density_and_learns_the_noise():
    mean, target, variance = features(4, 3, seed=1), features(4, 3, seed=2), torch.tensor([0.5, 1.0, 4.0]).double()
    expected = -norm.logpdf(target.numpy(), mean.numpy(), variance.sqrt().numpy()).mean(1) - 0.5 * math.log(2 * math.pi)
    close(gaussian_nll(mean, target, variance), expected)
    distance = VID()
    distance.build((4, 3), (4, 3))
    close(distance.variance.detach(), torch.full((3,), 5.0), rtol=1e-6)
    student = torch.zeros(2000, 3)
    teacher = features(2000, 3, seed=3).float() * torch.tensor([0.5, 1.0, 2.0])
    optimizer = torch.optim.Adam(distance.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        distance(student, teacher).mean().backward()
        optimizer.step()
    torch.testing.assert_close(distance.variance, teacher.square().mean(0), rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="must be larger than `smallest`"):
        VID(initial_variance=1e-6)


@pytest.mark.chapter("A72", api=API + "CRD")
def test_critic_matches_the_paper_and_tells_pairs_apart():
    similarity = features(4, 4)
    kernel = np.exp(similarity.numpy() / 0.5)
    h = kernel / (kernel + 0.3)
    off = ~np.eye(4, dtype=bool)
    expected = [-np.log(h[i, i]) - np.log(1 - h[i][off[i]]).sum() for i in range(4)]
    close(critic_loss(similarity, temperature=0.5, noise=0.3), torch.tensor(expected))
    distance = CRD(width=8)
    student, teacher = features(5, 3, seed=1).float(), features(5, 6, seed=2).float()
    distance.build(student.shape, teacher.shape)
    s, t = (
        torch.nn.functional.normalize(layer(side))
        for layer, side in ((distance.student_projection, student), (distance.teacher_projection, teacher))
    )
    torch.testing.assert_close(distance(student, teacher), critic_loss(s @ t.T, temperature=0.07, noise=0.8).mean())
    distance(student, teacher).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in distance.parameters())
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        CRD(temperature=0.0)
