import pytest
import torch
import torch.nn.functional as F

from lightning_distill.losses import (
    AuxiliaryHeads,
    CrossEntropy,
    FeatureAlignment,
    HierarchicalSelfKD,
    LayerwiseKD,
    OnHeads,
    PairedLayers,
    SoftTargets,
    alignment_pairs,
    deep_supervision_loss,
    hierarchical_pairs,
    layerwise_kd,
)
from lightning_distill.outputs import Outputs, Step

CLASSES = 5


def step_of(labels=None, teacher=None, items=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = {
        "a": torch.randn(items, 7, generator=generator).requires_grad_(),
        "b": torch.randn(items, 3, 2, 2, generator=generator).requires_grad_(),
    }
    logits = torch.randn(items, CLASSES, generator=generator).requires_grad_()
    return Step(None, Outputs(logits, features=features), teacher, labels=labels, temperature=2.0)


def built(step, **arguments):
    heads = AuxiliaryHeads(["a", "b"], "linear", weights=[0.25, 0.5], **arguments)
    heads.build_for(step)
    return heads


@pytest.mark.chapter("B05", api="lightning_distill.losses.deep_supervision_loss")
@pytest.mark.erratum("ERR-34")
def test_the_network_itself_is_one_of_the_classifiers(golden):
    """Heads 1 … k and the sum from 0 to k: without the main classifier the golden sum would be 0.66."""
    case = golden("deep_supervision_loss")
    losses, weights = list(case.inputs["head_ce"]), case.inputs["weights"].tolist()
    assert deep_supervision_loss(losses, weights).item() == pytest.approx(case.expected["loss"], rel=case.rtol)
    assert deep_supervision_loss(losses[:-1], weights[:-1]).item() == pytest.approx(0.66)
    assert deep_supervision_loss(losses, [0, 0, 0, 1]).item() == pytest.approx(0.7)


@pytest.mark.chapter("B12", api="lightning_distill.losses.layerwise_kd")
def test_layerwise_divergence_is_the_golden_one(golden):
    case = golden("layerwise_self_kd")
    logits, betas = case.inputs["head_probs"].log().unsqueeze(1).unbind(0), case.inputs["betas"].tolist()
    found = layerwise_kd(logits, weights=betas)
    assert found.item() == pytest.approx(case.expected["forward"], rel=case.rtol)


@pytest.mark.chapter("B12")
@pytest.mark.erratum("ERR-37")
def test_the_printed_layerwise_divergence_pulls_the_deep_head_down(golden):
    """KL(g_i || g_{i+1}) as printed: another number, and a gradient into the head that should teach."""
    case = golden("layerwise_self_kd")
    logits = [row.log().unsqueeze(0).requires_grad_() for row in case.inputs["head_probs"]]
    betas = case.inputs["betas"].tolist()
    printed = sum(
        beta * (shallow.softmax(-1) * (shallow.log_softmax(-1) - deep.log_softmax(-1))).sum()
        for beta, shallow, deep in zip(betas, logits[:-1], logits[1:], strict=True)
    )
    assert printed.item() == pytest.approx(case.expected["as_written_reverse"], rel=case.rtol)
    printed.backward()
    assert logits[-1].grad.abs().max() > 0.01

    for target in ("next", "deepest"):
        fresh = [row.detach().clone().requires_grad_() for row in logits]
        layerwise_kd(fresh, weights=betas, target=target).sum().backward()
        assert fresh[-1].grad is None
        assert all(row.grad.abs().max() > 0.01 for row in fresh[:-1])
    reverse = layerwise_kd(logits, weights=betas, direction="reverse")
    assert reverse.item() == pytest.approx(case.expected["as_written_reverse"], rel=case.rtol)


@pytest.mark.chapter("B12")
def test_a_head_in_the_middle_gets_the_gradient_of_its_own_term_alone():
    logits = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    layerwise_kd(logits, temperature=3.0).sum().backward()
    # d/dz T^2 KL(p || q(z / T)) = T (q - p)
    q, p = (logits[i].detach().div(3).softmax(-1) for i in (1, 2))
    torch.testing.assert_close(logits[1].grad, 3 * (q - p))


def test_terms_on_heads_are_the_formula():
    labels = torch.tensor([0, 4, -100, 2])
    step = step_of(labels, Outputs(torch.randn(4, CLASSES)))
    heads = built(step)
    first, second = heads.logits(step)
    ce = [F.cross_entropy(said, labels, reduction="none") for said in (first, second)]
    torch.testing.assert_close(OnHeads(CrossEntropy(), heads)(step), 0.25 * ce[0] + 0.5 * ce[1])
    soft = OnHeads(SoftTargets(), heads)
    assert soft.needs_teacher
    assert not OnHeads(CrossEntropy(), heads).needs_teacher
    kl = [
        4 * F.kl_div((said / 2).log_softmax(-1), (step.teacher.logits / 2).softmax(-1), reduction="none").sum(-1)
        for said in (first, second)
    ]
    torch.testing.assert_close(soft(step), 0.25 * kl[0] + 0.5 * kl[1])
    for target in ("next", "deepest"):
        expected = layerwise_kd(
            [first, second, step.student.logits], weights=heads.weights, temperature=2.0, target=target
        )
        torch.testing.assert_close(LayerwiseKD(heads, target)(step), expected)


def test_the_network_does_not_learn_from_its_heads_in_layerwise_kd():
    step = step_of()
    LayerwiseKD(built(step))(step).sum().backward()
    assert step.student.logits.grad is None
    assert all(feature.grad.abs().max() > 0 for feature in step.student.features.values())


@pytest.mark.chapter("B13", api="lightning_distill.losses.FeatureAlignment")
def test_alignment_of_all_pairs_is_the_golden_one(golden):
    case = golden("feature_alignment_pairs")
    features = {str(i): layer for i, layer in enumerate(case.inputs["h"])}
    step = Step(None, Outputs(torch.zeros(2, 3), features=features))
    term = FeatureAlignment(list(features), "all", projection="identity")
    assert 3 * term(step).sum().item() == pytest.approx(case.expected["sum"], rel=case.rtol)  # 3 channels
    assert len(term.pairs) == 3


@pytest.mark.chapter("B13")
def test_alignment_is_zero_for_equal_layers_and_leaves_the_deeper_one_alone():
    layer = torch.randn(2, 5, 6, requires_grad=True)
    deep = layer.detach().clone().requires_grad_()
    step = Step(None, Outputs(torch.zeros(2, 3), features={"a": layer, "b": deep}))
    term = FeatureAlignment(["a", "b"], projection="identity")
    assert term(step).abs().max() == 0
    step.student.features["a"] = 2 * layer
    term(step).sum().backward()
    torch.testing.assert_close(layer.grad, 4 * layer.detach() / (5 * 6))
    assert deep.grad is None


@pytest.mark.chapter("B19", api="lightning_distill.losses.HierarchicalSelfKD")
def test_hierarchical_distillation_is_the_golden_one(golden):
    case = golden("hierarchical_self_kd")
    layers = {f"layer{i}": case.inputs["h"].get(str(i), torch.zeros(2, 3).double()) for i in range(1, 5)}
    features = {name: layer.clone().requires_grad_() for name, layer in layers.items()}
    step = Step(None, Outputs(torch.zeros(2, 3), features=features))
    alphas = [case.inputs["alpha"]["1"], case.inputs["alpha"]["2"]]
    term = HierarchicalSelfKD(list(layers), alphas, projection="identity")
    assert term.pairs == (("layer1", "layer2"), ("layer2", "layer4"))
    total = 3 * term(step).sum()
    assert total.item() == pytest.approx(case.expected["sum"], rel=case.rtol)
    total.backward()
    assert features["layer4"].grad is None
    # layer 2 learns from layer 4 and is left alone as the teacher of layer 1
    torch.testing.assert_close(features["layer2"].grad, 2 * alphas[1] * (layers["layer2"] - layers["layer4"]))


@pytest.mark.chapter("B19")
def test_half_of_the_layers_have_a_teacher_twice_as_deep():
    assert hierarchical_pairs(24)[-1] == (12, 24)
    assert hierarchical_pairs(24)[5] == (6, 12)
    assert hierarchical_pairs(5) == [(1, 2), (2, 4)]
    assert alignment_pairs(4, "adjacent") == [(0, 1), (1, 2), (2, 3)]
    assert alignment_pairs(4, "to_last") == [(0, 3), (1, 3), (2, 3)]


def test_layers_of_other_widths_and_sizes_are_projected_and_resized():
    features = {"a": torch.randn(2, 4, 8, 8), "b": torch.randn(2, 6, 4, 4)}
    step = Step(None, Outputs(torch.zeros(2, 3), features=features))
    term = PairedLayers([("a", "b")])
    term.build(step)
    linear = term.projections[0].linear
    pooled = F.avg_pool2d(features["a"], 2).movedim(1, -1)
    expected = (linear(pooled) - features["b"].movedim(1, -1)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(term(step), expected)


def test_padding_does_not_count_in_the_alignment_of_sequences():
    features = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 3, 4)}
    positions = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    step = Step(None, Outputs(torch.zeros(2, 3), features=features), positions=positions)
    values = PairedLayers([("a", "b")], projection="identity")(step)
    squares = (features["a"] - features["b"]).square().mean(dim=-1)
    torch.testing.assert_close(values, torch.stack([squares[0, 0], squares[1].mean()]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    layers = {"a": torch.randn(2, 300).to(dtype), "b": torch.randn(2, 300).to(dtype)}
    step = Step(None, Outputs(torch.zeros(2, 3), features=layers))
    found = PairedLayers([("a", "b")], projection="identity")(step)
    exact = (layers["a"].double() - layers["b"].double()).square().mean(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    logits = [torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])]
    assert layerwise_kd([side.to(dtype) for side in logits]).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deep_supervision_loss([], []), "one number for each of the 0 losses, got 0"),
        (lambda: deep_supervision_loss([torch.zeros(())], [1.0, 2.0]), "for each of the 1 losses, got 2"),
        (lambda: layerwise_kd([torch.zeros(1, 2)]), "at least two classifiers, got 1"),
        (
            lambda: layerwise_kd([torch.zeros(1, 2)] * 2, target="all"),
            "`target` must be 'next' or 'deepest', got 'all'",
        ),
        (lambda: layerwise_kd([torch.zeros(1, 2)] * 3, weights=[1.0]), "for each of the 2 losses, got 1"),
        (lambda: LayerwiseKD(AuxiliaryHeads(["a"]), "first"), "`target` must be 'next' or 'deepest', got 'first'"),
        (lambda: alignment_pairs(1), "`layers` must be at least 2, got 1"),
        (lambda: alignment_pairs(3, "some"), "`which` must be 'all', 'adjacent' or 'to_last', got 'some'"),
        (lambda: hierarchical_pairs(1), "`layers` must be at least 2, got 1"),
        (lambda: PairedLayers([]), "`pairs` must hold at least one pair"),
        (lambda: PairedLayers([("a", "b")], projection="big"), "`projection` must be one of linear, mlp, identity"),
        (lambda: PairedLayers([("a", "b")], [1.0, 2.0]), "`weights` must be one number for each of the 1 pairs"),
        (lambda: HierarchicalSelfKD(["a", "b"], [-1.0]), r"not negative, got \[-1.0\]"),
    ],
)
def test_refuses_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
