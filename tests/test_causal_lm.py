"""Language models and sequence classifiers of transformers: losses against theirs, masks, gradients, metrics."""

import copy
from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import KD
from lightning_distill.losses import CrossEntropy, SoftTargets, fused
from lightning_distill.losses.fused import FusedKD
from lightning_distill.losses.language_modelling import AdaptiveTokenWeight, EntropyTokenWeight
from lightning_distill.modules import DistillationModule
from lightning_distill.tasks import CausalLM, SequenceClassification

transformers = pytest.importorskip("transformers")

VOCABULARY = 29
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ALPHA, TEMPERATURE = 0.3, 2.0


def gpt2(width=16, seed=0, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=16, n_embd=width, n_layer=2, n_head=2, initializer_range=0.3,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **SPECIAL,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(width=16, seed=0, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.3, **SPECIAL,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gemma2(width=16, seed=0, vocabulary=VOCABULARY):
    """Its logits are capped: more than an output layer over the last hidden state."""
    torch.manual_seed(seed)
    config = transformers.Gemma2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=16, final_logit_softcapping=1.0,
        initializer_range=0.5, attn_implementation="eager", **SPECIAL,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def language_batch(rows=4, length=9, seed=0):
    """Prompts of two tokens at ``-100``, padding on the right."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.tensor([[length], [5], [7], [4]])[torch.arange(rows) % 4]).long()
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(params=["plain", "fused"])
def path(request, monkeypatch):
    """Both ways of computing the loss, the second of which is otherwise taken for large vocabularies only."""
    calls = []
    operator = fused.fused_linear_kd

    def spy(*arguments, **keywords):
        calls.append(1)
        return operator(*arguments, **keywords)

    monkeypatch.setattr(fused, "PLAIN_BYTES", 0 if request.param == "fused" else 2**62)
    monkeypatch.setattr(fused, "fused_linear_kd", spy)
    return request.param, calls


def reference(student, teacher, batch, alpha=ALPHA, temperature=TEMPERATURE, everywhere=False):
    """The loss from transformers' own logits, token by token."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits
    student_logits = student(**inputs).logits
    hard, soft, count = 0.0, 0.0, 0
    for row in range(len(batch["labels"])):
        for position in range(batch["labels"].shape[1] - 1):
            label = batch["labels"][row, position + 1]
            labelled = label != -100
            if not (labelled or (everywhere and batch["attention_mask"][row, position + 1] == 1)):
                continue
            z, t = student_logits[row, position], teacher_logits[row, position]
            p, q = (t / temperature).softmax(-1), (z / temperature).softmax(-1)
            soft = soft + temperature**2 * (p * (p / q).log()).sum()
            hard = hard - z.log_softmax(-1)[label] if labelled else hard
            count += 1
    return alpha * hard / count + (1 - alpha) * soft / count, hard / count, soft / count


def total_and_gradients(module, batch):
    module.student.zero_grad()
    losses = module.losses(module.observe(batch))
    total = module.weighting(losses)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in module.student.named_parameters()}


# Values and gradients


@pytest.mark.parametrize("make", [gpt2, llama, gemma2])
def test_loss_and_gradient_are_those_of_the_model_s_own_logits(make, path):
    student, teacher = make(16, seed=1), make(24 if make is not gemma2 else 16, seed=2)
    batch = language_batch()
    module = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM())
    total, gradients = total_and_gradients(module, batch | {"index": torch.arange(4)})
    student.zero_grad()
    expected, hard, soft = reference(student, teacher, batch)
    expected.backward()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        close = {"rtol": 1e-4, "atol": 1e-5 * parameter.grad.norm().item()}
        torch.testing.assert_close(gradients[name], parameter.grad, **close, msg=lambda m, n=name: f"{n}: {m}")
    parts = module.terms["kd"].parts
    torch.testing.assert_close(parts["hard"], hard.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["soft"], soft.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["hard"], student(**batch).loss.detach(), rtol=1e-5, atol=1e-6)
    way, calls = path
    assert bool(calls) == (way == "fused" and make is not gemma2)


@pytest.mark.parametrize("make", [gpt2, llama, gemma2])
def test_labels_alone_are_transformers_own_loss(make):
    student, batch = make(), language_batch()
    module = KD(student, alpha=1.0, task=CausalLM())
    torch.testing.assert_close(module.losses(module.observe(batch))["hard"], student(**batch).loss)
    no_labels = {key: batch[key] for key in ("input_ids", "attention_mask")}
    everything = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = student(**no_labels, labels=everything).loss
    torch.testing.assert_close(module.losses(module.observe(no_labels))["hard"], expected)


