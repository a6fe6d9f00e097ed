"""Measuring two networks: the rows belong together, the importance is autograd's, nothing is changed."""

import copy

import pytest
import torch
from torch import nn

from lightning_distill import KD, CausalLM, SequenceClassification
from lightning_distill.layer_maps import build_student, knowledge_density, measure_layers
from lightning_distill.networks import ConvNet1d, ConvNet2d, from_config

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60, "pad_token_id": 0}


def bert(depth, **more):
    return from_config("bert", "sequence-classification", SMALL | {"num_hidden_layers": depth} | more)


def batches(count=3, labels=True):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 60, (4, 7), generator=generator)
        mask = torch.arange(7) < torch.tensor([[7], [5], [3], [6]])
        batch = {"input_ids": ids * mask, "attention_mask": mask.long()}
        made.append(batch | ({"labels": torch.randint(0, 2, (4,), generator=generator)} if labels else {}))
    return made


def test_rows_are_the_hidden_states_of_the_same_positions():
    student, teacher = bert(2), bert(4)
    module = KD(student, teacher, task=SequenceClassification())
    found = measure_layers(module, batches(2), batches=2, rows=1000)
    assert [tuple(layer.shape) for layer in found.student] == [(42, 16)] * 2
    assert [tuple(layer.shape) for layer in found.teacher] == [(42, 16)] * 4
    for network, layers in ((student, found.student), (teacher, found.teacher)):
        expected = []
        for batch in batches(2):
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            network.eval()
            with torch.no_grad():
                states = network(**inputs, output_hidden_states=True).hidden_states
            expected.append([state[batch["attention_mask"].bool()] for state in states])
        for layer, parts in zip(layers, list(zip(*expected, strict=True))[1:], strict=True):
            # rows are chosen in random order
            whole = torch.cat(parts)
            assert torch.cdist(layer, whole, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values.max() < 1e-4
            torch.testing.assert_close(layer.sum(0), whole.sum(0), atol=1e-3, rtol=1e-4)
    # the same row of student and teacher is the same position: layer 1 of an identical network is equal
    same = measure_layers(KD(copy.deepcopy(teacher), teacher, task=SequenceClassification()), batches(1), batches=1)
    for ours, theirs in zip(same.student, same.teacher, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.chapter("C12", api="lightning_distill.layer_maps.measure_layers")
def test_importance_is_that_of_the_loss_and_the_density_leaves_padding_out():
    teacher = bert(3)
    found = measure_layers(KD(bert(2), teacher, task=SequenceClassification()), batches(2), batches=2)
    importances, densities = [], []
    for batch in batches(2):
        said = teacher.eval().requires_grad_(True)(
            **{key: batch[key] for key in ("input_ids", "attention_mask")}, output_hidden_states=True
        )
        loss = nn.functional.cross_entropy(said.logits, batch["labels"], reduction="sum")
        gradients = torch.autograd.grad(loss, said.hidden_states[1:])
        products = [(g * h).flatten(1).sum(1).abs().mean() for g, h in zip(gradients, said.hidden_states[1:],
                                                                         strict=True)]  # fmt: skip
        importances.append(torch.stack(products).detach())
        states = [state.detach() for state in said.hidden_states]
        densities.append(knowledge_density(states, mask=batch["attention_mask"].bool(), relative=True))
    torch.testing.assert_close(found.importance, torch.stack(importances).mean(0))
    torch.testing.assert_close(found.density, torch.stack(densities).mean(0))
    assert found.taylor().method == "by Taylor importance"
    assert torch.equal(found.densest().scores, found.density)


def test_nothing_is_changed():
    student, teacher = bert(2, hidden_dropout_prob=0.5), bert(3)
    module = KD(student, teacher, task=SequenceClassification())
    state, random = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    first = measure_layers(module, batches(), batches=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert student.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in (*student.parameters(), *teacher.parameters()))
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in (*student.modules(),
                                                                                *teacher.modules()))  # fmt: skip
    again = measure_layers(module, batches(), batches=2)
    assert all(torch.equal(a, b) for a, b in zip(first.student, again.student, strict=True))


def test_a_student_made_of_the_teachers_layers_finds_them_again():
    """Kept layers 2 and 3 of 4 whose first layer is nearly the identity."""
    torch.manual_seed(1)
    teacher = bert(4, initializer_range=0.4)
    student = build_student(teacher, [1, 2])
    found = measure_layers(KD(student, teacher, task=SequenceClassification()), batches(12), batches=12, rows=200)
    assert found.similar().teacher == (1, 2)
    assert found.fitted().teacher == (1, 2)
    assert found.fitted().scores[0, 0] < 1e-3


def test_images_and_signals_give_one_row_per_sample():
    x, y = torch.randn(30, 1, 8, 8), torch.randint(0, 10, (30,))
    module = KD(ConvNet2d((8, 8)), ConvNet2d((16, 16, 16)))
    found = measure_layers(module, [(x, y)])
    assert [tuple(layer.shape) for layer in (*found.student, *found.teacher)] == [(30, 8)] * 2 + [(30, 16)] * 3
    assert found.density is None
    assert found.importance.shape == (3,)
    with pytest.raises(ValueError, match="layers change the shape"):
        found.densest()
    module = KD(ConvNet1d((8, 8)), ConvNet1d((16, 16, 16)))
    found = measure_layers(module, [(torch.randn(30, 1, 40), y)], channel_dim=1)
    assert found.teacher[0].shape == (30, 16)


def test_language_models_and_a_loss_of_ones_own():
    config = {"n_embd": 16, "n_head": 2, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    student, teacher = (from_config("gpt2", "causal-lm", config | {"n_layer": depth}) for depth in (2, 4))
    module = KD(student, teacher, task=CausalLM())
    found = measure_layers(module, batches(labels=False), batches=3)
    assert found.importance.shape == (4,)
    assert (found.importance > 0).all()
    module = KD(bert(2), bert(3), task=SequenceClassification())
    unlabelled = batches(labels=False)
    with pytest.raises(ValueError, match="There is no importance: the batches have no labels"):
        measure_layers(module, unlabelled).taylor()
    own = measure_layers(module, unlabelled, loss=lambda outputs, batch: outputs.logits.logsumexp(-1).sum())
    assert own.taylor().student_depth == 2


@pytest.mark.parametrize(
    ("module", "loader", "arguments", "message"),
    [
        (lambda: KD(bert(2), task=SequenceClassification(), alpha=1.0), batches, {}, "needs a frozen network as"),
        (lambda: KD(bert(2), bert(3), task=SequenceClassification()), list, {}, "gave no batch"),
        (lambda: KD(nn.Linear(4, 2), bert(3)), batches, {}, "Linear has no list"),
        (
            lambda: KD(bert(2), bert(3), task=SequenceClassification()),
            batches,
            {"student_layers": ["bert.layers.0"]},
            "has no submodule 'bert.layers.0'",
        ),
    ],
)
def test_bad_input(module, loader, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_layers(module(), loader(), **arguments)
