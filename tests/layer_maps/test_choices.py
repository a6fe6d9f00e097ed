"""Layer maps by rule, by importance and by fit: golden numbers, brute force, invariants."""

import io
import itertools

import matplotlib.image
import pytest
import torch
from rich.console import Console

from lightning_distill.layer_maps import (
    LayerMap,
    all_map,
    cka_map,
    explicit_map,
    importance_map,
    last_map,
    monotone_map,
    nearest_map,
    uniform_map,
)


@pytest.mark.chapter("B35", api="lightning_distill.layer_maps.uniform_map")
@pytest.mark.chapter("C11", api="lightning_distill.layer_maps.uniform_map")
def test_uniform_golden(golden):
    case = golden("layer_map_uniform")
    pairs = case.inputs["pairs"].int().tolist()
    for i, (teacher_depth, student_depth) in enumerate(pairs):
        one, zero = uniform_map(student_depth, teacher_depth), uniform_map(student_depth, teacher_depth, base=0)
        assert list(one.teacher) == [int(layer) for layer in case.expected["one_based"][i]]
        assert list(zero.teacher_positions) == [int(layer) for layer in case.expected["zero_based"][i]]
        assert one.student == zero.student == tuple(range(1, student_depth + 1))


@pytest.mark.erratum("ERR-43")
def test_counted_from_zero_the_uniform_map_never_reaches_the_top():
    for student_depth, teacher_depth in itertools.combinations(range(1, 25), 2):
        assert max(uniform_map(student_depth, teacher_depth, base=0).teacher) < teacher_depth
        assert max(uniform_map(student_depth, teacher_depth).teacher) == teacher_depth
    left_out = set(range(24)) - set(uniform_map(18, 24, base=0).teacher_positions)
    assert left_out == {3, 7, 11, 15, 19, 23}


@pytest.mark.parametrize("base", [0, 1])
def test_uniform_maps_ascend_and_are_the_identity_at_equal_depth(base):
    for student_depth, teacher_depth in itertools.combinations_with_replacement(range(1, 13), 2):
        layers = uniform_map(student_depth, teacher_depth, base=base).teacher
        assert list(layers) == sorted(set(layers))
        if student_depth == teacher_depth:
            assert layers == tuple(range(1, teacher_depth + 1))


@pytest.mark.chapter("X3", api="lightning_distill.layer_maps.uniform_map")
def test_exercise_3(golden):
    case = golden("exercise3_maps")
    layers = uniform_map(6, 24, base=0)
    assert layers.teacher_positions == tuple(case.expected["uniform"].int().tolist())
    assert uniform_map(6, 24).teacher == tuple(case.expected["one_based"].int().tolist())
    # the exercise's other answer, [0, 6, 12, 16, 20, 23], is what importance gives if those layers are the largest
    scores = torch.zeros(24).index_fill(0, torch.tensor([0, 6, 12, 16, 20, 23]), 1.0)
    assert importance_map(scores, 6).teacher_positions == (0, 6, 12, 16, 20, 23)


def test_last_and_all_and_explicit():
    assert list(last_map(3, 12)) == [(3, 12)]
    assert list(last_map(3, 12, count=3)) == [(1, 10), (2, 11), (3, 12)]
    assert list(all_map(3, 3)) == [(1, 1), (2, 2), (3, 3)]
    assert list(explicit_map([2, -2, -1], 3, 6)) == [(1, 2), (2, 5), (3, 6)]


@pytest.mark.chapter("C12", api="lightning_distill.layer_maps.importance_map")
def test_importance_takes_the_largest_in_order_and_the_lower_of_equal_ones(golden):
    assert importance_map([5.0, 1.0, 4.0, 4.0, 4.0, 9.0], 3).teacher == (1, 3, 6)
    density = golden("knowledge_density")
    chosen = importance_map(density.expected["I"], int(density.inputs["k"]))
    assert list(chosen.teacher) == density.expected["selected_layers_one_based"].int().tolist()


def total(cost, layers):
    return sum(cost[i][j - 1] for i, j in enumerate(layers))


@pytest.mark.chapter("C13", api="lightning_distill.layer_maps.monotone_map")
def test_monotone_golden(golden):
    case = golden("layer_map_dp")
    cost = case.inputs["cost"]
    chosen = monotone_map(cost)
    assert list(chosen.teacher_positions) == case.expected["mapping"].int().tolist()
    assert float(total(cost, chosen.teacher)) == pytest.approx(float(case.expected["total"]), rel=case.rtol)
    assert list(nearest_map(cost).teacher_positions) == case.expected["unconstrained"].int().tolist()


@pytest.mark.chapter("C13", api="lightning_distill.layer_maps.nearest_map")
def test_where_the_cheapest_layers_cross_the_monotone_map_pays_for_its_order():
    cost = torch.tensor([[0.9, 0.1, 0.5, 0.4], [0.2, 0.8, 0.7, 0.3], [0.6, 0.5, 0.4, 0.9]])
    assert nearest_map(cost).teacher_positions == (1, 0, 2)
    ordered = monotone_map(cost)
    assert ordered.teacher_positions == (1, 2, 3)
    assert float(total(cost, ordered.teacher)) == pytest.approx(1.7)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 3), (3, 6), (4, 7), (5, 6)], ids=str)
