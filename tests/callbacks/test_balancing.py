"""Every callback that balances terms: splits, processes, precision, resume, compilation, absent terms, bad input."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import KD, DistillationModule
from lightning_distill.callbacks import (
    MGDA,
    BalancedMagnitudes,
    CAGrad,
    GradientLog,
    GradNorm,
    ScheduledWeights,
    UncertaintyWeighting,
    WeightReport,
)
from lightning_distill.losses import Term
from lightning_distill.weighting import GradientWeights, StagedWeight, UncertaintyWeights
from tests.callbacks.balancing_run import CALLBACKS, PER_MICRO_BATCH, build, dataset, train

SCRIPT = Path(__file__).with_name("balancing_run.py")
INVARIANT = [name for name in CALLBACKS if name not in PER_MICRO_BATCH]
NEVER = 10**6
pytestmark = pytest.mark.filterwarnings("ignore:.*Please use self.log.*batch_size")


def close(found, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def run_script(folder, *arguments):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, SCRIPT, folder, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", CALLBACKS)
def test_weights_move(name, tmp_path):
    weights, _ = train(name, tmp_path)
    assert weights.shape == (6, 3)
    assert (weights >= 0).all()
    assert (weights[-1] - weights[0]).abs().max() > 1e-4


@pytest.mark.chapter("A59", api="lightning_distill.callbacks.GradNorm")
@pytest.mark.parametrize("name", INVARIANT)
def test_micro_batches_do_not_change_the_weights(name, tmp_path):
    whole = train(name, tmp_path)
    for batch_size, accumulate in [(8, 4), (16, 2), (4, 8)]:
        close(train(name, tmp_path, batch_size=batch_size, accumulate=accumulate), whole)


@pytest.mark.slow
def test_two_processes_have_the_weights_of_one(tmp_path):
    done = run_script(tmp_path / "two", "splits")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / "two" / f"found-{rank}.pt") for rank in (0, 1))
    assert len(first) == len(CALLBACKS) + len(INVARIANT)
    one = {name: train(name, tmp_path) for name in CALLBACKS}
    for name, (weights, student) in first.items():
        assert torch.equal(weights, second[name][0]), name
        assert torch.equal(student, second[name][1]), name
        close((weights, student), one[name.split("/")[0]])


@pytest.mark.parametrize("name", CALLBACKS)
def test_resumed_run_equals_uninterrupted_run(name, tmp_path):
    straight = train(name, tmp_path, max_epochs=3)
    stop = Stop()
    first = train(name, tmp_path, max_epochs=3, callbacks=[stop, Save(tmp_path / "half.ckpt")])
    assert len(first[0]) == 3
    rest = train(name, tmp_path, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(rest[1], straight[1])
    assert torch.equal(rest[0][-6:], straight[0][-6:])


class Stop(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GradNorm", "UncertaintyWeighting"])
def test_two_processes_that_are_killed_resume_exactly(name, tmp_path):
    straight = run_script(tmp_path / "straight", name, NEVER)
    assert straight.returncode == 0, straight.stderr
    killed = run_script(tmp_path / "killed", name, 5)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    resumed = run_script(tmp_path / "killed", name, NEVER)
    assert resumed.returncode == 0, resumed.stderr
    for rank in (0, 1):
        (expected,) = torch.load(tmp_path / "straight" / f"found-{rank}.pt").values()
        (found,) = torch.load(tmp_path / "killed" / f"found-{rank}.pt").values()
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0][-3:], expected[0][-3:])


@pytest.mark.parametrize("name", CALLBACKS)
def test_float16_with_a_scaler_and_bfloat16(name, tmp_path):
    plain = train(name, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    half = train(name, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    close(half, plain, rtol=0.02, atol=0.02)
    bfloat = train(name, tmp_path, precision="bf16-mixed")
    close(bfloat, plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", CALLBACKS)
def test_overflowing_float16_gradients_are_left_out(name, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # float16 ends at 2^16
    weights, student = train(name, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=12)
    assert weights.isfinite().all()
    assert student.isfinite().all()
    assert scaler.get_scale() < 2.0**40


@pytest.mark.parametrize("exact", [False, True])
def test_inner_products_of_gradients_are_not_taken_in_half_precision(exact, make_trainer):
    seen = []

    class Look(GradientWeights):
        def look(self, step, live):
            inputs = list(module.student.parameters()) if exact else [step.student.features["3"]]
            rows = torch.stack(list(live.gradients(inputs).values())).double()
            super().look(step, live)
            seen.append(rows @ rows.T)

    def rule(gram):
        seen.append(gram)
        return torch.full((len(gram),), 1 / len(gram))

    module = build(weights=Look(rule, exact=exact))
    data = DataLoader(dataset(), batch_size=32)
    make_trainer(precision="bf16-mixed", max_steps=1).fit(module, data)
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-9)


def test_clipping_does_not_touch_what_is_measured(tmp_path):
    plain, _ = train("GradNorm at once", tmp_path, max_epochs=1)
    clipped, _ = train("GradNorm at once", tmp_path, max_epochs=1, gradient_clip_val=1e-3)
    torch.testing.assert_close(clipped[0], plain[0])


@pytest.mark.parametrize("name", ["GradNorm", "UncertaintyWeighting", "MGDA", "MGDA, exact"])
def test_a_compiled_student(name, tmp_path):
    module = build()
    module.student.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        found = train(name, tmp_path, module=module, max_epochs=1)
    close(found, train(name, tmp_path, max_epochs=1))


@pytest.mark.parametrize("name", CALLBACKS)
def test_frozen_layers(name, tmp_path):
    module = build()
    module.student[0].requires_grad_(False)
    before = module.student[0].weight.clone()
    weights, _ = train(name, tmp_path, module=module)
    assert weights.isfinite().all()
    assert torch.equal(module.student[0].weight, before)


class Sometimes(Term):
    """A term that is there in every second step only."""

    def forward(self, step):
        return step.student.logits.square().mean(-1)


class Rarely(KD):
    def losses(self, step):
        losses = super().losses(step)
        if step.step % 2 == 0:
            del losses["sometimes"]
        return losses


@pytest.mark.parametrize(
    "callback",
    [
        GradNorm(lr=None, every_n_steps=1),
        UncertaintyWeighting(),
        MGDA(),
        CAGrad(),
        BalancedMagnitudes(every_n_steps=1),
        ScheduledWeights({"sometimes": StagedWeight(warm_up=3)}),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_terms_that_are_absent_from_a_step(callback, make_trainer):
    module = Rarely(nn.Linear(4, 3), nn.Linear(4, 3), terms={"sometimes": Sometimes()})
    data = DataLoader(dataset(), batch_size=16)
    make_trainer(callbacks=[callback], max_epochs=1).fit(module, data)
    weights = module.weighting.weights()
    assert set(weights) == {"hard", "soft", "sometimes"}
    assert all(0 <= float(weight) < 100 for weight in weights.values())
    assert not module.student.weight.isnan().any()


# What the measurements are


class Quadratic(Term):
    """``scale * |student - target|^2`` for a student that is a vector."""

    needs_teacher = False

    def __init__(self, scale, target):
        super().__init__()
        self.scale, self.target = scale, torch.tensor(target)

    def forward(self, step):
        return self.scale * (step.student.logits - self.target).square().sum(-1)


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.theta.expand(len(x), 2)


def quadratics(**arguments):
    terms = {"steep": Quadratic(5.0, [1.0, 0.0]), "flat": Quadratic(0.5, [0.0, 1.0])}
    return DistillationModule(Vector(), terms=terms, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), **arguments)


def vectors(batches=60):
    return DataLoader(
        torch.utils.data.TensorDataset(torch.zeros(batches, 1), torch.zeros(batches).long()), batch_size=1
    )


class Losses(L.Callback):
    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append({name: value.item() for name, value in pl_module.live.losses.items()})


@pytest.mark.chapter("A59", api="lightning_distill.callbacks.GradNorm")
@pytest.mark.parametrize(("lr", "tolerance"), [(0.005, 1.15), (None, 1.05)])
def test_gradnorm_equalizes_the_weighted_gradient_norms_of_two_quadratics(lr, tolerance, make_trainer):
    module = quadratics()
    make_trainer(callbacks=[GradNorm(alpha=0.0, lr=lr, every_n_steps=1)], max_epochs=1).fit(module, vectors(200))
    theta, weights = module.student.theta.detach(), module.weighting.weights()
    steep = weights["steep"] * (10 * (theta - torch.tensor([1.0, 0.0]))).norm().item()
    flat = weights["flat"] * (1 * (theta - torch.tensor([0.0, 1.0]))).norm().item()
    assert 1 / tolerance < steep / flat < tolerance
    assert sum(weights.values()) == pytest.approx(2)


@pytest.mark.chapter("A57", api="lightning_distill.callbacks.MGDA")
@pytest.mark.parametrize("normalise", [None, "norm", "loss", "loss and norm"])
@pytest.mark.parametrize("exact", [False, True])
def test_mgda_lowers_all_losses_in_every_step(normalise, exact, make_trainer):
    module, losses = quadratics(), Losses()
    make_trainer(callbacks=[MGDA(exact=exact, normalise=normalise), losses], max_epochs=1).fit(module, vectors())
    for before, after in zip(losses.seen, losses.seen[1:], strict=False):
        assert all(after[name] <= before[name] + 1e-6 for name in before)
    assert losses.seen[-1]["steep"] < losses.seen[0]["steep"]


@pytest.mark.chapter("A58", api="lightning_distill.callbacks.UncertaintyWeighting")
def test_uncertainty_converges_to_the_losses(make_trainer):
    module = quadratics()
    module.student.theta.requires_grad_(False)
    module.bias = nn.Parameter(torch.zeros(()))
    module.configure_optimizers = lambda: torch.optim.Adam(
        [{"params": [module.bias]}, {"params": module.weighting.parameters(), "weight_decay": 0.0}], lr=0.1
    )
    make_trainer(callbacks=[UncertaintyWeighting()], max_epochs=5).fit(module, vectors())
    variances = module.weighting.log_variances.exp()
    torch.testing.assert_close(variances, torch.tensor([5.0, 0.5]), rtol=0.02, atol=0)


class Entries(L.Callback):
    def __init__(self):
        self.entries = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.entries.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_gradient_log_says_what_autograd_does(make_trainer):
    module, entries = build(), Entries()
    expected = None

    class Reference(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            nonlocal expected
            if expected is None:
                layer = list(pl_module.student[0].parameters())
                expected = {
                    name: torch.cat([g.flatten() for g in torch.autograd.grad(value, layer, retain_graph=True)])
                    for name, value in pl_module.live.losses.items()
                }

    log = GradientLog(every_n_steps=2, layer="0")
    make_trainer(callbacks=[Reference(), log, entries], max_epochs=1).fit(module, DataLoader(dataset(), batch_size=32))
    first = entries.entries[0]
    for name, gradient in expected.items():
        assert first[f"train_gradient/{name}"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    cosine = torch.cosine_similarity(expected["hard"], expected["soft"], dim=0).item()
    assert first["train_cosine/hard-soft"] == pytest.approx(cosine, rel=1e-4)
    assert entries.entries[1]["train_cosine/hard-soft"] == first["train_cosine/hard-soft"]  # measured every second step
    assert entries.entries[2]["train_cosine/hard-soft"] != first["train_cosine/hard-soft"]


def test_the_layer_is_the_last_that_all_terms_share(make_trainer):
    callback = GradNorm()
    make_trainer(callbacks=[callback], max_steps=1).fit(build(), DataLoader(dataset(), batch_size=32))
    assert callback.state_dict()["layer"] == "2"  # the features after layer 3 know nothing of layer 4
    callback = GradNorm()
    module = KD(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.Linear(4, 3))
    make_trainer(callbacks=[callback], max_steps=1).fit(module, DataLoader(dataset(), batch_size=32))
    assert callback.state_dict()["layer"] == "2"


def test_representation_is_the_last_on_which_all_terms_depend(make_trainer):
    module, callback = build(), MGDA()
    make_trainer(callbacks=[callback], max_steps=1).fit(module, DataLoader(dataset(), batch_size=32))
    assert module.weighting.representation_in_use == "3"
    named = build()
    make_trainer(callbacks=[MGDA("0")], max_steps=1).fit(named, DataLoader(dataset(), batch_size=32))
    assert named.weighting.representation_in_use == "0"
    assert named.weighting.weights() != module.weighting.weights()


# Weights in logs, reports and checkpoints


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_weight_is_logged(name, make_trainer):
    module = build()
    trainer = make_trainer(callbacks=[CALLBACKS[name]()], max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, DataLoader(dataset(), batch_size=32))
    for term, weight in module.weighting.weights().items():
        assert trainer.callback_metrics[f"train_weight/{term}"].item() == pytest.approx(float(weight), rel=1e-5)


def test_report_writes_a_table_and_a_plot_and_continues_after_a_resume(tmp_path):
    straight = WeightReport(every_n_steps=1, folder=str(tmp_path / "straight"))
    train("GradNorm", tmp_path, callbacks=[straight])
    lines = (tmp_path / "straight" / "weights.csv").read_text().splitlines()
    assert lines[0] == "step,feature,hard,soft"
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, 7)]
    assert (tmp_path / "straight" / "weights.png").stat().st_size > 5000
    first = WeightReport(every_n_steps=1, folder=str(tmp_path / "half"))
    train("GradNorm", tmp_path, callbacks=[first, Stop(), Save(tmp_path / "half.ckpt")])
    second = WeightReport(every_n_steps=1, folder=str(tmp_path / "rest"))
    train("GradNorm", tmp_path, callbacks=[second], ckpt_path=tmp_path / "half.ckpt")
    assert (tmp_path / "rest" / "weights.csv").read_text().splitlines() == lines


def test_a_checkpoint_loads_without_the_callback_but_does_not_train_on(tmp_path, make_trainer):
    train("UncertaintyWeighting", tmp_path, callbacks=[Save(tmp_path / "a.ckpt")])
    module = build()
    loaded = KD.load_from_checkpoint(
        tmp_path / "a.ckpt",
        student=module.student,
        teacher=None,
        terms=dict(module.terms),
        task=module.task,
        weights_only=False,
    )
    assert not list(loaded.weighting.parameters())
    with pytest.raises(ValueError, match=r"state of a weighting, \['weighting.log_variances'\].*Add the callback"):
        train(None, tmp_path, ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    train("GradNorm", tmp_path, callbacks=[Save(tmp_path / "b.ckpt")])
    with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`, callbacks used to create"):
        train(None, tmp_path, ckpt_path=tmp_path / "b.ckpt", max_epochs=3)


def test_log_variances_join_the_optimizer_without_decay_and_with_a_rate_of_their_own(make_trainer):
    def optimizer(groups):
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3)

    module = KD(
        nn.Linear(4, 3), nn.Linear(4, 3), optimizer=optimizer,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4), lr_interval="step",
    )  # fmt: skip
    trainer = make_trainer(callbacks=[UncertaintyWeighting(learning_rate=0.05)], max_steps=3, max_epochs=3)
    trainer.fit(module, DataLoader(dataset(), batch_size=32))
    student, own = trainer.optimizers[0].param_groups
    assert (student["weight_decay"], own["weight_decay"]) == (0.3, 0.0)
    assert own["lr"] == pytest.approx(5 * student["lr"])
    assert own["params"] == [module.weighting.log_variances]
    assert (module.weighting.log_variances != 0).all()


def test_weights_argument_is_the_same_as_the_callback(tmp_path):
    by_callback = train("UncertaintyWeighting", tmp_path)
    by_argument = train(None, tmp_path, module=build(weights=UncertaintyWeights(learning_rate=0.1)))
    assert torch.equal(by_callback[1], by_argument[1])
    by_callback = train("MGDA", tmp_path)
    by_argument = train(None, tmp_path, module=build(weights=GradientWeights(normalise="norm")))
    assert torch.equal(by_callback[1], by_argument[1])


def test_the_graph_is_let_go_after_the_backward(make_trainer):
    module = build()
    seen = []

    class Look(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(pl_module.live.losses["hard"].requires_grad and int(pl_module.live.items) > 0)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(pl_module.live)

    make_trainer(callbacks=[Look()], max_steps=1).fit(module, DataLoader(dataset(), batch_size=32))
    assert seen == [True, None]
    assert module.live is None


# Bad input


def fit(make_trainer, callback, module=None):
    make_trainer(callbacks=[callback], max_epochs=1).fit(module or build(), DataLoader(dataset(), batch_size=32))


def one_term():
    return KD(nn.Linear(4, 3), nn.Linear(4, 3), alpha=1.0)


@pytest.mark.parametrize("name", [name for name in CALLBACKS if name != "ScheduledWeights"])
def test_one_term_is_nothing_to_balance(name, make_trainer):
    with pytest.raises(ValueError, match=r"balances two terms or more, but the module has only \['hard'\]"):
        fit(make_trainer, CALLBACKS[name](), one_term())


@pytest.mark.parametrize("name", CALLBACKS)
def test_two_callbacks_do_not_weigh_the_same_terms(name, make_trainer):
    module = build(weights=UncertaintyWeights())
    with pytest.raises(ValueError, match="and UncertaintyWeights would both weigh the terms"):
        fit(make_trainer, CALLBACKS[name](), module)


@pytest.mark.parametrize("name", [*CALLBACKS, "GradientLog", "WeightReport"])
def test_modules_without_terms_are_refused(name, make_trainer):
    callback = {"GradientLog": GradientLog, "WeightReport": WeightReport, **CALLBACKS}[name]()
    with pytest.raises(TypeError, match="but the module is a BoringModel"):
        make_trainer(callbacks=[callback], max_steps=1).fit(BoringModel())


@pytest.mark.parametrize("make", [lambda layer: GradNorm(layer=layer), lambda layer: GradientLog(layer=layer)])
def test_layers_that_do_not_do(make, make_trainer):
    with pytest.raises(ValueError, match=r"Sequential has no submodule '00'. Nearest names: '0'"):
        fit(make_trainer, make("00"))
    with pytest.raises(ValueError, match="The layer '1' has no trainable parameter"):
        fit(make_trainer, make("1"))
    with pytest.raises(ValueError, match=r"'feature' gives no gradient to the layer '4'. `layer='2'` is one"):
        fit(make_trainer, make("4"))
    frozen = build()
    frozen.student[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"The layer '0' has no trainable parameter .* or is frozen"):
        fit(make_trainer, make("0"), frozen)


class Own(Term):
    """Depends on nothing of the student."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, step):
        return self.value.square()


