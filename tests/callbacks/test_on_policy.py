"""On-policy distillation: what the student writes, and how it is taught about it."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_distill import KD
from lightning_distill.callbacks.on_policy import OnPolicy, generated_batch, prompt_mask
from lightning_distill.losses import SoftTargets, kl_divergence
from lightning_distill.modes import inference
from lightning_distill.tasks import CausalLM
from lightning_distill.teachers import CachedTeacher
from tests.teachers.cache.samples import write_dense

END = 1
SCRIPT = Path(__file__).with_name("on_policy_run.py")


def gpt2(seed=0, vocab_size=23, width=16):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=16, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=END
    )
    network = GPT2LMHeadModel(config).train()
    network.transformer.wpe.weight.data.mul_(20)  # so that a position that is off by one shows
    return network


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=END, initializer_range=0.3,
        )
    ).train()  # fmt: skip


def prompts(*, left=False):
    """Three prompts of 4, 2 and 3 tokens, each with an answer."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 2], [3, 4, 10, 11, 0, 0], [12, 13, 14, 15, 16, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    labels = torch.tensor([[-100] * 4 + [9, 2], [-100] * 2 + [10, 11] + [-100] * 2, [-100] * 3 + [15, 16, -100]])
    if left:
        order = torch.tensor([[0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3], [5, 0, 1, 2, 3, 4]])
        ids, mask, labels = (value.gather(1, order) for value in (ids, mask, labels))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": torch.arange(3)}


LENGTHS = [4, 2, 3]


