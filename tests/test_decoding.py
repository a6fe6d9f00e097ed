"""Decoding against enumeration of all sequences, and the training sets made of it."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill.compatibility import check_context
from lightning_distill.decoding import collate, continued, decode, teacher_nbest, teacher_sequences
from lightning_distill.losses import CrossEntropy, kl_divergence
from lightning_distill.modules import DistillationModule
from lightning_distill.nbest import NBestTargets, nbest_divergence, nbest_targets, nbest_weights, prefix_weights
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import CausalLM

transformers = pytest.importorskip("transformers")
VOCABULARY = 4


def language_model(end=None, seed=0, dropout=0.0, kind="gpt2"):
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": None}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **special,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.5, **special,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def log_probability(model, prompt, continuation):
    """Token after token, without padding, cache or batch."""
    return sum(next_token(model, (*prompt, *continuation[:i]))[token] for i, token in enumerate(continuation))


@functools.cache
@torch.no_grad()
def next_token(model, text):
    return model(torch.tensor([text])).logits[0, -1].double().log_softmax(-1).tolist()


def all_sequences(model, prompt, length, end=None):
    """Every sequence that ends or is cut, most probable first."""
    found = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=length):
        cut = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        if cut not in found:
            found[cut] = log_probability(model, prompt, cut)
    return sorted(found.items(), key=lambda item: -item[1])


PROMPTS = [[3, 1], [2, 0, 1, 1], [1]]


def padded(side):
    width = max(map(len, PROMPTS))
    rows = [[2] * (width - len(p)) + p if side == "left" else p + [2] * (width - len(p)) for p in PROMPTS]
    masks = [[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]
    if side == "right":
        masks = [mask[::-1] for mask in masks]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


@pytest.mark.chapter("B24", api="lightning_distill.decoding.decode")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "end"), [("gpt2", None), ("gpt2", 1), ("llama", 1)])
def test_a_wide_beam_finds_the_most_probable_of_all_sequences(side, kind, end):
    model = language_model(end, kind=kind).eval()
    sequences, log_scores = decode(model, padded(side), strategy="beam", num=16, max_new_tokens=3)
    assert sequences.shape == (3, 16, 3)
    for prompt, found, scores in zip(PROMPTS, sequences.tolist(), log_scores, strict=True):
        expected = all_sequences(model, prompt, 3, end)[:8]
        assert [tuple(token for token in row if token >= 0) for row in found[:8]] == [tokens for tokens, _ in expected]
        torch.testing.assert_close(scores[:8].tolist(), [value for _, value in expected], rtol=1e-4, atol=1e-4)
        assert (scores.diff() <= 0).all()


@pytest.mark.chapter("B21", api="lightning_distill.decoding.teacher_nbest")
def test_greedy_is_a_beam_with_one_candidate_and_takes_the_most_likely_token():
    model = language_model().eval()
    greedy = decode(model, padded("right"), max_new_tokens=4)
    beam = decode(model, padded("right"), strategy="beam", num=1, max_new_tokens=4)
    assert torch.equal(greedy.sequences, beam.sequences)
    for prompt, row in zip(PROMPTS, greedy.sequences[:, 0].tolist(), strict=True):
        for i, token in enumerate(row):
            assert token == model(torch.tensor([prompt + row[:i]])).logits[0, -1].argmax()


def test_samples_come_as_often_as_they_are_probable():
    model = language_model().eval()
    prompt = {"input_ids": torch.tensor([[3, 1]])}
    sequences, log_scores = decode(model, prompt, strategy="top_k", num=4000, max_new_tokens=2, seed=1)
    shares = torch.zeros(VOCABULARY, VOCABULARY)
    shares.index_put_(tuple(sequences[0].T), torch.tensor(1 / 4000), accumulate=True)
    exact = torch.zeros(VOCABULARY, VOCABULARY)
    for tokens, value in all_sequences(model, [3, 1], 2):
        exact[tokens] = math.exp(value)
    assert ((shares - exact).abs() < 4.5 * (exact * (1 - exact) / 4000).sqrt() + 1e-4).all()
    expected = exact[tuple(sequences[0].T)].log()
    torch.testing.assert_close(log_scores[0], expected, rtol=1e-3, atol=1e-3)
    only_two = decode(model, prompt, strategy="top_k", num=200, max_new_tokens=1, seed=1, top_k=2).sequences
    assert len(only_two.unique()) == 2


def test_decoding_leaves_modes_and_random_numbers_as_they_were():
    model = language_model(dropout=0.5)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = decode(model, padded("left"), strategy="top_k", num=3, max_new_tokens=5, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(decode(model, padded("left"), strategy="top_k", num=3, max_new_tokens=5, seed=7)[0], first[0])
    assert not torch.equal(
        decode(model, padded("left"), strategy="top_k", num=3, max_new_tokens=5, seed=8)[0], first[0]
    )
    short = {"max_new_tokens": 5}
    assert torch.equal(decode(model, padded("left"), **short)[0], decode(model.eval(), padded("left"), **short)[0])


def test_settings_of_the_model_do_not_change_what_is_decoded():
    model = language_model().eval()
    expected = decode(model, padded("left"), strategy="beam", max_new_tokens=4)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 2
    model.generation_config.max_length = 3
    found = decode(model, padded("left"), strategy="beam", max_new_tokens=4)
    assert torch.equal(found.sequences, expected.sequences)


def test_rows_hold_prompt_and_continuation_and_padding_on_the_right():
    inputs = {"input_ids": torch.tensor([[9, 3, 1], [5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    written = torch.tensor([[4, 2], [8, -100], [4, -100], [1, 1]])
    rows = continued(inputs, written)
    assert rows["input_ids"].tolist() == [[3, 1, 4, 2, 0], [3, 1, 8, 0, 0], [5, 6, 7, 4, 0], [5, 6, 7, 1, 1]]
    assert rows["attention_mask"].sum(1).tolist() == [4, 3, 4, 5]
    assert rows["labels"].tolist() == [
        [-100, -100, 4, 2, -100], [-100, -100, 8, -100, -100], [-100, -100, -100, 4, -100], [-100, -100, -100, 1, 1]
    ]  # fmt: skip


# Sequence-level distillation


class Says(nn.Module):
    """A language model that says the same whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.cat([logits, torch.zeros_like(logits[:1])])[None])

    def forward(self, input_ids):
        return self.logits[:, : input_ids.shape[1]].expand(len(input_ids), -1, -1)


