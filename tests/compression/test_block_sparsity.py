import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_distill.compression import (
    BLOCK_SIZES,
    block_importance,
    block_mask,
    block_masks,
    block_norms,
    block_size,
    cubic_sparsity,
    element_mask,
    sparsity_report,
)
from lightning_distill.compression.blocks import as_block, bits_of_present, block_grid, set_to_zero
from lightning_distill.compression.sparse_layers import sparse_layers
from lightning_distill.hardware import simd_width
from lightning_distill.hardware.alignment import VECTOR_BITS
from lightning_distill.networks import MLP, ConvNet2d
from lightning_distill.quantization import QuantSpec, prepare

API = "lightning_distill.compression."


@pytest.mark.chapter("D37", api=API + "BLOCK_SIZES")
def test_block_sizes_are_the_golden_ones(golden):
    expected = golden("block_size_table").expected
    for isa, sizes in BLOCK_SIZES.items():
        assert [list(size) for size in sizes] == expected[isa].int().tolist()
    for isa, bits in expected["vector_bits"].items():
        assert VECTOR_BITS[isa] == bits
    for name, lanes in expected["lanes"].items():
        isa, _, kind = name.partition("_")
        assert simd_width(isa, int(kind.removeprefix("fp").removeprefix("int"))) == lanes


@pytest.mark.chapter("D37", api=API + "block_size")
def test_a_block_is_no_wider_than_a_register():
    assert [block_size("neon", bits) for bits in (32, 16, 8)] == [(4, 4), (8, 8), (8, 8)]
    assert [block_size("avx512", bits) for bits in (64, 32, 8)] == [(16, 16)] * 3
    assert block_size("tensor_core") == (16, 16)
    assert as_block("neon") == (4, 4)
    assert as_block([32, 8]) == (32, 8)


@pytest.mark.chapter("D38", api=API + "block_importance")
def test_importance_and_mask_are_the_golden_ones(golden):
    case = golden("block_importance_mask")
    weight, gradient = case.inputs["W"], case.inputs["grad"]
    block = tuple(case.inputs["block"].int().tolist())
    importance = block_importance(weight, gradient, block)
    torch.testing.assert_close(importance, case.expected["importance"], rtol=case.rtol, atol=case.atol)
    mask = block_mask(importance, 1 - case.inputs["keep"] / importance.numel())
    elements = element_mask(mask, tuple(weight.shape), block)
    assert torch.equal(elements.double(), case.expected["mask"])
    assert torch.equal(weight * elements, case.expected["W_sparse"])


SHAPES = [((16, 16), (4, 4)), ((5, 7), (2, 3)), ((6, 4, 3), (4, 5)), ((3, 2, 2, 3), (3, 12)), ((4, 9), (1, 1))]


def slow_blocks(weight, block):
    """Each block of a matrix, cut out one by one."""
    matrix = weight.reshape(len(weight), -1)
    for row in range(0, matrix.shape[0], block[0]):
        for column in range(0, matrix.shape[1], block[1]):
            yield matrix[row : row + block[0], column : column + block[1]]


@pytest.mark.chapter("D38", api=API + "block_importance")
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_importance_bounds_the_first_order_change_of_the_loss(shape, block):
    weight, gradient = torch.randn(shape), torch.randn(shape)
    importance = block_importance(weight, gradient, block)
    assert tuple(importance.shape) == block_grid(shape, block)
    pairs = zip(slow_blocks(weight, block), slow_blocks(gradient, block), strict=True)
    for value, (w, g) in zip(importance.flatten(), pairs, strict=True):
        torch.testing.assert_close(value, w.square().sum().sqrt() * g.square().sum().sqrt())
        assert value >= (w * g).sum().abs() - 1e-6
    torch.testing.assert_close(block_importance(weight, -3 * weight, block), 3 * block_norms(weight, block) ** 2)


