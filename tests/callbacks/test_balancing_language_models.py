"""Balancing the terms of language models: the joint term beside another one, and its parts."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distill import KD
from lightning_distill.callbacks import MGDA, GradientLog, GradNorm, PCGrad, UncertaintyWeighting
from lightning_distill.losses import FeatureMatching, fused
from lightning_distill.tasks import CausalLM
from lightning_distill.weighting import UncertaintyWeights

transformers = pytest.importorskip("transformers")


def gpt2(seed):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=29, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(1, 29, (12, 9), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def module(**arguments):
    made = KD(
        gpt2(0),
        gpt2(1),
        task=CausalLM(),
        terms={"feature": FeatureMatching({"hidden_states.1": "hidden_states.1"})},
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        **arguments,
    )
    torch.manual_seed(2)
    made.build(next(iter(DataLoader(Texts(), batch_size=4))))
    return made


@pytest.fixture(params=["plain", "fused"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(fused, "PLAIN_BYTES", 0 if request.param == "fused" else 2**62)
    return request.param


@pytest.mark.parametrize(
    "callback",
    [GradNorm(lr=None, every_n_steps=1), UncertaintyWeighting(), MGDA(), MGDA(exact=True, normalise=None), PCGrad()],
    ids=lambda callback: type(callback).__name__,
)
def test_the_joint_term_is_balanced_with_another_and_the_backward_still_works(callback, make_trainer):
    made = module()
    assert list(made.terms) == ["kd", "feature"]
    before = made.student.transformer.wte.weight.clone()
    log = GradientLog(every_n_steps=1)
    make_trainer(callbacks=[callback, log], max_epochs=1).fit(made, DataLoader(Texts(), batch_size=4))
    assert set(made.weighting.weights()) == {"kd", "feature"}
    assert not torch.equal(made.student.transformer.wte.weight, before)
    if isinstance(callback, GradNorm):
        # not the output layer: it is tied to the embedding, and the features of the first block know nothing of it
        assert callback.state_dict()["layer"] == "transformer.h.0.mlp.c_proj"


def test_measuring_does_not_change_the_gradient(make_trainer):
    """The fused loss keeps its gradients for a backward; several passes through it must not use them up."""
    students = []
    for callbacks in ([], [GradientLog(every_n_steps=1)]):
        made = module()
        trainer = make_trainer(callbacks=callbacks, max_epochs=1)
        trainer.fit(made, DataLoader(Texts(), batch_size=4))
        students.append(torch.nn.utils.parameters_to_vector(made.student.parameters()))
    assert torch.equal(*students)


def test_a_weighting_gets_the_two_parts_as_terms_of_their_own(make_trainer):
    made = module(weights=UncertaintyWeights())
    assert list(made.terms) == ["hard", "soft", "feature"]
    make_trainer(max_epochs=1).fit(made, DataLoader(Texts(), batch_size=4))
    assert set(made.weighting.weights()) == {"hard", "soft", "feature"}


def test_the_joint_term_alone_is_nothing_to_balance(make_trainer):
    alone = KD(gpt2(0), gpt2(1), task=CausalLM())
    with pytest.raises(ValueError, match=r"has only \['kd'\].*name both: `weights=\{'hard': 0.5, 'soft': 0.5\}`"):
        make_trainer(callbacks=[GradNorm()], max_epochs=1).fit(alone, DataLoader(Texts(), batch_size=4))