def test_terms_that_share_nothing(make_trainer):
    module = KD(nn.Linear(4, 3), nn.Linear(4, 3), terms={"own": Own()})
    with pytest.raises(ValueError, match=r"No layer of Linear .* gets a gradient from each .*'own': None"):
        fit(make_trainer, GradNorm(), module)
    module = KD(nn.Linear(4, 3), nn.Linear(4, 3), terms={"own": Own()})
    with pytest.raises(ValueError, match=r"None of the activations .* gets a gradient from each of the terms"):
        fit(make_trainer, MGDA(), module)


def test_names_that_do_not_exist(make_trainer):
    with pytest.raises(ValueError, match=r"`schedules` names \['sotf'\], which are no terms"):
        fit(make_trainer, ScheduledWeights({"sotf": StagedWeight(warm_up=1)}))
    with pytest.raises(ValueError, match=r"`log_variance` names \['sotf'\], which are no terms"):
        fit(make_trainer, UncertaintyWeighting(log_variance={"sotf": 1.0}))
    with pytest.raises(ValueError, match="has no submodule '00'"):
        fit(make_trainer, MGDA("00"))
    with pytest.raises(ValueError, match=r"`priorities` names \['sotf'\], which are no terms"):
        build(weights=GradientWeights(priorities={"sotf": 1.0}))


