"""Terms on attention maps: heads, padding, items, and two real networks."""

import copy

import pytest
import torch

from lightning_distill.losses import AttentionMatching, AttentionSelfDistillation
from lightning_distill.losses.attention import (
    SparseAttention,
    attention_kl,
    attention_wasserstein,
    smooth_attention,
    sparse_thresholds,
)
from lightning_distill.outputs import Outputs, Step
from tests.losses.attention.test_rows import maps

PADDING = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


def step(student, teacher=None, positions=None, **more):
    size = len(next(iter(student.values())))
    said = [None if side is None else Outputs(torch.zeros(size, 2), features=side) for side in (student, teacher)]
    return Step(None, *said, positions=positions, **more)


def padded(heads, seed, mask=PADDING, causal=False):
    forbidden = ~mask[:, None, None, :].expand(-1, heads, mask.shape[1], -1)
    if causal:
        forbidden = forbidden | torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).triu(1)
    return maps(len(mask), heads, mask.shape[1], mask.shape[1], seed=seed, forbidden=forbidden)


@pytest.mark.chapter("A29", api="lightning_distill.losses.AttentionMatching")
@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_is_the_mean_over_its_heads_and_its_queries_that_count(causal):
    student, teacher = padded(2, 1, causal=causal), padded(2, 2, causal=causal)
    term = AttentionMatching({"a": "b"}, heads="same", smoothing=0.0)
    values = term(step({"a": student}, {"b": teacher}, PADDING))
    rows = attention_kl(student, teacher).mean(1)
    expected = torch.stack([row[kept].mean() for row, kept in zip(rows, PADDING, strict=True)])
    torch.testing.assert_close(values, expected)


@pytest.mark.chapter("A29", "A33")
@pytest.mark.parametrize("distance", ["kl", "reverse_kl", "js", "mse", "wasserstein", "sparse", "local_global"])
def test_more_padding_changes_nothing_and_gets_no_gradient(distance):
    student, teacher = padded(2, 1), padded(2, 2)
    term = AttentionMatching({"a": "b"}, distance=distance, heads="same")
    values = term(step({"a": student}, {"b": teacher}, PADDING))
    wider = torch.nn.functional.pad(PADDING, (0, 3))
    ours, theirs = (torch.nn.functional.pad(side, (0, 3, 0, 3)) for side in (student, teacher))
    ours[:, :, 5:, 0] = theirs[:, :, 5:, 1] = 1.0  # queries that are padding look anywhere
    ours.requires_grad_()
    again = term(step({"a": ours}, {"b": theirs}, wider))
    torch.testing.assert_close(again, values)
    again.sum().backward()
    rows = wider[:, None, :, None].expand_as(ours)
    assert ours.grad[~rows].abs().max() == 0
    assert ours.grad[rows].abs().max() > 0


def test_tokens_are_items():
    student, teacher = padded(2, 1, causal=True), padded(2, 2, causal=True)
    term = AttentionMatching({"a": "b"}, heads="same", smoothing=0.0)
    values = term(step({"a": student}, {"b": teacher}, PADDING, token_items=True))
    torch.testing.assert_close(values, attention_kl(student, teacher).mean(1)[PADDING])


@pytest.mark.chapter("A34", api="lightning_distill.losses.AttentionMatching")
def test_heads_are_aligned_now_and_then_and_the_order_is_kept():
    teacher = padded(4, 1)
    order = torch.tensor([2, 0, 3, 1])
    student = 0.98 * teacher[:, order] + 0.02 * padded(4, 5)
    term = AttentionMatching({"a": "b"}, every=2)
    now = step({"a": student.requires_grad_()}, {"b": teacher}, PADDING)
    term.build(now)
    assert term.alignments[0].teacher_heads.tolist() == [0, 1, 2, 3]
    value = term(now)
    assert term.alignments[0].teacher_heads.tolist() == order.tolist()
    same = AttentionMatching({"a": "b"}, heads="same")(now)
    assert value.sum() < 0.2 * same.sum()
    shuffled = step({"a": student}, {"b": teacher[:, [1, 0, 3, 2]]}, PADDING)
    term(shuffled)  # not its turn
    assert term.alignments[0].teacher_heads.tolist() == order.tolist()
    term.eval()(shuffled)
    assert term.alignments[0].teacher_heads.tolist() == order.tolist()
    loaded = AttentionMatching({"a": "b"}, every=2)
    loaded.load_state_dict(copy.deepcopy(term.state_dict()))
    assert loaded.alignments[0].teacher_heads.tolist() == order.tolist()
    loaded(shuffled)  # the third pass
    assert loaded.alignments[0].teacher_heads.tolist() == [3, 1, 2, 0]


