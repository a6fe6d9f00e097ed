"""Short texts from files, data sets and the standard library: splits, padding, order, resume."""

import csv
import json
import types

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distill import KD
from lightning_distill.datamodules import SentenceDataModule, TextClassificationDataModule, sentences
from lightning_distill.datamodules.buckets import bucketed
from lightning_distill.embedding import Embedding
from lightning_distill.networks import from_config
from lightning_distill.tasks import SequenceClassification

WORDS = ["student", "teacher", "reads", "writes", "slowly", "never", "often", "learns"]


def sentence(number):
    return f"The {WORDS[number % 8]} {WORDS[number // 8 % 8]} number {number}" + " again" * (number % 13) + "."


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(map(sentence, range(300))) + "\n\n")
    return path


def data(file, **more):
    arguments = {"max_length": 24, "batch_size": 8, "validation": 0.2, "test": 0.2, "vocab_size": 300}
    return SentenceDataModule([file], **arguments | more)


def rows(count=120):
    return [{"text": sentence(n), "other": sentence(n + 1), "label": n % 3} for n in range(count)]


def write(folder, kind, values):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in values) + "\n\n")
    else:
        with path.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(values[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(values)
    return path


def test_batches_are_padded_to_their_longest_text_and_hold_like_lengths(file):
    source = data(file)
    source.setup("fit")
    loader = source.train_dataloader()
    seen, padded, tokens = [], 0, 0
    for batch in loader:
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max() <= 24
        assert (batch["input_ids"][~batch["attention_mask"].bool()] == source.tokenizer.pad_token_id).all()
        for row, length, index in zip(batch["input_ids"], lengths, batch["index"], strict=True):
            assert torch.equal(row[:length], source.parts.train.rows[index].long())
        seen += batch["index"].tolist()
        padded += batch["input_ids"].numel()
        tokens += int(lengths.sum())
    assert sorted(seen) == list(range(source.train_size))
    assert tokens / padded > 0.9
    shuffled = torch.randperm(source.train_size)
    blind = sum(len(b) * int(source.parts.train.lengths[b].max()) for b in shuffled.split(8))
    assert tokens / blind < 0.8  # what batches without regard to length would have


def test_parts_depend_on_the_text_alone_and_larger_choices_contain_smaller_ones(file, tmp_path):
    source = data(file)
    texts = [set(part["text"]) for part in source.texts]
    assert sum(map(len, texts)) == 300
    assert len(set.union(*texts)) == 300
    assert all(len(part) > 30 for part in texts)
    more = tmp_path / "more.txt"
    more.write_text("\n".join([*map(sentence, range(300, 400)), *map(sentence, range(0, 300, 2))]))
    both = SentenceDataModule([more, file], validation=0.2, test=0.2, vocab_size=300)
    for part, small in zip(both.texts, texts, strict=True):
        assert small <= set(part["text"])
    few, many = (set(data(file, train_size=size).texts.train["text"]) for size in (20, 50))
    assert len(few) == 20
    assert few < many < texts[0]
    turned = tmp_path / "turned.txt"
    turned.write_text("\n".join(map(sentence, reversed(range(300)))))
    assert set(data(turned, train_size=20).texts.train["text"]) == few  # whatever the order of the file
    assert len(data(file, eval_size=7).parts.test) == 7
    none = data(file, validation=0.0, test=0.0)
    assert none.parts.validation is None
    assert none.val_dataloader() == []
    with pytest.raises(ValueError, match="There is no test set"):
        none.test_dataloader()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_pairs_stand_in_neighbouring_rows_with_their_similarity(tmp_path, kind):
    values = [row | {"score": row["label"] / 2 if row["label"] else ""} for row in rows()]
    path = write(tmp_path, kind, values)
    source = SentenceDataModule([path], pair="other", label="score", batch_size=5, vocab_size=300, max_length=30)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    assert batch["input_ids"].shape[0] == 10
    assert torch.equal(batch["index"][1::2], batch["index"][::2] + 1)
    assert torch.equal(batch["labels"][::2].nan_to_num(-1), batch["labels"][1::2].nan_to_num(-1))
    train = source.texts.train
    for row, index, label in zip(batch["input_ids"], batch["index"], batch["labels"], strict=True):
        text = train["text" if index % 2 == 0 else "other"][index // 2]
        assert source.tokenizer.decode(row, skip_special_tokens=True) == text
        score = train["score"][index // 2]
        assert label.isnan() if score == "" else label == float(score)


@pytest.mark.parametrize("pair", [None, "other"])
def test_classified_texts_train_a_classifier(tmp_path, make_trainer, pair):
    named = [row | {"label": ["spring", "autumn", "winter"][row["label"]]} for row in rows()]
    source = TextClassificationDataModule(
        [write(tmp_path, "csv", named)], pair=pair, vocab_size=300, max_length=48, validation=0.2, test=0.2
    )
    assert source.classes == ["autumn", "spring", "winter"]
    labels = source.parts.train.labels
    assert [source.classes[label] for label in labels] == source.texts.train["label"]
    network = from_config(
        "bert",
        "sequence-classification",
        {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 300}
        | {"num_labels": 3},
    )
    trainer = make_trainer(max_epochs=1)
    module = KD(network, alpha=1.0, task=SequenceClassification())
    trainer.fit(module, datamodule=source)
    (found,) = trainer.test(module, datamodule=source, verbose=False)
    assert 0 <= found["test/accuracy"] <= 1


class OfColumns:
    """What we use of a `datasets.Dataset`."""

    def __init__(self, values):
        self.values = values
        self.column_names = list(values[0])
        self.features = None

    def __getitem__(self, name):
        return [row[name] for row in self.values]

    def __contains__(self, name):
        return False


@pytest.mark.parametrize("make", [OfColumns, lambda values: {key: [r[key] for r in values] for key in values[0]}])
def test_data_sets_with_and_without_splits(make):
    whole = TextClassificationDataModule(dataset=make(rows()), vocab_size=300, validation=0.2, test=0.2)
    assert sum(len(part) for part in whole.parts) == 120
    assert whole.classes == ["0", "1", "2"]
    splits = {"train": OfColumns(rows(60)), "validation": OfColumns(rows(20)), "test": OfColumns(rows(10))}
    split = TextClassificationDataModule(dataset=splits, vocab_size=300, eval_size=15)
    assert [len(part) for part in split.parts] == [60, 15, 10]
    assert split.texts.train["text"] == [row["text"] for row in rows(60)]
    only = TextClassificationDataModule(dataset={"train": OfColumns(rows())}, vocab_size=300, validation=0.3, test=0.2)
    assert sum(len(part) for part in only.parts) == 120


def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [sentence(n) for n in range(120)], "label": [n % 3 for n in range(120)]})
    made = datasets.Dataset(table, fingerprint="all")  # by itself it pickles the table, which some versions cannot
    assert sum(len(part) for part in TextClassificationDataModule(dataset=made, vocab_size=300).parts) == 120
    both = datasets.DatasetDict(train=made, test=datasets.Dataset(table.slice(0, 10), fingerprint="few"))
    both.save_to_disk(tmp_path / "saved")
    for source in (both, str(tmp_path / "saved")):
        loaded = TextClassificationDataModule(dataset=source, vocab_size=300)
        assert [part if part is None else len(part) for part in loaded.parts] == [120, None, 10]


def test_data_sets_by_name_need_their_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-distill\[datasets\]"'):
        SentenceDataModule(dataset="some/name").setup("fit")
    asked = []
    stand_in = types.SimpleNamespace(load_dataset=lambda name: asked.append(name) or OfColumns(rows()))
    monkeypatch.setitem(__import__("sys").modules, "datasets", stand_in)
    assert SentenceDataModule(dataset="some/name", vocab_size=300).train_size > 80
    assert asked == ["some/name"]


def test_the_default_is_sentences_of_the_documentation():
    source = SentenceDataModule(train_size=50, eval_size=20, vocab_size=300)
    assert source.train_size == 50
    for text in source.texts.train["text"]:
        assert 30 <= len(text) <= 160
        assert text[0].isupper()
        assert text[-1] in ".!?"
    with pytest.raises(ValueError, match="has no pairs of sentences"):
        SentenceDataModule(pair="other").setup("fit")


def test_sentences_are_found_once_across_lines():
    text = "Returns the number of\nbytes that were read. x = 1\n Returns the number of bytes that were read.  Yes."
    assert sentences([text]) == ["Returns the number of bytes that were read."]
    assert sentences(["f(x, y) -> z := {1, 2, 3} + [4, 5] // 6."]) == []


@pytest.mark.parametrize("size", [3, 40, 403])
def test_buckets_keep_every_sample_once_and_the_small_batch_last(size):
    order = torch.randperm(size)
    lengths = torch.randint(1, 50, (size,))
    found = bucketed(order, lengths, 8, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == list(range(size))
    assert torch.equal(found[size // 8 * 8 :], order[size // 8 * 8 :])
    other = bucketed(order, lengths, 8, torch.Generator().manual_seed(1))
    assert size < 16 or not torch.equal(found, other)
    if size == 403:
        spread = [int(lengths[b].max() - lengths[b].min()) for b in found[:400].split(8)]
        assert sum(spread) / len(spread) < 10


class Recorder(L.LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("killed")
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["input_ids"][:, :1].float()).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_killed_run_sees_the_rest_of_the_epoch(file, make_trainer, tmp_path):
    straight = Recorder()
    make_trainer(max_epochs=3, limit_val_batches=0).fit(straight, datamodule=data(file, seed=4))
    per_epoch = len(straight.seen) // 3
    killed = Recorder(fail_at=per_epoch + 5)
    keep = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=per_epoch + 5, save_top_k=1, filename="stop")
    trainer = make_trainer(max_epochs=3, callbacks=[keep], enable_checkpointing=True, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(killed, datamodule=data(file, seed=4))
    rest = Recorder()
    make_trainer(max_epochs=3, limit_val_batches=0).fit(
        rest, datamodule=data(file, seed=4), ckpt_path=tmp_path / "saved" / "stop.ckpt"
    )
    assert killed.seen + rest.seen == straight.seen
    assert straight.seen[:per_epoch] != straight.seen[per_epoch : 2 * per_epoch]


def test_refuses_texts_longer_than_the_models_context(file, make_trainer):
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    network = from_config("bert", "encoder", small | {"vocab_size": 300, "max_position_embeddings": 16})
    with pytest.raises(ValueError, match="Sequences of 24 tokens are longer than the context of BertModel, 16"):
        make_trainer(max_steps=1).fit(KD(network, alpha=1.0, task=Embedding()), datamodule=data(file))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda path: SentenceDataModule(str(path)), ValueError, "`files` must be a list of paths"),
        (lambda path: SentenceDataModule([]), ValueError, "Name at least one file"),
        (lambda path: SentenceDataModule([path], dataset={}), ValueError, "not both"),
        (lambda path: SentenceDataModule(label="score"), ValueError, "`label` is 'score', but there is no `pair`"),
        (lambda path: SentenceDataModule(max_length=0), ValueError, "`max_length` must be at least 1, got 0"),
        (lambda path: SentenceDataModule(train_size=0), ValueError, "`train_size` must be at least 1, got 0"),
        (lambda path: SentenceDataModule(validation=1.0), ValueError, r"`validation` must be in \[0, 1\), got 1.0"),
        (lambda path: SentenceDataModule(num_workers=-1), ValueError, "`num_workers` must be at least 0"),
        (lambda path: SentenceDataModule(seed=-1), ValueError, "`seed` must be in"),
        (lambda path: TextClassificationDataModule(), ValueError, "`files` and `dataset` are both None"),
        (lambda path: SentenceDataModule([path.with_name("no.txt")]).setup(), FileNotFoundError, "There is no file"),
        (lambda path: SentenceDataModule([path.parent / "x.bin"]).setup(), ValueError, "must end with one of .txt"),
        (lambda path: TextClassificationDataModule([path]).setup(), ValueError, "has no column 'label'; it has text"),
        (lambda path: SentenceDataModule(dataset={"a": []}).setup(), ValueError, "has no column 'text'; its columns"),
        (
            lambda path: SentenceDataModule(dataset={"text": ["one"]}).setup(),
            ValueError,
            "part has no text: there are 1 in all",
        ),
        (
            lambda path: TextClassificationDataModule(
                dataset={
                    "train": OfColumns([{"text": "a", "label": "x"}] * 9),
                    "test": OfColumns([{"text": "b", "label": "y"}]),
                },
                vocab_size=300,
            ).setup(),
            ValueError,
            "The class 'y' does not occur in the training set, whose classes are x",
        ),
    ],
)
def test_bad_input(file, make, kind, message):
    (file.parent / "x.bin").write_text("x")
    with pytest.raises(kind, match=message):
        make(file)
