"""Text for language models: what becomes of paragraphs, tokens and batches."""

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distill import KD
from lightning_distill.compatibility import check_context, check_reader, check_same_language, check_same_tokenizer
from lightning_distill.datamodules import text
from lightning_distill.datamodules.text import TextDataModule, split, standard_library, train_tokenizer, unique
from lightning_distill.tasks import CausalLM
from lightning_distill.teachers import OtherTokenizerTeacher

transformers = pytest.importorskip("transformers")

WORDS = [
    "the",
    "a",
    "student",
    "teacher",
    "model",
    "learns",
    "knows",
    "says",
    "writes",
    "reads",
    "of",
    "slowly",
    "never",
]


def paragraph(number):
    """Ten words that no other number gives."""
    digits = [number * 7919 // len(WORDS) ** i % len(WORDS) for i in range(6)]
    return f"Number {number}: " + " ".join(WORDS[digit] for digit in digits) + "."


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(folder))
    return folder


@pytest.fixture
def file(tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(map(paragraph, range(400))), encoding="utf-8")
    return path


def test_batches_are_what_a_language_model_reads(file):
    data = TextDataModule([file], length=32, batch_size=4, vocab_size=300)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    for key in ("input_ids", "attention_mask", "labels"):
        assert batch[key].shape == (4, 32)
        assert batch[key].dtype == torch.long
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()  # masking one must not mask the other
    assert batch["attention_mask"].all()
    assert torch.equal(data.blocks.train.tokens[batch["index"]].long(), batch["input_ids"])
    assert 257 < batch["input_ids"].max() < data.vocab_size == 300 == len(data.tokenizer)
    assert {key: value.tolist() for key, value in data.blocks.train[2].items()} == {
        key: value[0].tolist() for key, value in data.blocks.train.__getitems__([2]).items()
    }


def test_nothing_is_lost_but_the_rest_that_fills_no_sequence(file):
    data = TextDataModule([file], length=16, vocab_size=300)
    parts = split(unique([file.read_text()]), 0.05, 0.05)
    for blocks, paragraphs in zip(data.blocks, parts, strict=True):
        whole = "".join(one + "<|endoftext|>" for one in paragraphs)
        found = data.tokenizer.decode(blocks.tokens.flatten())
        assert whole.startswith(found.rstrip("\ufffd"))
        rest = len(data.tokenizer(whole)["input_ids"]) - blocks.tokens.numel()
        assert 0 <= rest < 16


