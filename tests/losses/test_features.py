"""Matching of inner features: values, items, masks, weights of pairs."""

import pytest
import torch
from torch import nn

from lightning_distill.losses import FeatureMatching, LinearTransform, per_item
from lightning_distill.outputs import Outputs, Step


def step(student, teacher, **more):
    """A step whose networks have these features."""
    batch = len(next(iter(student.values())))
    return Step(
        None, Outputs(torch.zeros(batch, 2), features=student), Outputs(torch.zeros(batch, 2), features=teacher), **more
    )


def features(*shape, seed=0, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


@pytest.mark.chapter("A21", api="lightning_distill.losses.FeatureMatching")
def test_pairs_are_added_up_with_their_weights(golden):
    case = golden("feature_loss_weighted")
    errors = case.inputs["layer_mse"].sqrt()
    student = {str(i): torch.full((2, 3), float(error), requires_grad=True) for i, error in enumerate(errors)}
    teacher = {str(i): torch.zeros(2, 3) for i in range(3)}
    term = FeatureMatching(
        {str(i): str(i) for i in range(3)}, transform="identity", weights=case.inputs["lambdas"].tolist()
    )
    values = term(step(student, teacher))
    torch.testing.assert_close(values, torch.full((2,), float(case.expected["loss"])))
    plain = FeatureMatching({str(i): str(i) for i in range(3)}, transform="identity")
    torch.testing.assert_close(plain(step(student, teacher)).mean(), case.inputs["layer_mse"].mean().float())


@pytest.mark.chapter("A21", api="lightning_distill.losses.FeatureMatching")
def test_equal_features_cost_nothing_and_only_the_student_learns():
    student, teacher = features(4, 5), features(4, 5)
    term = FeatureMatching({"a": "b"}, transform="identity")
    assert term(step({"a": student}, {"b": teacher})).abs().max() == 0
    value = term(step({"a": student}, {"b": teacher + 1.0}))
    value.sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, torch.full((4, 5), -2 / 5))


def test_widths_and_sizes_are_brought_to_the_teacher():
    now = step({"a": features(2, 3, 8, 8)}, {"b": features(2, 5, 4, 4, seed=1)})
    term = FeatureMatching({"a": "b"})
    term.build(now)
    pooled = torch.nn.functional.adaptive_avg_pool2d(now.student.features["a"], 4)
    linear = term.transforms[0].linear
    mapped = torch.nn.functional.conv2d(pooled, linear.weight[:, :, None, None], linear.bias)
    expected = (mapped - now.teacher.features["b"]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(term(now), expected)
    assert {tuple(p.shape) for p in term.parameters()} == {(5, 3), (5,)}


def test_one_dimensional_maps_need_their_channel_dimension():
    now = step({"a": features(2, 3, 8)}, {"b": features(2, 5, 4, seed=1)})
    term = FeatureMatching({"a": "b"}, channel_dim=1)
    term.build(now)
    assert term(now).shape == (2,)
    assert term.transforms[0].linear.weight.shape == (5, 3)


def test_padding_does_not_count_and_changes_nothing():
    positions = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    ours, theirs = features(3, 3, 4), features(3, 3, 4, seed=1, grad=False)
    term = FeatureMatching({"a": "b"}, transform="identity")
    values = term(step({"a": ours}, {"b": theirs}, positions=positions))
    each = (ours - theirs).square().mean(dim=-1)
    torch.testing.assert_close(values, torch.stack([each[0].mean(), each[1, 0], torch.zeros(())]))
    values.sum().backward()
    assert ours.grad[1, 1:].abs().max() == 0
    assert ours.grad[2].abs().max() == 0
    changed = torch.where(positions[..., None], theirs, 1e4)
    torch.testing.assert_close(term(step({"a": ours}, {"b": changed}, positions=positions)), values)


def test_tokens_get_their_own_values():
    positions = torch.tensor([[True, True, False], [True, False, False]])
    ours, theirs = features(2, 3, 4), features(2, 3, 4, seed=1, grad=False)
    now = step({"a": ours}, {"b": theirs}, positions=positions, token_items=True)
    values = FeatureMatching({"a": "b"}, transform="identity")(now)
    torch.testing.assert_close(values, (ours - theirs).square().mean(dim=-1)[positions])


def test_values_of_items():
    positions = torch.tensor([[True, True, False], [True, False, False]])
    samples, tokens = (
        step({"a": features(2, 1)}, {}, positions=positions),
        step({"a": features(2, 1)}, {}, positions=positions),
    )
    tokens.token_items = True
    values = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]])
    assert per_item(values, samples).tolist() == [2, 5]
    assert per_item(values, tokens).tolist() == [1, 3, 5]
    assert per_item(torch.tensor([7.0, 8.0]), samples).tolist() == [7, 8]
    assert per_item(torch.tensor([7.0, 8.0]), tokens).tolist() == [7, 7, 8]  # each token has its sample's
    assert per_item(torch.tensor(2.0), tokens).item() == 2
    assert per_item(torch.ones(2, 4, 4) * 3, samples).tolist() == [3, 3]  # a map beside the sequence
    pooled = torch.tensor([[True, False], [False, False]])
    assert per_item(torch.tensor([[4.0, 9.0], [9.0, 9.0]]), samples, pooled).tolist() == [4, 0]
    assert per_item(torch.tensor([[4.0, 9.0], [9.0, 9.0]]), tokens, pooled).tolist() == [4, 4, 0]


