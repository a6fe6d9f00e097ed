import copy
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, QADModule
from lightning_distill.callbacks import AlternatingQuantization, QuantizationRamp
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import Term, fused, kl_divergence
from lightning_distill.outputs import Outputs, Step
from lightning_distill.quantization import (
    QuantizationError,
    QuantSpec,
    SoftQuantized,
    fake_quantize,
    full_precision,
    grid_of,
    minmax_scale,
    monotonicity_report,
    prepare,
    quantized_layers,
    set_bits,
    soft_quantized_loss,
    weight_quantization_error,
)
from lightning_distill.teachers import load_network

API = "lightning_distill.quantization."
SCRIPT = Path(__file__).with_name("quantization_run.py")
adam = partial(torch.optim.AdamW, lr=0.01)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def tensors(rows=64):
    return torch.randn(rows, 4), torch.randint(0, 3, (rows,))


def data(rows=64, **arguments):
    return TensorDataModule(tensors(rows), **({"batch_size": 16, "seed": 0, "validation": tensors(16)} | arguments))


class Constant(Term):
    needs_teacher = False

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, step):
        return step.student.logits.sum() * 0 + self.value


@pytest.mark.chapter("D01", api="lightning_distill.QADModule")
def test_the_loss_is_task_plus_distillation_plus_quantization(golden):
    case = golden("qad_total")
    i = {name: float(value) for name, value in case.inputs.items()}
    module = QADModule(
        network(),
        terms={name: Constant(i[key]) for name, key in {"hard": "task", "soft": "distill", "quant": "quant"}.items()},
        weights={"hard": 1.0, "soft": i["lambda1"], "quant": i["lambda2"]},
    )
    total, _ = module.loss(module.observe(tensors()))
    assert float(total.detach()) == pytest.approx(float(case.expected["total"]))


@pytest.mark.chapter("D01", api="lightning_distill.QADModule")
def test_without_quantization_it_is_kd(make_trainer):
    teacher = network()
    plain = KD(network(), copy.deepcopy(teacher), temperature=2.0, optimizer=adam)
    module = QADModule(network(), teacher, QuantSpec(32), temperature=2.0, optimizer=adam)
    for one in (plain, module):
        torch.manual_seed(0)
        make_trainer(max_epochs=2).fit(one, datamodule=data())
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(module.student.state_dict()[name], value)


@pytest.mark.chapter("D02", api="lightning_distill.QADModule")
@pytest.mark.erratum("ERR-56")
def test_direct_distillation_is_of_what_the_quantized_student_says(golden):
    case = golden("direct_quant_distill")
    i, e = case.inputs, case.expected
    quantized = fake_quantize(i["student_logits"], i["scale"], grid=grid_of(i["bits"]))
    forward = kl_divergence(quantized, i["teacher_logits"]).mean()
    assert float(forward) == pytest.approx(float(e["forward"]), rel=case.rtol)
    as_printed = kl_divergence(quantized, i["teacher_logits"], direction="reverse").mean()
    assert float(as_printed) == pytest.approx(float(e["as_written_reverse"]), rel=case.rtol)
    # rounded probabilities, the other reading, are none: they do not add up to 1
    p = fake_quantize(i["student_logits"].softmax(-1), 0.4, grid=grid_of(4))
    assert (p.sum(-1) - 1).abs().max() > 0.1
    module = QADModule(network().eval(), spec=QuantSpec(2), alpha=0.0)
    x, y = tensors()
    step = module.observe((x, y))
    assert torch.equal(step.student.logits, module.student(x))
    with full_precision(module.student):
        torch.testing.assert_close(module.student(x), step.teacher.logits)
    total, losses = module.loss(step)
    torch.testing.assert_close(losses["soft"], kl_divergence(module.student(x), step.teacher.logits).mean())
    torch.testing.assert_close(total, losses["soft"])


