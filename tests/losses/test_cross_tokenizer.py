"""Distillation across tokenizers: the distance of sorted probabilities, and the pairing of positions."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import wasserstein_distance
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_distill import KD
from lightning_distill.datamodules.two_tokenizers import TwoTokenizers, aligned_positions
from lightning_distill.losses.cross_tokenizer import UniversalLogitDistance, universal_logit_distance
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import CausalLM, Classification
from lightning_distill.teachers import FrozenTeacher
from lightning_distill.teachers.other_tokenizer import OtherTokenizerTeacher

TEXTS = [
    "The cat sat on the mat, and the cat sat still.",
    "Naïve façades — 東京 and 🙂 smile at the cat.",
    "   leading  spaces, and  double ones",
]
PAIR = ("What sat on the mat?", " The cat sat on the mat.")


def logits(*shape, seed, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestDistance:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    @pytest.mark.parametrize(("student_size", "teacher_size"), [(7, 7), (5, 9), (9, 5), (1, 6)])
    def test_is_the_wasserstein_distance_of_the_probabilities_values(self, student_size, teacher_size, temperature):
        student, teacher = logits(4, student_size, seed=0), logits(4, teacher_size, seed=1)
        size = max(student_size, teacher_size)
        found = universal_logit_distance(student, teacher, temperature=temperature)
        for row in range(4):
            q = np.pad(softmax(student[row].numpy() / temperature), (0, size - student_size))
            p = np.pad(softmax(teacher[row].numpy() / temperature), (0, size - teacher_size))
            assert found[row].item() == pytest.approx(size * wasserstein_distance(q, p), abs=1e-12)

    def test_does_not_see_which_token_is_which(self):
        student, teacher = logits(3, 6, seed=0), logits(3, 6, seed=1)
        expected = universal_logit_distance(student, teacher)
        torch.testing.assert_close(universal_logit_distance(student[:, torch.randperm(6)], teacher), expected)
        zero = universal_logit_distance(teacher[:, torch.randperm(6)], teacher)
        torch.testing.assert_close(zero, torch.zeros_like(zero))

    def test_is_between_zero_and_two_and_symmetric(self):
        sure, unsure = torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.zeros(1, 1000)
        distance = universal_logit_distance(sure, unsure)
        torch.testing.assert_close(distance, torch.tensor([2 * (1 - 1 / 1000)]))
        torch.testing.assert_close(universal_logit_distance(unsure, sure), distance)

    def test_top_k_is_short_by_at_most_the_tails(self):
        student, teacher = logits(20, 30, seed=0), logits(20, 40, seed=1)
        whole = universal_logit_distance(student, teacher)
        for k in (1, 5, 29):
            part = universal_logit_distance(student, teacher, top_k=k)
            tails = sum(1 - z.softmax(-1).topk(k).values.sum(-1) for z in (student, teacher))
            assert (part <= whole + 1e-12).all()
            assert (whole - part <= tails + 1e-12).all()
        torch.testing.assert_close(universal_logit_distance(student, teacher, top_k=40), whole)

    def test_gradient_is_that_of_the_definition_and_reaches_the_student_alone(self):
        student, teacher = logits(3, 5, seed=0).requires_grad_(), logits(3, 7, seed=1).requires_grad_()
        temperature = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda z: universal_logit_distance(z, teacher, temperature=temperature), (student,)
        )
        universal_logit_distance(student, teacher).sum().backward()
        assert teacher.grad is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
    def test_is_computed_in_single_precision(self, dtype, temperature):
        student, teacher = logits(4, 9, seed=0).to(dtype), logits(4, 5, seed=1).to(dtype)
        found = universal_logit_distance(student, teacher, temperature=temperature)
        assert found.dtype == torch.float32
        expected = universal_logit_distance(student.double(), teacher.double(), temperature=temperature)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"teacher_logits": torch.zeros(3, 4)}, r"\(2, 4\) and `teacher_logits` \(3, 4\)"),
            ({"temperature": 0.0}, "`temperature` must be positive"),
            ({"temperature": float("nan")}, "`temperature` must be positive"),
            ({"top_k": 0}, "`top_k` must be at least 1, got 0"),
        ],
    )
    def test_refuses(self, arguments, message):
        values = {"student_logits": torch.zeros(2, 4), "teacher_logits": torch.zeros(2, 4)} | arguments
        with pytest.raises(ValueError, match=message):
            universal_logit_distance(values.pop("student_logits"), values.pop("teacher_logits"), **values)

    def test_the_term_refuses_a_bad_top_k(self):
        with pytest.raises(ValueError, match="`top_k` must be at least 1, got -1"):
            UniversalLogitDistance(top_k=-1)


def byte_tokenizer(vocab_size, **special):
    """Byte-level: several tokens may share one character; spaces belong to the word that follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<end>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **special)