@pytest.mark.chapter("D37", api=API + "block_norms")
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_blocks_cover_every_weight_once(shape, block):
    rows, columns = block_grid(shape, block)
    for blocks, side, length in ((rows, block[0], shape[0]), (columns, block[1], math.prod(shape[1:]))):
        assert 0 <= blocks * side - length < side  # filled up to whole blocks, and no further
    count = torch.zeros(shape)
    for i in range(rows):
        for j in range(columns):
            one = torch.zeros(rows, columns, dtype=torch.bool)
            one[i, j] = True
            count += element_mask(one, shape, block)
    assert torch.equal(count, torch.ones(shape))
    weight = torch.randn(shape)
    torch.testing.assert_close(block_norms(weight, block).square().sum(), weight.square().sum())
    half = torch.rand(rows, columns) < 0.5
    masked = weight * element_mask(half, shape, block)
    assert torch.equal(block_norms(masked, block) != 0, half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_computed_in_float32(dtype):
    weight = torch.full((4, 4), 300.0, dtype=dtype)  # 300² is infinite in float16
    assert block_norms(weight, (4, 4)).dtype == torch.float32
    torch.testing.assert_close(block_norms(weight, (4, 4)).item(), 1200.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_what_has_gone_becomes_zero_whatever_it_was(dtype):
    parameter = nn.Parameter(torch.tensor([[float("nan"), -448.0, -0.0, 2.0, -3.0]]).to(dtype))
    present = bits_of_present(torch.tensor([[False, True]]), parameter, (1, 3))
    set_to_zero(parameter, present)
    assert parameter.double().tolist() == [[0, 0, 0, 2, -3]]
    assert not parameter[0, :3].double().signbit().any()
    assert bits_of_present(torch.ones(1, 2, dtype=bool), parameter, (1, 3)) is None
    set_to_zero(parameter, None)
    assert parameter.double().tolist() == [[0, 0, 0, 2, -3]]


@pytest.mark.chapter("D36", api=API + "block_mask")
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (10, 10)])
def test_sparsity_is_exact_to_one_block(sparsity, shape):
    importance = torch.rand(shape)
    mask = block_mask(importance, sparsity)
    gone = int((~mask).sum())
    if mask.sum() > 1:
        assert abs(gone - sparsity * mask.numel()) <= 0.5 + 1e-9
    assert mask.any()
    if gone:
        assert importance[~mask].max() <= importance[mask].min()


def test_the_first_of_equal_blocks_go():
    mask = block_mask(torch.ones(2, 3), 0.5)
    assert mask.tolist() == [[False, False, False], [True, True, True]]
    assert torch.equal(mask, block_mask(torch.ones(2, 3), 0.5))
    assert block_mask(torch.zeros(4, 4), 0.999).sum() == 1


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_ties_are_broken_as_a_stable_sort_breaks_them(levels):
    for sparsity in (0.0, 0.01, 0.3, 0.62, 0.99):
        importance = torch.randint(levels, (7, 9)).double()
        order = importance.flatten().argsort(stable=True)
        expected = torch.ones(63, dtype=torch.bool)
        expected[order[: min(math.floor(63 * sparsity + 0.5), 62)]] = False
        assert torch.equal(block_mask(importance, sparsity).flatten(), expected)


def test_blocks_that_have_gone_stay_gone():
    importance = torch.rand(6, 6)
    kept = block_mask(torch.rand(6, 6), 0.5)
    for sparsity in (0.0, 0.3, 0.5, 0.8):
        mask = block_mask(importance, sparsity, kept=kept)
        assert not (mask & ~kept).any()
        assert int(mask.sum()) == min(18, 36 - math.floor(36 * sparsity + 0.5))


@pytest.mark.chapter("D36", api=API + "block_masks")
def test_the_scope_is_a_layer_or_all_of_them():
    importance = {"weak": torch.rand(4, 4), "strong": torch.rand(4, 4) + 10}
    each = block_masks(importance, 0.5)
    assert {name: int(mask.sum()) for name, mask in each.items()} == {"weak": 8, "strong": 8}
    for name in importance:
        assert torch.equal(each[name], block_mask(importance[name], 0.5))
    together = block_masks(importance, 0.5, scope="global")
    assert {name: int(mask.sum()) for name, mask in together.items()} == {"weak": 1, "strong": 15}  # one must stay
    assert together["weak"].flatten()[importance["weak"].argmax()]
    everything = torch.cat([values.flatten() for values in importance.values()])
    most = block_masks({"one": everything[None]}, 0.4)["one"].flatten()
    together = block_masks(importance, 0.4, scope="global")
    assert torch.equal(torch.cat([mask.flatten() for mask in together.values()]), most)


@pytest.mark.chapter("D36", api=API + "cubic_sparsity")
def test_sparsity_rises_as_a_cubic():
    values = [cubic_sparsity(step, start=10, end=50, final=0.9, initial=0.1) for step in range(60)]
    assert values[:11] == pytest.approx([0.1] * 11)
    assert values[50:] == [0.9] * 10
    assert values[10:] == sorted(values[10:])
    assert values[20] == pytest.approx(0.9 - 0.8 * 0.75**3)
    rises = [after - before for before, after in pairwise(values[10:51])]
    assert rises == sorted(rises, reverse=True)
    assert cubic_sparsity(4, start=5, end=5, final=0.5) == 0
    assert cubic_sparsity(5, start=5, end=5, final=0.5) == 0.5