@pytest.mark.chapter("A69", api="lightning_distill.decoding.teacher_sequences")
@pytest.mark.erratum("ERR-26")
def test_sequence_level_distillation_is_the_likelihood_of_one_sequence(golden):
    """And not the printed sum over the vocabulary at every position, whose value for the same student is 3.68."""
    case = golden("clm_kd_loss")
    record = {"input_ids": torch.tensor([3, 0, 1, 2]), "labels": torch.tensor([-100, 0, 1, 2])}
    module = DistillationModule(Says(case.inputs["student_logprobs"]), terms={"hard": CrossEntropy()}, task=CausalLM())
    step = module.observe(collate([record]))
    assert 3 * module.losses(step)["hard"].item() == pytest.approx(1.901544, abs=1e-6)  # what the chapter's list gives
    printed = golden("token_level_kd").expected["sum"]
    assert abs(printed - 1.901544) > 1


@pytest.mark.chapter("A69")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_training_set_of_the_teacher_s_best_sequences(kind):
    teacher = language_model(end=1, kind=kind).eval()
    mappings = [
        {"input_ids": [3, 1, 2, 2], "labels": [-100, -100, 2, 2]},
        {"input_ids": torch.tensor([2, 0, 1, 1, 3]), "attention_mask": torch.tensor([1, 1, 1, 1, 0])},
        torch.tensor([1]),
    ]
    records = teacher_sequences(teacher, mappings, num=16, max_new_tokens=3, batch_size=2)
    assert len(records) == 3
    for prompt, record in zip(PROMPTS, records, strict=True):
        best = list(all_sequences(teacher, prompt, 3, end=1)[0][0])
        assert record["input_ids"].tolist() == prompt + best
        assert record["labels"].tolist() == [-100] * len(prompt) + best
    samples = teacher_sequences(teacher, PROMPTS, strategy="top_k", num=5, max_new_tokens=3)
    assert len(samples) == 15
    assert samples[0]["input_ids"][:2].tolist() == PROMPTS[0]


def test_a_student_learns_the_teacher_s_best_sequences(make_trainer):
    teacher, student = language_model(seed=1), language_model(seed=2)
    records = teacher_sequences(teacher, PROMPTS, max_new_tokens=4)
    module = DistillationModule(
        student, terms={"hard": CrossEntropy()}, task=CausalLM(), optimizer=lambda p: torch.optim.Adam(p, lr=0.02)
    )
    loader = DataLoader(records, batch_size=3, collate_fn=collate)
    make_trainer(max_epochs=40).fit(module, loader)
    written = decode(student, padded("right"), max_new_tokens=4).sequences[:, 0]
    for record, row in zip(records, written, strict=True):
        assert record["labels"][record["labels"] >= 0].tolist() == row.tolist()


