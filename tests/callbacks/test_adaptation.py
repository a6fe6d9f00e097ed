"""Selection rules and adapting callbacks in a Trainer: split steps, two processes, resumed and killed runs."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, DistillationModule
from lightning_distill.callbacks import GradientAlignment, GradientVarianceTemperature, LogSelection, TaskDifficulty
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.difficulty import alignment_factor, gradient_cosine, task_difficulty
from lightning_distill.losses import FeatureMatching, SoftTargets
from lightning_distill.losses.distances import MMD, mmd2
from lightning_distill.selection import SelectByPercentile, SelectByRunningPercentile
from lightning_distill.temperature import gradient_variance_temperature
from lightning_distill.weighting import MultiTaskWeights
from tests.callbacks.adaptation_run import CASES, network, run

SCRIPT = Path(__file__).with_name("adaptation_run.py")
MATCH = {"rtol": 2e-5, "atol": 1e-6}
# a variance over 6 micro-batches is another one when they are smaller, and is not compared
INVARIANT = [case for case in CASES if case != "gradient variance"]


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(torch.tensor(found["seen"]), torch.tensor(expected["seen"]), **tolerance)
    torch.testing.assert_close(found["student"], expected["student"], **tolerance)
    assert found["fractions"] == pytest.approx(expected["fractions"])


def killed(case, folder, kill_at):
    process = multiprocessing.get_context("fork").Process(target=run, args=(case, folder), kwargs={"kill_at": kill_at})
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_exactly(tmp_path, case):
    straight = run(case, tmp_path / "straight")
    assert len(straight["seen"]) == 18
    assert len({tuple(row[1:]) for row in straight["seen"]}) > 1  # a knob was turned
    assert killed(case, tmp_path / "killed", 9) == -signal.SIGKILL  # in the middle of the second epoch
    resumed = run(case, tmp_path / "killed")
    assert_same(resumed, straight, rtol=0, atol=0)
    assert resumed["rates"] == straight["rates"]


@pytest.mark.parametrize("case", INVARIANT)
def test_micro_batches_change_nothing(tmp_path, case):
    whole = run(case, tmp_path / "whole")
    parts = run(case, tmp_path / "parts", batch_size=4, accumulate=4)
    assert_same(parts, whole, **MATCH)


@pytest.mark.slow
def test_two_processes_have_the_same_knobs_as_one(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1))
    for case in CASES:
        assert_same(second[case], first[case], rtol=0, atol=0)
        if case in INVARIANT:
            assert_same(first[case], run(case, tmp_path / f"one-{case}"), **MATCH)


@pytest.mark.parametrize("case", ["gradient variance", "alignment", "percentile"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(tmp_path, case, precision):
    if precision == "16-mixed" and not torch.cuda.is_available():
        pytest.skip("the gradient scaler of Lightning needs a GPU")
    found = run(case, tmp_path, precision=precision)
    assert torch.tensor(found["seen"]).isfinite().all()
    assert found["student"].isfinite().all()


class Gradients(L.Callback):
    """The two terms' gradients of the last layer by the definition: a step at a time, before any callback of ours."""

    def __init__(self):
        self.rows = []

    def on_before_backward(self, trainer, pl_module, loss):
        layer = list(pl_module.student[2].parameters())
        rows = []
        for name in ("hard", "soft"):
            found = torch.autograd.grad(pl_module.live.losses[name], layer, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        self.rows.append(torch.stack(rows))


def small_fit(make_trainer, *callbacks, module=None, lr=0.1, **arguments):
    x, y = torch.randn(48, 4), torch.randint(0, 3, (48,))
    module = module or KD(network(8, 1), network(16, 2), optimizer=lambda p: torch.optim.SGD(p, lr=lr))
    trainer = make_trainer(callbacks=list(callbacks), **({"max_steps": 2} | arguments))
    trainer.fit(module, datamodule=TensorDataModule((x, y), (x, y), batch_size=8))
    return module, trainer


@pytest.mark.chapter("A14", api="lightning_distill.callbacks.GradientVarianceTemperature")
def test_temperature_is_that_of_the_gradients_variance(make_trainer):
    gradients, callback = Gradients(), GradientVarianceTemperature(5.0, momentum=0.0, micro_batches=3)
    module, _ = small_fit(make_trainer, gradients, callback, accumulate_grad_batches=3, max_steps=1)
    hard, soft = torch.stack(gradients.rows).unbind(1)
    expected = gradient_variance_temperature(hard, soft, tau0=5.0)
    assert len(hard) == 3
    assert 1 < expected < 20
    assert module.temperature == pytest.approx(expected, rel=1e-6)


def test_a_variance_may_take_several_steps_and_is_averaged_geometrically(make_trainer):
    gradients, callback = Gradients(), GradientVarianceTemperature(2.0, momentum=0.75, micro_batches=3)
    module, _ = small_fit(make_trainer, gradients, callback, max_steps=2)
    assert module.temperature == 4.0  # KD's; two gradients are not enough
    gradients, callback = Gradients(), GradientVarianceTemperature(2.0, momentum=0.75, micro_batches=3)
    module, _ = small_fit(make_trainer, gradients, callback, max_steps=5)
    rows = torch.stack(gradients.rows[:3])
    estimate = gradient_variance_temperature(rows[:, 0], rows[:, 1], tau0=2.0)
    assert module.temperature == pytest.approx(4.0**0.75 * estimate**0.25, rel=1e-6)


@pytest.mark.chapter("C23", "C27", api="lightning_distill.callbacks.GradientAlignment")
def test_the_learning_rate_of_a_step_is_that_of_its_gradients_cosine(make_trainer):
    gradients, callback = Gradients(), GradientAlignment(alpha=2.0, momentum=0.0)

    class Weights(L.Callback):
        before = after = None

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = [p.detach().clone() for p in pl_module.student.parameters()]
            self.gradients = [p.grad.clone() for p in pl_module.student.parameters()]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.after = [p.detach().clone() for p in pl_module.student.parameters()]

    weights = Weights()
    _, trainer = small_fit(make_trainer, gradients, callback, weights, max_steps=1, lr=0.3)
    cosine = gradient_cosine(*gradients.rows[0])
    assert callback.cosine == pytest.approx(cosine, rel=1e-5)
    factor = alignment_factor(cosine, alpha=2.0)
    assert factor < 0.99
    for before, after, gradient in zip(weights.before, weights.after, weights.gradients, strict=True):
        torch.testing.assert_close(after, before - 0.3 * factor * gradient)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.3  # what a scheduler sees
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_the_mean_cosine_and_when_it_is_measured(make_trainer):
    gradients, callback = Gradients(), GradientAlignment(momentum=0.5, every_n_steps=2)
    small_fit(make_trainer, gradients, callback, max_steps=4)
    first, third = gradient_cosine(*gradients.rows[0]), gradient_cosine(*gradients.rows[2])
    assert callback.cosine == pytest.approx((first + third) / 2, rel=1e-5)


class Accuracies(L.Callback):
    """Difficulty by hand after each validation."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append((pl_module.temperature, pl_module.weighting.weights()["soft"]))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.accuracy = trainer.callback_metrics["val/accuracy"].item()


@pytest.mark.chapter("C22", "C25", "C26", api="lightning_distill.callbacks.TaskDifficulty")
def test_temperature_and_weight_follow_the_accuracy_gap(make_trainer):
    seen, callback = Accuracies(), TaskDifficulty(beta=2.0, limit=0.4)
    teacher = network(16, 2)
    x = torch.randn(48, 4)
    y = teacher(x).argmax(-1)
    y[:12] = (y[:12] + 1) % 3  # a teacher that is right for 36 of 48
    y[40:] = -100  # and items that nobody knows
    module = KD(network(8, 1), teacher, alpha=0.25)
    trainer = make_trainer(callbacks=[callback, seen], max_epochs=2)
    trainer.fit(module, datamodule=TensorDataModule((x, y), (x, y), batch_size=8, eval_batch_size=20))
    assert callback.teacher_accuracy == pytest.approx(28 / 40)
    difficulty = task_difficulty(28 / 40, seen.accuracy)
    assert callback.difficulty == pytest.approx(difficulty)
    assert difficulty > 0
    assert module.temperature == pytest.approx(4.0 * (1 + 2 * difficulty))
    assert module.weighting.weights()["soft"] == pytest.approx(0.75 * (1 + min(difficulty, 0.4)))
    assert seen.seen[0] == (4.0, 0.75)
    assert seen.seen[1] != seen.seen[0]


def test_a_given_accuracy_spares_the_teacher_and_knobs_can_be_left_alone(make_trainer):
    callback = TaskDifficulty(beta=0.0, limit=0.2, teacher_accuracy=1.0, metric="val/accuracy")
    module, trainer = small_fit(make_trainer, callback, max_epochs=1, max_steps=-1)
    assert module.temperature == 4.0
    assert callback.difficulty == pytest.approx(1 - trainer.callback_metrics["val/accuracy"].item())
    assert module.weighting.weights()["soft"] == pytest.approx(0.7 * 1.2)
    callback = TaskDifficulty(beta=1.0, limit=0.0, teacher_accuracy=1.0)
    module, _ = small_fit(make_trainer, callback, max_epochs=1, max_steps=-1)
    assert module.weighting.weights()["soft"] == 0.7
    assert module.temperature == pytest.approx(4 * (1 + callback.difficulty))


def test_a_module_that_was_turned_already_is_turned_from_where_it_began(make_trainer, tmp_path):
    module, trainer = small_fit(make_trainer, TaskDifficulty(teacher_accuracy=1.0), max_epochs=1, max_steps=-1)
    trainer.save_checkpoint(tmp_path / "turned.ckpt")
    assert module.temperature > 4.0
    callback = TaskDifficulty(teacher_accuracy=1.0)
    again = make_trainer(callbacks=[callback], max_epochs=2)
    x, y = torch.randn(48, 4), torch.randint(0, 3, (48,))
    again.fit(module, datamodule=TensorDataModule((x, y), (x, y), batch_size=8), ckpt_path=tmp_path / "turned.ckpt")
    assert module.temperature == pytest.approx(4.0 * (1 + callback.difficulty))


def test_difficulty_from_a_term_is_the_root_of_its_running_mean(make_trainer):
    class Losses(L.Callback):
        def __init__(self):
            self.seen = []

        def on_before_backward(self, trainer, pl_module, loss):
            self.seen.append(pl_module.live.losses["soft"].item())

    losses, callback = Losses(), TaskDifficulty(term="soft", momentum=0.5)
    module, _ = small_fit(make_trainer, losses, callback, max_steps=2)
    expected = math.sqrt((losses.seen[0] + losses.seen[1]) / 2)
    assert callback.difficulty == pytest.approx(expected, rel=1e-6)
    assert module.temperature == pytest.approx(4 * (1 + expected), rel=1e-6)


@pytest.mark.chapter("C24", api="lightning_distill.callbacks.TaskDifficulty")
def test_the_discrepancy_of_features_is_a_difficulty(make_trainer, golden):
    """The golden case is the squared discrepancy; the difficulty is its root, and 0 for features that are the same."""
    case = golden("mmd_task_difficulty")
    student, teacher = case.inputs["F_S"], case.inputs["F_T"]
    squared = mmd2(student, teacher, sigma=case.inputs["sigma"]).item()
    assert squared == pytest.approx(case.expected["D_feat"], rel=case.rtol)
    assert mmd2(student, student, sigma=case.inputs["sigma"]).item() == pytest.approx(0, abs=1e-12)
    features = FeatureMatching({"0": "0"}, MMD(sigma=1.0), transform="identity")
    callback = TaskDifficulty(term="features", momentum=0.0, limit=0.0)

    class Features(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            self.value = pl_module.live.losses["features"].item()

    seen = Features()
    module = KD(network(8, 1), network(8, 2), terms={"features": features}, weights={"features": 0.0})
    small_fit(make_trainer, seen, callback, module=module, max_steps=1)
    assert callback.difficulty == pytest.approx(math.sqrt(seen.value), rel=1e-6)
    assert callback.difficulty > 0.01
    assert module.temperature == pytest.approx(4.0 * (1 + callback.difficulty))


class TwoHeads(nn.Module):
    """Two tasks on one trunk; the second one's logits come behind the first one's."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Linear(4, 6)

    def forward(self, x):
        return self.net(x)


class OnHead(SoftTargets):
    """Soft targets of one task."""

    def __init__(self, part, hard):
        super().__init__()
        self.part, self.hard = part, hard

    def forward(self, step):
        student = step.student.logits[:, self.part]
        if self.hard:
            return nn.functional.cross_entropy(student, step.labels % 3, reduction="none")
        teacher = step.teacher.logits[:, self.part]
        log_p, log_q = (torch.log_softmax(z / step.temperature, -1) for z in (teacher, student))
        return step.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.chapter("C28", api="lightning_distill.weighting.MultiTaskWeights")
def test_two_tasks_are_trained_and_the_teacher_s_weight_of_one_is_turned(make_trainer):
    terms = {
        f"{task}/{kind}": OnHead(part, kind == "hard")
        for task, part in {"a": slice(0, 3), "b": slice(3, 6)}.items()
        for kind in ("hard", "soft")
    }
    weights = MultiTaskWeights({"a": 1.0, "b": 0.5}, {"b": 2.0})
    module = DistillationModule(
        TwoHeads(1), TwoHeads(2), terms=terms, weights=weights, temperature=2.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )  # fmt: skip
    callback = TaskDifficulty(beta=0.0, limit=0.3, term="b/soft", weighted="b")
    before = module.student.net.weight.detach().clone()
    small_fit(make_trainer, callback, module=module, max_steps=20, max_epochs=10)
    moved = (module.student.net.weight.detach() - before).norm(dim=1)
    assert (moved > 0).all()
    assert weights.kd_weights["a"] == 1.0
    assert weights.kd_weights["b"] == pytest.approx(2.0 * (1 + min(callback.difficulty, 0.3)))


def test_selection_is_reported_and_logged(make_trainer):
    callback = LogSelection()
    module = KD(network(8, 1), network(16, 2), item_weights={"soft": SelectByRunningPercentile(75.0, 0.5)})
    _, trainer = small_fit(make_trainer, callback, module=module, max_epochs=6, max_steps=-1)
    report = callback.reports["soft"]
    assert report.n == 48
    assert report.fraction == pytest.approx(0.25, abs=0.15)
    assert trainer.callback_metrics["selection/soft/fraction"].item() == pytest.approx(report.fraction)
    assert trainer.callback_metrics["selection/soft/balance"].item() == pytest.approx(report.balance)


def test_a_module_without_the_rules_loads_a_checkpoint_that_has_them(make_trainer, tmp_path):
    module = KD(network(8, 1), network(16, 2), item_weights={"soft": SelectByRunningPercentile(75.0)})
    _, trainer = small_fit(make_trainer, module=module)
    trainer.save_checkpoint(tmp_path / "rules.ckpt")
    stored = torch.load(tmp_path / "rules.ckpt")["state_dict"]
    assert stored["item_rules.soft.histogram"].sum() > 0
    loaded = KD.load_from_checkpoint(tmp_path / "rules.ckpt", student=network(8, 3), teacher=network(16, 2))
    for name, value in module.student.state_dict().items():
        assert torch.equal(loaded.student.state_dict()[name], value)
    same = KD.load_from_checkpoint(
        tmp_path / "rules.ckpt", student=network(8, 3), teacher=network(16, 2),
        item_weights={"soft": SelectByRunningPercentile(75.0)},
    )  # fmt: skip
    assert torch.equal(same.item_weights["soft"].histogram, stored["item_rules.soft.histogram"])


def test_the_live_losses_are_let_go_after_the_backward(make_trainer):
    class Look(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            assert set(pl_module.live.losses) == {"hard", "soft"}

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert pl_module.live is None

    module, _ = small_fit(make_trainer, Look())
    assert module.live is None


def kd(**arguments):
    return KD(network(8, 1), network(16, 2), **arguments)


def unscaled():
    return kd(terms={"soft": SoftTargets(scale_by_t2=False)})


@pytest.mark.parametrize(
    ("callback", "module", "error", "message"),
    [
        (lambda: LogSelection(), kd, TypeError, "KD has none of them"),
        (lambda: GradientAlignment(second="dkd"), kd, ValueError, r"\['dkd'\] is not there"),
        (lambda: GradientAlignment(layer="head"), kd, ValueError, "Sequential has no submodule 'head'. Nearest names"),
        (lambda: GradientAlignment(layer="1"), kd, ValueError, "The layer '1' has no trainable parameter"),
        (lambda: GradientAlignment(), BoringModel, TypeError, "loss terms, which BoringModel does not have"),
        (lambda: GradientVarianceTemperature(), lambda: kd(temperature=lambda step: 2.0), TypeError, "computes by"),
        (lambda: GradientVarianceTemperature(), unscaled, ValueError, "`scale_by_t2=False`"),
        (lambda: TaskDifficulty(), lambda: kd(temperature=lambda step: 2.0), TypeError, "has no constant"),
        (lambda: TaskDifficulty(weighted="kd"), kd, ValueError, "`weighted` of TaskDifficulty is 'kd'"),
        (lambda: TaskDifficulty(term="mmd"), kd, ValueError, "`term` of TaskDifficulty is 'mmd'"),
        (lambda: TaskDifficulty(metric="val/f1"), kd, ValueError, "'val/f1', which was not logged"),
        (lambda: TaskDifficulty(), lambda: KD(network(8, 1), alpha=1.0), ValueError, "`weighted`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_module_is_refused(make_trainer, callback, module, error, message):
    with pytest.raises(error, match=message):
        small_fit(make_trainer, callback(), module=module(), max_epochs=1, max_steps=-1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientVarianceTemperature(0.0), "`tau0` must be positive"),
        (lambda: GradientVarianceTemperature(momentum=1.0), r"`momentum` must be in \[0, 1\), got 1.0"),
        (lambda: GradientVarianceTemperature(micro_batches=1), "`micro_batches` must be at least 2"),
        (lambda: GradientAlignment(-1.0), "`alpha` must not be negative"),
        (lambda: GradientAlignment(momentum=-0.1), "`momentum`"),
        (lambda: GradientAlignment(every_n_steps=0), "`every_n_steps` must be positive, got 0"),
        (lambda: TaskDifficulty(limit=-0.1), "`limit` must not be negative"),
        (lambda: TaskDifficulty(beta=math.inf), "`beta` must be finite"),
        (lambda: TaskDifficulty(teacher_accuracy=0.0), "`teacher_accuracy` must be positive"),
        (lambda: TaskDifficulty(momentum=1.0), "`momentum`"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_selection_works_without_labels(make_trainer):
    x = torch.randn(16, 4)
    module = KD(
        network(8, 1), network(16, 2), item_weights={"*": SelectByPercentile(75.0, source="teacher", keep="below")}
    )
    trainer = make_trainer(callbacks=[LogSelection()], max_steps=2)
    trainer.fit(module, DataLoader(TensorDataset(x, torch.full((16,), -100)), batch_size=8))
    assert trainer.global_step == 2
    report = trainer.callbacks[0].reports["all"]
    assert report.n == 16
    assert report.fraction == 0.75
    assert math.isnan(report.balance)
