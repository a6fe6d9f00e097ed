"""Networks that get their weights where they are trained."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.deferred import give_weights, on_meta
from lightning_distill.export import write_network
from lightning_distill.networks import MLP, from_config
from lightning_distill.sharding import inside, is_sharded, repeated_blocks
from lightning_distill.teachers import FrozenTeacher


def gpt2():
    config = {"vocab_size": 40, "n_positions": 8, "n_embd": 8, "n_layer": 3, "n_head": 2}
    return from_config("gpt2", "causal-lm", config | {"bos_token_id": 0, "eos_token_id": 0})


class WithBuffer(nn.Module):
    """A table that stands in no state dict, as those of rotary positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_parameters_wait_and_buffers_do_not(tmp_path):
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "weights.safetensors")
    network = on_meta(WithBuffer, tmp_path / "weights.safetensors")
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.table.tolist() == [0.0, 1.0, 2.0]
    assert not nn.Linear(2, 2).weight.is_meta  # networks made later are as usual


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_weights_come_from_what_was_exported(tmp_path, kind):
    original = gpt2()
    path = tmp_path / ("network.safetensors" if kind == "file" else "network")
    write_network(original, path)
    network = on_meta(gpt2, path)
    network.transformer.wpe.weight.requires_grad_(False)
    give_weights(network, torch.device("cpu"))
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in network.state_dict().items())
    assert network.lm_head.weight is network.transformer.wte.weight  # tied, as before
    assert network.transformer.wte.weight.requires_grad
    assert not network.transformer.wpe.weight.requires_grad
    before = copy.deepcopy(network.state_dict())
    give_weights(network, torch.device("cpu"))  # nothing is missing any more
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_training_reads_student_and_teacher(tmp_path, make_trainer):
    student, teacher = MLP((4, 5, 3)), MLP((4, 9, 3))
    for name, network in {"student": student, "teacher": teacher}.items():
        write_network(network, tmp_path / f"{name}.safetensors")

    def trained(student, teacher):
        module = KD(student, teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        data = TensorDataset(torch.linspace(-1, 1, 32).reshape(8, 4), torch.arange(8) % 3)
        make_trainer(max_steps=2).fit(module, DataLoader(data, batch_size=4))
        return module.export()

    later = trained(
        on_meta(lambda: MLP((4, 5, 3)), tmp_path / "student.safetensors"),
        FrozenTeacher(on_meta(lambda: MLP((4, 9, 3)), tmp_path / "teacher.safetensors"), sharded=True),
    )
    expected = trained(student, teacher).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in later.state_dict().items())


def test_refuses_what_is_not_there_or_of_another_network(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere\.safetensors"):
        on_meta(gpt2, tmp_path / "nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*empty"):
        on_meta(gpt2, tmp_path / "empty")
    write_network(MLP((4, 5, 3)), tmp_path / "mlp.safetensors")
    with pytest.raises(ValueError, match=r"blocks.0.0.weight has shape \(5, 4\) in .*, but \(6, 4\) in this MLP"):
        give_weights(on_meta(lambda: MLP((4, 6, 3)), tmp_path / "mlp.safetensors"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"has no weights for blocks.1.0.weight \(2 in all\) of this MLP"):
        give_weights(on_meta(lambda: MLP((4, 5, 5, 3)), tmp_path / "mlp.safetensors"), torch.device("cpu"))
    with torch.device("meta"):
        network = MLP((4, 5, 3))
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.weight is on the meta device, without data"):
        give_weights(network, torch.device("cpu"))


def test_blocks_are_what_a_network_repeats():
    network = gpt2()
    assert repeated_blocks(network) == list(network.transformer.h)
    assert repeated_blocks(nn.Linear(2, 2)) == []
    assert len(repeated_blocks(MLP((4, 5, 6, 3)))) == 2
    one = nn.ModuleDict({"only": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})  # a list of one block repeats nothing
    assert repeated_blocks(one) == []


def test_a_whole_network_is_entered_by_a_plain_call():
    network = gpt2()
    assert not is_sharded(network)
    assert inside(network, lambda: 5) == 5