def test_every_epoch_has_every_sequence_once_in_another_order(file):
    data = TextDataModule([file], length=16, vocab_size=300, batch_size=7, seed=3)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.start_at(epoch, 0)
        epochs.append(torch.cat([batch["index"] for batch in loader]).tolist())
    assert all(sorted(epoch) == list(range(data.train_size)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    in_order = torch.cat([batch["index"] for batch in data.predict_dataloader()])
    assert torch.equal(in_order, torch.arange(data.train_size))


def test_equal_paragraphs_are_dropped_before_the_split():
    texts = ["One.\n\nTwo\n  lines.\n \n\nThree.", "Two lines.\n\nOne.\n\n\n", ""]
    assert unique(texts) == ["One.", "Two\n  lines.", "Three."]


def test_a_paragraph_stays_in_its_part_whatever_else_there_is():
    few, many = (split(map(paragraph, range(n)), 0.2, 0.1) for n in (300, 3000))
    assert [len(part) for part in many] == pytest.approx([2100, 600, 300], abs=75)
    for some, all_of_them in zip(few, many, strict=True):
        assert set(some) <= set(all_of_them)
    assert not {*many.train} & {*many.validation} | {*many.train} & {*many.test} | {*many.validation} & {*many.test}
    smaller = split(map(paragraph, range(3000)), 0.1, 0.1)
    assert set(smaller.validation) < set(many.validation)
    assert split(map(paragraph, range(50)), 0.0, 0.0).train == list(map(paragraph, range(50)))


def test_the_tokenizer_is_trained_on_the_training_part_alone_and_writes_every_text(file):
    data = TextDataModule([file], vocab_size=350)
    expected = train_tokenizer(split(unique([file.read_text()]), 0.05, 0.05).train, 350)
    assert data.tokenizer.get_vocab() == expected.get_vocab()
    for sample in ("naïve — 東京 🎉\n\ttabs", paragraph(3), ""):
        assert data.tokenizer.decode(data.tokenizer(sample)["input_ids"]) == sample
    assert data.tokenizer.eos_token_id == 0


def test_tokens_are_made_once_and_kept_on_disk(file, cache, monkeypatch):
    first = TextDataModule([file], length=16, vocab_size=300)
    blocks = first.blocks
    (saved,) = cache.iterdir()
    assert saved.name.startswith("tokens-")
    with monkeypatch.context() as patch:
        patch.setattr(text, "train_tokenizer", lambda *_: pytest.fail("trained although it is on disk"))
        again = TextDataModule([file], length=16, vocab_size=300)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(blocks, again.blocks, strict=True))
        assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    saved.write_bytes(b"half a file")
    assert torch.equal(TextDataModule([file], length=16, vocab_size=300).blocks.train.tokens, blocks.train.tokens)
    _ = TextDataModule([file], length=16, vocab_size=301).blocks
    file.write_text(file.read_text() + "\n\nAnother one.")
    _ = TextDataModule([file], length=16, vocab_size=300).blocks
    assert len(list(cache.iterdir())) == 3  # other tokens for another vocabulary and for another text


def test_a_folder_that_cannot_be_written_to_only_costs_time(file, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(file))
    assert TextDataModule([file], length=16, vocab_size=300).train_size > 0


def test_the_standard_library_is_read_once_per_version(cache, monkeypatch):
    calls = []

    def documentation():
        calls.append(1)
        yield from ["First.\n\nSecond.", "Second."]

    monkeypatch.setattr(text, "_documentation", documentation)
    assert standard_library() == standard_library() == ["First.", "Second."]
    assert calls == [1]
    monkeypatch.setattr(text.sys, "version_info", (3, 99, 0))
    standard_library()
    assert calls == [1, 1]


@pytest.mark.slow
def test_the_default_text_is_two_million_characters_of_documentation(cache):
    data = TextDataModule()
    data.setup("fit")
    paragraphs = standard_library()
    assert sum(map(len, paragraphs)) > 1_500_000
    assert len({" ".join(one.split()) for one in paragraphs}) == len(paragraphs)
    sizes = [len(blocks) for blocks in data.blocks]
    assert sizes[0] > 5000
    assert 0.03 < sizes[1] / sum(sizes) < 0.07
    assert 0.03 < sizes[2] / sum(sizes) < 0.07
    assert data.vocab_size == len(data.tokenizer) == 512
    assert "the" in data.tokenizer.decode(next(iter(data.val_dataloader()))["input_ids"].flatten())


def test_a_given_tokenizer_is_used(file, tmp_path):
    own = train_tokenizer(map(paragraph, range(100)), 280)
    own.save_pretrained(tmp_path / "tokenizer")
    data = TextDataModule([file], str(tmp_path / "tokenizer"), length=16)
    check_same_tokenizer(data.tokenizer, own)
    assert data.vocab_size == 280
    first, second, *_ = split(unique([file.read_text()]), 0.05, 0.05).train
    expected = [*own(first)["input_ids"], own.eos_token_id, *own(second)["input_ids"]]
    assert data.blocks.train.tokens[0].tolist() == expected[:16]


# Training


def language_model(vocabulary=300, context=32, width=16):
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def test_trains_and_measures_a_language_model(file, make_trainer):
    data = TextDataModule([file], length=32, batch_size=8, vocab_size=300)
    module = KD(
        language_model(), language_model(width=32), task=CausalLM(), temperature=1.0, alpha=0.5,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    )  # fmt: skip
    trainer = make_trainer(max_epochs=2)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.test(module, data, verbose=False)
    assert after["test/nll"] < before["val/nll"] - 0.5


class Recorder(L.LightningModule):
    """Keeps the numbers of its sequences; may fail at a step."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.seen = []

    def validation_step(self, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("killed")
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["input_ids"][:, :1].float()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_with_the_sequences_that_were_left(file, tmp_path, make_trainer, num_workers, monkeypatch):
    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "false")  # forked after tokenizing

    def data():
        return TextDataModule([file], length=64, batch_size=10, vocab_size=300, seed=1, num_workers=num_workers)

    uninterrupted = Recorder()
    make_trainer(max_epochs=3, limit_val_batches=0).fit(uninterrupted, datamodule=data())
    stop = len(uninterrupted.seen) // 2  # in the middle of the second epoch
    save = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=stop, save_top_k=1, filename="stop")
    killed, resumed = Recorder(fail_at=stop), Recorder()
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(max_epochs=3, limit_val_batches=0, callbacks=[save], enable_checkpointing=True).fit(
            killed, datamodule=data()
        )
    make_trainer(max_epochs=3, limit_val_batches=0).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / "checkpoints" / "stop.ckpt"
    )
    assert killed.seen + resumed.seen == uninterrupted.seen


# Bad input


def test_sequences_longer_than_the_context_are_refused_before_the_training(file, make_trainer):
    data = TextDataModule([file], length=33, vocab_size=300)
    module = KD(language_model(), language_model(context=64), task=CausalLM())
    message = "Sequences of 33 tokens are longer than the context of GPT2LMHeadModel, 32 tokens. Shorten them to 32"
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=1).fit(module, datamodule=data)
    module = KD(language_model(context=64), language_model(), task=CausalLM())
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=1).fit(module, datamodule=data)
    check_context(language_model(), 32)


def test_tokenizers_that_differ_are_refused():
    paragraphs = list(map(paragraph, range(100)))
    student, same = train_tokenizer(paragraphs, 280), train_tokenizer(paragraphs, 280)
    check_same_tokenizer(student, same)
    other = train_tokenizer([text.upper() for text in paragraphs], 290)
    with pytest.raises(ValueError, match=r"of 280 and 290 tokens, \d+ differ, first 257 is 'er' and 'ER'; 258"):
        check_same_tokenizer(student, other)
    from tokenizers import pre_tokenizers

    same.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match=r"the same tokens but cut a text differently: .* from token 0 on \['H'"):
        check_same_tokenizer(student, same)


@pytest.fixture
def models(tmp_path):
    """A model beside each of two tokenizers; where they are."""
    paragraphs = list(map(paragraph, range(100)))
    for name, texts in {"lower": paragraphs, "upper": [one.upper() for one in paragraphs]}.items():
        language_model().save_pretrained(tmp_path / name)
        train_tokenizer(texts, 280).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("lower", "upper")}


def test_a_teacher_with_another_tokenizer_is_refused_where_the_module_is_made(models, tmp_path):
    with pytest.raises(ValueError, match=r"different tokenizers: of 280 and 280 tokens, \d+ differ.*`TwoTokenizers`"):
        KD(models["lower"], models["upper"], task=CausalLM())
    student = CausalLM().load(models["lower"])
    KD(student, models["lower"], task=CausalLM())
    KD(student, language_model(), task=CausalLM())  # it has no folder, and so no tokenizer that is known
    KD(student, OtherTokenizerTeacher(CausalLM().load(models["upper"])), task=CausalLM())
    language_model().save_pretrained(tmp_path / "bare")
    check_same_language(student, CausalLM().load(str(tmp_path / "bare")))


def test_a_model_is_refused_data_of_another_tokenizer(file, models, make_trainer):
    student = CausalLM().load(models["lower"])
    data = TextDataModule([file], models["upper"], length=16)
    with pytest.raises(ValueError, match=r"has another tokenizer than the data.*`tokenizer='.*lower'`"):
        make_trainer(max_epochs=1).fit(KD(student, task=CausalLM(), alpha=1.0), datamodule=data)
    check_reader(student, TextDataModule([file], models["lower"], length=16).tokenizer, 16)


def test_a_tokenizer_may_have_more_tokens(models):
    own, more = (transformers.AutoTokenizer.from_pretrained(models["lower"]) for _ in range(2))
    more.add_special_tokens({"pad_token": "<pad>"})
    assert len(more) == len(own) + 1
    check_same_tokenizer(own, more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": []}, "`files` is empty. Name at least one file, or pass None"),
        ({"files": "text.txt"}, "`files` must be a list of paths, got the single path 'text.txt'"),
        ({"length": 1}, "`length` must be at least 2, got 1"),
        ({"vocab_size": 256}, r"`vocab_size` must be at least 257 \(256 bytes and the end of a text\), got 256"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"eval_batch_size": float("nan")}, "`eval_batch_size` must be at least 1, got nan"),
        ({"validation": 1.0}, r"`validation` must be in \[0, 1\), got 1.0"),
        ({"validation": 0.5, "test": 0.5}, r"`validation \+ test` must be in \[0, 1\), got 1.0"),
        ({"test": -0.1}, r"`test` must be in \[0, 1\), got -0.1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"seed": -1}, "`seed` must be in"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**arguments)


def test_files_that_are_missing_or_too_short_are_refused(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match=r"There is no text file '.*nothing.txt', which `files` names"):
        TextDataModule([tmp_path / "nothing.txt"]).setup("fit")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(ValueError, match="The train part has no full sequence: 0 tokens in 0 paragraphs"):
        TextDataModule([empty]).setup("fit")
    empty.write_text("\n\n".join(map(paragraph, range(8))))
    with pytest.raises(
        ValueError, match=r"The validation part has no full sequence: .* Shorten `length`, add text, or"
    ):
        TextDataModule([empty], length=40, validation=0.01).setup("fit")
    without = TextDataModule([empty], length=16, validation=0.0, test=0.0)
    without.setup("fit")
    assert without.val_dataloader() == []
    with pytest.raises(ValueError, match="There is no test set: its share `test` is 0"):
        without.test_dataloader()
