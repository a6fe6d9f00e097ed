"""Hidden states and attention maps of transformers models by name."""

import peft
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from lightning_distill.networks import from_config
from lightning_distill.outputs import UNLABELLED
from lightning_distill.taps import Taps
from lightning_distill.tasks import CausalLM, SequenceClassification
from lightning_distill.teachers import FrozenTeacher

BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def bert(**config):
    return from_config("bert", "sequence-classification", BERT | config).eval()


def gpt2():
    return from_config("gpt2", "causal-lm", GPT2).eval()


def test_hidden_states_are_those_that_the_model_returns():
    model = bert()
    with Taps(model, ["hidden_states.0", "hidden_states.3", "hidden_states.-1"]).recording() as kept:
        model(**BATCH)
    expected = model(**BATCH, output_hidden_states=True).hidden_states
    for name, layer in {"hidden_states.0": 0, "hidden_states.3": 3, "hidden_states.-1": 3}.items():
        torch.testing.assert_close(kept[name], expected[layer])
        assert kept[name].requires_grad


def test_attention_maps_switch_to_eager_attention_and_back():
    model = bert()
    assert model.config._attn_implementation == "sdpa"
    plain = model(**BATCH).logits
    taps = Taps(model, ["attentions.1"])
    assert model.config._attn_implementation == "eager"
    with taps.recording() as kept:
        said = model(**BATCH).logits
    torch.testing.assert_close(said, plain)
    assert kept["attentions.1"].shape == (2, 2, 5, 5)
    torch.testing.assert_close(kept["attentions.1"].sum(dim=-1), torch.ones(2, 2, 5))
    assert kept["attentions.1"][1, :, :, 3:].abs().max() < 1e-6  # nobody attends to padding
    taps.remove()
    assert model.config._attn_implementation == "sdpa"
    with taps.recording() as kept:
        model(**BATCH)
    assert kept == {}


def test_a_model_that_is_eager_already_stays_so():
    model = BertModel(BertConfig(**BERT, attn_implementation="eager"))
    taps = Taps(model, ["attentions.0"])
    taps.remove()
    assert model.config._attn_implementation == "eager"


def test_causal_models_are_tapped_under_their_head_with_and_without_it():
    model, task = gpt2(), CausalLM()
    labels = torch.where(MASK.bool(), IDS, UNLABELLED)
    taps = Taps(model, ["hidden_states.-1", "attentions.0", "transformer.h.1"])
    for _ in range(2):  # the first pass tries the head
        with taps.recording() as kept:
            said = task.run(model, {**BATCH, "labels": labels})
        assert kept["attentions.0"].shape == (2, 2, 5, 5)
        assert kept["transformer.h.1"].shape == (2, 5, 16)
        positions = task.positions({**BATCH, "labels": labels})
        torch.testing.assert_close(kept["hidden_states.-1"][positions], said.hidden)


def test_encoder_decoder_models_name_their_sides():
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    names = ["encoder_hidden_states.1", "decoder_hidden_states.2", "cross_attentions.0"]
    with Taps(model, names).recording() as kept:
        model(input_ids=IDS, attention_mask=MASK, labels=IDS[:, :3].contiguous())
    assert [tuple(kept[name].shape) for name in names] == [(2, 5, 8), (2, 3, 8), (2, 2, 3, 5)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_and_their_base_are_tapped():
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with Taps(model, ["hidden_states.1"]).recording() as kept:
        model(**BATCH)
    assert kept["hidden_states.1"].shape == (2, 5, 16)


def test_a_frozen_teacher_gives_them_and_can_be_tapped_anew():
    teacher, task = FrozenTeacher(bert()), SequenceClassification()
    teacher.tap(["hidden_states.2", "attentions.2"])
    assert set(teacher(BATCH, task).features) == {"hidden_states.2", "attentions.2"}
    teacher.tap(["hidden_states.1"])
    assert set(teacher(BATCH, task).features) == {"hidden_states.1"}
    assert teacher.network.config._attn_implementation == "sdpa"


def test_a_layer_that_is_not_there_is_refused():
    model = bert()
    taps = Taps(model, ["hidden_states.4"])
    with (
        pytest.raises(ValueError, match=r"'hidden_states.4' is not there: BertModel returned 4 of them"),
        taps.recording(),
    ):
        model(**BATCH)
    model = bert()
    taps = Taps(model, ["cross_attentions.0"])
    with (
        pytest.raises(ValueError, match="returned no cross_attentions: it returns last_hidden_state"),
        taps.recording(),
    ):
        model(**BATCH)


def test_models_that_cannot_return_their_maps_are_refused(monkeypatch):
    model = gpt2()
    monkeypatch.delattr(PreTrainedModel, "set_attn_implementation")  # as before transformers 4.53
    with pytest.raises(ValueError, match=r"GPT2Model with `attn_implementation='sdpa'` does not return. Load"):
        Taps(model, ["attentions.0"])
