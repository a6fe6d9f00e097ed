"""Training from what a teacher said earlier is training with the teacher."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_distill import KD, Outputs
from lightning_distill.callbacks import TemperatureAnnealing
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import Mixup, SparseKD, TopKTargets
from lightning_distill.tasks import CausalLM, Classification
from lightning_distill.teachers import CachedTeacher, FrozenTeacher
from lightning_distill.teachers.cache import CacheSpec, ShardWriter, read_spec, write_head
from tests.callbacks.cache_run import data, teacher, write

SGD = partial(torch.optim.SGD, lr=0.1)


def student(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "cache")
    return tmp_path / "cache"


def fit(make_trainer, teacher, *, datamodule=None, callbacks=(), epochs=2, trainer=None, **options):
    module = KD(student(), teacher, optimizer=SGD, **options)
    arguments = {"max_epochs": epochs, "callbacks": list(callbacks), "limit_val_batches": 0} | (trainer or {})
    make_trainer(**arguments).fit(module, datamodule=datamodule or data())
    return module


def assert_same_weights(first, second, **tolerance):
    for name, value in first.student.state_dict().items():
        torch.testing.assert_close(second.student.state_dict()[name], value, **tolerance)


# --- images, signals, tables -----------------------------------------------------------------------------------------


@pytest.mark.chapter("C37", api="lightning_distill.teachers.CachedTeacher")
def test_the_weights_are_those_of_training_with_the_teacher(make_trainer, folder):
    online, cached = fit(make_trainer, teacher()), fit(make_trainer, CachedTeacher(folder))
    assert_same_weights(online, cached)
    assert_same_weights(online, KD(student()), rtol=0, atol=10)
    with pytest.raises(AssertionError):
        assert_same_weights(online, KD(student()))


def test_order_batch_size_and_subsets_do_not_matter(make_trainer, folder):
    some = data(seed=7, batch_size=7, num_labels=12, unlabelled=False)
    online = fit(make_trainer, teacher(), datamodule=some)
    again = data(seed=7, batch_size=7, num_labels=12, unlabelled=False)
    assert_same_weights(online, fit(make_trainer, CachedTeacher(folder), datamodule=again))


def test_top_k_of_all_classes_trains_as_the_teacher_does(make_trainer, tmp_path):
    write(tmp_path / "cache", kind="top_k", k=3, temperatures=(4.0,))
    online = fit(make_trainer, teacher())
    cached = fit(make_trainer, CachedTeacher(tmp_path / "cache"), terms={"soft": TopKTargets()})
    assert_same_weights(online, cached, rtol=2e-3, atol=2e-3)  # its logits are stored in float16


def test_a_validation_set_has_no_cached_teacher(make_trainer, folder):
    x, y = data().splits.train
    unseen = (x[:10] + 1, y[:10])
    both = TensorDataModule((x, y), unseen)
    module = fit(make_trainer, CachedTeacher(folder), epochs=1, datamodule=both, trainer={"limit_val_batches": 1.0})
    for batches in (
        DataLoader(TensorDataset(x[:10] + 1, y[:10]), batch_size=5),
        DataLoader(TensorDataset(x[:10] + 1, y[:10], torch.arange(10)), batch_size=5),  # numbered from 0 again
        DataLoader(TensorDataset(x[:10], y[:10], 1000 + torch.arange(10)), batch_size=5),
    ):
        (result,) = make_trainer().test(module, batches, verbose=False)
        assert set(result) == {"test/accuracy", "test/nll", "test/ece"}


def test_agreement_is_measured_on_what_is_in_the_cache(make_trainer, folder):
    online, cached = KD(student(), teacher()), KD(student(), CachedTeacher(folder))
    batches = data().predict_dataloader()
    (expected,) = make_trainer().test(online, batches, verbose=False)
    (found,) = make_trainer().test(cached, batches, verbose=False)
    assert found == pytest.approx(expected, rel=1e-5)
    assert "test/agreement" in found


def test_agreement_is_not_measured_where_only_the_largest_logits_are_known(make_trainer, tmp_path):
    write(tmp_path / "cache", kind="top_k", k=2, temperatures=(4.0,))
    module = KD(student(), CachedTeacher(tmp_path / "cache"), terms={"soft": TopKTargets()})
    (found,) = make_trainer().test(module, data().predict_dataloader(), verbose=False)
    assert {"test/soft", "test/hard", "test/loss"} < set(found)
    assert not {"test/agreement", "test/fidelity"} & set(found)


def test_checkpoints_and_copies_hold_none_of_it(make_trainer, folder):
    module = KD(student(), CachedTeacher(folder))
    assert set(module.state_dict()) == {f"student.{name}" for name in student().state_dict()}
    for other in (copy.deepcopy(module.teacher), pickle.loads(pickle.dumps(module.teacher))):
        batch = next(iter(data().predict_dataloader()))
        assert torch.equal(other(batch, Classification()).logits, module.teacher(batch, Classification()).logits)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_another_data_set_is_refused(make_trainer, folder):
    x, y = data().splits.train
    with pytest.raises(ValueError, match=r"10 of 10 samples.*do not look as they did to the teacher.*another data set"):
        fit(make_trainer, CachedTeacher(folder), datamodule=TensorDataModule((x.flip(0), y), batch_size=10))
    with pytest.raises(ValueError, match=r"has no sample 5\d.*holds 50 samples with ids from 0 to 49"):
        fit(make_trainer, CachedTeacher(folder), datamodule=data(items=60, batch_size=60))


def test_inputs_that_the_teacher_did_not_see_are_refused_unless_meant(make_trainer, folder):
    moved = {"batch_transform": lambda batch: (batch[0] + 0.1, *batch[1:])}
    with pytest.raises(ValueError, match=r"a `batch_transform`\) that the teacher has not seen.*`same_inputs=False`"):
        fit(make_trainer, CachedTeacher(folder), **moved)
    fit(make_trainer, CachedTeacher(folder, same_inputs=False), **moved)
    with pytest.raises(ValueError, match=r"has no `index`.*A `batch_transform` that makes new samples, such as mixup"):
        fit(make_trainer, CachedTeacher(folder), batch_transform=Mixup(alpha=1.0, num_classes=3))


def test_half_precision_sees_the_same_inputs(make_trainer, folder):
    module = fit(make_trainer, CachedTeacher(folder), trainer={"precision": "bf16-true"})
    assert next(module.student.parameters()).dtype == torch.bfloat16


def test_batches_without_an_index_are_refused(make_trainer, folder):
    x, y = data().splits.train
    with pytest.raises(ValueError, match=r"The batch has no `index`, by which a teacher cache finds its samples"):
        make_trainer(max_epochs=1).fit(KD(student(), CachedTeacher(folder)), DataLoader(TensorDataset(x, y)))


def test_the_cache_of_another_teacher_is_refused(folder):
    spec = read_spec(folder)
    CachedTeacher(folder, teacher=spec.teacher, data=spec.data, transform_seed=0)
    for asked in ({"teacher": "resnet"}, {"data": "digits"}, {"transform_seed": 1}):
        with pytest.raises(ValueError, match=f"`{next(iter(asked))}` is .*, not"):
            CachedTeacher(folder, **asked)
    with pytest.raises(FileNotFoundError, match="There is no teacher cache in"):
        CachedTeacher(folder.parent / "nowhere")


def test_a_damaged_cache_is_refused_by_the_first_process(folder, monkeypatch):
    path = next(folder.glob("shard-*")) / "values.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"values\.bin differs from its checksum"):
        CachedTeacher(folder)
    monkeypatch.setenv("LOCAL_RANK", "1")
    CachedTeacher(folder)  # the others need not read everything again
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"values\.bin has 599 bytes instead of 600"):
        CachedTeacher(folder)


def test_terms_that_need_more_than_is_stored_are_refused(make_trainer, tmp_path, folder):
    write(tmp_path / "top_k", kind="top_k", k=2)
    top_k = CachedTeacher(tmp_path / "top_k")
    with pytest.raises(ValueError, match="Use the loss term `TopKTargets`"):
        fit(make_trainer, top_k)
    with pytest.raises(ValueError, match=r"stored at, 1, 2, 4, got 3\.0"):
        fit(make_trainer, top_k, temperature=3.0, terms={"soft": TopKTargets()})
    annealing = TemperatureAnnealing(4.0, 2.0, num_steps=20, shape="linear")
    with pytest.raises(ValueError, match=r"stored at, 1, 2, 4, got 3\.\d+"):  # the second step's
        fit(make_trainer, top_k, callbacks=[annealing], terms={"soft": TopKTargets()})
    with pytest.raises(ValueError, match="has no inner activations"):
        CachedTeacher(folder).tap(["0"])


# --- language models -------------------------------------------------------------------------------------------------


def gpt2(seed, **config):
    torch.manual_seed(seed)
    small = {"vocab_size": 60, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**small | config))


class Texts(TensorDataModule):
    """Texts of different lengths, padded on the right, with prompts that are not learnt; in dictionaries."""

    def __init__(self, side="right", **options):
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, 60, (20, 10), generator=generator)
        lengths = torch.randint(3, 11, (20,), generator=generator)
        mask = torch.arange(10) < lengths.unsqueeze(1)
        labels = torch.where(mask & (torch.arange(10) > 1), ids, -100)
        if side == "left":
            order = (torch.arange(10) - (10 - lengths).unsqueeze(1)) % 10
            ids, mask, labels = (part.gather(1, order) for part in (ids, mask, labels))
        self.columns = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "index": torch.arange(20)}
        super().__init__((ids, torch.arange(20)), eval_batch_size=3, **options)

    def rows(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def train_dataloader(self):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(9))
        return DataLoader([self.rows(part) for part in order.split(6)], batch_size=None)

    def predict_dataloader(self):
        samples = [{name: column[i] for name, column in self.columns.items()} for i in range(20)]
        return DataLoader(samples, batch_size=3)


def fit_text(make_trainer, teacher, datamodule=None, **options):
    module = KD(gpt2(1), teacher, task=CausalLM(), optimizer=SGD, **{"temperature": 2.0} | options)
    make_trainer(max_epochs=2).fit(module, (datamodule or Texts()).train_dataloader())
    return module


@pytest.mark.parametrize("kind", ["hidden", "dense"])
@pytest.mark.parametrize("fused", [False, True])
def test_language_models_learn_the_same_from_hidden_states_or_logits(make_trainer, tmp_path, monkeypatch, kind, fused):
    if fused:
        monkeypatch.setattr("lightning_distill.losses.fused.PLAIN_BYTES", 0)
    write(tmp_path / "cache", kind=kind, network=gpt2(2, n_embd=16), datamodule=Texts(), task=CausalLM())
    cached = CachedTeacher(tmp_path / "cache")
    assert cached.spec.width == {"hidden": 16, "dense": 60}[kind]
    online = fit_text(make_trainer, gpt2(2, n_embd=16))
    assert_same_weights(online, fit_text(make_trainer, cached), rtol=1e-4, atol=1e-5)


def test_language_models_learn_nearly_the_same_from_the_largest_logits(make_trainer, tmp_path):
    write(tmp_path / "cache", kind="top_k", k=60, network=gpt2(2), datamodule=Texts(), task=CausalLM())
    cached = CachedTeacher(tmp_path / "cache")
    online = fit_text(make_trainer, gpt2(2))
    joint = fit_text(make_trainer, cached, terms={"kd": SparseKD(alpha=0.3)})
    apart = fit_text(make_trainer, cached, terms={"soft": TopKTargets()})
    assert list(joint.terms) == ["kd"]
    assert_same_weights(online, joint, rtol=2e-3, atol=2e-3)
    assert_same_weights(joint, apart, rtol=1e-4, atol=1e-5)


def test_only_the_tokens_that_count_are_stored(tmp_path):
    write(tmp_path / "cache", kind="top_k", k=4, network=gpt2(2), datamodule=Texts(), task=CausalLM())
    labels = Texts().columns["labels"]
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("tail.bin"))
    assert stored == 4 * 3 * (labels[:, 1:] != -100).sum()


def test_padding_on_the_other_side_is_no_other_text(tmp_path):
    network = gpt2(2)
    write(tmp_path / "cache", kind="hidden", network=network, datamodule=Texts("right"), task=CausalLM())
    batch = Texts("left").rows(torch.tensor([4, 0, 9]))
    found = CachedTeacher(tmp_path / "cache")(batch, CausalLM())
    assert torch.equal(
        FrozenTeacher(network)(Texts("right").rows(batch["index"]), CausalLM()).logits.argmax(-1),
        found.logits.argmax(-1),
    )


def test_tokens_that_count_must_be_those_that_were_stored(tmp_path):
    write(tmp_path / "cache", kind="hidden", network=gpt2(2), datamodule=Texts(), task=CausalLM())
    cached = CachedTeacher(tmp_path / "cache")
    batch = Texts().rows(torch.tensor([4, 0]))
    with pytest.raises(ValueError, match=r"Sample 4 has \d+ tokens that count, but \d+ in the teacher cache"):
        cached(batch, CausalLM(distill_prompt=True))
    batch["input_ids"] = batch["input_ids"] + 1
    with pytest.raises(ValueError, match=r"2 of 2 samples, the first being sample 4, do not look"):
        cached(batch, CausalLM())


def test_a_batch_in_which_no_token_counts_is_cached_too(tmp_path):
    texts = Texts()
    texts.columns["labels"][3:6] = -100
    for kind in ("top_k", "dense", "hidden"):
        write(tmp_path / kind, kind=kind, k=4, network=gpt2(2), datamodule=texts, task=CausalLM())
        said = CachedTeacher(tmp_path / kind)(texts.rows(torch.tensor([3, 5])), CausalLM())
        assert said.item_shape == (0,)


def test_the_head_stays_out_of_the_students_module(tmp_path):
    write(tmp_path / "cache", kind="hidden", network=gpt2(2), datamodule=Texts(), task=CausalLM())
    module = KD(gpt2(1), CachedTeacher(tmp_path / "cache"), task=CausalLM())
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert all(name.startswith("student.") for name, _ in module.named_parameters())
    module.bfloat16()
    batch = Texts().rows(torch.tensor([1]))
    said = module.teacher(batch, CausalLM())
    assert said.logits.dtype == torch.float32
    assert not said.logits.requires_grad


def test_hidden_states_may_be_stored_in_another_precision_than_the_output_layer(tmp_path):
    head, x = nn.Linear(4, 3), torch.randn(5, 4).half()
    write_head(tmp_path, head)
    with ShardWriter(tmp_path, CacheSpec("hidden", width=4, dtype="float16")) as writer:
        writer.write(torch.arange(5), x)
    cached = CachedTeacher(tmp_path)
    said = cached((x[[2, 4]], None, torch.tensor([2, 4])), Classification())  # what inputs were like is not known
    torch.testing.assert_close(said.logits, head(x[[2, 4]].float()))
    with pytest.raises(ValueError, match="`index` has 2 entries for 5 samples"):
        cached((x, None, torch.tensor([2, 4])), Classification())


def test_sequences_of_one_length_keep_their_shape(tmp_path):
    class Tokens(Classification):
        def run(self, network, batch):
            return Outputs(network(batch[0].unflatten(1, (2, 2))))

    for kind, k in (("dense", 2), ("top_k", 2)):
        network = nn.Linear(2, 3)
        write(tmp_path / kind, kind=kind, k=k, network=network, task=Tokens())
        x, y = data().splits.train
        batch = (x[[3, 1]], y[[3, 1]], torch.tensor([3, 1]))
        said = CachedTeacher(tmp_path / kind)(batch, Tokens())
        assert said.item_shape == (2, 2)
        expected = network(x[[3, 1]].unflatten(1, (2, 2)))
        found = said.logits if kind == "dense" else said.top_k.ids.long()
        torch.testing.assert_close(found, expected if kind == "dense" else expected.topk(2).indices)


def test_sequences_of_several_lengths_need_their_task(tmp_path):
    write(tmp_path / "cache", kind="dense", network=gpt2(2), datamodule=Texts(), task=CausalLM())
    batch = Texts().rows(torch.arange(20))
    with pytest.raises(ValueError, match=r"sequences of different lengths.*which the task cannot arrange"):
        CachedTeacher(tmp_path / "cache")(
            {key: batch[key] for key in ("input_ids", "index", "attention_mask")}, Classification(input_key="input_ids")
        )
