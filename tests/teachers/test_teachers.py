"""Teachers: frozen for ever, wherever they come from."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_distill import KD, Outputs
from lightning_distill.tasks import Classification, SequenceClassification
from lightning_distill.teachers import FrozenTeacher, FunctionTeacher, build_teacher, load_network

TASK = Classification()


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def batch(items=6):
    return torch.randn(items, 4), torch.randint(0, 3, (items,))


def bert(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    return BertForSequenceClassification(config)


def test_is_hidden_from_its_parent():
    parent = nn.Module()
    parent.teacher = FrozenTeacher(network())
    assert list(parent.parameters()) == []
    assert parent.state_dict() == {}
    assert [name for name, _ in parent.named_modules()] == ["", "teacher"]


def test_stays_in_eval_mode_whoever_calls_train():
    net = network()
    teacher = FrozenTeacher(net)
    teacher.train()
    net.train()
    x = batch()
    before = copy.deepcopy(net.state_dict())
    first, second = teacher(x, TASK).logits, teacher(x, TASK).logits
    assert torch.equal(first, second)  # dropout would differ
    assert not first.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_follows_the_device_and_keeps_its_precision():
    teacher = FrozenTeacher(network(), dtype=torch.float64)
    parent = nn.ModuleList([nn.Linear(1, 1), teacher])
    parent.to(torch.bfloat16)
    assert parent[0].weight.dtype == torch.bfloat16
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float64}
    assert teacher(batch(), TASK).logits.dtype == torch.float64  # float32 inputs are cast to it
    weights = copy.deepcopy(teacher.network.state_dict())
    parent.to_empty(device="cpu")
    assert all(torch.equal(weights[name], value) for name, value in teacher.network.state_dict().items())
    parent.to("meta")
    assert {p.device.type for p in teacher.network.parameters()} == {"cpu"}


def test_copies_of_a_module_share_it_and_pickles_hold_it():
    module = KD(nn.Linear(4, 3), network())
    clone = copy.deepcopy(module)
    assert clone.teacher is module.teacher
    again = pickle.loads(pickle.dumps(module.teacher))
    x = batch()
    torch.testing.assert_close(again(x, TASK).logits, module.teacher(x, TASK).logits)


def test_a_function_may_return_logits_or_outputs():
    logits = torch.randn(6, 3)
    for said in (logits, Outputs(logits)):
        teacher = build_teacher(lambda batch, said=said: said, TASK)
        assert isinstance(teacher, FunctionTeacher)
        assert torch.equal(teacher(batch(), TASK).logits, logits)
    with pytest.raises(ValueError, match=r"FunctionTeacher has no inner activations, but a loss term reads \['0'\]"):
        teacher.tap(["0"])


def test_a_transformers_model_by_path(tmp_path, make_trainer):
    model = bert()
    model.save_pretrained(tmp_path / "bert")
    module = KD(bert(1), str(tmp_path / "bert"), task=SequenceClassification())
    ids = torch.randint(0, 30, (8, 5))
    data = [
        {"input_ids": ids[i], "attention_mask": torch.ones(5, dtype=torch.long), "labels": i % 3, "index": i}
        for i in range(8)
    ]
    loader = DataLoader(data, batch_size=4)
    first = next(iter(loader))
    torch.testing.assert_close(
        module.teacher(first, module.task).logits, model.eval()(input_ids=ids[:4]).logits.detach()
    )
    assert not any(parameter.requires_grad for parameter in module.teacher.network.parameters())
    make_trainer(max_epochs=1).fit(module, loader, loader)
    exported = module.export(tmp_path / "student")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, exported(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint", "state dict"])
def test_weights_load_from_what_training_leaves_behind(tmp_path, make_trainer, kind):
    trained = KD(network(), alpha=1.0)
    path = tmp_path / {"safetensors": "s.safetensors", "checkpoint": "s.ckpt", "state dict": "s.pt"}[kind]
    if kind == "safetensors":
        trained.export(path)
    elif kind == "checkpoint":
        trainer = make_trainer(max_epochs=1)
        trainer.fit(trained, DataLoader(TensorDataset(*batch()), batch_size=3))
        trainer.save_checkpoint(path)
    else:
        torch.save(trained.student.state_dict(), path)
    loaded = load_network(network(), str(path))
    assert all(torch.equal(value, trained.student.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_tied_weights_survive_the_way_through_a_file(tmp_path):
    def tied():
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        net[1].weight = net[0].weight
        return net

    net = tied()
    KD(net, alpha=1.0).export(tmp_path / "tied.safetensors")
    loaded = load_network(tied(), str(tmp_path / "tied.safetensors"))
    assert torch.equal(loaded[1].weight, net[1].weight)
    assert loaded[1].weight is loaded[0].weight


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path):
    KD(nn.Linear(4, 3), alpha=1.0).export(tmp_path / "s.safetensors")
    other = nn.Linear(4, 2)
    before = other.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight: \(3, 4\) in the file, \(2, 4\) in the network"):
        load_network(other, str(tmp_path / "s.safetensors"))
    assert torch.equal(other.weight, before)
    with pytest.raises(ValueError, match=r"missing 0\.weight"):
        load_network(nn.Sequential(nn.Linear(4, 3)), str(tmp_path / "s.safetensors"))
    with pytest.raises(FileNotFoundError, match="There are no weights at"):
        load_network(other, str(tmp_path / "none.safetensors"))
