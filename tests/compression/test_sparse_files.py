import json

import pytest
import torch
from safetensors.torch import safe_open, save_file
from torch import nn

from lightning_distill.compression import read_block_sparse, sparsity_report, write_block_sparse
from lightning_distill.networks import MLP, ConvNet2d
from lightning_distill.quantization import QuantSpec, prepare, read_packed, write_packed


def sparse(network, share, block):
    """``network`` with some of its blocks set to 0, the others with a zero in them."""
    for parameter in network.parameters():
        if parameter.ndim < 2:
            continue
        matrix = parameter.data.view(len(parameter), -1)
        for i in range(0, matrix.shape[0], block[0]):
            for j in range(0, matrix.shape[1], block[1]):
                part = matrix[i : i + block[0], j : j + block[1]]
                if torch.rand(()) < share:
                    part.zero_()
                elif part.numel() > 1:
                    part[0, 0] = 0
    return network


@pytest.mark.chapter("D36", api="lightning_distill.compression.write_block_sparse")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(4, 4), (5, 3), (1, 1)])
@pytest.mark.parametrize("make", [lambda: MLP((13, 40, 21)), lambda: ConvNet2d((8, 12))], ids=["mlp", "conv"])
def test_what_is_read_is_what_was_written(tmp_path, make, block, dtype):
    network = sparse(make().to(dtype), 0.7, block)
    written = write_block_sparse(network, tmp_path / "s.safetensors", block)
    assert written.bytes == (tmp_path / "s.safetensors").stat().st_size
    again = read_block_sparse(make().to(dtype).train(), tmp_path / "s.safetensors")
    assert not again.training
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for layer in sparsity_report(network, (1, 1)).layers:
        assert f"{layer.name}.weight" in written.sparse
    assert written.dense_bytes == sum(v.numel() * v.element_size() for v in network.state_dict().values())


@pytest.mark.chapter("D36", api="lightning_distill.compression.write_block_sparse")
def test_a_file_holds_the_kept_weights_and_a_bit_per_block(tmp_path):
    network = MLP((256, 256, 16))
    weight = network.blocks[0][0].weight
    with torch.no_grad():
        weight.view(16, 16, 16, 16)[:, :, 2:] = 0  # an eighth of the columns of blocks is left: 32 of 256
    written = write_block_sparse(network, tmp_path / "s.safetensors")
    assert written.sparse == {"blocks.0.0.weight": (32, 256)}
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.get_tensor("blocks.0.0.weight.values").numel() == 32 * 256
        assert file.get_tensor("blocks.0.0.weight.blocks").numel() == 256 / 8
        numbers = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert 0 < written.bytes - numbers < 1000  # names and shapes
    assert written.ratio == written.bytes / written.dense_bytes < 0.2
    assert str(written).splitlines()[0] == "blocks.0.0.weight      32 of    256 blocks"
    assert f"{written.bytes:,} bytes, {written.ratio:.3f} of dense ({written.dense_bytes:,})" in str(written)


def test_dense_tensors_are_left_as_they_are_and_none_is_lost(tmp_path):
    network = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 2))
    network[0].weight.data[:16, :16] = -0.0
    written = write_block_sparse(network, tmp_path / "s.safetensors")
    assert written.sparse == {"0.weight": (3, 4)}
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert {"2.weight", "1.running_mean", "1.num_batches_tracked", "0.bias"} <= set(file.keys())
    again = read_block_sparse(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 2)), written.path)
    x = torch.randn(5, 32)
    assert torch.equal(again(x), network.eval()(x))


def test_zeros_that_are_too_few_to_pay_are_written(tmp_path):
    layer = nn.Linear(8, 8)
    layer.weight.data[0, :2] = 0  # 8 bytes, as many as 64 bits
    assert write_block_sparse(layer, tmp_path / "no.safetensors", (1, 1)).sparse == {}
    layer.weight.data[0, 2] = 0
    assert write_block_sparse(layer, tmp_path / "yes.safetensors", (1, 1)).sparse == {"weight": (61, 64)}


def test_values_that_are_not_finite_are_no_zeros(tmp_path):
    layer = nn.Linear(8, 8)
    layer.weight.data.zero_()
    layer.weight.data[0, 0], layer.weight.data[7, 7] = float("nan"), float("inf")
    write_block_sparse(nn.Sequential(layer), tmp_path / "s.safetensors", (2, 2))
    again = read_block_sparse(nn.Sequential(nn.Linear(8, 8)), tmp_path / "s.safetensors")
    torch.testing.assert_close(again[0].weight, layer.weight, equal_nan=True)


def test_a_layer_of_zeros_alone_needs_no_values(tmp_path):
    network = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.zeros_(network[0].weight)
    written = write_block_sparse(network, tmp_path / "s.safetensors")
    assert written.sparse == {"0.weight": (0, 16)}
    again = read_block_sparse(nn.Sequential(nn.Linear(64, 64, bias=False)), written.path)
    assert not again[0].weight.any()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 32)
        self.head = nn.Linear(32, 32, bias=False)
        self.head.weight = self.table.weight


