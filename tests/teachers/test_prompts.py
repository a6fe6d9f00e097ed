"""A teacher that is asked in several ways."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.losses import kl_divergence
from lightning_distill.tasks import CausalLM, Classification
from lightning_distill.teachers import FunctionTeacher
from lightning_distill.teachers.prompts import PromptEnsemble, prepend_tokens, prompt_ensemble


def logits(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.chapter("B25", api="lightning_distill.teachers.prompt_ensemble")
@pytest.mark.parametrize("mode", ["arithmetic", "geometric"])
def test_matches_golden(golden, mode):
    case = golden("prompt_ensemble")
    mean = prompt_ensemble(case.inputs["prompt_probs"].log(), mode=mode).exp()
    torch.testing.assert_close(mean, case.expected[mode], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("B25")
@pytest.mark.parametrize("mode", ["arithmetic", "geometric"])
def test_equal_predictions_are_their_own_mean_and_weights_choose(mode):
    one, many = logits(4, 3), logits(3, 4, 3, seed=1)
    torch.testing.assert_close(prompt_ensemble(one.expand(5, 4, 3), mode=mode), one.log_softmax(-1))
    chosen = prompt_ensemble(many, mode=mode, weights=[0.0, 2.0, 0.0])
    torch.testing.assert_close(chosen, many[1].log_softmax(-1))
    assert torch.equal(chosen.exp().sum(-1).round(decimals=9), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("mode", "direction"), [("arithmetic", "forward"), ("geometric", "reverse")])
def test_each_mean_is_the_student_closest_to_all_prompts(mode, direction):
    many, weights = logits(3, 4, seed=1), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    best = prompt_ensemble(many, mode=mode, weights=weights).requires_grad_()
    total = (weights * kl_divergence(best.expand(3, 4), many, direction=direction)).sum()
    (gradient,) = torch.autograd.grad(total, best)
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("mode", ["arithmetic", "geometric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sure_and_contradicting_prompts_are_finite_in_half_precision(mode, dtype):
    many = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]).to(dtype)
    mean = prompt_ensemble(many, mode=mode)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.exp(), torch.full((1, 2), 0.5))


def shifted(batch, by):
    return (batch[0] + by, *batch[1:])


TEMPLATES = [partial(shifted, by=0.0), partial(shifted, by=1.0), partial(shifted, by=-2.0)]


@pytest.mark.chapter("B25", api="lightning_distill.teachers.PromptEnsemble")
@pytest.mark.parametrize("mode", ["arithmetic", "geometric"])
def test_teacher_averages_what_its_network_says_to_each_prompt(mode):
    network, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), torch.randn(5, 4)
    teacher = PromptEnsemble(network, TEMPLATES, mode, weights=[1, 2, 1])
    teacher.train()
    said = teacher((x, None), Classification()).logits
    probs = torch.stack([network(x + by).softmax(-1) for by in (0.0, 1.0, -2.0)])
    shares = torch.tensor([0.25, 0.5, 0.25])[:, None, None]
    expected = (shares * probs).sum(0) if mode == "arithmetic" else (shares * probs.log()).sum(0).softmax(-1)
    torch.testing.assert_close(said.exp(), expected)
    assert not said.requires_grad
    assert list(teacher.parameters()) == []  # of the frozen network nothing reaches optimizer or checkpoint


def test_trains_a_student_and_stays_as_it_is(make_trainer):
    network, x = nn.Linear(4, 3), torch.randn(32, 4)
    before = copy.deepcopy(network.state_dict())
    module = KD(nn.Linear(4, 3), PromptEnsemble(network, TEMPLATES), temperature=2.0, alpha=0.5)
    start = module.student.weight.detach().clone()
    loader = DataLoader(TensorDataset(x, torch.arange(32) % 3), batch_size=8)
    make_trainer(max_epochs=1).fit(module, loader, loader)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.equal(module.student.weight, start)
    assert not any("teacher" in name for name in module.state_dict())


class Mean(nn.Module):
    """A causal language model whose logits say the mean of what it read."""

    def forward(self, input_ids):
        counts = torch.arange(1, input_ids.shape[1] + 1)
        return nn.functional.one_hot(input_ids, 6).cumsum(1) / counts[:, None]


def test_prompts_of_a_language_model_change_what_it_says_of_the_same_tokens():
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 4, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 2, 3, 4], [-100, 4, 3, -100]]),
        "index": torch.tensor([0, 1]),
    }
    templates = [partial(prepend_tokens, tokens=[0, 5]), partial(prepend_tokens, tokens=[2])]
    longer = templates[0](batch)
    assert longer["input_ids"].tolist() == [[0, 5, 1, 2, 3, 4], [0, 5, 5, 4, 3, 0]]
    assert longer["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 1, 0]]
    assert longer["labels"].tolist() == [[-100] * 3 + [2, 3, 4], [-100] * 3 + [4, 3, -100]]
    assert longer["index"] is batch["index"]
    said = PromptEnsemble(Mean(), templates)(batch, CausalLM()).logits
    assert said.shape == (5, 6)
    first = (
        torch.stack([torch.tensor([1, 1, 0, 0, 0, 1]) / 3, torch.tensor([0, 1, 1, 0, 0, 0]) / 2]).softmax(-1).mean(0)
    )
    torch.testing.assert_close(said[0].exp(), first)


def test_a_teacher_can_be_any_teacher():
    said = torch.tensor([[1.0, 0.0]])
    teacher = PromptEnsemble(FunctionTeacher(lambda batch: said + batch[0]), TEMPLATES[:2])
    torch.testing.assert_close(teacher((torch.zeros(1, 2), None), Classification()).logits, said.log_softmax(-1))


def test_errors():
    with pytest.raises(ValueError, match="`templates` is empty"):
        PromptEnsemble(nn.Linear(1, 1), [])
    with pytest.raises(TypeError, match="`templates` must be functions of the batch, got str"):
        PromptEnsemble(nn.Linear(1, 1), ["Question: "])
    with pytest.raises(ValueError, match="`mode` must be 'arithmetic' or 'geometric', got 'mean'"):
        PromptEnsemble(nn.Linear(1, 1), TEMPLATES, "mean")
    with pytest.raises(ValueError, match=r"`weights` must have one entry for each of 3 predictions, got \(2,\)"):
        PromptEnsemble(nn.Linear(1, 1), TEMPLATES, weights=[1, 1])
    for weights in ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(ValueError, match="`weights` must be finite, none negative and not all zero"):
            prompt_ensemble(logits(3, 2), weights=weights)
    ragged = PromptEnsemble(nn.Linear(4, 3), [lambda batch: batch, lambda batch: (batch[0][:2],)])
    with pytest.raises(
        ValueError, match=r"For template 1 the teacher's logits have shape \(2, 3\), for template 0 \(5, 3\)"
    ):
        ragged((torch.randn(5, 4),), Classification())
    with pytest.raises(ValueError, match="PromptEnsemble has no inner activations, but a loss term reads"):
        ragged.tap(["0"])
    with pytest.raises(ValueError, match="does not know what to put into 'position_ids'"):
        prepend_tokens({"input_ids": torch.ones(1, 2), "position_ids": torch.ones(1, 2)}, [1])