def test_an_optimizer_without_the_log_variances(make_trainer):
    module = build()
    module.configure_optimizers = lambda: torch.optim.SGD(module.student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="The parameters of UncertaintyWeights are in no optimizer"):
        fit(make_trainer, UncertaintyWeighting(), module)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GradNorm(alpha=-1), "`alpha` must not be negative, got -1"),
    (lambda: GradNorm(lr=0), "`lr` must be positive, or None for the balance at once, got 0"),
    (lambda: GradNorm(every_n_steps=0), "`every_n_steps` must be at least 1, got 0"),
    (lambda: GradientLog(every_n_steps=0), "`every_n_steps` must be at least 1, got 0"),
    (lambda: WeightReport(every_n_steps=0), "`every_n_steps` must be at least 1, got 0"),
    (lambda: BalancedMagnitudes(every_n_steps=0), "`every_n_steps` must be at least 1, got 0"),
    (lambda: BalancedMagnitudes(decay=1.0), r"`decay` must be in \[0, 1\), got 1.0"),
    (lambda: UncertaintyWeighting(log_variance=20), r"`log_variance` must be in \[-10, 10\], got 20"),
    (lambda: MGDA(normalise="l2"), "`normalise` must be 'norm', 'loss', 'loss and norm' or None, got 'l2'"),
    (lambda: MGDA("0", exact=True), "leave it or `representation='0'` out"),
    (lambda: CAGrad(c=-1), "`c` must not be negative, got -1"),
    (lambda: ScheduledWeights({}), "`schedules` must hold a schedule for at least one term"),
    (lambda: ScheduledWeights({"soft": lambda step: -1}), "The weight of the term 'soft' must not be negative, got -1"),
    (lambda: GradientWeights(priorities={"soft": -1.0}), "The weight of the term 'soft' must not be negative, got -1"),
], ids=lambda value: "" if callable(value) else value[:40])  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_must_be_a_function():
    with pytest.raises(TypeError, match=r"`schedules\['soft'\]` must be a function of the step"):
        ScheduledWeights({"soft": 0.5})