def word_tokenizer():
    """Lower-cased words, begun by a special token; spaces are no tokens, and there is no end token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "<begin>"]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<begin>")


class TestAlignment:
    def test_pairs_the_places_where_both_have_read_the_same(self):
        assert aligned_positions([2, 7], [1, 2, 5, 7]) == [1, 3]
        assert aligned_positions([1, 2, 3], [3]) == [-1, -1, 0]
        assert aligned_positions([0, 3], [3, 4]) == [-1, 0]

    def test_takes_the_last_of_the_tokens_of_one_character(self):
        assert aligned_positions([1, 1, 1, 2], [1, 1, 2]) == [-1, -1, 1, 2]

    def test_tokens_that_are_nowhere_have_no_partner(self):
        assert aligned_positions([0, 2, -1], [0, 2, -1]) == [0, 1, -1]

    @pytest.mark.parametrize("text", TEXTS)
    def test_partners_have_read_the_same_text_by_their_bytes(self, text):
        """An oracle without offsets: what the tokens so far decode to."""
        student, teacher = byte_tokenizer(270), byte_tokenizer(400)
        batch = TwoTokenizers(student, teacher)([text])
        raw = text.encode()

        def read(tokenizer, ids):
            """Bytes read after each token of byte-level vocabularies."""
            byte_of = {letter: byte for byte, letter in bytes_to_letters().items()}
            pieces = [tokenizer.convert_ids_to_tokens(token) for token in ids.tolist()[:-1]]  # without the end token
            counts = np.cumsum([len([byte_of[letter] for letter in piece]) for piece in pieces])
            assert counts[-1] == len(raw)
            return counts.tolist()

        mine = read(student, batch["input_ids"][0])
        others = {count: place for place, count in enumerate(read(teacher, batch["teacher"]["input_ids"][0]))}
        whole = {len(text[:i].encode()) for i in range(len(text) + 1)}
        expected = [others.get(count, -1) if count in whole else -1 for count in mine] + [-1]
        assert batch["teacher"]["position"][0].tolist() == expected
        assert sum(place >= 0 for place in expected) > len(expected) / 4

    def test_other_kinds_of_tokenizers_meet_at_the_ends_of_words(self):
        batch = TwoTokenizers(byte_tokenizer(400), word_tokenizer())(["The cat sat.", "cat"])
        words = batch["teacher"]["input_ids"]
        assert words.shape == (2, 5)  # <begin> the cat sat .
        student = byte_tokenizer(400)
        heard = [
            (student.decode(batch["input_ids"][0, : place + 1]), partner)
            for place, partner in enumerate(batch["teacher"]["position"][0].tolist())
            if partner >= 0
        ]
        assert [partner for _, partner in heard] == [1, 2, 3, 4]
        assert [text for text, _ in heard] == ["The", "The cat", "The cat sat", "The cat sat."]

    def test_both_may_begin_with_a_special_token(self):
        batch = TwoTokenizers(word_tokenizer(), word_tokenizer())(["the cat sat"])
        assert batch["teacher"]["position"].tolist() == [[0, 1, 2, 3]]

    def test_only_the_answer_of_a_prompt_gets_labels(self):
        tokenizer = byte_tokenizer(400)
        batch = TwoTokenizers(tokenizer, word_tokenizer())([PAIR])
        labels, ids = batch["labels"][0], batch["input_ids"][0]
        assert tokenizer.decode(labels[labels >= 0]) == PAIR[1] + "<end>"
        assert tokenizer.decode(ids) == "".join(PAIR) + "<end>"
        assert (labels[labels >= 0] == ids[labels >= 0]).all()

    def test_pads_and_cuts(self):
        collate = TwoTokenizers(byte_tokenizer(300), byte_tokenizer(400), max_length=10, teacher_max_length=4)
        batch = collate([TEXTS[0], "cat"])
        assert batch["input_ids"].shape == (2, 10)
        assert batch["teacher"]["input_ids"].shape == (2, 4)
        assert (batch["labels"][1][batch["attention_mask"][1] == 0] == -100).all()
        assert (batch["teacher"]["position"][1][batch["attention_mask"][1] == 0] == -1).all()
        assert batch["input_ids"][0, -1] != collate.student_tokenizer.eos_token_id  # the text goes on
        assert batch["attention_mask"].sum() == 10 + (batch["labels"][1] >= 0).sum()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"student_tokenizer": object()}, TypeError, "`student_tokenizer` must be a fast tokenizer.*got object"),
            ({"max_length": 1}, ValueError, "`max_length` must be at least 2"),
            ({"teacher_max_length": 0}, ValueError, "`teacher_max_length` must be at least 2"),
        ],
    )
    def test_refuses(self, arguments, error, message):
        tokenizer = word_tokenizer()
        with pytest.raises(error, match=message):
            TwoTokenizers(**{"student_tokenizer": tokenizer, "teacher_tokenizer": tokenizer} | arguments)


def bytes_to_letters():
    """GPT-2's printable stand-ins for bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def student_model(size):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def teacher_model(size):
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128,
        )
    )  # fmt: skip