@pytest.mark.chapter("A34")
@pytest.mark.parametrize(("ours", "theirs"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("heads", ["aligned", "mean"])
def test_numbers_of_heads_may_differ(ours, theirs, heads):
    now = step({"a": padded(ours, 1).requires_grad_()}, {"b": padded(theirs, 2)}, PADDING)
    term = AttentionMatching({"a": "b"}, heads=heads)
    term.build(now)
    values = term(now)
    values.sum().backward()
    assert values.shape == (3,)
    assert now.student.features["a"].grad.isfinite().all()
    with pytest.raises(ValueError, match=rf"'a' has {ours} heads and 'b' {theirs}; use `heads='aligned'` or"):
        AttentionMatching({"a": "b"}, heads="same")(now)


@pytest.mark.chapter("A44", "A45")
def test_each_layer_may_have_its_own_distance_and_weight():
    now = step({"a": padded(2, 1), "c": padded(2, 3)}, {"b": padded(2, 2), "d": padded(2, 4)}, PADDING)
    distances = [SparseAttention(threshold) for threshold in sparse_thresholds(2, 0.1)]
    term = AttentionMatching({"a": "b", "c": "d"}, distances, heads="same", weights=[1.0, 3.0])
    alone = [
        AttentionMatching({ours: theirs}, SparseAttention(threshold), heads="same")(now)
        for ours, theirs, threshold in (("a", "b", 0.15), ("c", "d", 0.2))
    ]
    torch.testing.assert_close(term(now), alone[0] + 3 * alone[1])
    term.pair_weights[1] = 0.0
    torch.testing.assert_close(term(now), alone[0])


@pytest.mark.chapter("A32")
def test_a_function_of_two_maps_will_do():
    now = step({"a": padded(2, 1)}, {"b": padded(2, 2)})
    term = AttentionMatching({"a": "b"}, attention_wasserstein, heads="mean", smoothing=0.0)
    student, teacher = (side.mean(1) for side in (padded(2, 1), padded(2, 2)))
    visible = PADDING[:, None, :]
    torch.testing.assert_close(term(now), attention_wasserstein(student, teacher, visible).mean(1))


def test_a_student_in_half_precision_and_rows_without_keys_are_finite():
    student, teacher = padded(2, 1).bfloat16(), padded(2, 2).bfloat16()
    student[0, 0, 0] = teacher[0, 1, 1] = 0.0
    student.requires_grad_()
    for heads in ("aligned", "same", "mean"):
        term = AttentionMatching({"a": "b"}, heads=heads)
        now = step({"a": student}, {"b": teacher}, PADDING)
        term.build(now)
        values = term(now)
        assert values.dtype == torch.float32
        values.sum().backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": {}}, "`pairs` must map taps"),
        ({"distance": "l1"}, "`distance` must be one of js, kl, .*, or a function, got 'l1'"),
        ({"distance": ["kl", "js"]}, "`distance` must be one, or one for each of the 1 pairs, got 2"),
        ({"heads": "all"}, "`heads` must be 'aligned', 'same' or 'mean', got 'all'"),
        ({"smoothing": 1.0}, r"`smoothing` must be in \[0, 1\), got 1.0"),
        ({"every": 0}, "`every` must be positive, got 0"),
        ({"weights": [1.0, 2.0]}, "`weights` must have one number for each of the 1 pairs, got 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionMatching(**({"pairs": {"a": "b"}} | arguments))


def test_maps_that_cannot_be_compared_are_refused():
    term = AttentionMatching({"a": "b"}, heads="same")
    with pytest.raises(ValueError, match=r"'a' has the shape \(3, 4\), but attention maps have \(B, heads"):
        term(step({"a": torch.zeros(3, 4)}, {"b": padded(2, 2)}))
    with pytest.raises(ValueError, match=r"\(5, 5\) and \(3, 3\) queries and keys.*the same tokens"):
        term(step({"a": padded(2, 1)}, {"b": padded(2, 2)[:, :, :3, :3]}))


@pytest.mark.chapter("B22", api="lightning_distill.losses.AttentionSelfDistillation")
def test_shallow_heads_learn_from_the_nearest_deep_heads_which_get_no_gradient():
    shallow, deep = padded(2, 1).requires_grad_(), padded(3, 2).requires_grad_()
    term = AttentionSelfDistillation({"s": "d"})
    assert not term.needs_teacher
    now = step({"s": shallow, "d": deep}, positions=PADDING)
    values = term(now)
    visible = PADDING[:, None, None, :]
    s, d = (smooth_attention(side, visible=visible) for side in (shallow, deep))
    rows = PADDING.sum()
    costs = torch.stack(
        [torch.stack([attention_kl(s[:, i], d[:, j])[PADDING].sum() / rows for j in range(3)]) for i in range(2)]
    )
    nearest = costs.argmin(1)
    expected = attention_kl(s, d[:, nearest]).mean(1)
    torch.testing.assert_close(
        values, torch.stack([row[kept].mean() for row, kept in zip(expected, PADDING, strict=True)])
    )
    values.sum().backward()
    assert shallow.grad.abs().sum() > 0
    assert deep.grad is None


@pytest.mark.chapter("B22")
def test_heads_of_one_layer_must_not_teach_themselves():
    attention = padded(4, 1).requires_grad_()
    term = AttentionSelfDistillation({"a": "a"}, student_heads=[0, 1], teacher_heads=[2, 3], direction="reverse")
    assert term.student_taps == ("a",)
    term(step({"a": attention})).sum().backward()
    assert (attention.grad.abs().sum((0, 2, 3)) > 0).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"share \[1\], which would teach themselves"):
        AttentionSelfDistillation({"a": "a"}, student_heads=[0, 1], teacher_heads=[1, 2])
    with pytest.raises(ValueError, match="needs `student_heads` and `teacher_heads` without a common head"):
        AttentionSelfDistillation({"a": "a"})
    aliases = AttentionSelfDistillation({"attentions.1": "attentions.-1"})
    with pytest.raises(ValueError, match="the loss would be 0"):
        aliases(step({"attentions.1": attention, "attentions.-1": attention}))
    with pytest.raises(ValueError, match=r"'b' has heads 0 to 3, but \[4\] are asked for"):
        AttentionSelfDistillation({"a": "b"}, teacher_heads=[4])(step({"a": attention, "b": padded(4, 2)}))
    with pytest.raises(ValueError, match="`direction` must be 'forward' or 'reverse', got 'up'"):
        AttentionSelfDistillation({"a": "b"}, direction="up")
    with pytest.raises(ValueError, match=r"`smoothing` must be in \[0, 1\), got -1"):
        AttentionSelfDistillation({"a": "b"}, smoothing=-1.0)