def test_monotone_equals_brute_force(shape, repeat):
    student_depth, teacher_depth = shape
    choose = itertools.combinations_with_replacement if repeat else itertools.combinations
    for seed in range(20):
        cost = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        layers = monotone_map(cost, repeat=repeat).teacher
        best = min(total(cost, other) for other in choose(range(1, teacher_depth + 1), student_depth))
        assert float(total(cost, layers)) == pytest.approx(float(best), rel=1e-12)
        assert list(layers) == sorted(layers)
        assert repeat or len(set(layers)) == student_depth


def test_only_a_repeating_map_lets_a_deeper_student_learn():
    cost = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert monotone_map(cost, repeat=True).teacher == (1, 1, 2)
    with pytest.raises(ValueError, match=r"at most as many as the teacher, 2, got 3"):
        monotone_map(cost)


def test_cka_maps_follow_the_similarity():
    similarity = torch.tensor([[0.3, 0.9, 0.2], [0.8, 0.1, 0.7]])
    assert cka_map(similarity).teacher == (2, 3)
    assert cka_map(similarity, monotone=False).teacher == (2, 1)
    assert torch.equal(cka_map(similarity).scores, similarity)


def test_pairs_count_as_each_kind_of_name_does():
    layers = uniform_map(3, 6)
    assert layers.pairs("hidden_states.{}") == {f"hidden_states.{i}": f"hidden_states.{2 * i}" for i in (1, 2, 3)}
    assert layers.pairs("attentions.{}") == {f"attentions.{i}": f"attentions.{2 * i + 1}" for i in (0, 1, 2)}
    both = layers.pairs("blocks.{}", "encoder.layer.{}.output")
    assert next(iter(both.items())) == ("blocks.0", "encoder.layer.1.output")
    with_embeddings = layers.with_embeddings()
    assert with_embeddings.pairs("hidden_states.{}") == {"hidden_states.0": "hidden_states.0"} | layers.pairs(
        "hidden_states.{}"
    )
    assert with_embeddings.with_embeddings() == with_embeddings


def test_the_table_shows_each_choice_and_its_score():
    chosen = importance_map([0.5, 0.25, 2.0], 2, name="density").with_embeddings()
    assert str(chosen).splitlines() == [
        "by density: 2 layers learn from 3",
        "  embeddings <- embeddings",
        "           1 <-          1   density 0.5",
        "           2 <-          3   density 2",
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(chosen)
    shown = console.export_text()
    assert "density" in shown
    assert "embeddings" in shown


@pytest.mark.parametrize(
    "layers",
    [
        uniform_map(3, 6),
        importance_map(torch.rand(12), 4),
        monotone_map(torch.rand(3, 6)),
        uniform_map(2, 4).with_embeddings(),
    ],
    ids=["none", "importance", "pairs", "embeddings"],
)
def test_plots_are_written(layers, tmp_path):
    picture = matplotlib.image.imread(layers.plot(tmp_path / "map.png"))
    assert picture.shape[0] > 100
    assert picture.std() > 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform_map(7, 6), "at least 1 layer and at most as many as the teacher, 6, got 7"),
        (lambda: uniform_map(0, 6), "at least 1 layer"),
        (lambda: uniform_map(2, 6, base=2), "`base` must be 0 or 1, got 2"),
        (lambda: last_map(3, 6, count=4), "`count` must be between 1 and 3"),
        (lambda: all_map(3, 6), "`all_map` needs networks of equal depth, got a student with 3 layers"),
        (lambda: explicit_map([1, 2], 3, 6), "must name one layer for each of the student's 3, got 2"),
        (lambda: explicit_map([1, 2, 7], 3, 6), "The teacher has no layer 7: it has 6 layers, numbered 1 to 6"),
        (lambda: LayerMap((1, 1), (1, 2), 2, 2), "must ascend, each once"),
        (lambda: LayerMap((), (), 2, 2), "at least one, got 0 of the student"),
        (lambda: LayerMap((3,), (1,), 2, 2), "The student has no layer 3"),
        (lambda: importance_map([1.0, float("nan")], 1), "one finite number per teacher layer"),
        (lambda: importance_map([1.0], 2), "at most as many as the teacher, 1, got 2"),
        (lambda: monotone_map(torch.tensor([[float("inf")]])), "`cost` must be finite numbers of shape"),
        (lambda: nearest_map(torch.zeros(3)), "`cost` must be finite numbers of shape"),
        (lambda: uniform_map(1, 2).pairs("blocks"), "needs {} where the layer's number comes, got 'blocks'"),
        (lambda: uniform_map(1, 2).with_embeddings().pairs("blocks.{}"), "The map has the embeddings"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