@pytest.mark.chapter("D03", api=API + "soft_quantized_loss")
def test_soft_distillation_is_the_known_numbers(golden):
    case = golden("soft_quant_distill")
    i, e = case.inputs, case.expected
    s = i["student_logits"]
    q = fake_quantize(s, i["scale"], grid=grid_of(i["bits"]))
    for beta, expected in ((i["beta"], e["total"]), (0.0, e["match"])):
        found = soft_quantized_loss(q, s, i["teacher_logits"], beta=beta).mean()
        assert float(found) == pytest.approx(float(expected), rel=case.rtol)
    assert torch.equal(soft_quantized_loss(s, s, i["teacher_logits"]), (s - i["teacher_logits"]).square().mean(-1))
    for make in (SoftQuantized, partial(soft_quantized_loss, s, s, s)):
        with pytest.raises(ValueError, match="`beta` must be at least 0, got -1"):
            make(beta=-1)
    with pytest.raises(ValueError, match="the teacher 2; a loss on logits compares them class by class"):
        soft_quantized_loss(s, s, s[:, :2])


def test_soft_distillation_runs_the_student_twice_and_keeps_its_statistics():
    module = QADModule(network(), spec=QuantSpec(2), alpha=0.0, terms={"soft": SoftQuantized(0.5)})
    x, y = tensors()
    once = copy.deepcopy(module.student)
    once(x)
    step = module.observe((x, y))
    assert all(torch.equal(a, b) for a, b in zip(once.buffers(), module.student.buffers(), strict=True))
    exact = step.extras["float_logits"]
    assert not torch.allclose(exact, step.student.logits)
    expected = soft_quantized_loss(step.student.logits, exact, step.teacher.logits, beta=0.5).mean()
    torch.testing.assert_close(module.losses(step)["soft"], expected)
    with pytest.raises(ValueError, match=r"SoftQuantized compares a student with itself .* use it in a QADModule"):
        SoftQuantized()(Step(None, Outputs(torch.zeros(1, 2)), Outputs(torch.zeros(1, 2))))


def test_quantization_error_is_a_share_and_draws_weights_to_their_levels():
    model = prepare(network(), QuantSpec(2))
    layers = quantized_layers(model)
    error = weight_quantization_error(layers)
    powers = [(w.weight - w.quantized_weight()).square().sum() / 1 for w in layers.values()]
    torch.testing.assert_close(error, sum(powers) / sum(w.weight.square().sum() for w in layers.values()))
    (gradient,) = torch.autograd.grad(error, layers["0"].weight)
    difference = layers["0"].weight - layers["0"].quantized_weight()
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), difference.detach().flatten(), dim=0) > 0.999
    set_bits(model, {"0": 32, "3": 32})
    assert weight_quantization_error(layers) == 0
    with pytest.raises(ValueError, match="`layers` is empty: the student has no quantized layer"):
        QuantizationError()(Step(None, Outputs(torch.zeros(1, 2))))


def test_a_training_learns_weights_and_steps_and_leaves_the_teacher_alone(make_trainer, tmp_path):
    student = network()
    module = QADModule(student, spec=QuantSpec(3, 8), alpha=0.5, quant_weight=0.1, overrides={"3": 8}, optimizer=adam)
    assert [layer.weight_bits for layer in quantized_layers(module.student).values()] == [3, 8]
    assert module.student is student
    teacher = copy.deepcopy(module.teacher.network.state_dict())
    before = copy.deepcopy(student.state_dict())
    checkpoints = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[checkpoints], enable_checkpointing=True)
    trainer.fit(module, datamodule=data())
    assert all(torch.equal(value, teacher[name]) for name, value in module.teacher.network.state_dict().items())
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"{i}.{name}" for i in (0, 3) for name in ("weight", "log_weight_scale", "log_activation_scale")} <= moved
    assert trainer.global_step == 4
    again = QADModule.load_from_checkpoint(tmp_path / "last.ckpt", student=network(), spec=QuantSpec(3, 8)).eval()
    x = torch.randn(5, 4)
    assert torch.equal(again(x), module.eval()(x))
    assert [layer.weight_bits for layer in quantized_layers(again.student).values()] == [3, 8]