# Candidates as soft labels


@pytest.mark.chapter("B21", api="lightning_distill.nbest.nbest_targets")
def test_candidates_make_the_golden_distribution(golden):
    case = golden("nbest_token_targets")
    close = {"rtol": case.rtol, "atol": case.atol}
    sequences, student = case.inputs["sequences"].long(), case.inputs["student_logprobs"]
    found = nbest_targets(
        sequences, case.inputs["log_scores"], vocabulary=int(case.inputs["vocab"]), tau=float(case.inputs["tau"])
    )
    torch.testing.assert_close(found.weights, case.expected["weights"], **close)
    torch.testing.assert_close(found.marginals, case.expected["marginals"], **close)
    divergence = nbest_divergence(student, sequences.T, found.weights.expand(3, 3))
    torch.testing.assert_close(divergence.sum().item(), case.expected["kl"], **close)
    dense = kl_divergence(student, found.marginals.clamp_min(1e-300).log())
    torch.testing.assert_close(divergence, dense)


@pytest.mark.chapter("B21")
@pytest.mark.erratum("ERR-41")
def test_divergence_of_decoding_strategies_is_infinite_and_has_no_student(golden):
    case = golden("greedy_vs_beam_infinite")
    greedy, beam = case.inputs["p_greedy"], case.inputs["p_beam"]
    as_written = torch.special.xlogy(greedy, greedy) - torch.special.xlogy(greedy, beam)
    assert as_written.sum() == float(case.expected["as_written"]) == math.inf
    student = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    ours = nbest_divergence(student, torch.tensor([1, 2]), beam[1:])
    ours.backward()
    assert ours.isfinite()
    torch.testing.assert_close(student.grad, torch.tensor([1 / 3, 1 / 3 - 0.6, 1 / 3 - 0.4], dtype=torch.float64))


def test_marginals_sum_to_one_wherever_a_candidate_has_a_token():
    sequences = torch.tensor([[[1, 2, -100], [1, -100, -100]], [[0, 0, 0], [3, 3, 3]]])
    scores = torch.tensor([[-1.0, -2.0], [-3.0, -3.0]])
    weights, marginals = nbest_targets(sequences, scores, vocabulary=4, tau=2.0)
    torch.testing.assert_close(weights, (scores / 2).softmax(-1))
    torch.testing.assert_close(marginals.sum(-1), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
    assert marginals[0, 1, 2] == 1
    torch.testing.assert_close(nbest_weights(scores, tau=math.inf), torch.full((2, 2), 0.5))


@pytest.mark.chapter("B24", api="lightning_distill.nbest.NBestTargets")
def test_divergences_given_the_prefix_add_up_to_that_of_whole_sequences():
    """The chain rule: sum_n w_n sum_t KL_t(y_n) = sum_n w_n (log w_n - log p_S(y_n))."""
    teacher, student = language_model(end=1, seed=1).eval(), language_model(end=1, seed=2).eval()
    prompt = [2, 3]
    inputs = {"input_ids": torch.tensor([prompt])}
    sequences, scores = decode(teacher, inputs, strategy="beam", num=6, max_new_tokens=4)
    weights = nbest_weights(scores)[0]
    exact = sum(
        weight * (weight.log() - log_probability(student, prompt, [token for token in row if token >= 0]))
        for weight, row in zip(weights, sequences[0].tolist(), strict=True)
    )
    total = torch.zeros(())
    for weight, row in zip(weights, sequences[0], strict=True):
        rows = continued(inputs, row[None])
        tokens = torch.cat([torch.full((6, 2), -100), sequences[0]], dim=1)
        batch = rows | {"targets": {"tokens": tokens[None], "weights": weights[None]}}
        module = DistillationModule(student, terms={"soft": NBestTargets()}, task=CausalLM())
        total = total + weight * NBestTargets()(module.observe(batch)).sum()
    torch.testing.assert_close(total, exact, rtol=1e-4, atol=1e-4)


def test_only_candidates_that_began_in_the_same_way_vote():
    tokens = torch.tensor([[-100, 1, 2, 3], [-100, 1, 0, 3], [-100, 2, 2, -100]])
    weights = prefix_weights(tokens, torch.tensor([0.5, 0.3, 0.2]), tokens[0])
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.3, 0.2], [0.625, 0.375, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(weights, expected)


@pytest.mark.chapter("B24")
def test_one_candidate_is_sequence_level_distillation():
    model = language_model(end=1, seed=3)
    records = teacher_nbest(model, PROMPTS, num=1, max_new_tokens=3)
    module = DistillationModule(
        language_model(seed=4), terms={"soft": NBestTargets(), "hard": CrossEntropy()}, task=CausalLM()
    )
    losses = module.losses(module.observe(collate(records)))
    torch.testing.assert_close(losses["soft"], losses["hard"])


@pytest.mark.chapter("B21")
@pytest.mark.parametrize("strategy", ["greedy", "beam", "top_k"])
def test_self_distillation_from_decoded_candidates(strategy, make_trainer):
    """A student that has written candidates itself comes closer to them, without labels and without a teacher."""
    model = language_model(end=1, seed=3)
    records = teacher_nbest(model, PROMPTS, strategy=strategy, num=4, max_new_tokens=4, batch_size=2)
    for record, prompt in zip(records, PROMPTS, strict=True):
        targets = record["targets"]
        assert targets["tokens"].shape == (1 if strategy == "greedy" else 4, len(record["input_ids"]))
        assert (targets["tokens"][:, : len(prompt)] == -100).all()
        assert torch.equal(targets["tokens"][0], record["labels"])
        assert targets["weights"].sum() == pytest.approx(1)
        if strategy == "top_k":
            torch.testing.assert_close(targets["weights"], torch.full((4,), 0.25))
    module = DistillationModule(
        model, terms={"soft": NBestTargets()}, task=CausalLM(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)
    )
    loader = DataLoader(records, batch_size=3, collate_fn=collate)
    before = module.losses(module.observe(next(iter(loader))))["soft"].item()
    make_trainer(max_epochs=30).fit(module, loader)
    after = module.losses(module.observe(next(iter(loader))))["soft"].item()
    assert 0 <= after < 0.5 * before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_divergence_from_candidates_is_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]).to(dtype).requires_grad_()
    tokens, weights = (
        torch.tensor([[1, 1], [0, -100], [-100, -100]]),
        torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]),
    )
    values = nbest_divergence(logits, tokens, weights)
    values.sum().backward()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[1:], torch.tensor([math.log(3), 0.0]))
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()