def test_a_pair_of_weight_zero_is_not_computed_but_its_parameters_have_gradients():
    calls = []

    def distance(student, teacher, mask=None):
        calls.append(student.shape[-1])
        return (student - teacher).square().mean(dim=-1)

    term = FeatureMatching({"a": "b", "c": "d"}, distance, weights=[1.0, 1.0])
    now = step({"a": features(4, 2), "c": features(4, 3)}, {"b": features(4, 2, seed=1), "d": features(4, 5, seed=2)})
    term.build(now)
    both = term(now)
    assert calls == [2, 5]
    term.pair_weights[1] = 0.0
    one = term(now)
    assert calls == [2, 5, 2]
    assert (both > one).all()
    one.sum().backward()
    assert all(parameter.grad is not None for parameter in term.parameters())
    assert term.transforms[1].linear.weight.grad.abs().max() == 0
    term.pair_weights = [0.0, 0.0]
    assert term(now).item() == 0
    assert term(now).requires_grad


def test_modules_are_copied_for_each_pair():
    term = FeatureMatching({"a": "b", "c": "d"}, distance=nn.PairwiseDistance(), transform=LinearTransform(bias=False))
    assert term.transforms[0] is not term.transforms[1]
    assert term.distances[0] is not term.distances[1]
    term.build(step({"a": features(4, 2), "c": features(4, 3)}, {"b": features(4, 3), "d": features(4, 5)}))
    assert [tuple(part.linear.weight.shape) for part in term.transforms] == [(3, 2), (5, 3)]


def test_half_precision_is_computed_in_single():
    ours, theirs = features(4, 6).half().detach().requires_grad_(), features(4, 6, seed=1, grad=False).half()
    value = FeatureMatching({"a": "b"}, transform="identity")(step({"a": ours}, {"b": theirs}))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, (ours.float() - theirs.float()).square().mean(dim=-1))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`pairs` must map taps of the student to taps of the teacher, got \{\}"):
        FeatureMatching({})
    with pytest.raises(ValueError, match=r"`distance` must be one of .*mse.*, or a function, got 'l7'"):
        FeatureMatching({"a": "b"}, distance="l7")
    with pytest.raises(TypeError, match="`distance` must be a name or a function of two features, got int"):
        FeatureMatching({"a": "b"}, distance=2)
    with pytest.raises(ValueError, match="`transform` must be one of linear, mlp, identity, or a module, got 'conv'"):
        FeatureMatching({"a": "b"}, transform="conv")
    with pytest.raises(ValueError, match="`weights` must have one number for each of the 1 pairs, got 2"):
        FeatureMatching({"a": "b"}, weights=[1, 2])
    with pytest.raises(ValueError, match=r"The weight of the pair \('a', 'b'\) must not be negative, got nan"):
        FeatureMatching({"a": "b"}, weights=[float("nan")])


def test_features_that_do_not_fit_are_refused_with_what_would_do():
    term = FeatureMatching({"a": "b"}, transform="identity")
    with pytest.raises(
        ValueError, match=r"\(2, 3\) after their transform, the teacher's \(2, 5\). Use `transform='linear'`"
    ):
        term(step({"a": features(2, 3)}, {"b": features(2, 5)}))
    with pytest.raises(ValueError, match=r"'a' and 'b' have 3 and 4 positions.*give both networks the same tokens"):
        term(step({"a": features(2, 3, 5)}, {"b": features(2, 4, 5)}, positions=torch.ones(2, 3, dtype=torch.bool)))


def test_features_without_a_gradient_are_told():
    term = FeatureMatching({"a": "b"}, transform="identity")
    now = step({"a": features(2, 3, grad=False)}, {"b": features(2, 3)})
    with pytest.warns(UserWarning, match="The student's features 'a' carry no gradient"):
        term(now)
    with torch.no_grad():
        term(now)  # a validation pass is nothing to tell of