def rows(batch):
    """The tokens of each row without padding."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


class TestPrompts:
    def test_are_what_comes_before_the_first_label(self):
        assert prompt_mask(prompts()).sum(dim=1).tolist() == LENGTHS
        left = prompts(left=True)
        found = [ids[keep].tolist() for ids, keep in zip(left["input_ids"], prompt_mask(left), strict=True)]
        assert found == [[5, 6, 7, 8], [3, 4], [12, 13, 14]]

    def test_are_at_least_min_prompt_tokens(self):
        ids = torch.ones(2, 5, dtype=torch.long)
        assert prompt_mask({"input_ids": ids}).sum(dim=1).tolist() == [1, 1]
        assert prompt_mask({"input_ids": ids, "labels": ids}, min_prompt=3).sum(dim=1).tolist() == [3, 3]
        padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])}
        assert prompt_mask(padded, min_prompt=3).sum(dim=1).tolist() == [2, 3]

    def test_end_at_the_first_label_and_not_at_a_later_gap(self):
        labels = torch.tensor([[-100, -100, 7, -100, 8]])
        mask = prompt_mask({"input_ids": torch.ones(1, 5, dtype=torch.long), "labels": labels})
        assert mask.tolist() == [[True, True, False, False, False]]

    def test_a_row_without_labels_is_a_prompt_as_a_whole(self):
        batch = prompts()
        batch["labels"][:] = -100
        assert torch.equal(prompt_mask(batch), batch["attention_mask"].bool())


class TestGeneratedBatch:
    @pytest.mark.parametrize("left", [False, True])
    @pytest.mark.parametrize("make", [gpt2, llama])
    def test_continues_each_prompt_as_if_it_were_alone(self, make, left):
        """At a temperature near zero sampling is greedy: compared with a loop without padding and without a cache."""
        student = make()
        found = generated_batch(student, prompts(left=left), max_new_tokens=6, temperature=1e-4, seed=0)
        with inference(student):
            for row, tokens in enumerate([[5, 6, 7, 8], [3, 4], [12, 13, 14]]):
                for _ in range(6):
                    tokens.append(int(student(torch.tensor([tokens])).logits[0, -1].argmax()))
                    if tokens[-1] == END:
                        break
                assert rows(found)[row] == tokens

    def test_tells_what_was_generated_and_gives_no_labels(self):
        found = generated_batch(gpt2(), prompts(), max_new_tokens=6, seed=0)
        assert set(found) == {"input_ids", "attention_mask", "labels", "distill_mask", "index"}
        assert found["index"].tolist() == [0, 1, 2]
        assert (found["labels"] == -100).all()
        assert len({value.shape for name, value in found.items() if name != "index"}) == 1
        for row, length in enumerate(LENGTHS):
            generated = found["distill_mask"][row]
            assert not generated[:length].any()
            assert torch.equal(generated[length:], found["attention_mask"][row, length:].bool())
            assert generated.any()
        assert found["attention_mask"][:, 0].all()  # padded on the right
        assert found["attention_mask"].any(dim=0).all()  # by no more than needed

    def test_ends_with_the_first_end_token_which_counts(self):
        student = gpt2()
        student.transformer.ln_f.bias.data = 8 * student.lm_head.weight.data[END] / student.lm_head.weight[END].norm()
        student.generation_config.eos_token_id = [END, 2]
        batch = {"input_ids": torch.randint(3, 23, (200, 3))}
        found = generated_batch(student, batch, min_prompt=3, max_new_tokens=5, seed=0)
        lengths = set()
        for tokens in rows(found):
            written = tokens[3:]
            lengths.add(len(written))
            assert not {END, 2} & set(written[:-1])
            assert written[-1] in (END, 2) or len(written) == 5
        assert {1, 2, 5} <= lengths

    def test_samples_from_the_whole_softened_distribution(self):
        student = gpt2()
        student.lm_head.weight.data.mul_(10)
        student.generation_config.update(top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=5.0, min_p=0.3)
        batch = {"input_ids": torch.tensor([[5, 6, 7]]).expand(4000, 3)}
        found = generated_batch(student, batch, min_prompt=3, max_new_tokens=1, temperature=2.0, seed=0)
        with inference(student):
            expected = (student(batch["input_ids"][:1]).logits[0, -1] / 2.0).softmax(-1).double()
        counts = found["input_ids"][:, 3].bincount(minlength=23)
        assert expected.max() > 3 * expected.min()
        assert chisquare(counts.numpy(), 4000 * (expected / expected.sum()).numpy()).pvalue > 0.01
        without_temperature = (expected**2 / (expected**2).sum()).numpy()
        assert chisquare(counts.numpy(), 4000 * without_temperature).pvalue < 1e-6

    def test_is_a_function_of_its_seed_and_leaves_the_generators_alone(self):
        student = gpt2()
        before = torch.get_rng_state()
        first, again, other = (generated_batch(student, prompts(), max_new_tokens=6, seed=s) for s in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert rows(first) == rows(again)
        assert rows(first) != rows(other)
        assert rows(generated_batch(student, prompts(), max_new_tokens=6)) != rows(
            generated_batch(student, prompts(), max_new_tokens=6)
        )

    def test_leaves_the_student_as_it_was(self):
        student = gpt2()
        student.transformer.drop.eval()
        modes = [module.training for module in student.modules()]
        preferences = student.generation_config.to_dict()
        generated_batch(student, prompts(), max_new_tokens=3)
        assert [module.training for module in student.modules()] == modes
        assert student.generation_config.to_dict() == preferences
        assert torch.is_grad_enabled()

    def test_stays_within_the_vocabulary_and_the_context(self):
        student = gpt2(vocab_size=40)
        found = generated_batch(student, prompts(), max_new_tokens=500, vocabulary=23, seed=0)
        assert found["input_ids"].max() < 23
        assert generated_batch(student, prompts(), max_new_tokens=500, seed=0)["input_ids"].max() >= 23
        assert max(map(len, rows(found))) <= 16
        longest = {"input_ids": torch.full((1, 16), 5)}
        with pytest.raises(ValueError, match=r"longest prompt has 16 tokens and the student's context 16: there is no"):
            generated_batch(student, longest, min_prompt=16, max_new_tokens=1)

    def test_works_with_an_adapter(self):
        student = get_adapted()
        plain = rows(generated_batch(llama(), prompts(), max_new_tokens=6, temperature=1e-4))
        adapted = rows(generated_batch(student, prompts(), max_new_tokens=6, temperature=1e-4))
        assert adapted != plain
        merged = student.merge_and_unload()
        assert rows(generated_batch(merged, prompts(), max_new_tokens=6, temperature=1e-4)) == adapted

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
            ({"min_prompt": 0}, "`min_prompt` must be at least 1, got 0"),
            ({"vocabulary": 0}, "`vocabulary` must be at least 1, got 0"),
            ({"temperature": 0.0}, "`temperature` of the sampling must be positive and finite, got 0.0"),
            ({"temperature": float("nan")}, "`temperature` of the sampling must be positive and finite, got nan"),
            ({"lmbda": 1.5}, r"`lmbda`, the share of generated batches, must be in \[0, 1\], got 1.5"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            OnPolicy(**arguments)
        if "lmbda" not in arguments:
            with pytest.raises(ValueError, match=message):
                generated_batch(gpt2(), prompts(), **{"max_new_tokens": 3} | arguments)

    def test_refuses_a_row_without_tokens(self):
        batch = prompts()
        batch["attention_mask"][1] = 0
        with pytest.raises(ValueError, match="A row of the batch has no tokens"):
            generated_batch(gpt2(), batch, max_new_tokens=3)


def get_adapted():
    student = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    return student


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft 0.21 asks transformers 5.23 for it
)


class TestLosses:
    @pytest.mark.parametrize("make", [gpt2, llama])
    def test_the_teacher_is_heard_about_the_generated_tokens_alone(self, make):
        student, teacher = make().eval(), make(seed=1)
        batch = generated_batch(student, prompts(), max_new_tokens=6, seed=0)
        module = KD(
            student, teacher, task=CausalLM(), temperature=2.0, terms={"soft": SoftTargets()}, weights={"hard": 0.3}
        )
        losses = module.losses(module.observe(batch))
        expected = []
        for tokens, length in zip(rows(batch), LENGTHS, strict=True):  # one row at a time, without padding
            ids = torch.tensor([tokens])
            said, meant = student(ids).logits[0], teacher(ids).logits[0]
            expected.append(kl_divergence(said[length - 1 : -1], meant[length - 1 : -1], temperature=2.0))
        assert losses["hard"] == 0
        torch.testing.assert_close(losses["soft"], torch.cat(expected).mean())
        assert losses["soft"] > 1e-4

    def test_the_mask_adds_to_the_labels(self):
        batch = prompts()
        labelled = CausalLM().counts(batch)
        batch["distill_mask"] = torch.zeros_like(batch["input_ids"]).bool()
        assert torch.equal(CausalLM().counts(batch), labelled)
        batch["distill_mask"][:, 1] = True
        wanted = labelled.clone()
        wanted[:, 0] = True
        assert torch.equal(CausalLM().counts(batch), wanted)
        labels = CausalLM().labels(batch)
        assert len(labels) == wanted.sum()
        assert (labels != -100).sum() == labelled.sum()


def loader(batches=4):
    """Different prompts in each batch."""
    found = []
    for shift in range(batches):
        batch = prompts()
        batch["input_ids"] = (batch["input_ids"] + shift) % 23
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
        found.append(batch)
    return DataLoader(found, batch_size=None)


class Seen(L.Callback):
    """Keeps the batches that the module trains on."""

    def __init__(self):
        self.batches = []

    def on_fit_start(self, trainer, pl_module):
        observe = pl_module.observe

        def keep(batch):
            self.batches.append(batch)
            return observe(batch)

        pl_module.observe = keep


def module_of(student=None, **more):
    student = gpt2() if student is None else student
    return KD(
        student,
        gpt2(seed=1),
        task=CausalLM(),
        temperature=1.0,
        **{"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)} | more,
    )


class TestCallback:
    def run(self, make_trainer, on_policy, module=None, data=None, **trainer):
        seen = Seen()
        module = module_of() if module is None else module
        make_trainer(callbacks=[on_policy, seen], **{"max_epochs": 1} | trainer).fit(module, data or loader())
        return seen.batches

    def test_replaces_its_share_of_the_batches(self, make_trainer):
        on_policy = OnPolicy(0.5, max_new_tokens=4, seed=3)
        batches = self.run(make_trainer, on_policy, max_epochs=4)
        found = ["distill_mask" in batch for batch in batches]
        assert found == [on_policy.generates(step) for step in range(16)]
        assert 3 < sum(found) < 13
        assert all(torch.equal(batch["index"], torch.arange(3)) for batch in batches)  # whose prompts they continue

    def test_the_share_is_lmbda(self):
        for lmbda in (0.0, 0.3, 1.0):
            on_policy = OnPolicy(lmbda)
            share = sum(on_policy.generates(step, micro) for step in range(1000) for micro in range(2)) / 2000
            assert share == pytest.approx(lmbda, abs=0.04)
        assert [OnPolicy(seed=1).generates(i) for i in range(20)] != [OnPolicy(seed=2).generates(i) for i in range(20)]

    def test_decides_for_each_micro_batch(self, make_trainer):
        on_policy = OnPolicy(0.5, max_new_tokens=4, seed=5)
        batches = self.run(make_trainer, on_policy, max_epochs=2, accumulate_grad_batches=2)
        expected = [on_policy.generates(step, micro) for step in range(4) for micro in range(2)]
        assert ["distill_mask" in batch for batch in batches] == expected
        assert expected != [on_policy.generates(step) for step in range(4) for _ in range(2)]

    def test_with_a_share_of_zero_nothing_changes(self, make_trainer):
        with_callback, without = module_of(), module_of()
        state = torch.get_rng_state()  # dropout
        self.run(make_trainer, OnPolicy(0.0), module=with_callback)
        torch.set_rng_state(state)
        make_trainer(max_epochs=1).fit(without, loader())
        for name, value in without.state_dict().items():
            assert torch.equal(with_callback.state_dict()[name], value)

    def test_writes_what_the_present_student_would(self, make_trainer):
        """Not what the student before the training would have written."""
        early = self.run(make_trainer, OnPolicy(1.0, max_new_tokens=6), data=loader(1))
        late = self.run(make_trainer, OnPolicy(1.0, max_new_tokens=6), data=loader(1), max_epochs=3)
        assert rows(early[0]) == rows(late[0])
        assert rows(late[0]) != rows(late[2])

    def test_what_is_written_does_not_hang_on_what_else_is_drawn(self, make_trainer):
        texts = []
        for seed in (1, 2):
            module = module_of()
            torch.manual_seed(seed)
            texts.append(rows(self.run(make_trainer, OnPolicy(1.0, max_new_tokens=6), module=module)[0]))
        assert texts[0] == texts[1]

    def test_a_resumed_run_equals_an_uninterrupted_one(self, make_trainer, tmp_path):
        straight, resumed = module_of(), module_of()
        expected = self.run(make_trainer, OnPolicy(0.5, max_new_tokens=4), module=straight, max_epochs=3)
        first = make_trainer(callbacks=[OnPolicy(0.5, max_new_tokens=4)], max_epochs=1)
        first.fit(module_of(), loader())
        first.save_checkpoint(tmp_path / "first.ckpt")
        seen = Seen()
        torch.manual_seed(99)  # another process starts elsewhere
        second = make_trainer(callbacks=[OnPolicy(0.5, max_new_tokens=4), seen], max_epochs=3)
        second.fit(resumed, loader(), ckpt_path=tmp_path / "first.ckpt")
        assert [rows(batch) for batch in seen.batches] == [rows(batch) for batch in expected[4:]]
        for name, value in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name

    def test_comes_after_the_modules_own_transform_and_goes_with_the_training(self, make_trainer):
        def shorter(batch):
            return {**batch, "input_ids": batch["input_ids"].clamp(max=4)}

        module = module_of(batch_transform=shorter)
        batches = self.run(make_trainer, OnPolicy(1.0, max_new_tokens=3), module=module)
        assert all(row[:2] == [4, 4] or row[0] < 5 for batch in batches for row in rows(batch))
        assert module.batch_transform is shorter

    def test_goes_after_an_error_too(self, make_trainer):
        module = module_of()
        data = loader()
        data.dataset[2]["attention_mask"][0] = 0
        with pytest.raises(ValueError, match="A row of the batch has no tokens"):
            self.run(make_trainer, OnPolicy(1.0, max_new_tokens=3), module=module, data=data)
        assert module.batch_transform is None

    def test_an_error_outside_of_training_takes_nothing_away(self, make_trainer):
        module = module_of(batch_transform=dict)
        with pytest.raises(IndexError, match="index out of range"):
            make_trainer(callbacks=[OnPolicy()]).validate(
                module, DataLoader([{"input_ids": torch.full((1, 3), 99)}], batch_size=None)
            )
        assert module.batch_transform is dict

    def test_brings_the_student_closer_to_the_teacher_on_its_own_texts(self, make_trainer):
        module = module_of(alpha=0.0, optimizer=lambda groups: torch.optim.Adam(groups, lr=3e-3))
        module.teacher.network.lm_head.weight.data.mul_(3)

        def distance():
            with inference(module.student):
                batch = generated_batch(module.student, prompts(), max_new_tokens=10, seed=0)
                return module.losses(module.observe(batch))["kd"]

        before = distance()
        self.run(make_trainer, OnPolicy(1.0, max_new_tokens=10), module=module, max_epochs=10)
        assert distance() < 0.7 * before

    def test_mixed_precision_trains_every_weight(self, make_trainer):
        module = module_of()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        self.run(make_trainer, OnPolicy(1.0, max_new_tokens=4), module=module, precision="bf16-mixed")
        assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_refuses_a_teacher_that_knows_given_texts_alone(self, make_trainer, tmp_path):
        write_dense(tmp_path, range(4))
        module = KD(gpt2(), CachedTeacher(tmp_path), task=CausalLM())
        with pytest.raises(ValueError, match=r"The teacher is a cache, .* it cannot judge what the student writes"):
            make_trainer(callbacks=[OnPolicy()], max_epochs=1).fit(module, loader())

    def test_refuses_students_that_cannot_write(self, make_trainer):
        module = KD(nn.Linear(4, 3), alpha=1.0)
        with pytest.raises(TypeError, match=r"needs a DistillationModule whose student can `generate`.*type Linear"):
            make_trainer(callbacks=[OnPolicy()], max_epochs=1).fit(module, [(torch.ones(2, 4), torch.zeros(2).long())])


@pytest.mark.slow
def test_two_processes_write_different_texts_in_the_same_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert [row is None for row in first["rows"]] == [row is None for row in second["rows"]]
    assert 0 < sum(row is None for row in first["rows"]) < 8
    assert all(a != b for a, b in zip(first["rows"], second["rows"], strict=True) if a is not None)