def test_errors():
    model, inputs = language_model(), {"input_ids": torch.tensor([[1, 2]])}
    with pytest.raises(TypeError, match="`model` must be a transformers model that can generate, got Linear"):
        decode(nn.Linear(1, 1), inputs)
    with pytest.raises(ValueError, match="`strategy` must be 'greedy', 'beam' or 'top_k', got 'best'"):
        decode(model, inputs, strategy="best")
    with pytest.raises(ValueError, match="`num` must be at least 1, got 0"):
        decode(model, inputs, strategy="beam", num=0)
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, got 0"):
        decode(model, inputs, max_new_tokens=0)
    with pytest.raises(ValueError, match="Sequences of 17 tokens are longer than the context of GPT2LMHeadModel, 16"):
        decode(model, inputs, max_new_tokens=15)
    with pytest.raises(ValueError, match="A prompt is empty: its `attention_mask` is 0 throughout"):
        decode(model, inputs | {"attention_mask": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"Prompt 1 is empty\. Begin it with the tokenizer's bos token"):
        teacher_sequences(model, [[1], {"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(
        ValueError, match=r"Prompt 0 must be token ids of shape \(P,\), got torch.int64 of shape \(1, 2\)"
    ):
        teacher_sequences(model, [inputs["input_ids"]])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        teacher_sequences(model, [[1]], batch_size=0)
    with pytest.raises(ValueError, match="`tau` must be positive, got 0"):
        teacher_nbest(model, [[1]], tau=0.0, max_new_tokens=2)
    with pytest.raises(ValueError, match="`sequences` has the token 5, outside the `vocabulary` of 4"):
        nbest_targets(torch.tensor([[5]]), torch.zeros(1), vocabulary=4)
    step = Step({"input_ids": torch.tensor([[1]])}, Outputs(torch.zeros(1, 3)))
    with pytest.raises(
        ValueError, match=r"NBestTargets reads `targets` .* which has \['input_ids'\]\. Make the data with"
    ):
        NBestTargets()(step)


def test_a_model_without_a_stated_context_reads_anything():
    check_context(nn.Linear(1, 1), 10**9)
    check_context(language_model(), 16)
