"""Identity of teachers and data sets."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill.datamodules import TensorDataModule
from lightning_distill.teachers import FrozenTeacher, FunctionTeacher
from lightning_distill.teachers.cache import data_fingerprint, fingerprint, read_head, teacher_fingerprint, write_head


def network(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), activation(), nn.Linear(4, 2))


def test_fingerprint_is_that_of_the_contents():
    assert fingerprint(network()) == fingerprint(network())
    assert fingerprint(network().eval().requires_grad_(False)) == fingerprint(network())
    assert len(fingerprint(network())) == 32


def test_fingerprint_changes_with_a_weight_a_buffer_a_part_and_the_precision():
    weight, buffer = network(), network()
    weight[0].weight.data[1, 2] += 1e-6
    buffer[1].running_mean[0] = 1e-6
    others = [weight, buffer, network(nn.GELU), network().bfloat16(), network()[0]]
    assert len({fingerprint(other) for other in [network(), *others]}) == 6


def test_fingerprint_does_not_depend_on_the_file_of_a_class():
    class Mine(nn.Linear):
        """As a script defines it."""

    torch.manual_seed(0)
    here = Mine(3, 4)
    before = fingerprint(here)
    Mine.__module__ = "__main__"
    assert fingerprint(here) == before


def test_fingerprint_reads_the_configuration_but_not_where_it_came_from():
    class Configuration:
        def __init__(self, **fields):
            self.to_dict = lambda: fields

    def configured(**fields):
        module = network()
        module.config = Configuration(**fields)
        return fingerprint(module)

    assert configured(rope_theta=1e4, _name_or_path="here") == configured(rope_theta=1e4, _name_or_path="there")
    assert configured(rope_theta=1e4) != configured(rope_theta=1e6)


def test_fingerprint_needs_weights():
    with pytest.raises(ValueError, match=r"'0\.bias' is on the meta device"):
        fingerprint(network().to("meta"))


# --- data sets -------------------------------------------------------------------------------------------------------


class Samples:
    def __init__(self, items, offset=0.0):
        self.items = items
        self.offset = offset

    def __len__(self):
        return self.items

    def __getitem__(self, i):
        return {"x": torch.full((3,), i + self.offset), "name": f"{i}", "pixels": np.full(2, i), "meta": (i, None)}


def test_data_fingerprint_is_that_of_length_and_contents():
    assert data_fingerprint(Samples(100)) == data_fingerprint(Samples(100))
    others = [Samples(101), Samples(100, 1e-3), Samples(1), Samples(0), [1.0], [2.0]]
    assert len({data_fingerprint(other) for other in [Samples(100), *others]}) == 7


def test_data_fingerprint_is_the_same_for_loader_and_data_module_whatever_their_settings():
    x, y = torch.randn(40, 3), torch.arange(40) % 4
    module = TensorDataModule((x, y), batch_size=5)
    expected = data_fingerprint(module)
    other = TensorDataModule((x, y), batch_size=8, seed=3, num_labels=8, unlabelled=False, label_noise=0.5)
    assert data_fingerprint(other) == expected
    assert data_fingerprint(module.predict_dataloader()) == expected
    assert data_fingerprint(DataLoader(module.predict_dataloader().dataset, batch_size=3)) == expected
    assert data_fingerprint(TensorDataModule((x + 1, y))) != expected


def test_a_data_set_that_cannot_be_told_needs_a_name():
    class Random(Samples):
        def __getitem__(self, i):
            return torch.rand(3)

    class Objects(Samples):
        def __getitem__(self, i):
            return object()

    with pytest.raises(ValueError, match=r"gives other samples each time.*`CacheWriter\(..., data="):
        data_fingerprint(Random(3))
    with pytest.raises(ValueError, match="must have a length and samples by position, got generator"):
        data_fingerprint(i for i in range(3))
    with pytest.raises(TypeError, match="holds a object, whose contents cannot be told"):
        data_fingerprint(Objects(3))


def test_a_teacher_that_is_no_network_needs_a_name():
    assert teacher_fingerprint(FrozenTeacher(network())) == fingerprint(network().eval())
    with pytest.raises(ValueError, match=r"FunctionTeacher is no network.*`CacheWriter\(..., teacher="):
        teacher_fingerprint(FunctionTeacher(len))


# --- the output layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_layer_is_stored_exactly(tmp_path, bias):
    head = nn.Linear(4, 7, bias=bias, dtype=torch.bfloat16)
    write_head(tmp_path / "cache", head)
    write_head(tmp_path / "cache", nn.Linear(4, 7))  # it is there already
    found = read_head(tmp_path / "cache", 4)
    assert {name: value.dtype for name, value in found.state_dict().items()} == dict.fromkeys(
        head.state_dict(), torch.bfloat16
    )
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in found.state_dict().items())


def test_a_damaged_output_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"head\.safetensors is missing"):
        read_head(tmp_path, 4)
    write_head(tmp_path, nn.Linear(4, 7))
    path = tmp_path / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="differs from its checksum"):
        read_head(tmp_path, 4)
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        read_head(tmp_path, 4)
