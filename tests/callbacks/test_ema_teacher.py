"""The mean teacher: what it averages, when, and that it is training state."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import MeanTeacher
from lightning_distill.losses import FeatureMatching
from lightning_distill.teachers import EMATeacher, momentum_alpha, scale_momentum
from lightning_distill.teachers.ema import FOREACH_FROM, ema_update_, warmed_up_momentum


def network(seed=0, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def loader(items=32, batch_size=8, unlabelled=0):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(items, 8, generator=generator), torch.randint(0, 3, (items,), generator=generator)
    y[:unlabelled] = -100
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class History(L.Callback):
    """State of the student after each optimizer step, and of the teacher after it has moved."""

    def __init__(self):
        self.students, self.teachers = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.students.append(copy.deepcopy(module.student.state_dict()))
        self.teachers.append(copy.deepcopy(module.teacher.network.state_dict()))


@pytest.mark.chapter("B27", api="lightning_distill.teachers.EMATeacher")
def test_the_average_matches_golden(golden):
    case = golden("ema_teacher")
    alpha = float(case.inputs["alpha"])
    student = nn.Linear(1, 1, bias=False).double()
    for warm_up, name in ((False, "plain"), (True, "warmup_min_1_minus_1_over_tp1")):
        student.weight.data.fill_(float(case.inputs["theta_T0"]))
        teacher = EMATeacher(student)
        found = []
        for value in case.inputs["theta_S"]:
            student.weight.data.fill_(value)
            teacher.update(student, warmed_up_momentum(alpha, teacher.updates) if warm_up else alpha)
            found.append(teacher.network.weight.item())
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), case.expected[name], rtol=case.rtol, atol=case.atol
        )


@pytest.mark.chapter("B28", api="lightning_distill.teachers.momentum_alpha")
def test_momentum_matches_golden_and_the_scaling_rule(golden):
    case = golden("momentum_alpha")
    for (tau, batch, samples), alpha, horizon in zip(
        case.inputs["tau_B_N"].tolist(),
        case.expected["alpha"].tolist(),
        case.expected["horizon_steps"].tolist(),
        strict=True,
    ):
        found = momentum_alpha(int(batch), int(samples), tau)
        assert found == pytest.approx(alpha, rel=case.rtol)
        assert 1 / (1 - found) == pytest.approx(horizon, rel=1e-6)
    assert momentum_alpha(512, 1281167) == pytest.approx(0.998404, abs=1e-6)
    assert scale_momentum(momentum_alpha(256, 1281167), 2) == pytest.approx(0.998403, abs=1e-6)
    assert 0 < momentum_alpha(64, 1000) < momentum_alpha(32, 1000) < momentum_alpha(32, 2000) < 1


@pytest.mark.chapter("B28")
@pytest.mark.erratum("ERR-42")
def test_the_printed_momentum_is_the_complement(golden):
    case = golden("momentum_alpha_as_written")
    for (tau, batch, samples), alpha in zip(
        case.inputs["tau_B_N"].tolist(), case.expected["alpha"].tolist(), strict=True
    ):
        printed = 1 - 1 / (1 + tau * batch / samples)
        assert printed == pytest.approx(alpha, rel=case.rtol)
        assert printed < 0.04  # the teacher would be a copy of the student
        assert momentum_alpha(int(batch), int(samples), tau) == pytest.approx(1 - printed)


@pytest.mark.parametrize("together", [False, True])
def test_both_ways_to_update_are_the_definition(monkeypatch, together):
    if together:
        monkeypatch.setattr("lightning_distill.teachers.ema.FOREACH_FROM", 0)
    averages = [torch.randn(3, 4), torch.randn(5), torch.tensor(7), torch.randn(2, dtype=torch.float64)]
    values = [torch.randn(3, 4), torch.randn(5), torch.tensor(12), torch.randn(2, dtype=torch.float64)]
    expected = [0.9 * a + 0.1 * v if a.is_floating_point() else v for a, v in zip(averages, values, strict=True)]
    shared = torch.randn(4)
    kept = shared.clone()
    ema_update_([*averages, shared], [*values, shared], 0.9)
    for average, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(average, value.clone())
    assert torch.equal(shared, kept)
    assert FOREACH_FROM > 0 or together
    ema_update_([], [], 0.5)


@pytest.mark.chapter("B27", api="lightning_distill.callbacks.MeanTeacher")
@pytest.mark.parametrize("buffers", ["ema", "copy"])
@pytest.mark.parametrize("warm_up", [True, False])
def test_the_teacher_follows_every_optimizer_step(make_trainer, warm_up, buffers):
    student, history = network(), History()
    expected = copy.deepcopy(student.state_dict())
    module = KD(student, alpha=0.5, optimizer=sgd)
    callback = MeanTeacher(0.9, warm_up=warm_up, buffers=buffers)
    make_trainer(max_epochs=2, callbacks=[callback, history]).fit(module, loader())
    for t, (now, teacher) in enumerate(zip(history.students, history.teachers, strict=True)):
        alpha = min(1 - 1 / (t + 1), 0.9) if warm_up else 0.9
        for name, value in now.items():
            counter, statistic = not value.is_floating_point(), "running" in name
            copied = counter or (statistic and buffers == "copy")
            expected[name] = value if copied else alpha * expected[name] + (1 - alpha) * value
            torch.testing.assert_close(teacher[name], expected[name], rtol=1e-5, atol=1e-6)
    assert history.teachers[-1]["1.num_batches_tracked"] == 8
    assert module.teacher.updates == 8
    assert not any(p.requires_grad for p in module.teacher.parameters())


def test_it_counts_optimizer_steps_and_may_rest_between(make_trainer):
    module, history = KD(network(), alpha=0.5, optimizer=sgd), History()
    make_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[MeanTeacher(0.9), history]).fit(module, loader())
    assert module.teacher.updates == 4
    assert torch.equal(history.teachers[0]["0.weight"], network()[0].weight)  # in the middle of the first step
    rare = KD(network(), alpha=0.5, optimizer=sgd)
    callback, history = MeanTeacher(0.9, every_n_steps=2, warm_up=False), History()
    make_trainer(max_epochs=1, callbacks=[callback, history]).fit(rare, loader())
    assert rare.teacher.updates == 2
    start = network()[0].weight
    torch.testing.assert_close(
        history.teachers[1]["0.weight"], 0.81 * start.detach() + 0.19 * history.students[1]["0.weight"]
    )


@pytest.mark.chapter("B28", api="lightning_distill.callbacks.MeanTeacher")
def test_auto_is_the_momentum_of_the_data_and_the_batch(make_trainer):
    module, history = KD(network(), alpha=0.5, optimizer=sgd), History()
    callback = MeanTeacher("auto", averaging=2.0, warm_up=False)
    make_trainer(max_epochs=1, callbacks=[callback, history]).fit(module, loader())
    alpha = momentum_alpha(8, 32, 2.0)
    start = network()[0].weight.detach()
    torch.testing.assert_close(
        history.teachers[0]["0.weight"], alpha * start + (1 - alpha) * history.students[0]["0.weight"]
    )


def test_it_teaches_about_samples_without_a_label(make_trainer):
    """Without labels the student moves only because of the teacher, and towards it."""
    module = KD(network(), alpha=0.5, optimizer=sgd)
    with torch.no_grad():
        module.student[3].weight.mul_(3)
    trainer = make_trainer(max_epochs=1, callbacks=[MeanTeacher(0.9)], log_every_n_steps=2)
    trainer.fit(module, loader(unlabelled=32))
    assert trainer.callback_metrics["train/hard"] == 0
    assert trainer.callback_metrics["train/soft"] > 0  # batch statistics here, averaged ones there
    assert 0 < trainer.callback_metrics["ema/distance"] < 1
    assert not torch.equal(module.student[0].weight, network()[0].weight)


def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    straight = KD(network(), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=3, callbacks=[MeanTeacher(0.99), Save()]).fit(straight, loader())
    resumed = KD(network(5), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=3, callbacks=[MeanTeacher(0.99)]).fit(resumed, loader(), ckpt_path=tmp_path / "4.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.teacher.updates == 12
    assert any(name.startswith("teacher.network") for name in straight.state_dict())


def test_the_teacher_is_gone_at_export_and_where_nobody_asks_for_it(make_trainer, tmp_path):
    module = KD(network(), alpha=0.5, terms={"hint": FeatureMatching({"2": "2"}, transform="identity")}, optimizer=sgd)
    trainer = make_trainer(max_epochs=1, callbacks=[MeanTeacher(0.9)])
    trainer.fit(module, loader())
    exported = module.export()
    assert set(exported.state_dict()) == set(network().state_dict())
    assert not any(part._forward_hooks for part in exported.modules())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    loaded = KD.load_from_checkpoint(tmp_path / "kd.ckpt", student=network(3), weights_only=True)
    assert loaded.teacher is None
    assert torch.equal(loaded.student[0].weight, module.student[0].weight)
    both = KD.load_from_checkpoint(tmp_path / "kd.ckpt", student=network(3), teacher=EMATeacher(network(4)))
    assert torch.equal(both.teacher.network[0].weight, module.teacher.network[0].weight)


def test_taps_of_the_student_and_of_its_average_do_not_mix(make_trainer):
    module = KD(network(), alpha=0.5, terms={"hint": FeatureMatching({"2": "2"}, transform="identity")}, optimizer=sgd)
    make_trainer(max_epochs=1, callbacks=[MeanTeacher(0.9)]).fit(module, loader())
    step = module.observe(next(iter(loader())))
    x = step.batch[0]
    torch.testing.assert_close(step.teacher.features["2"], module.teacher.network[:3].eval()(x))
    torch.testing.assert_close(step.student.features["2"], module.student[:3](x))


def test_it_works_with_lightnings_averaging_in_one_order_and_says_so_in_the_other(make_trainer, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    def callbacks():
        return [MeanTeacher(0.9), EMAWeightAveraging(decay=0.5, use_buffers=False)]

    straight = KD(network(), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=2, callbacks=[*callbacks(), Save()]).fit(straight, loader(), loader())
    resumed = KD(network(), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=2, callbacks=callbacks()).fit(
        resumed, loader(), loader(), ckpt_path=tmp_path / "4.ckpt", weights_only=True
    )
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    alone = KD(network(), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=2, callbacks=[MeanTeacher(0.9)]).fit(alone, loader(), loader())
    assert not torch.equal(alone.student[0].weight, straight.student[0].weight)  # that one is an average
    with pytest.raises(ValueError, match=r"EMAWeightAveraging is listed before MeanTeacher: .* List MeanTeacher first"):
        make_trainer(max_epochs=1, callbacks=callbacks()[::-1]).fit(KD(network(), alpha=0.5), loader())


def test_an_adapters_frozen_base_is_shared():
    student = network()
    student[0].requires_grad_(False)
    teacher = EMATeacher(student)
    assert teacher.network[0].weight is student[0].weight
    assert teacher.network[3].weight is not student[3].weight
    assert student[3].weight.requires_grad
    assert teacher.distance(student) == 0
    teacher.update(student, 0.5)


def test_the_base_under_an_adapter_stands_in_no_checkpoint(make_trainer, tmp_path):
    def adapted(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(network(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    straight = KD(adapted(1), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=2, callbacks=[MeanTeacher(0.9), Save()]).fit(straight, loader())
    state = torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]
    weights = {name for name in state if "num_batches" not in name and "running" not in name and "_extra" not in name}
    assert {name.split(".")[0] for name in weights} == {"student", "teacher"}
    assert all("lora" in name for name in weights)
    resumed = KD(adapted(2), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=2, callbacks=[MeanTeacher(0.9)]).fit(resumed, loader(), ckpt_path=tmp_path / "4.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    alone = KD.load_from_checkpoint(tmp_path / "4.ckpt", student=adapted(3), weights_only=True)
    assert alone.teacher is None


def test_a_coarse_average_is_warned_of(make_trainer):
    with pytest.warns(UserWarning, match=r"The average is kept in torch.bfloat16.*Train with `precision='bf16-mixed'`"):
        make_trainer(max_epochs=1, limit_train_batches=1, precision="bf16-true", callbacks=[MeanTeacher(0.999)]).fit(
            KD(network(), alpha=0.5), loader()
        )


BAD = {
    "one": (lambda: MeanTeacher(1.0), ValueError, r"momentum of a moving average must be in \[0, 1\), got 1.0"),
    "negative": (lambda: MeanTeacher(-0.1), ValueError, r"in \[0, 1\), got -0.1"),
    "NaN": (lambda: MeanTeacher(float("nan")), ValueError, r"in \[0, 1\), got nan"),
    "text": (lambda: MeanTeacher("high"), TypeError, "must be a number, got 'high'"),
    "averaging": (lambda: MeanTeacher(averaging=0), ValueError, "`averaging` must be positive, got 0"),
    "steps": (lambda: MeanTeacher(every_n_steps=0), ValueError, "`every_n_steps` must be at least 1, got 0"),
    "buffers": (lambda: MeanTeacher(buffers="mean"), ValueError, "`buffers` must be 'ema' or 'copy', got 'mean'"),
    "teacher's buffers": (lambda: EMATeacher(network(), "mean"), ValueError, "`buffers` must be 'ema' or 'copy'"),
    "batch size": (lambda: momentum_alpha(0, 10), ValueError, "`batch_size` must be positive, got 0"),
    "samples": (lambda: momentum_alpha(10, 0), ValueError, "`samples` must be positive, got 0"),
    "scale": (lambda: scale_momentum(0.9, 0), ValueError, "`k` must be positive, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_bad_runs_are_refused(make_trainer):
    with pytest.raises(ValueError, match="has a teacher already, a FrozenTeacher; MeanTeacher brings its own"):
        make_trainer(max_epochs=1, callbacks=[MeanTeacher()]).fit(KD(network(), network(1)), loader())
    with pytest.raises(TypeError, match=r"MeanTeacher needs a module of lightning-distill.*got BoringModel"):
        make_trainer(max_epochs=1, callbacks=[MeanTeacher()]).fit(BoringModel())