def test_a_shared_weight_is_written_once(tmp_path):
    network = sparse(Tied(), 0.5, (16, 16))
    network.table.weight.data[:16] = 0
    written = write_block_sparse(network, tmp_path / "s.safetensors")
    assert list(written.sparse) == ["table.weight"]
    assert written.dense_bytes == 32 * 32 * 4
    again = read_block_sparse(Tied(), written.path)
    assert again.head.weight is again.table.weight
    assert torch.equal(again.head.weight, network.head.weight)


def test_nothing_is_overwritten_unasked_and_half_a_file_is_none(tmp_path, monkeypatch):
    path, network = tmp_path / "deep" / "s.safetensors", MLP((32, 32, 4))
    write_block_sparse(network, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"exists. Choose another path, or pass `overwrite=True`"):
        write_block_sparse(network, path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_block_sparse(MLP((32, 32, 4)), path, overwrite=True)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    write_block_sparse(MLP((32, 32, 4)), path, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.chapter("D36", api="lightning_distill.compression.write_block_sparse")
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4),
        QuantSpec(3, granularity="tensor"),
        QuantSpec(8, granularity="group:4"),
        QuantSpec("ternary"),
        QuantSpec(5, scheme="minmax"),
        QuantSpec(16),
        QuantSpec(1),
    ],
    ids=str,
)
def test_quantized_networks_have_few_bits_as_well(tmp_path, spec):
    network = prepare(sparse(MLP((16, 64, 32, 4)), 0.8, (4, 4)), spec, skip=["blocks.1.*"]).eval()
    written = write_block_sparse(network, tmp_path / "sparse.safetensors", (4, 4))
    write_packed(network, tmp_path / "packed.safetensors")
    packed = (tmp_path / "packed.safetensors").stat().st_size
    assert written.bytes < packed + 500  # names and shapes
    assert ("blocks.0.0.codes" in written.sparse) == (1 < written_bits(network) <= 8)
    assert "blocks.1.0.weight" in written.sparse  # in floating point
    again = read_block_sparse(MLP((16, 64, 32, 4)), tmp_path / "sparse.safetensors")
    dense = read_packed(MLP((16, 64, 32, 4)), tmp_path / "packed.safetensors")
    for name, value in dense.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    x = torch.randn(5, 16)
    torch.testing.assert_close(again(x), network(x))


def written_bits(network):
    return network.blocks[0][0].weight_bits


def test_a_quantized_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    write_block_sparse(prepare(MLP((16, 64, 4)), QuantSpec(4)), path)
    with pytest.raises(ValueError, match=r"has the shape .* in the file|s.safetensors' is not this MLP"):
        read_block_sparse(MLP((16, 48, 4)), path)
    with pytest.raises(ValueError, match=r"s.safetensors' has quantized layers .*which this Linear has not"):
        read_block_sparse(nn.Linear(4, 4), path)
    with pytest.raises(ValueError, match="is quantized already"):
        read_block_sparse(prepare(MLP((16, 64, 4)), QuantSpec(4)), path)


class Odd(nn.Linear):
    def get_extra_state(self):
        return "text"

    def set_extra_state(self, state):
        pass


def test_bad_input_is_refused(tmp_path):
    network, path = MLP((32, 32, 4)), tmp_path / "s.safetensors"
    with pytest.raises(ValueError, match=r"`path` must end in '.safetensors', got .*s.pt'"):
        write_block_sparse(network, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="`isa` must be one of"):
        write_block_sparse(network, path, "sse")
    with pytest.raises(ValueError, match=r"The ranges of what the layers .* read are not known"):
        write_block_sparse(prepare(MLP((32, 32, 4)), QuantSpec(4, 8)), path)
    with pytest.raises(ValueError, match="'_extra_state' of `network` is a str; files hold tensors alone"):
        write_block_sparse(Odd(2, 2), path)
    with pytest.raises(FileNotFoundError, match="There is no network at"):
        read_block_sparse(network, path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no blocks of version 1; `write_block_sparse` writes them"):
        read_block_sparse(network, path)
    save_file({"x": torch.zeros(2)}, path, {"lightning_distill_block_sparsity": json.dumps({"version": "0"})})
    with pytest.raises(ValueError, match="holds no blocks of version 1"):
        read_block_sparse(network, path)


def test_another_network_is_refused(tmp_path):
    network, path = MLP((32, 32, 4)), tmp_path / "s.safetensors"
    network.blocks[0][0].weight.data[:16] = 0
    write_block_sparse(network, path)
    wider = MLP((32, 48, 4))
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(ValueError, match=r"is not this MLP: .*blocks.0.0.weight of shape \(32, 32\), not \(48, 32\)"):
        read_block_sparse(wider, path)
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())
    with pytest.raises(ValueError, match=r"is not this MLP: missing blocks.1.0.weight"):
        read_block_sparse(MLP((32, 32, 32, 4)), path)
    with pytest.raises(ValueError, match="is not this Linear: missing weight; missing bias; unknown"):
        read_block_sparse(nn.Linear(32, 32), path)
