import copy
import io

import pytest
import torch
from torch import nn

from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    fake_quantize,
    full_precision,
    grid_of,
    prepare,
    quantized_layers,
    set_alpha,
    set_bits,
    size_report,
)

API = "lightning_distill.quantization."
SPECS = [
    QuantSpec(8),
    QuantSpec(4, 8),
    QuantSpec(2, 4),
    QuantSpec(1),
    QuantSpec("binary"),
    QuantSpec("ternary"),
    QuantSpec(16),
    QuantSpec(32),
    QuantSpec(3, 8, scheme="fixed"),
    QuantSpec(4, 8, scheme="minmax"),
    QuantSpec(3, scheme="seq"),
    QuantSpec(2, scheme="lsq"),
    QuantSpec(4, granularity="tensor"),
    QuantSpec(4, 8, granularity="group:4"),
    QuantSpec(4, gradient="dsq"),
    QuantSpec("binary", gradient="dsq"),
]


class Network(nn.Module):
    """One layer of each kind that can be quantized."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.line = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.plane = nn.Conv2d(1, 4, 3, padding="same", padding_mode="circular")
        self.space = nn.Conv3d(1, 4, (1, 2, 2))
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens):
        x = self.line(self.table(tokens).transpose(1, 2)).relu()
        images = self.plane(x[:, None]) + self.space(nn.functional.pad(x[:, None, None], (1, 0, 1, 0))).squeeze(2)
        return self.head(self.norm(torch.cat([x.mean(-1), images.mean((-2, -1))], 1)))


def tokens(rows=6):
    return torch.randint(0, 10, (rows, 5))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_spec_trains_every_layer_and_gives_every_parameter_a_gradient(spec):
    model = Network()
    names = list(model.state_dict())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert prepare(model, spec, skip=["plane", "space"] if spec.group_size else []) is model
    calibrate(model, [tokens(), tokens()])
    assert [name for name in model.state_dict() if name in names] == names
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch, labels = tokens(32), torch.randint(0, 3, (32,))
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), labels).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()


def test_levels_are_as_many_as_the_bits_name_and_each_channel_has_its_own():
    for spec in SPECS[:6] + SPECS[8:12]:
        model = prepare(nn.Sequential(nn.Linear(200, 3)), spec)
        rows = quantized_layers(model)["0"].quantized_weight()
        most = {"binary": 2, "ternary": 3}.get(spec.weights) or (3 if spec.scheme == "lsq" else 2**spec.weights)
        for row in rows:
            assert 2 <= len(row.unique()) <= most


def test_weight_is_the_rounded_one_under_the_effective_steps():
    for spec in SPECS:
        if spec.weights in (16, 32):
            continue
        layer = quantized_layers(prepare(nn.Sequential(nn.Linear(8, 3)), spec))["0"]
        rows = layer.weight.detach().reshape(3, -1, 8 if spec.group_size is None else 4)
        if spec.granularity == "tensor":
            rows = rows.reshape(1, 1, -1)
        expected = layer.quantized_weight().reshape(rows.shape)
        steps = expected / layer.effective_scale() + layer.weight_grid.zero_point
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        if layer.closed_form is None:
            torch.testing.assert_close(expected, fake_quantize(rows, layer.effective_scale(), grid=layer.weight_grid))


def test_half_precision_is_exact_and_32_bits_change_nothing():
    model = nn.Sequential(nn.Linear(8, 3))
    x, weight = torch.randn(4, 8), model[0].weight.detach().clone()
    prepare(model, QuantSpec(16))
    assert torch.equal(model[0].quantized_weight(), weight.half().float())
    set_bits(model, {"0": 32})
    assert torch.equal(model(x), nn.functional.linear(x, weight, model[0].bias))


def test_embedding_quantizes_what_it_reads_as_the_whole_table_would_be():
    for granularity in ("channel", "tensor", "group:4"):
        table = prepare(nn.Sequential(nn.Embedding(10, 8, padding_idx=0)), QuantSpec(3, granularity=granularity))
        ids = torch.tensor([[1, 2, 2], [0, 9, 1]])
        out = torch.randn(2, 3, 8)
        vectors = table(ids)
        assert torch.equal(vectors, table[0].quantized_weight()[ids])
        vectors.backward(out)
        actual = [p.grad.clone() for p in table.parameters()]
        table.zero_grad()
        table[0].quantized_weight()[ids].backward(out * (ids != 0)[..., None])
        torch.testing.assert_close(actual[0], table[0].weight.grad)


@pytest.mark.chapter("D21", api=API + "set_bits")
def test_plans_change_bits_but_no_parameter():
    model = prepare(Network(), QuantSpec(4, 8), overrides={"head": 8, "line": QuantSpec(2)})
    layers = quantized_layers(model)
    assert list(layers) == ["table", "line", "plane", "space", "head"]
    assert [layer.weight_bits for layer in layers.values()] == [4, 2, 4, 4, 8]
    assert [layer.activation_bits for layer in layers.values()] == [None, None, 8, 8, 8]
    parameters = {name: (p, p.shape) for name, p in model.named_parameters()}
    before = layers["plane"].weight_scale.clone()
    set_bits(model, {"plane": 2, "head": 8})
    assert layers["plane"].weight_bits == 2
    assert (layers["plane"].weight_scale > 2 * before).all()
    assert {name: (p, p.shape) for name, p in model.named_parameters()} == parameters
    for plan, message in {
        "nowhere": r"`plan` names \['nowhere'\], which are no quantized layers; there are \['table'",
        "head": "`bits of head` must be 1 to 8 bits, or 16 or 32 to keep floating point, got 9",
    }.items():
        with pytest.raises(ValueError, match=message):
            set_bits(model, {"table": 3, plan: 9})
    assert layers["table"].weight_bits == 4


def test_state_dict_carries_bits_steps_and_ranges():
    model = prepare(Network(), QuantSpec(4, 8), overrides={"line": QuantSpec("ternary", 8)}).eval()
    calibrate(model, [tokens()])
    set_bits(model, {"plane": 2, "line": 3})
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = prepare(Network(), QuantSpec(4, 8), overrides={"line": QuantSpec("ternary", 8)}).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = tokens()
    assert torch.equal(model(x), other(x))
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert quantized_layers(other)["line"].closed_form is None


def test_full_precision_is_the_network_before_and_nests():
    model = Network().eval()
    x = tokens()
    before = model(x)
    prepare(model, QuantSpec(2, 4))
    with full_precision(model):  # no range of inputs is needed
        assert torch.equal(model(x), before)
        with full_precision(model):
            pass
        assert torch.equal(model(x), before)
    calibrate(model, [x])
    assert not torch.allclose(model(x), before)
    set_alpha(model, 0.0)
    assert torch.equal(model(x), before)
    set_alpha(model, 0.5)
    half = model(x)
    set_alpha(model, 1.0)
    assert not torch.equal(half, model(x))
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got nan"):
        set_alpha(model, float("nan"))


def test_more_bits_are_closer_to_floating_point():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(64, 32)
    exact = model(x)
    prepare(model, QuantSpec(8, 8))
    calibrate(model, [x])
    errors = []
    for bits in (8, 6, 4, 3, 2, 1):
        set_bits(model, {"0": bits, "2": bits})
        errors.append(float((model(x) - exact).detach().square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 * float(exact.detach().var())


def test_calibration_leaves_the_network_as_it_was_and_needs_batches():
    model = prepare(Network(), QuantSpec(8, 8))
    before = copy.deepcopy(model.norm.state_dict())
    with pytest.raises(RuntimeError, match=r"range is not known. Call `calibrate\(model, batches\)`"):
        model(tokens())
    with pytest.raises(ValueError, match="No batch came by the layers"):
        calibrate(model)
    calibrate(model, iter([(tokens(), torch.zeros(6))]))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.norm.state_dict().items())
    calibrate(model, [tokens()], run=lambda network, batch: network(batch))
    with pytest.raises(ValueError, match=r"`model` has no quantized layer; call `prepare"):
        calibrate(Network())
    with pytest.raises(ValueError, match=r"`model` has no quantized layer; call `prepare"):
        size_report(Network())


def test_input_is_rounded_to_levels_that_hold_zero():
    model = prepare(nn.Sequential(nn.Linear(6, 2)), QuantSpec(32, 4))
    x = torch.randn(500, 6) + 1
    calibrate(model, [x])
    layer = model[0]
    q = layer.quantized_input(x)
    assert len(q.unique()) == 16
    assert 0 in q.unique()
    assert layer.activation_zero_point == layer.activation_zero_point.round()
    torch.testing.assert_close(model(x), nn.functional.linear(q, layer.weight, layer.bias))
    assert layer.quantized_input(torch.empty(0, 6)).shape == (0, 6)


def test_bfloat16_and_autocast_run():
    model = prepare(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), QuantSpec(4, 8))
    calibrate(model, [torch.randn(20, 6)])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(3, 6)).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = prepare(nn.Sequential(nn.Linear(6, 4)).bfloat16(), QuantSpec(4, 8))
    calibrate(half, [torch.randn(20, 6).bfloat16()])
    assert half(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dimensions", [2, 3])
def test_transformer_layers_do_not_go_past_their_layers_at_inference(dimensions):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=dimensions == 3
    )
    prepare(encoder, QuantSpec(2))
    assert list(quantized_layers(encoder)) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    x = torch.randn(2, 5, 8)
    trained = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), trained)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[0], trained[0])


def test_size_report_counts_packed_weights_their_steps_and_the_rest():
    model = prepare(
        nn.Sequential(nn.Linear(100, 30), nn.BatchNorm1d(30), nn.Linear(30, 10)), QuantSpec(3, 8), overrides={"2": 16}
    )
    report = size_report(model)
    assert [row.bytes for row in report.layers] == [3000 * 3 / 8 + 30 * 4, 300 * 2]
    assert report.average_bits == pytest.approx((3000 * 3 + 300 * 16) / 3300)
    rest = 4 * (30 + 10 + 4 * 30) + 8  # biases, normalization, and its counter
    assert report.bytes == 1125 + 120 + 600 + rest + 2 * 5
    assert report.float32_bytes == 4 * (3300 + 40 + 120 + 1)
    assert "3 bits" in str(report)
    assert str(report).endswith(f"({report.float32_bytes:,})")


def test_what_cannot_be_quantized_is_refused_before_anything_changes():
    tied = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"The layers \['0', '1'\] share one weight"):
        prepare(tied)
    with pytest.raises(ValueError, match=r"The layers \['0', '1'\] share one weight"):
        prepare(tied, skip=["1"])
    with pytest.raises(ValueError, match=r"Sequential has no layer to quantize: there are \['0', '1'\]"):
        prepare(tied, skip=["*"])
    assert type(tied[0]) is nn.Embedding
    for arguments, message in (
        ({"overrides": {"blocks.*": 4}}, r"`overrides` has 'blocks.\*', which fits no layer .* there are \['0'\]"),
        ({"skip": ["head"]}, "`skip` has 'head', which fits no layer"),
        ({"spec": QuantSpec(granularity="group:3")}, "has 4 weights per channel, which groups of 3 do not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(nn.Sequential(nn.Linear(4, 4)), **arguments)
    with pytest.raises(ValueError, match="Sequential has no layer to quantize: there are none"):
        prepare(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="is quantized already; change its bits with `set_bits`"):
        prepare(prepare(nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match="One bit has no level at 0"):
        set_bits(prepare(nn.Sequential(nn.Linear(4, 4)), QuantSpec(4, scheme="lsq")), {"0": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": 9}, "`weights` must be 1 to 8 bits, or 16 or 32 to keep floating point, got 9"),
        ({"weights": True}, "`weights` must be 1 to 8 bits, or 16 or 32 to keep floating point, got True"),
        ({"weights": "int4"}, "`weights` must be 1 to 8 bits, or 16 or 32 .* got 'int4'"),
        ({"activations": 1}, "`activations` must be 2 to 8 bits, or None to leave them alone, got 1"),
        ({"granularity": "group:0"}, "`granularity` must be 'channel', 'tensor' or 'group:SIZE'"),
        ({"granularity": "row"}, "`granularity` must be 'channel', 'tensor' or 'group:SIZE' .* got 'row'"),
        ({"scheme": "pact"}, "`scheme` must be .* got 'pact'"),
        ({"gradient": "mlp"}, "`gradient` must be 'ste' or 'dsq', got 'mlp'"),
        ({"weights": 1, "scheme": "lsq"}, "One bit has no level at 0, which scheme='lsq' needs"),
    ],
)
def test_specs_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**arguments)


def test_steps_of_a_layer_have_the_gradients_of_lsq():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 4), torch.randn(6, 32)
    calibrate(prepare(nn.Sequential(layer), QuantSpec(3, 4)), [x])
    layer(x).square().sum().backward()
    scale, step = (found.detach().requires_grad_() for found in (layer.weight_scale, layer.activation_scale))
    weight = fake_quantize(layer.weight.detach().unsqueeze(1), scale, grid=layer.weight_grid).squeeze(1)
    zero = layer.activation_zero_point
    inputs = fake_quantize(x, step, grid=grid_of(4, "unsigned"), zero_point=zero)
    (inputs @ weight.T + layer.bias.detach()).square().sum().backward()
    # per number that shares the step, and of the logarithm
    weights_share, inputs_share = (32 * 3) ** -0.5, (32 * 15) ** -0.5
    torch.testing.assert_close(layer.log_weight_scale.grad, scale.grad * scale.detach() * weights_share)
    torch.testing.assert_close(layer.log_activation_scale.grad, step.grad * step.detach() * inputs_share)
