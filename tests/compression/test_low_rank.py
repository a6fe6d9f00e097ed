import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.compression import energy_rank, factorize, factorized, largest_rank, low_rank_factors
from lightning_distill.quantization import QuantSpec, prepare


@pytest.mark.chapter("D42", api="lightning_distill.compression.low_rank_factors")
def test_errors_are_the_golden_ones(golden):
    case = golden("low_rank_factorisation")
    weight, inputs, rank = case.inputs["W"], case.inputs["X"], int(case.inputs["rank"])
    moments = inputs.T @ inputs / len(inputs)

    def output_error(factors):
        return (inputs @ (weight - factors[0] @ factors[1]).T).square().mean().item()

    plain, aware = low_rank_factors(weight, rank), low_rank_factors(weight, rank, moments=moments)
    assert (weight - plain[0] @ plain[1]).norm().item() == pytest.approx(case.expected["weight_error_svd"], rel=1e-7)
    assert output_error(plain) == pytest.approx(case.expected["output_mse_svd"], rel=1e-7)
    assert output_error(aware) == pytest.approx(case.expected["output_mse_data_aware"], rel=1e-7)
    assert largest_rank(*weight.shape) == 1 < case.expected["rank_breakeven"] < 2


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 4)])
def test_full_rank_is_exact_and_data_never_make_outputs_worse(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    inputs = torch.randn(40, shape[1], dtype=torch.float64) * torch.logspace(0, -3, shape[1])
    moments = inputs.T @ inputs
    for rank in range(1, min(shape) + 1):
        plain, aware = low_rank_factors(weight, rank), low_rank_factors(weight, rank, moments=moments)
        lost = [(inputs @ (weight - a @ b).T).norm() for a, b in (plain, aware)]
        assert lost[1] <= lost[0] + 1e-9
        torch.testing.assert_close(plain[0].norm(dim=0), plain[1].norm(dim=1))
    torch.testing.assert_close(plain[0] @ plain[1], weight)
    torch.testing.assert_close(aware[0] @ aware[1], weight)


def test_inputs_of_low_dimension_need_no_more_rank():
    weight, basis = torch.randn(6, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    inputs = torch.randn(30, 2, dtype=torch.float64) @ basis
    left, right = low_rank_factors(weight, 2, moments=inputs.T @ inputs)
    torch.testing.assert_close(inputs @ (left @ right).T, inputs @ weight.T)


def test_a_rank_below_break_even_saves_and_the_next_one_does_not():
    for rows in range(1, 20):
        for columns in range(1, 20):
            rank = largest_rank(rows, columns)
            assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)


def test_energy_is_the_share_of_squares():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1 of 14
    assert [energy_rank(values, share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


LAYERS = [
    (nn.Linear(12, 9), (5, 12)),
    (nn.Linear(12, 9, bias=False), (5, 3, 12)),
    (nn.Conv1d(6, 8, 3, padding=2, dilation=2, stride=2), (4, 6, 11)),
    (nn.Conv1d(6, 8, 4, padding="same"), (4, 6, 11)),
    (nn.Conv2d(4, 12, (3, 5), padding=(1, 2), padding_mode="circular"), (4, 4, 7, 8)),
    (nn.Conv2d(4, 12, (3, 2), padding="valid", stride=(1, 2), bias=False), (4, 4, 7, 8)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_of_low_rank_stays_what_it_is(layer, shape):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        flat = layer.weight.flatten(1)
        left, right = low_rank_factors(flat, 2)
        layer.weight.copy_((left @ right).view_as(layer.weight))
    network, x = nn.Sequential(layer), torch.randn(shape)
    expected = network(x)
    report = factorize(network, energy=1 - 1e-9)
    assert [entry.rank for entry in report.layers] == [2]
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert report.after == sum(p.numel() for name, p in network.named_parameters() if "weight" in name)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_batches_give_the_best_outputs_of_any_layer(layer, shape):
    scales = torch.logspace(0, -2, shape[1] if len(shape) > 2 and not isinstance(layer, nn.Linear) else shape[-1])
    x = torch.randn(shape) * (scales if isinstance(layer, nn.Linear) else scales.view(1, -1, *[1] * (len(shape) - 2)))
    expected = layer(x).detach()
    centre = torch.zeros_like(x)
    errors, reported = [], []
    for batches in (None, [x]):
        network = nn.Sequential(layer)
        [entry] = factorize(network, rank=2, batches=batches).layers
        errors.append((network(x) - expected).norm().item())
        reported.append(entry.error * (expected - layer(centre)).norm().item())
    assert errors[1] < errors[0]
    assert errors[1] == pytest.approx(reported[1], rel=1e-3)  # the report tells the error of the outputs


def network():
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_a_budget_is_kept_and_used(share):
    net = network()
    report = factorize(net, parameters=share)
    assert [layer.name for layer in report.layers] == ["0", "2"]  # one output cannot be factorized
    assert share * report.before - 80 < report.after <= share * report.before
    assert report.after == sum(p.numel() for i in (0, 2) for p in net[i].parameters() if p.ndim == 2)


def test_a_large_budget_stops_at_break_even():
    assert [layer.rank for layer in factorize(network(), parameters=0.999).layers] == [13, 19]


def test_a_budget_goes_where_the_energy_is():
    net = network()
    with torch.no_grad():
        net[0].weight.copy_(torch.outer(torch.randn(40), torch.randn(20)))  # of rank 1
    ranks = {layer.name: layer.rank for layer in factorize(net, parameters=0.4).layers}
    assert ranks["0"] == 1
    assert ranks["2"] > 5


def test_a_layer_that_needs_much_rank_stays():
    net = network()
    before = net[2]
    report = factorize(net, energy=1.0)
    assert net[2] is before
    assert [layer.rank for layer in report.layers] == [None, None]
    assert report.after == report.before
    assert "stays" in str(report)


def test_it_leaves_shared_grouped_and_attention_layers_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.grouped = nn.Conv1d(8, 8, 3, groups=2)
            self.layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)

    net = Tied().eval()
    report = factorize(net, rank=2)
    assert [layer.name for layer in report.layers] == ["c", "layer.linear1", "layer.linear2"]
    with torch.no_grad():
        assert net.layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)  # without the fused path, which reads the old weights


def test_it_is_the_student_of_a_distillation_and_can_be_quantized(make_trainer):
    L.seed_everything(0, verbose=False)
    teacher = network_of_classes()
    student = factorized(network_of_classes(teacher), parameters=0.4, skip=["4"])
    x = torch.randn(64, 20)
    data = DataLoader(TensorDataset(x, teacher(x).argmax(-1)), batch_size=16)
    before = (student(x) - teacher(x)).square().mean()
    module = KD(student, teacher, alpha=0.0)
    make_trainer(max_epochs=20).fit(module, data)
    assert (student(x).softmax(-1) - teacher(x).softmax(-1)).square().mean() < before
    prepare(student, QuantSpec(8))
    assert student(x).shape == (64, 3)


def network_of_classes(like=None):
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    if like is not None:
        net.load_state_dict(like.state_dict())
    return net


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `rank`, `energy` and `parameters`"),
        ({"rank": 1, "energy": 0.5}, "exactly one"),
        ({"rank": 14}, r"Rank 14 does not make '0' of shape \(40, 20\) smaller: it must be from 1 to 13"),
        ({"rank": {"2": 20}}, r"Rank 20 does not make '2' .* from 1 to 19"),
        ({"rank": 0}, "Rank 0 does not make '0'"),
        ({"rank": {"4": 1}}, r"`rank` names \['4'\], which cannot be factorized; there are \['0', '2'\]"),
        ({"energy": 0.0}, r"`energy` must be in \(0, 1\], got 0.0"),
        ({"parameters": 1.0}, r"`parameters` must be in \(0, 1\), got 1.0"),
        ({"parameters": 0.01}, "rank 1 everywhere needs more"),
        ({"rank": 1, "skip": ["x*"]}, r"`skip` has 'x\*', which fits no layer"),
        ({"rank": 1, "skip": ["*"]}, "Sequential has no layer to factorize"),
        ({"rank": 1, "batches": []}, r"No batch came by the layers \['0', '2'\]"),
    ],
)
def test_bad_input_is_refused_and_nothing_changed(arguments, message):
    net = network()
    before = list(net)
    with pytest.raises(ValueError, match=message):
        factorize(net, **arguments)
    assert all(now is then for now, then in zip(net, before, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got 3 for shape \(2, 4\)"):
        low_rank_factors(torch.zeros(2, 4), 3)
    with pytest.raises(ValueError, match=r"`moments` must have shape \(4, 4\), got \(2, 2\)"):
        low_rank_factors(torch.zeros(2, 4), 1, moments=torch.eye(2))
    with pytest.raises(ValueError, match="must be positive, got 0 and 2"):
        largest_rank(0, 2)


def test_a_layer_of_zeros_stays_finite():
    net = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(net[0].weight)
    factorize(net, rank=2)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
