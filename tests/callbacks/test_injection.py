"""Callbacks that lend a student its teacher's features or gradients."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_distill import KD
from lightning_distill.callbacks import FeatureInjection, GradientInjection, TemperatureAnnealing
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.networks import MLP
from lightning_distill.recovery import adaptive_alpha, feature_injection
from lightning_distill.weighting import align_direction, align_projection

API = "lightning_distill.callbacks."


def everything():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 6, generator=generator), torch.randint(0, 4, (48,), generator=generator)


def data(batch_size=8):
    x, y = everything()
    return TensorDataModule((x, y), (x, y), batch_size=batch_size, eval_batch_size=48, seed=1)


def module(**more):
    torch.manual_seed(3)
    student, teacher = MLP((6, 8, 8, 4)), MLP((6, 8, 8, 4))
    return KD(student, teacher, **({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)} | more))


class Watch(L.Callback):
    """The shares, and validation losses, by optimizer step."""

    def __init__(self):
        self.shares = []
        self.validation = []

    def on_before_backward(self, trainer, pl_module, loss):
        found = [c for c in trainer.callbacks if isinstance(c, FeatureInjection)]
        self.shares.append((trainer.global_step, found[0]._injector.alpha))

    def on_validation_end(self, trainer, pl_module):
        with torch.no_grad():
            x, y = everything()
            plain = nn.functional.cross_entropy(copy.deepcopy(pl_module.student)(x), y)
        self.validation.append((trainer.callback_metrics["val/hard"].item(), plain.item()))


@pytest.mark.chapter("D22", api=API + "FeatureInjection")
def test_features_are_injected_in_training_less_and_less_and_never_in_validation(make_trainer):
    injection, watch = FeatureInjection(["blocks.0", "blocks.1"], alpha=0.8, num_steps=8), Watch()
    trained = module()
    trainer = make_trainer(max_epochs=2, callbacks=[injection, watch], accumulate_grad_batches=1)
    trainer.fit(trained, datamodule=data())
    assert watch.shares == [(step, pytest.approx(0.8 * max(1 - step / 8, 0))) for step in range(12)]
    assert [injection.alpha_at(step) for step in (0, 4, 8, 100)] == pytest.approx([0.8, 0.4, 0.0, 0.0])
    for logged, plain in watch.validation[1:]:  # the first is the sanity check's
        assert logged == pytest.approx(plain, rel=1e-5)
    assert not any(part._forward_hooks for part in trained.student.modules())
    assert not any(part._forward_hooks for part in trained.teacher.network.modules())


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_is_that_of_the_formula(make_trainer, adaptive):
    trained = module()
    reference, teacher = copy.deepcopy(trained.student), trained.teacher.network
    injection = FeatureInjection({"blocks.0": "blocks.0"}, alpha=0.5, num_steps=10, adaptive=adaptive)
    make_trainer(max_steps=1, limit_val_batches=0, callbacks=[injection]).fit(trained, datamodule=data(48))
    x, y = everything()
    hidden, theirs = reference.blocks[0](x), teacher.blocks[0](x).detach()
    share = 0.5 * adaptive_alpha(hidden, theirs) if adaptive else 0.5
    logits = reference.head(reference.blocks[1](feature_injection(hidden, theirs, share)))
    soft = nn.functional.kl_div(
        (logits / 4).log_softmax(1), (teacher(x) / 4).log_softmax(1).detach(), reduction="batchmean", log_target=True
    )
    (0.3 * nn.functional.cross_entropy(logits, y) + 0.7 * 16 * soft).backward()
    for ours, theirs in zip(trained.student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-6)


class Save(L.Callback):
    """Writes a checkpoint after some steps."""

    def __init__(self, path, steps):
        self.path = path
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


def resumed(make_trainer, path, callback, steps):
    """Weights of an uninterrupted run, and of one that goes on from its checkpoint after some steps."""
    straight, second = module(), module()
    quiet = {"max_epochs": 2, "limit_val_batches": 0}
    make_trainer(**quiet, callbacks=[callback(), Save(path, steps)]).fit(straight, datamodule=data())
    trainer = make_trainer(**quiet, callbacks=[callback()])
    trainer.fit(second, datamodule=data(), ckpt_path=path, weights_only=True)
    assert trainer.global_step == 12
    return straight.state_dict(), second.state_dict()


@pytest.mark.parametrize("steps", [5, 6])
@pytest.mark.parametrize(
    "callback", [lambda: FeatureInjection(["blocks.0"]), lambda: GradientInjection(beta=1.0, gamma=3.0)]
)
def test_a_resumed_run_is_an_uninterrupted_one(make_trainer, tmp_path, callback, steps):
    straight, found = resumed(make_trainer, tmp_path / "step.ckpt", callback, steps)
    assert all(torch.equal(found[name], value) for name, value in straight.items())


@pytest.mark.chapter("D24", api=API + "GradientInjection")
@pytest.mark.parametrize("alignment", ["none", "direction", "projection"])
def test_one_step_has_the_injected_gradient(make_trainer, alignment):
    trained = module(alpha=0.5)
    reference, teacher = copy.deepcopy(trained.student), trained.teacher.network
    callback = GradientInjection(beta=0.6, gamma=0.0, alignment=alignment)
    make_trainer(max_steps=1, limit_val_batches=0, callbacks=[callback]).fit(trained, datamodule=data(48))
    x, y = everything()
    logits = reference(x)
    hard = 0.5 * nn.functional.cross_entropy(logits, y)
    soft = 16 * nn.functional.kl_div(
        (logits / 4).log_softmax(1), (teacher(x) / 4).log_softmax(1).detach(), reduction="batchmean", log_target=True
    )
    own, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(reference.parameters()), retain_graph=True)])
        for loss in (hard, soft)
    )
    aligned = {"none": theirs, "direction": align_direction(own, theirs), "projection": align_projection(own, theirs)}
    expected = own + 0.6 * aligned[alignment]
    before = torch.cat([p.flatten() for p in reference.parameters()])
    after = torch.cat([p.flatten() for p in trained.student.parameters()])
    torch.testing.assert_close((before - after) / 0.1, expected, rtol=1e-3, atol=1e-5)


def test_the_teachers_share_falls_over_the_training(make_trainer):
    seen = []

    class Look(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(pl_module.weighting.weights()["soft"])

    callback = GradientInjection(beta=1.0, gamma=2.0)
    make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[callback, Look()]).fit(module(), datamodule=data())
    assert seen == pytest.approx([torch.tensor(-2 * step / 12).exp().item() for step in range(12)])


def test_the_schedule_is_half_of_the_training_unless_it_is_given(make_trainer):
    injection = FeatureInjection(["blocks.0"])
    make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[injection]).fit(module(), datamodule=data())
    assert injection.num_steps == 6
    endless = make_trainer(max_epochs=-1, limit_val_batches=0, callbacks=[FeatureInjection(["blocks.0"])])
    with pytest.raises(ValueError, match="`num_steps` of FeatureInjection must be given"):
        endless.fit(module(), datamodule=data())


def test_bad_settings_are_refused(make_trainer):
    with pytest.raises(ValueError, match="`layers` must be one or more names of submodules, got 'blocks'"):
        FeatureInjection("blocks")
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        FeatureInjection(["blocks.0"], alpha=0)
    with pytest.raises(ValueError, match="`num_steps` must be positive, got 0"):
        FeatureInjection(["blocks.0"], num_steps=0)
    with pytest.raises(ValueError, match="The student has no submodule 'stem'"):
        make_trainer(max_steps=1, callbacks=[FeatureInjection(["stem"])]).fit(module(), datamodule=data())
    with pytest.raises(TypeError, match="got BoringModel with the teacher NoneType"):
        make_trainer(max_steps=1, callbacks=[FeatureInjection(["layer"])]).fit(BoringModel())
    function = KD(MLP((6, 8, 4)), lambda batch: torch.zeros(len(batch[0]), 4))
    with pytest.raises(TypeError, match="with the teacher FunctionTeacher"):
        make_trainer(max_steps=1, callbacks=[FeatureInjection(["blocks.0"])]).fit(function, datamodule=data())
    with pytest.raises(ValueError, match="the term 'guide', which the module does not have"):
        make_trainer(max_steps=1, callbacks=[GradientInjection(teacher="guide")]).fit(module(), datamodule=data())
    with pytest.raises(TypeError, match="GradientInjection weighs the loss terms"):
        make_trainer(max_steps=1, callbacks=[GradientInjection()]).fit(BoringModel())


def test_injection_lives_with_other_knobs(make_trainer):
    callbacks = [FeatureInjection(["blocks.0"], adaptive=True), GradientInjection(), TemperatureAnnealing(tau_max=6.0)]
    trained = module()
    before = copy.deepcopy(trained.student.state_dict())
    make_trainer(max_epochs=1, callbacks=callbacks, accumulate_grad_batches=2).fit(trained, datamodule=data())
    assert all(value.isfinite().all() for value in trained.student.state_dict().values())
    assert not torch.equal(before["head.weight"], trained.student.state_dict()["head.weight"])