def test_steps_have_no_weight_decay_and_everything_is_trained_once():
    module = QADModule(network(), spec=QuantSpec(4, 8), optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1))
    weights, steps = module.configure_optimizers().param_groups
    assert (weights["weight_decay"], steps["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in steps["params"]] == [id(p) for p in module.step_parameters()]
    assert len(steps["params"]) == 4
    assert len(weights["params"]) + 4 == len(list(module.student.parameters()))
    (only,) = QADModule(network(), spec=QuantSpec(4, scheme="fixed")).configure_optimizers().param_groups
    assert len(only["params"]) == 6


def test_unlabelled_data_is_enough(make_trainer):
    student = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    module = QADModule(student, spec=QuantSpec(2, 8), alpha=0.0, optimizer=partial(adam, lr=0.001))
    x = torch.randn(256, 4)
    module.calibrate([(x, None)])
    before = module.eval().losses(module.observe((x, None)))["soft"]
    module.train()
    make_trainer(max_epochs=30).fit(module, DataLoader(TensorDataset(x, torch.full((256,), -100)), batch_size=64))
    after = module.eval().losses(module.observe((x, None)))["soft"]
    assert after < 0.5 * before


@pytest.mark.chapter("D05", api="lightning_distill.QADModule")
def test_a_chain_of_quantized_teachers(golden, make_trainer):
    case = golden("quantised_chain")
    w = case.inputs["w"]

    def rounded(values, bits):
        grid = grid_of(bits)
        return fake_quantize(values, minmax_scale(values, grid), grid=grid)

    for name, values in {
        "mse_int8": rounded(w, 8),
        "mse_int4_direct": rounded(w, 4),
        "mse_int4_via_int8": rounded(rounded(w, 8), 4),
    }.items():
        assert float((w - values).square().mean()) == pytest.approx(float(case.expected[name]), rel=1e-8)
    before = network()
    eight = QADModule(copy.deepcopy(before), before, QuantSpec(8, 8), alpha=0.0, optimizer=adam)
    make_trainer(max_epochs=1).fit(eight, datamodule=data())
    student = eight.export().train()
    set_bits(student, dict.fromkeys(quantized_layers(student), 4))
    four = QADModule(student, eight.student, alpha=0.0, optimizer=adam)
    make_trainer(max_epochs=1).fit(four, datamodule=data())
    x = torch.randn(6, 4)
    step = four.eval().observe((x, None))
    assert torch.equal(step.teacher.logits, eight.student.eval()(x))
    assert {layer.weight_bits for layer in quantized_layers(eight.student).values()} == {8}
    assert {layer.weight_bits for layer in quantized_layers(four.student).values()} == {4}
    for arguments, message in (
        ({}, "`teacher` is 'self', but `student` is quantized already"),
        ({"teacher": before, "spec": QuantSpec(2)}, "`student` is quantized already: leave out `spec`"),
    ):
        with pytest.raises(ValueError, match=message):
            QADModule(student, **arguments)


@pytest.mark.chapter("D07", api="lightning_distill.callbacks.AlternatingQuantization")
def test_alternation_leaves_what_is_off_duty_bit_identical(make_trainer):
    module = QADModule(network(), spec=QuantSpec(3, 8), alpha=0.5, optimizer=partial(adam, weight_decay=0.1))
    steps = {id(p) for p in module.step_parameters()}
    seen = []

    class Watch(AlternatingQuantization):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = [p.detach().clone() for p in pl_module.student.parameters()]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            changed = [
                (id(p) in steps)
                for p, b in zip(pl_module.student.parameters(), self.before, strict=True)
                if not torch.equal(p, b)
            ]
            seen.append("quantizers" if all(changed) else "weights" if not any(changed) else "both")

    callback = Watch(2, 1)
    make_trainer(max_epochs=2, callbacks=[callback]).fit(module, datamodule=data())
    assert seen == [callback.phase_at(step) for step in range(8)]
    assert set(seen) == {"weights", "quantizers"}


@pytest.mark.chapter("D08", api=API + "monotonicity_report")
@pytest.mark.erratum("ERR-58")
def test_exact_alternation_is_monotone_and_straight_through_descent_is_not(golden):
    case = golden("alternating_minimisation")
    q, b, w, theta = case.inputs["Q"], case.inputs["b"], 2.0, -1.0
    trace = []
    for _ in range(int(case.inputs["rounds"])):
        w = float((b[0] - q[0, 1] * theta) / q[0, 0])
        theta = float((b[1] - q[0, 1] * w) / q[1, 1])
        x = torch.tensor([w, theta], dtype=torch.float64)
        trace.append([w, theta, float(0.5 * x @ q @ x - b @ x)])
    torch.testing.assert_close(torch.tensor(trace, dtype=torch.float64), case.expected["trace"])
    report = monotonicity_report([row[2] for row in trace])
    assert report.is_monotone
    assert report.total_decrease == pytest.approx(trace[0][2] - trace[-1][2])
    # a weight whose loss is lowest between two levels: gradients that ignore the rounding push it back and forth
    weight, losses = torch.tensor([0.6], requires_grad=True), []
    for _ in range(20):
        loss = (fake_quantize(weight, 1.0, grid=grid_of(4)) - 0.45).square().sum()
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
    report = monotonicity_report(losses)
    assert len(report.violations) >= 2
    assert report.largest_increase == pytest.approx(0.55**2 - 0.45**2)
    for bad, message in (([], r"at least one number"), ([1.0, float("nan")], "none NaN")):
        with pytest.raises(ValueError, match=message):
            monotonicity_report(bad)
    with pytest.raises(ValueError, match="`tolerance` must be at least 0, got -1"):
        monotonicity_report([1.0], tolerance=-1)
    assert monotonicity_report([1.0, 1.1], tolerance=0.2).is_monotone


@pytest.mark.chapter("D04", api="lightning_distill.callbacks.QuantizationRamp")
def test_the_ramp_blends_training_and_nothing_else(make_trainer):
    alphas, validated = [], []

    class Watch(QADModule):
        def training_step(self, batch, batch_idx):
            alphas.append(self.student[0].alpha)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            validated.append(self.student[0].alpha)

    module = Watch(network(), spec=QuantSpec(2, 8), optimizer=adam)
    ramp = QuantizationRamp(end=0.5)
    make_trainer(max_epochs=2, callbacks=[ramp]).fit(module, datamodule=data())
    assert alphas == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1] == [ramp.alpha_at(step) for step in range(8)]
    assert set(validated) == {1.0}
    cosine = QuantizationRamp(1.0, "cosine", num_steps=4)
    assert [round(cosine.alpha_at(step), 3) for step in range(6)] == [0, 0.146, 0.5, 0.854, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizationRamp(0.0), r"`end` must be in \(0, 1\], got 0.0"),
        (lambda: QuantizationRamp(shape="exp"), "`shape` must be 'linear' or 'cosine', got 'exp'"),
        (lambda: QuantizationRamp(num_steps=0), "`num_steps` must be positive, got 0"),
        (lambda: QuantizationRamp().alpha_at(3), "`num_steps` is not known before the training starts"),
        (lambda: AlternatingQuantization(0), "`weight_steps` must be at least 1, got 0"),
        (lambda: AlternatingQuantization(1, 0), "`quantizer_steps` must be at least 1, got 0"),
        (lambda: QADModule(network(), quant_weight=-1.0), "`quant_weight` must be at least 0 and finite, got -1.0"),
        (lambda: QADModule(network(), calibration_samples=0), "`calibration_samples` must be at least 1, got 0"),
        (lambda: QADModule(network(), skip=["9"]), "`skip` has '9', which fits no layer"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_runs_that_cannot_work_are_refused(make_trainer):
    loader = DataLoader(TensorDataset(*tensors()), batch_size=16)
    with pytest.raises(ValueError, match=r"The ranges of what the layers \['0', '3'\] read are not known"):
        make_trainer(max_epochs=1).fit(QADModule(network(), spec=QuantSpec(8, 8)), loader)
    with pytest.raises(ValueError, match="QuantizationRamp blends quantization in, but KD has no quantized layer"):
        make_trainer(max_epochs=1, callbacks=[QuantizationRamp()]).fit(KD(network(), network()), loader)
    with pytest.raises(TypeError, match="AlternatingQuantization needs a QADModule, got KD"):
        make_trainer(max_epochs=1, callbacks=[AlternatingQuantization()]).fit(KD(network(), network()), loader)
    with pytest.raises(ValueError, match="trains the steps of quantizers, but none is trained"):
        make_trainer(max_epochs=1, callbacks=[AlternatingQuantization()]).fit(
            QADModule(network(), spec=QuantSpec(8, scheme="fixed")), loader
        )
    with pytest.raises(ValueError, match="`teacher` is None, but the loss terms"):
        make_trainer(max_epochs=1).fit(QADModule(network(), None), loader)


def test_an_export_holds_what_was_trained(make_trainer, tmp_path):
    module = QADModule(network(), spec=QuantSpec(3, 8), optimizer=adam)
    make_trainer(max_epochs=1).fit(module, datamodule=data())
    exported = module.export(tmp_path / "student.safetensors")
    x = torch.randn(5, 4)
    assert torch.equal(exported(x), module.student.eval()(x))
    again = load_network(prepare(network(), QuantSpec(3, 8)), str(tmp_path / "student.safetensors")).eval()
    assert torch.equal(again(x), exported(x))


def test_a_quantized_output_layer_is_called_where_its_weights_would_be_read():
    head = nn.Linear(4, 6)
    assert fused.unprojected(Outputs(hidden=torch.zeros(2, 4), head=head))
    prepare(head, QuantSpec(2))
    assert not fused.unprojected(Outputs(hidden=torch.zeros(2, 4), head=head))


def test_an_adapter_is_trained_on_a_quantized_base(make_trainer, tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(1)
        base = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian"))

    module = QADModule(adapted(), spec=QuantSpec(2, 8), alpha=0.0, optimizer=adam)
    assert list(quantized_layers(module.student)) == ["base_model.model.0.base_layer", "base_model.model.2"]
    base = module.student.base_model.model[2].weight.clone()
    checkpoints = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    make_trainer(max_epochs=2, callbacks=[checkpoints], enable_checkpointing=True).fit(module, datamodule=data())
    assert torch.equal(module.student.base_model.model[2].weight, base)
    again = QADModule.load_from_checkpoint(tmp_path / "last.ckpt", student=adapted(), spec=QuantSpec(2, 8)).eval()
    x = torch.randn(5, 4)
    assert torch.equal(again(x), module.eval()(x))


def run(folder, devices, kill_at):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, SCRIPT, folder, str(devices), str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_exactly_with_its_ramp_phases_and_bits(tmp_path, devices):
    straight = run(tmp_path / "straight", devices, 10**6)
    assert straight.returncode == 0, straight.stderr
    killed = run(tmp_path / "killed", devices, 15)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    resumed = run(tmp_path / "killed", devices, 10**6)
    assert resumed.returncode == 0, resumed.stderr
    states = []
    for rank in range(devices):
        expected = torch.load(tmp_path / "straight" / f"final-{rank}.pt")
        found = torch.load(tmp_path / "killed" / f"final-{rank}.pt")
        assert found["steps"] == expected["steps"] == 30
        assert found["bits"] == expected["bits"] == [2, 32]
        for name, value in expected["student"].items():
            assert torch.equal(found["student"][name], value), name
        states.append(expected["student"])
    assert all(torch.equal(states[0][name], states[-1][name]) for name in states[0] if "running" not in name)