class TestTraining:
    @pytest.fixture
    def tokenizers(self):
        return byte_tokenizer(300), byte_tokenizer(400)

    def modules(self, tokenizers, **more):
        student, teacher = (len(tokenizer) for tokenizer in tokenizers)
        return KD(
            student_model(student),
            OtherTokenizerTeacher(teacher_model(teacher)),
            temperature=1.0,
            task=CausalLM(),
            **{"terms": {"soft": UniversalLogitDistance()}, "weights": {"hard": 1.0, "soft": 1.5}} | more,
        )

    @pytest.mark.parametrize(("linear", "kind"), [(True, "bytes"), (False, "bytes"), (True, "words")])
    def test_compares_the_logits_of_paired_positions(self, tokenizers, linear, kind):
        if kind == "words":  # without an end token: at the end of the text the teacher has nothing to predict
            tokenizers = tokenizers[0], word_tokenizer()
        module = self.modules(tokenizers)
        if not linear:
            module.task._linear[module.student] = module.task._linear[module.teacher.network] = False
        batch = TwoTokenizers(*tokenizers)([*TEXTS, PAIR])
        student, teacher = module.student.eval(), module.teacher.network
        step = module.observe(batch)
        assert (step.student.hidden is not None) == (step.teacher.hidden is not None) == linear
        found = module.terms["soft"](step)
        expected = []
        for row, (mine, theirs) in enumerate(
            zip(
                batch["attention_mask"].sum(1).tolist(), batch["teacher"]["attention_mask"].sum(1).tolist(), strict=True
            )
        ):  # one text at a time, without padding
            said = student(batch["input_ids"][row : row + 1, :mine]).logits[0]
            meant = teacher(batch["teacher"]["input_ids"][row : row + 1, :theirs]).logits[0]
            for place in range(mine - 1):
                if batch["labels"][row, place + 1] == -100:
                    continue
                partner = int(batch["teacher"]["position"][row, place])
                if 0 <= partner < theirs - 1:
                    expected.append(universal_logit_distance(said[place], meant[partner]))
                else:
                    expected.append(torch.tensor(0.0))
        torch.testing.assert_close(found, torch.stack(expected))
        assert 0.2 < (found > 0).float().mean() < 1

    def test_learns_from_the_teacher_through_a_trainer(self, tokenizers, make_trainer):
        module = self.modules(tokenizers, optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-2))
        batch = TwoTokenizers(*tokenizers)(TEXTS)
        with torch.no_grad():
            before = module.losses(module.observe(batch))
        trainer = make_trainer(max_epochs=10)
        loader = DataLoader(TEXTS, batch_size=2, collate_fn=TwoTokenizers(*tokenizers))
        trainer.fit(module, loader, loader)
        with torch.no_grad():
            after = module.losses(module.observe(batch))
        assert after["hard"] < before["hard"]
        assert {"val/soft", "val/nll"} <= set(trainer.callback_metrics)
        assert "val/agreement" not in trainer.callback_metrics  # token numbers of two vocabularies

    def test_the_soft_term_alone_brings_the_shape_of_the_predictions_closer(self, tokenizers, make_trainer):
        optimizer = lambda groups: torch.optim.Adam(groups, lr=1e-2)  # noqa: E731
        module = self.modules(tokenizers, weights={"hard": 0.0, "soft": 1.0}, optimizer=optimizer)
        module.teacher.network.lm_head.weight.data.mul_(40)  # sure of what it says
        batch = TwoTokenizers(*tokenizers)(TEXTS)
        before = module.losses(module.observe(batch))["soft"]
        make_trainer(max_epochs=30).fit(module, DataLoader([batch], batch_size=None))
        assert module.losses(module.observe(batch))["soft"] < 0.5 * before

    def test_temperatures_may_differ_by_item(self, tokenizers):
        module = self.modules(tokenizers)
        module.student.eval()
        step = module.observe(TwoTokenizers(*tokenizers)(TEXTS))
        step.temperature = 2.0
        expected = module.terms["soft"](step)
        step.temperature = torch.full(step.student.item_shape, 2.0)
        torch.testing.assert_close(module.terms["soft"](step), expected)

    def test_without_any_pair_the_loss_is_zero_and_has_a_gradient(self, tokenizers):
        module = self.modules(tokenizers)
        batch = TwoTokenizers(*tokenizers)(["cat sat", "the mat"])
        batch["teacher"] = {name: value[:, :1] for name, value in batch["teacher"].items()} | {
            "position": torch.full_like(batch["teacher"]["position"], -1)
        }
        loss = module.losses(module.observe(batch))["soft"]
        assert loss == 0
        loss.backward()

    def test_the_same_tokens_with_other_outputs_need_no_pairs(self):
        step = Step({}, Outputs(logits(4, 5, seed=0)), Outputs(logits(4, 9, seed=1)), temperature=2.0)
        expected = universal_logit_distance(step.student.logits, step.teacher.logits, temperature=2.0)
        torch.testing.assert_close(UniversalLogitDistance()(step), expected)

    def test_refuses_batches_and_tasks_that_it_cannot_read(self, tokenizers):
        teacher = OtherTokenizerTeacher(teacher_model(10))
        with pytest.raises(ValueError, match=r"no tokens of the teacher under 'teacher': only .'input_ids'."):
            teacher({"input_ids": torch.ones(1, 3)}, CausalLM())
        with pytest.raises(TypeError, match=r"needs `task=CausalLM..`, got Classification"):
            teacher({"input_ids": torch.ones(1, 3)}, Classification())

    def test_an_ordinary_teacher_is_refused_with_the_way_out(self, tokenizers):
        module = self.modules(tokenizers)
        module.teacher = FrozenTeacher(teacher_model(400))
        batch = TwoTokenizers(*tokenizers)(TEXTS[:1])
        step = module.observe(batch)
        step.teacher = Outputs(step.teacher.logits[:-1])
        with pytest.raises(ValueError, match="need `OtherTokenizerTeacher` and `TwoTokenizers`"):
            module.losses(step)