BAD = {
    "unknown set": (lambda: block_size("avx"), r"`isa` must be one of \['avx512', 'neon', 'tensor_core'\], got 'avx'"),
    "unknown bits": (lambda: block_size("neon", 5), "`bits` must be 8, 16, 32 or 64, got 5"),
    "three sides": (lambda: as_block((1, 2, 3)), r"two positive whole numbers.*got \(1, 2, 3\)"),
    "no side": (lambda: as_block((0, 4)), r"two positive whole numbers.*got \(0, 4\)"),
    "half a side": (lambda: as_block((1.5, 4)), "two positive whole numbers"),
    "a vector": (lambda: block_norms(torch.zeros(3), (1, 1)), r"`weight` must be a matrix.*got shape \(3,\)"),
    "empty": (lambda: block_norms(torch.zeros(0, 3), (1, 1)), r"not empty, got shape \(0, 3\)"),
    "two shapes": (lambda: block_importance(torch.zeros(2, 3), torch.zeros(3, 2), (1, 1)), "must have the same shape"),
    "all": (lambda: block_mask(torch.ones(2, 2), 1.0), r"`sparsity`, a share of blocks, must be in \[0, 1\), got 1.0"),
    "NaN share": (lambda: block_mask(torch.ones(2, 2), math.nan), "got nan"),
    "scope": (lambda: block_masks({"a": torch.ones(2, 2)}, 0.5, scope="all"), "`scope` must be 'layer' or 'global'"),
    "NaN": (lambda: block_masks({"a": torch.tensor([[math.nan]])}, 0.5), "importance of blocks of 'a' is not finite"),
    "none": (lambda: block_mask(torch.ones(1, 2), 0, kept=torch.zeros(1, 2, dtype=bool)), "`kept` has no block; one"),
    "mask": (lambda: element_mask(torch.ones(2, 2), (4, 4), (4, 2)), r"has \(1, 2\) blocks of 4x2.*has \(2, 2\)"),
    "end": (lambda: cubic_sparsity(0, start=5, end=4, final=0.5), "`end` not be before it, got 5 and 4"),
    "start": (lambda: cubic_sparsity(0, start=-1, end=4, final=0.5), "`start` must not be negative"),
    "final": (lambda: cubic_sparsity(0, start=0, end=4, final=1.5), "`final`, a share of blocks"),
    "initial": (lambda: cubic_sparsity(0, start=0, end=4, final=0.5, initial=0.6), "`initial` must be at most `final`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_layers_are_linear_and_convolutions_quantized_or_not():
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Embedding(8, 8), nn.Linear(8, 8))
    assert list(sparse_layers(network, (4, 4))) == ["0", "3"]
    assert list(sparse_layers(network, (4, 4), layers=["3", "0"])) == ["0", "3"]
    assert list(sparse_layers(network, (4, 4), skip=["[1-9]"])) == ["0"]
    assert list(sparse_layers(prepare(network, QuantSpec(4)), (4, 4))) == ["0", "3"]


def test_a_report_counts_blocks_and_weights():
    network = MLP((6, 4, 4))
    with torch.no_grad():
        network.blocks[0][0].weight[:2, :4] = 0  # two blocks of 2x2
        network.head.weight[0] = 0  # no whole block
    report = sparsity_report(network, (2, 2))
    assert [(layer.name, layer.blocks, layer.kept, layer.zeros) for layer in report.layers] == [
        ("blocks.0.0", (2, 3), 4, 8),
        ("head", (2, 2), 4, 4),
    ]
    assert report.block_sparsity == pytest.approx(2 / 10)
    assert report.weight_sparsity == pytest.approx(12 / 40)
    assert "blocks.0.0           4x6       4 of      6 blocks" in str(report)
    assert str(report).endswith("20.0% of the blocks and 30.0% of the weights are 0")


def test_layers_that_do_not_fit_are_named_with_the_fix():
    network = ConvNet2d((8, 8))
    first = next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    with pytest.raises(ValueError, match=rf"A block of 16x16 is larger than the layers '{first}' \(8x9\)"):
        sparse_layers(network, (16, 16))
    with pytest.raises(ValueError, match=r"5x2 is larger than the layers 'head' \(4x8\).*`skip=\['head'\]`"):
        sparse_layers(MLP((6, 8, 4)), (5, 2))
    with pytest.raises(ValueError, match=r"2x7 is larger than the layers 'blocks.0.0' \(8x6\)"):
        sparse_layers(MLP((6, 8, 4)), (2, 7))
    with pytest.raises(ValueError, match="`skip` has 'tail', which fits no layer with blocks; there are"):
        sparse_layers(network, (4, 4), skip=["tail"])
    with pytest.raises(ValueError, match="`layers` has 'tail', which fits no layer"):
        sparse_layers(network, (4, 4), layers=["tail"])
    with pytest.raises(ValueError, match=r"has no layer to take blocks from.*`skip` leave none"):
        sparse_layers(network, (4, 4), skip=["*"])
    with pytest.raises(ValueError, match="BatchNorm1d has no layer to take blocks from: there are none"):
        sparse_layers(nn.BatchNorm1d(4), (4, 4))
    tied = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"The layers \['0', '1'\] share one weight.*`skip=\['1'\]`"):
        sparse_layers(tied, (4, 4))
