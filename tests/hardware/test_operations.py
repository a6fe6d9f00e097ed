import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_distill.hardware import Convolution, Operation, count_costs
from lightning_distill.quantization import QuantSpec, prepare


def operations(model, batch):
    return [operation for cost in count_costs(model, batch) for operation in cost.operations]


def kinds(model, batch):
    return [operation.kind for operation in operations(model, batch) if operation.kind != "view"]


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Linear(4, 3), (5, 4), ["matrix"]),
        (nn.Linear(4, 3), (1, 4), ["vector"]),
        (nn.Linear(4, 3, bias=False), (1, 4), ["vector"]),
        (nn.Linear(4, 3), (2, 6, 4), ["matrix"]),
        (nn.Conv1d(4, 3, 3), (1, 4, 8), ["convolution"]),
        (nn.BatchNorm1d(4), (2, 4, 8), ["norm"]),
        (nn.ReLU(), (2, 4), ["activation"]),
        (nn.ReLU(inplace=True), (2, 4), ["activation"]),
        (nn.GELU(), (2, 4), ["function"]),
        (nn.LayerNorm(4), (2, 4), ["function"]),
    ],
)
def test_operations_have_a_kind(model, shape, expected):
    assert kinds(model, torch.zeros(shape)) == expected


class Functions(nn.Module):
    def forward(self, x):
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).sum(dim=1) * 2 + x @ x.mT @ x[..., :2]


def test_functions_have_one_too_and_views_are_kept():
    model, batch = Functions(), torch.zeros(1, 3, 4)
    assert kinds(model, batch) == ["attention", "function", "arithmetic", "matrix", "matrix", "arithmetic"]
    assert "view" in [operation.kind for operation in operations(model, batch)]
    # … but for those of weights: a product transposes its own
    assert [operation.kind for operation in operations(nn.Linear(4, 3), torch.zeros(5, 4))] == ["matrix"]


def test_operations_add_up_to_their_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    for cost in count_costs(model, torch.zeros(2, 3, 8, 8)):
        assert sum(each.flops for each in cost.operations) == cost.flops
        assert 4 * sum(each.parameters for each in cost.operations) == cost.weight_bytes
        if cost.kind != "BatchNorm2d":  # which makes empty tensors
            assert sum(each.activation_bytes for each in cost.operations) == cost.activation_bytes


def test_of_a_table_of_embeddings_the_rows_that_are_looked_up_are_read():
    (cost,) = count_costs(nn.Embedding(1000, 8), torch.tensor([[1, 2, 3]]))
    assert [operation.parameters for operation in cost.operations] == [24]
    assert cost.weight_bytes == 4 * 24


@pytest.mark.parametrize(
    ("layer", "shape", "columns"),
    [
        (nn.Conv1d(3, 8, 5, stride=2, padding=2), (2, 3, 40), 2 * 20 * 3 * 5),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 2 * 36 * 3 * 9),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6), 2 * 36 * 4 * 9),
        (nn.Conv2d(3, 8, 1), (2, 3, 6, 6), 0),
        (nn.Conv2d(3, 8, 1, stride=2), (2, 3, 6, 6), 2 * 9 * 3),
    ],
)
def test_columns_are_the_inputs_with_a_copy_for_each_position(layer, shape, columns):
    (operation,) = operations(layer, torch.zeros(shape))
    assert operation.convolution.columns == columns
    assert operation.convolution.row == layer(torch.zeros(shape)).shape[-1]
    assert operation.convolution.strided == (max(layer.stride) > 1)
    if columns and layer.groups == 1:
        inputs = torch.zeros(shape) if len(shape) == 4 else torch.zeros(shape).unsqueeze(2)
        kernel, padding, stride = (
            (one[-1] if len(shape) == 4 else 1, one[-1]) for one in (layer.kernel_size, layer.padding, layer.stride)
        )
        padding = padding if len(shape) == 4 else (0, layer.padding[0])
        assert F.unfold(inputs, kernel, padding=padding, stride=stride).numel() == columns


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "factor"),
    [(16, 32, 1, 1.0), (17, 16, 1, 32 / 17), (3, 16, 1, 1.0), (3, 8, 1, 2.0), (8, 8, 2, 4.0), (20, 20, 20, 32 / 20)],
)
def test_channels_are_padded_but_for_those_of_an_image(inputs, outputs, groups, factor):
    shape = Convolution(2, groups, inputs // groups, outputs // groups, row=1, columns=0, strided=False, blocked=True)
    assert shape.padding == pytest.approx(factor)
    assert shape.depthwise == (groups == inputs)


def test_pytorchs_own_choice_of_an_algorithm_is_known():
    for number in range(300):
        draw = torch.Generator().manual_seed(number)

        def choice(*values, draw=draw):
            return values[int(torch.randint(len(values), (), generator=draw))]

        dimensions, groups, kernel, stride = choice(1, 2), choice(1, 1, 4), choice(1, 3, 5), choice(1, 2)
        kind, dilation, inputs = (nn.Conv1d, nn.Conv2d)[dimensions - 1], choice(1, 1, 2), groups * choice(1, 3, 20)
        layer = kind(inputs, groups * 4, kernel, stride, kernel // 2, dilation, groups=groups, bias=False)
        batch = torch.zeros(choice(1, 2, 16, 40), inputs, *[choice(10, 16, 40)] * dimensions)
        settings = (layer.stride, layer.padding, layer.dilation, False, [0] * dimensions, groups, None)
        chosen = torch._C._select_conv_backend(batch, layer.weight, None, *settings)
        (operation,) = operations(layer, batch)
        assert operation.convolution.blocked == ("Mkldnn" in str(chosen)), (layer, batch.shape)


class Branches(nn.Module):
    """Convolutions whose outputs are read by others, by a sum, or by nothing but the caller."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4 * 8, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))  # second reads it
        x = x + self.third(self.second(x).relu())  # … and so does a sum
        return self.head(self.last(x).relu().flatten(1))


def test_layers_know_whether_all_that_read_them_quantize():
    model, batch = Branches(), torch.zeros(2, 4, 8)
    assert not any(cost.feeds_integers for cost in count_costs(model, batch))
    prepare(model, QuantSpec(8, 8))
    feeding = {cost.name for cost in count_costs(model, batch) if cost.feeds_integers}
    assert feeding == {"second", "last"}
    assert {cost.activation_bits for cost in count_costs(model, batch) if "." not in cost.name and cost.flops} == {8}


class Normalized(nn.Module):
    """One convolution behind a normalization is read by a layer, another one by the caller too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        second = self.second(self.norm(self.first(x)))
        return self.third(second), second


def test_normalization_passes_integers_on_and_the_caller_reads_numbers():
    model = prepare(Normalized(), QuantSpec(8, 8))
    assert [cost.name for cost in count_costs(model, torch.zeros(2, 4, 8)) if cost.feeds_integers] == ["first"]


def test_weights_alone_feed_no_integers():
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), QuantSpec(8))
    assert [cost.feeds_integers for cost in count_costs(model, torch.zeros(2, 4))] == [False] * 3
    both = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), QuantSpec(4, 8))
    assert [cost.feeds_integers for cost in count_costs(both, torch.zeros(2, 4))] == [True, False, False]


def test_an_operation_without_anything_costs_nothing():
    assert Operation("view") == Operation("view", 0, 0, 0.0, None)