def test_separate_terms_are_the_fused_one(path):
    student, teacher, batch = gpt2(seed=1), llama(seed=2), language_batch()
    joint = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM())
    apart = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM(), weights={"hard": 0.3, "soft": 0.7})
    assert list(apart.terms) == ["hard", "soft"]
    first, second = total_and_gradients(joint, batch), total_and_gradients(apart, batch)
    torch.testing.assert_close(first[0], second[0])
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [gpt2, gemma2])
def test_a_step_in_bfloat16_is_finite_and_close(make, make_trainer, path):
    student, teacher = make(seed=1), make(seed=2)
    exact, *_ = reference(student, teacher, language_batch())
    module = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM())
    trainer = make_trainer(max_steps=1, precision="bf16-mixed", log_every_n_steps=1)
    trainer.fit(module, DataLoader([language_batch()], batch_size=None))
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], exact.detach(), rtol=0.05, atol=0.01)
    assert all(p.isfinite().all() for p in student.parameters())


# Which tokens count


class Says(nn.Module):
    """A plain module whose logits tell how often it has read each token."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids):
        return self.scale * F.one_hot(input_ids, VOCABULARY).cumsum(1).float()


def test_a_position_is_compared_with_the_token_after_it():
    batch = {"input_ids": torch.tensor([[3, 3, 5, 5, 5]])}
    module = KD(Says(), alpha=1.0, task=CausalLM())
    step = module.observe(batch)
    assert step.labels.tolist() == [3, 5, 5, 5]
    assert step.student.logits[:, 3].tolist() == [1, 2, 2, 2]
    assert step.student.logits[:, 5].tolist() == [0, 0, 1, 2]
    expected = F.cross_entropy(module.student(batch["input_ids"])[0, :-1], batch["input_ids"][0, 1:])
    torch.testing.assert_close(module.losses(step)["hard"], expected)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_padding_changes_nothing(make, path):
    module = KD(make(seed=1), make(seed=2), TEMPERATURE, ALPHA, task=CausalLM())
    batch = language_batch()
    total, gradients = total_and_gradients(module, batch)
    padding = batch["attention_mask"] == 0
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 7)}
    longer = {
        key: F.pad(value, (0, 3), value=-100 if key == "labels" else 0) for key, value in batch.items()
    }  # fmt: skip
    for changed in (other, longer):
        again, other_gradients = total_and_gradients(module, changed)
        torch.testing.assert_close(again, total)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_prompts_are_not_learnt_unless_they_are_distilled(path):
    student, teacher, batch = gpt2(seed=1), gpt2(seed=2), language_batch()
    answers = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM())
    everything = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM(distill_prompt=True))
    counted = {name: len(module.observe(batch).labels) for name, module in (("a", answers), ("e", everything))}
    assert counted == {"a": 7 + 3 + 5 + 2, "e": 8 + 4 + 6 + 3}
    for module, everywhere in ((answers, False), (everything, True)):
        expected, hard, soft = reference(student, teacher, batch, everywhere=everywhere)
        total, _ = total_and_gradients(module, batch)
        torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.terms["kd"].parts["hard"], hard.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.terms["kd"].parts["soft"], soft.detach(), rtol=1e-5, atol=1e-6)
    assert (everything.observe(batch).labels == -100).sum() == 4  # second token of each prompt


def test_the_first_token_of_a_packed_sequence_is_not_learnt(path):
    """Three texts in one row: what comes first in a text does not follow from the text before."""
    module = KD(gpt2(seed=1), gpt2(seed=2), TEMPERATURE, ALPHA, task=CausalLM())
    ids = language_batch()["input_ids"][:1]
    labels = ids.clone()
    labels[0, [0, 3, 7]] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    step = module.observe(batch)
    assert step.labels.tolist() == ids[0, [1, 2, 4, 5, 6, 8]].tolist()
    expected, *_ = reference(module.student, module.teacher.network, batch)
    torch.testing.assert_close(total_and_gradients(module, batch)[0], expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [gpt2, gemma2])
@pytest.mark.parametrize("how", ["labels", "padding", "one token"])
def test_a_batch_in_which_nothing_counts_teaches_nothing(make, how, path):
    module = KD(make(seed=1), make(seed=2), TEMPERATURE, ALPHA, task=CausalLM())
    batch = language_batch()
    if how == "labels":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    elif how == "padding":
        batch["attention_mask"] = F.pad(torch.ones(4, 1, dtype=torch.long), (0, 8))
    else:
        batch = {key: value[:, :1] for key, value in batch.items()}
    total, gradients = total_and_gradients(module, batch)
    assert total == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("terms", ["kd", "apart", "weighted"])
def test_a_batch_in_which_nothing_counts_can_be_trained_and_evaluated_on(terms, make_trainer):
    weights = {"hard": 0.3, "soft": 0.7}
    more = {
        "kd": {},
        "apart": {"weights": weights},
        "weighted": {"weights": weights, "item_weights": {"soft": AdaptiveTokenWeight(), "*": EntropyTokenWeight()}},
    }[terms]
    module = KD(gpt2(seed=1), gpt2(seed=2), TEMPERATURE, ALPHA, task=CausalLM(), **more)
    nothing = language_batch()
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    loader = DataLoader([nothing, language_batch(), nothing], batch_size=None)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    assert all(p.isfinite().all() for p in module.student.parameters())
    assert trainer.callback_metrics["val/nll"].isfinite()


def split_gradient(split, make_trainer, task, more):
    """What one optimizer step changes at learning rate 1, for micro-batches of the given numbers of rows."""
    student = gpt2(seed=1)
    before = nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    module = KD(
        student, gpt2(seed=2), TEMPERATURE, ALPHA, task=task, optimizer=partial(torch.optim.SGD, lr=1.0), **more
    )
    batch = language_batch(rows=8)
    batch["labels"][4:] = -100  # whole micro-batches without a labelled token
    parts = [
        dict(zip(batch, rows, strict=True)) for rows in zip(*(v.split(split) for v in batch.values()), strict=True)
    ]
    trainer = make_trainer(accumulate_grad_batches=len(parts), max_epochs=1)
    trainer.fit(module, DataLoader(parts, batch_size=None))
    assert trainer.global_step == 1
    return before - nn.utils.parameters_to_vector(student.parameters()).detach()


@pytest.mark.parametrize("task", [CausalLM(), CausalLM(distill_prompt=True)], ids=["answers", "prompts too"])
@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_do_not_change_the_gradient(make_trainer, task, weighted, path):
    more = {"weights": {"hard": 0.3, "soft": 0.7}, "item_weights": {"soft": AdaptiveTokenWeight()}} if weighted else {}
    whole = split_gradient(8, make_trainer, task, more)
    assert whole.norm() > 1e-3
    for split in (4, [1, 1, 3, 3], [6, 2], 1):
        assert (split_gradient(split, make_trainer, task, more) - whole).norm() <= 1e-5 * whole.norm(), split


# Measurements


@pytest.mark.parametrize("make", [gpt2, gemma2])
def test_metrics_are_means_over_tokens(make, make_trainer):
    student, teacher = make(seed=1), make(seed=2)
    batches = [language_batch(rows=4), language_batch(rows=2, seed=1), language_batch(rows=1, seed=2)]
    module = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM())
    (found,) = make_trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)
    z, t, labels = [], [], []
    for batch in batches:
        keep = batch["labels"][:, 1:] != -100
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            z.append(student(**inputs).logits[:, :-1][keep])
            t.append(teacher(**inputs).logits[:, :-1][keep])
        labels.append(batch["labels"][:, 1:][keep])
    z, t, labels = torch.cat(z), torch.cat(t), torch.cat(labels)
    expected = {
        "val/nll": F.cross_entropy(z, labels),
        "val/accuracy": (z.argmax(-1) == labels).float().mean(),
        "val/agreement": (z.argmax(-1) == t.argmax(-1)).float().mean(),
        "val/fidelity": F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean"),
        "val/hard": F.cross_entropy(z, labels),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name
    assert found["val/kd"] == pytest.approx(ALPHA * found["val/hard"] + (1 - ALPHA) * found["val/soft"], rel=1e-5)


def test_nothing_of_the_size_of_tokens_times_vocabulary_is_made_where_nobody_asks(path):
    module = KD(gpt2(seed=1), gpt2(seed=2), TEMPERATURE, ALPHA, task=CausalLM())
    step = module.observe(language_batch())
    module.losses(step)
    way, _ = path
    assert step.student.has_logits == step.teacher.has_logits == (way == "plain")


# Vocabularies


def padded_pair():
    """128 tokens, which the teacher pads to 152."""
    return gpt2(seed=1, vocabulary=128), llama(seed=2, vocabulary=152)


@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_vocabularies_that_are_padded_differently_are_compared_where_they_are_the_same(larger, path, make_trainer):
    student, teacher = padded_pair() if larger == "teacher" else padded_pair()[::-1]
    module = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM(), terms={"kd": FusedKD(ALPHA, vocabulary=128)})
    batch = language_batch()
    step = module.observe(batch)
    z, t = step.student.logits_of(slice(None))[:, :128], step.teacher.logits_of(slice(None))[:, :128]
    soft = F.kl_div((z / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    expected = ALPHA * F.cross_entropy(z, step.labels) + (1 - ALPHA) * TEMPERATURE**2 * soft
    total, gradients = total_and_gradients(module, batch)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    if larger == "student":
        assert (gradients["lm_head.weight"][128:] == 0).all()
    loader = DataLoader([batch], batch_size=None)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["val/nll"].isfinite()


def test_vocabularies_of_different_sizes_are_refused_with_both_sizes_and_the_fix(path):
    student, teacher = padded_pair()
    for terms in ({}, {"soft": SoftTargets(), "hard": CrossEntropy()}):
        module = KD(student, teacher, TEMPERATURE, ALPHA, task=CausalLM(), terms=terms)
        with pytest.raises(ValueError, match=r"(?s)128.*152.*vocabular"):
            module.losses(module.observe(language_batch()))


def test_tokens_outside_the_vocabulary_are_refused():
    module = KD(gpt2(), alpha=1.0, task=CausalLM())
    batch = language_batch()
    batch["labels"][0, 4] = VOCABULARY
    with pytest.raises(ValueError, match=r"Token 29 is outside the student's vocabulary of 29\. Tokenize with"):
        module.observe(batch)


# Models by name, and what a training leaves


@pytest.mark.parametrize("make", [gpt2, llama])
def test_models_are_loaded_from_a_folder_and_trained(make, tmp_path, make_trainer):
    make(seed=1).save_pretrained(tmp_path / "student")
    make(24, seed=2).save_pretrained(tmp_path / "teacher")
    module = KD(str(tmp_path / "student"), str(tmp_path / "teacher"), task=CausalLM(), temperature=1.0)
    assert type(module.student) is type(module.teacher.network) is type(make())
    assert module.student.training
    start = copy.deepcopy(module.student.state_dict())
    teacher = copy.deepcopy(module.teacher.network.state_dict())
    make_trainer(max_epochs=2).fit(module, DataLoader([language_batch()], batch_size=None))
    assert any(not torch.equal(value, start[name]) for name, value in module.student.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in module.teacher.network.state_dict().items())
    exported = module.export(tmp_path / "exported")
    again = type(make()).from_pretrained(tmp_path / "exported").eval()
    batch = language_batch()
    torch.testing.assert_close(again(**batch).loss, exported(**batch).loss)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_s_folder_gives_its_base_under_the_adapter(tmp_path, make_trainer):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama(seed=1).save_pretrained(base)
    peft.get_peft_model(CausalLM().load(str(base)), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    module = KD(str(adapter), str(base), task=CausalLM())
    assert isinstance(module.student, peft.PeftModel)
    trained = {name for name, parameter in module.student.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    make_trainer(max_epochs=1).fit(module, DataLoader([language_batch()], batch_size=None))
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"adapter without its base, which it says is '.*base'\. Bring"):
        KD(str(adapter), alpha=1.0, task=CausalLM())
    with pytest.raises(FileNotFoundError, match=r"There is no model '.*base', neither a folder nor on the hub"):
        KD(str(base), alpha=1.0, task=CausalLM())
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=r"empty"):
        KD(str(tmp_path / "empty"), alpha=1.0, task=CausalLM())


def classifier(kind, seed=0, width=16):
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=width, n_layer=1, n_head=2, num_labels=3, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, **SPECIAL,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_sequence_classifiers(kind, tmp_path, make_trainer):
    student, teacher = classifier(kind, seed=1), classifier(kind, seed=2, width=32)
    teacher.save_pretrained(tmp_path / "teacher")
    tokens = {key: value for key, value in language_batch().items() if key != "labels"}
    batch = tokens | {"labels": torch.tensor([0, 2, -100, 1]), "index": torch.arange(4)}
    module = KD(student, str(tmp_path / "teacher"), TEMPERATURE, ALPHA, task=SequenceClassification())
    losses = module.losses(module.observe(batch))
    z, t = student(**tokens).logits, teacher.eval()(**tokens).logits
    soft = F.kl_div((z / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(losses["soft"], TEMPERATURE**2 * soft, rtol=1e-4, atol=1e-6)
    labels = batch["labels"]
    torch.testing.assert_close(losses["hard"], F.cross_entropy(z, labels, ignore_index=-100, reduction="sum") / 4)
    loader = DataLoader([batch], batch_size=None)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    assert {"val/accuracy", "val/agreement", "val/fidelity"} <= trainer.callback_metrics.keys()


def test_a_masked_term_needs_no_labels_to_learn_from_the_teacher():
    """Text without labels at all: every token that is no padding is taught."""
    batch = {key: value for key, value in language_batch().items() if key != "labels"}
    module = DistillationModule(gpt2(seed=1), gpt2(seed=2), terms={"soft": SoftTargets()}, task=CausalLM())
    step = module.observe(batch)
    assert len(step.labels) == 8 + 4 + 6 + 3
    assert module.losses(step)["soft"] > 0
