"""Quantized networks in files with packed weights."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    pack_bits,
    prepare,
    quantized_layers,
    read_packed,
    set_alpha,
    set_bits,
    size_report,
    unpack_bits,
    unprepare,
    write_packed,
)


class Network(nn.Module):
    """Layers of three kinds and batch normalization."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 6, 3, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, ids):
        hidden = self.norm(self.conv(self.table(ids).mT)).relu().mean(dim=2)
        return self.head(self.hidden(hidden).relu())


IDS = torch.arange(60).reshape(10, 6) * 7 % 12


def trained(spec, **arguments):
    """A quantized network whose weights and steps are not those of calibration any more."""
    torch.manual_seed(0)
    network = Network().train()
    network(IDS)  # statistics of the normalization
    calibrate(prepare(network, spec, **arguments), [IDS])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        network(IDS).square().mean().backward()
        optimizer.step()
    return network.eval()


def said(network):
    with torch.no_grad():
        return network(IDS)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_undone_by_unpacking_and_takes_as_many_bits(bits):
    codes = torch.randint(2**bits, (37,), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-37 * bits // 8)
    assert unpack_bits(packed, bits, 37).tolist() == codes.tolist()


def test_packed_bytes_are_numbers_in_base_two():
    codes = [5, 0, 7, 2, 6, 1, 3, 4]
    number = sum(code << (3 * place) for place, code in enumerate(codes))
    assert bytes(pack_bits(torch.tensor(codes), 3).tolist()) == number.to_bytes(3, "little")


SPECS = [
    *(QuantSpec(weights=bits) for bits in (1, 2, 3, 4, 5, 8, 16, 32, "binary", "ternary")),
    QuantSpec(weights=4, activations=8, granularity="tensor"),
    QuantSpec(weights=2, activations=4, granularity="group:2"),
    QuantSpec(weights=4, scheme="minmax"),
    QuantSpec(weights=3, scheme="fixed", activations=8),
    QuantSpec(weights=4, scheme="seq"),
    QuantSpec(weights=4, gradient="dsq"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_file_says_what_the_network_said(spec, tmp_path):
    network = trained(spec)
    write_packed(network, tmp_path / "packed.safetensors")
    torch.manual_seed(1)
    again = read_packed(Network(), tmp_path / "packed.safetensors")
    torch.testing.assert_close(said(again), said(network), rtol=1e-5, atol=1e-6)
    for name, layer in quantized_layers(again).items():
        assert layer.weight_bits == quantized_layers(network)[name].weight_bits
        torch.testing.assert_close(layer.weight, layer.quantized_weight(), rtol=1e-6, atol=1e-7)


def test_learned_steps_come_back_bit_for_bit(tmp_path):
    network = trained(QuantSpec(weights=4, activations=8))
    write_packed(network, tmp_path / "packed.safetensors")
    again = read_packed(Network(), tmp_path / "packed.safetensors")
    assert torch.equal(said(again), said(network))


def test_bits_by_layer_and_layers_left_alone(tmp_path):
    network = trained(QuantSpec(weights="ternary"), overrides={"hidden": 8}, skip=["head"])
    set_bits(network, {"conv": 3, "table": 4})
    set_bits(network, {"table": 2})  # two bits, and not ternary any more
    write_packed(network, tmp_path / "packed.safetensors")
    again = read_packed(Network(), tmp_path / "packed.safetensors")
    assert {name: layer.weight_bits for name, layer in quantized_layers(again).items()} == {
        "table": 2,
        "conv": 3,
        "hidden": 8,
    }
    assert quantized_layers(again)["table"].closed_form is None
    torch.testing.assert_close(said(again), said(network))


def test_the_file_is_as_large_as_the_report_says(tmp_path):
    network = prepare(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 10)), QuantSpec(weights=2))
    write_packed(network, tmp_path / "packed.safetensors")
    size = (tmp_path / "packed.safetensors").stat().st_size
    assert size_report(network).bytes <= size <= size_report(network).bytes + 2000


def test_a_network_without_its_quantization_is_what_it_was():
    network, ids = Network().eval(), IDS
    before, state = said(network), set(network.state_dict())
    found = unprepare(calibrated(copy.deepcopy(network), ids))
    assert torch.equal(said(found), before)
    assert set(found.state_dict()) == state
    assert [type(module) for module in found.modules()] == [type(module) for module in network.modules()]
    assert len(quantized_layers(prepare(found))) == 4


def calibrated(network, ids):
    calibrate(prepare(network, QuantSpec(weights=2, activations=8, gradient="dsq")), [ids])
    return network


def test_files_are_not_replaced_by_chance_and_never_half_written(tmp_path):
    path = tmp_path / "packed.safetensors"
    network = trained(QuantSpec(weights=4))
    write_packed(network, path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_packed(network, path)
    write_packed(network, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["packed.safetensors"]


def test_networks_that_cannot_be_written_are_refused(tmp_path):
    path = tmp_path / "packed.safetensors"
    with pytest.raises(ValueError, match="no quantized layer"):
        write_packed(Network(), path)
    with pytest.raises(ValueError, match=r"must end in '\.safetensors', got .*x\.bin"):
        write_packed(trained(QuantSpec()), tmp_path / "x.bin")
    with pytest.raises(ValueError, match="not known"):
        write_packed(prepare(Network(), QuantSpec(activations=8)), path)
    half = trained(QuantSpec())
    set_alpha(half, 0.5)
    with pytest.raises(ValueError, match="not wholly quantized"):
        write_packed(half, path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [([1], 0, "`bits` must be 1 to 8"), ([4], 2, "from 0 to 3, got 4"), ([-1], 2, "from 0 to 3, got -1")],
)
def test_codes_out_of_range_are_refused(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_bits(torch.tensor(codes), bits)


def test_another_network_or_file_is_refused(tmp_path):
    path = tmp_path / "packed.safetensors"
    with pytest.raises(FileNotFoundError, match="no packed network"):
        read_packed(Network(), path)
    write_packed(trained(QuantSpec(weights=4)), path)
    with pytest.raises(ValueError, match="which this Linear has not"):
        read_packed(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="quantized already"):
        read_packed(prepare(Network()), path)
    wider = Network()
    wider.head = nn.Linear(6, 7)
    with pytest.raises(ValueError, match=r"'head' has the shape \(5, 1, 1\) in the file, not \(7, 1, 1\)"):
        read_packed(wider, path)
    more = Network()
    more.extra = nn.LayerNorm(3)
    with pytest.raises(ValueError, match=r"missing extra\.weight"):
        read_packed(more, path)
    other = Network()
    other.norm = nn.Identity()
    with pytest.raises(ValueError, match=r"unknown norm\.bias"):
        read_packed(other, path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(ValueError, match="no packed network of version 1"):
        read_packed(Network(), tmp_path / "plain.safetensors")


def test_a_file_with_too_few_codes_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "packed.safetensors"
    write_packed(trained(QuantSpec(weights=4)), path)
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"head.codes": tensors["head.codes"][:-1].clone()}, str(path), metadata=header)
    with pytest.raises(ValueError, match=r"'head' has the shape \(14,\) in the file, not \(15,\)"):
        read_packed(Network(), path)
    tensors.pop("head.codes")
    save_file(tensors, str(path), metadata=header)
    with pytest.raises(ValueError, match=r"lacks \['head\.codes'\]"):
        read_packed(Network(), path)


def adapted(seed):
    """A PeftModel with a low-rank adapter on its first layer, as it is after some training."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    network = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    return network.eval()


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(2, 8)], ids=str)
def test_an_adapted_student_keeps_its_base_packed_and_its_adapter_as_it_is(spec, tmp_path):
    network, values = prepare(adapted(0), spec), torch.randn(32, 16)
    calibrate(network, [values])
    adapter = {name: value for name, value in network.state_dict().items() if "lora_" in name}
    assert adapter
    assert not any("lora_" in name for name in quantized_layers(network))
    expected = network(values).detach()
    write_packed(network, tmp_path / "adapted.safetensors")
    again = read_packed(adapted(1), tmp_path / "adapted.safetensors")  # another base and another adapter
    torch.testing.assert_close(again(values).detach(), expected)
    state = again.state_dict()
    for name, value in adapter.items():
        assert torch.equal(state[name], value), name
    with safe_open(str(tmp_path / "adapted.safetensors"), framework="pt") as file:
        names = set(file.keys())
        assert {name for name in names if "lora_" in name} == set(adapter)
        codes = [file.get_tensor(name) for name in names if name.endswith(".codes")]
        assert sum(part.numel() for part in codes) == (16 * 32 + 32 * 4) * spec.bits // 8


def test_an_adapter_does_not_go_into_a_network_without_one(tmp_path):
    network = prepare(adapted(0), QuantSpec(4))
    write_packed(network, tmp_path / "adapted.safetensors")
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(ValueError, match=r"has quantized layers .*base_layer.*which this Sequential has not"):
        read_packed(plain, tmp_path / "adapted.safetensors")


def test_an_adapter_that_was_merged_is_packed_with_its_base(tmp_path):
    network, values = adapted(0), torch.randn(32, 16)
    expected = network(values).detach()
    merged = prepare(network.merge_and_unload(), QuantSpec(8))
    write_packed(merged, tmp_path / "merged.safetensors")
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    again = read_packed(plain, tmp_path / "merged.safetensors")
    assert (again(values) - expected).norm().item() < 0.02 * expected.norm().item()
