"""KD: what it computes, what it leaves alone, what it logs."""

import copy
import logging
import warnings
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, DistillationModule, Outputs
from lightning_distill.losses import CrossEntropy, SoftTargets
from lightning_distill.tasks import Classification, Regression, Task
from lightning_distill.weighting import FixedWeights


def network(width=16, seed=0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = nn.BatchNorm1d(width) if norm else nn.Identity()
        return nn.Sequential(
            nn.Linear(8, width), middle, nn.ReLU(), nn.Dropout(0.5) if norm else nn.Identity(), nn.Linear(width, 3)
        )


def data(items=32, unlabelled=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(items, 8, generator=generator), torch.randint(0, 3, (items,), generator=generator)
    y[:unlabelled] = -100
    return TensorDataset(x, y)


def loader(batch_size=8, **kwargs):
    return DataLoader(data(**kwargs), batch_size=batch_size)


@pytest.mark.chapter("A01", "A51", api="lightning_distill.KD")
def test_the_loss_is_the_golden_one(golden):
    case = golden("kd_loss_forward")
    logits, labels = case.inputs["student_logits"], case.inputs["labels"].long()
    module = KD(nn.Identity(), lambda batch: case.inputs["teacher_logits"], case.inputs["tau"], case.inputs["alpha"])
    losses = module.losses(module.observe((logits, labels)))
    torch.testing.assert_close(
        losses["hard"], torch.tensor(case.expected["ce"], dtype=torch.float64), rtol=case.rtol, atol=case.atol
    )
    torch.testing.assert_close(
        losses["soft"], torch.tensor(case.expected["kl"], dtype=torch.float64), rtol=case.rtol, atol=case.atol
    )
    total = module.weighting(losses)
    torch.testing.assert_close(
        total, torch.tensor(case.expected["total"], dtype=torch.float64), rtol=case.rtol, atol=case.atol
    )


@pytest.mark.chapter("A51")
def test_the_total_is_linear_in_the_weights(golden):
    case = golden("total_loss")
    names = [f"term{i}" for i in range(4)]
    weighting = FixedWeights(dict(zip(names, case.inputs["lambdas"].tolist(), strict=True)))
    total = weighting(dict(zip(names, case.inputs["losses"], strict=True)))
    assert total.item() == pytest.approx(case.expected["total"], rel=case.rtol)


@pytest.mark.chapter("A01", "A52")
def test_alpha_one_is_cross_entropy_and_needs_no_teacher():
    x, y = data().tensors
    module = KD(network(), alpha=1.0)
    step = module.observe((x, y))
    torch.testing.assert_close(module.weighting(module.losses(step)), F.cross_entropy(module.student(x), y))


@pytest.mark.chapter("A01")
def test_an_equal_teacher_leaves_nothing_to_learn():
    module = KD(network(), network(), alpha=0.0)
    losses = module.losses(module.observe(data().tensors))
    assert losses["soft"].item() == pytest.approx(0, abs=1e-6)


def test_unlabelled_items_count_for_the_teacher_and_not_for_the_labels():
    x, y = data(unlabelled=20).tensors
    module = KD(network(), network(seed=1), alpha=0.5)
    losses = module.losses(module.observe((x, y)))
    per_item = F.cross_entropy(module.student(x)[20:], y[20:], reduction="sum") / 32
    torch.testing.assert_close(losses["hard"], per_item)
    everybody = module.losses(module.observe((x,)))
    torch.testing.assert_close(losses["soft"], everybody["soft"])
    assert everybody["hard"].item() == 0


def test_fit_changes_the_student_and_nothing_in_the_teacher(make_trainer):
    student, teacher = network(norm=True), network(width=64, norm=True, seed=1)
    module = KD(student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    student_before = copy.deepcopy(student.state_dict())
    module.train()  # what a user, or an older Trainer, may do
    teacher.train()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader(), verbose=False)
    module.train()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(), loader())
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not any(torch.equal(student.state_dict()[name], student_before[name]) for name in student_before)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in student.parameters()}


def test_the_trainer_does_not_warn_of_modules_in_eval_mode(make_trainer, caplog):
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        make_trainer(max_epochs=1).fit(KD(network(), network(norm=True)), loader(), loader())
    said = [str(entry.message) for entry in caught] + [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "eval mode" in text]


@pytest.mark.parametrize("width", [4, 512])
def test_checkpoints_hold_no_byte_of_the_teacher(make_trainer, tmp_path, width):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(KD(network(), network(width, seed=1)), loader())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    checkpoint = torch.load(tmp_path / "kd.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"student.{name}" for name in network().state_dict()}
    moments = sum(v.numel() for s in checkpoint["optimizer_states"][0]["state"].values() for v in s.values())
    weights = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert moments == 2 * weights + len(checkpoint["state_dict"])
    assert (tmp_path / "kd.ckpt").stat().st_size < 4 * (weights + moments) + 25_000  # random states, names, loops


def test_a_checkpoint_loads_with_and_without_the_teacher(make_trainer, tmp_path):
    module = KD(network(), network(64, seed=1), temperature=3.0, alpha=0.25)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    x = data().tensors[0]
    alone = KD.load_from_checkpoint(tmp_path / "kd.ckpt", student=network(seed=5))
    both = KD.load_from_checkpoint(tmp_path / "kd.ckpt", student=network(seed=6), teacher=network(64, seed=1))
    for loaded in (alone, both):
        torch.testing.assert_close(loaded.student(x), module.student(x))
        assert loaded.temperature == 3.0
        assert loaded.weighting.weights() == {"hard": 0.25, "soft": 0.75}
    assert alone.teacher is None
    assert both.losses(both.observe(data().tensors))["soft"] > 0
    (alone_result,) = make_trainer().test(alone, loader(), verbose=False)
    (both_result,) = make_trainer().test(both, loader(), verbose=False)
    assert set(both_result) - set(alone_result) == {
        f"test/{n}" for n in ("agreement", "fidelity", "loss", "hard", "soft")
    }
    assert alone_result["test/accuracy"] == both_result["test/accuracy"]


def test_a_run_without_the_needed_teacher_is_refused_before_it_starts(make_trainer):
    with pytest.raises(ValueError, match=r"`teacher` is None, but the loss terms \['soft'\]"):
        make_trainer(max_epochs=1).fit(KD(network(), alpha=0.5), loader())


def test_metrics_equal_a_computation_by_hand(make_trainer):
    student, teacher = network(), network(seed=1)
    x, y = data(items=30, unlabelled=7).tensors
    (result,) = make_trainer().test(KD(student, teacher), loader(items=30, unlabelled=7), verbose=False)
    with torch.no_grad():
        s, t = student(x), teacher(x)
    assert result["test/accuracy"] == pytest.approx((s[7:].argmax(1) == y[7:]).float().mean().item())
    assert result["test/nll"] == pytest.approx(F.cross_entropy(s[7:], y[7:]).item(), rel=1e-5)
    assert result["test/agreement"] == pytest.approx((s.argmax(1) == t.argmax(1)).float().mean().item())
    kl = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    assert result["test/fidelity"] == pytest.approx(kl.item(), rel=1e-5)
    assert result["test/hard"] == pytest.approx(F.cross_entropy(s[7:], y[7:], reduction="sum").item() / 30, rel=1e-5)
    assert result["test/loss"] == pytest.approx(0.3 * result["test/hard"] + 0.7 * result["test/soft"], rel=1e-5)


def test_every_term_is_logged_raw_and_weighted(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, version="")
    frozen = partial(torch.optim.SGD, lr=1e-30)  # the losses of the log are then those of the first weights
    module = KD(network(), network(seed=1), alpha=0.5, optimizer=frozen)
    make_trainer(max_epochs=2, logger=logger, log_every_n_steps=4).fit(module, loader())
    rows = (tmp_path / "lightning_logs" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    entries = [dict(zip(names, row.split(","), strict=True)) for row in rows[1:]]
    assert [entry["step"] for entry in entries] == ["3", "7"]
    losses = module.losses(module.observe(data().tensors))
    for entry in entries:
        assert float(entry["train/hard"]) == pytest.approx(losses["hard"].item(), rel=1e-5)
        assert float(entry["train/soft"]) == pytest.approx(losses["soft"].item(), rel=1e-5)
        assert float(entry["train_weighted/soft"]) == pytest.approx(0.5 * losses["soft"].item(), rel=1e-5)
        assert float(entry["train/loss"]) == pytest.approx(0.5 * (losses["hard"] + losses["soft"]).item(), rel=1e-5)


def test_predict_gives_logits_classes_and_indices(make_trainer):
    x, y = data(items=5).tensors
    batches = DataLoader(TensorDataset(x, y, torch.arange(10, 15)), batch_size=5)
    module = KD(network())
    (said,) = make_trainer().predict(module, batches)
    module.eval()
    torch.testing.assert_close(said["logits"], module(x).detach())
    assert said["predictions"].tolist() == said["logits"].argmax(1).tolist()
    assert said["index"].tolist() == [10, 11, 12, 13, 14]


def test_export_gives_the_student_alone(tmp_path):
    student = network(norm=True)
    module = KD(student, network(seed=1))
    exported = module.export(tmp_path / "student.safetensors")
    assert type(exported) is nn.Sequential
    assert exported is not student
    assert not exported.training
    assert not any(m._forward_hooks for m in exported.modules())
    from lightning_distill.teachers import load_network

    loaded = load_network(network(norm=True, seed=9), str(tmp_path / "student.safetensors")).eval()
    x = data().tensors[0]
    torch.testing.assert_close(loaded(x), exported(x))
    with pytest.raises(FileExistsError, match="pass `overwrite=True`"):
        module.export(tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match=r"`path` must end in '.safetensors', got '.*student.pt'"):
        module.export(tmp_path / "student.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]


def test_terms_can_be_replaced_and_added():
    module = KD(
        network(),
        network(seed=1),
        alpha=0.5,
        terms={"soft": SoftTargets(beta=1.0), "more": CrossEntropy()},
        weights={"more": 0.1},
    )
    assert module.terms["soft"].beta == 1.0
    assert module.weighting.weights() == {"hard": 0.5, "soft": 0.5, "more": 0.1}


def test_item_weights_apply_to_the_named_term_or_to_all():
    x, y = data().tensors
    half = lambda step: (torch.arange(32) < 16).float()  # noqa: E731
    plain = KD(network(), network(seed=1))
    one = KD(network(), network(seed=1), item_weights={"soft": half})
    every = KD(network(), network(seed=1), item_weights={"*": half})
    base, first = plain.losses(plain.observe((x, y))), plain.losses(plain.observe((x[:16], y[:16])))
    weighted = one.losses(one.observe((x, y)))
    torch.testing.assert_close(weighted["hard"], base["hard"])
    torch.testing.assert_close(weighted["soft"], first["soft"] / 2)
    weighted = every.losses(every.observe((x, y)))
    torch.testing.assert_close(weighted["hard"], first["hard"] / 2)


def test_a_temperature_rule_gives_each_item_its_own_with_its_own_square():
    x, y = data(items=2).tensors
    rule = lambda step: torch.tensor([2.0, 5.0])  # noqa: E731
    module = KD(network(), network(seed=1), temperature=rule)
    soft = module.losses(module.observe((x, y)))["soft"]
    single = [KD(network(), network(seed=1), temperature=t) for t in (2.0, 5.0)]
    parts = [m.losses(m.observe((x[i : i + 1], y[i : i + 1])))["soft"] for i, m in enumerate(single)]
    torch.testing.assert_close(soft, (parts[0] + parts[1]) / 2)


def test_progress_runs_from_zero_to_one(make_trainer):
    seen = []

    def rule(step):
        seen.append((step.step, step.epoch, step.progress))
        return 1.0

    module = KD(network(), network(seed=1), temperature=rule)
    make_trainer(max_epochs=2).fit(module, loader(batch_size=16))
    assert seen == [(0, 0, 0.0), (1, 0, 0.25), (2, 1, 0.5), (3, 1, 0.75)]


def test_a_batch_transform_reaches_student_and_teacher_alike(make_trainer):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    module = KD(Spy(8, 3), Spy(8, 3), batch_transform=lambda batch: (batch[0] + 1, batch[1]))
    make_trainer(max_epochs=1, limit_train_batches=1).fit(module, loader())
    torch.testing.assert_close(seen[0], data().tensors[0][:8] + 1)
    torch.testing.assert_close(seen[0], seen[1])


def test_regression_learns_from_numbers(make_trainer):
    x = torch.randn(64, 8)
    teacher = nn.Linear(8, 2)
    y = torch.full((64, 2), float("nan"))
    y[:4] = teacher(x[:4]).detach()
    fast = partial(torch.optim.Adam, lr=0.05)
    module = KD(nn.Linear(8, 2), teacher, alpha=0.5, task=Regression(), optimizer=fast)
    batches = DataLoader(TensorDataset(x, y), batch_size=32)
    make_trainer(max_epochs=150).fit(module, batches)
    (result,) = make_trainer().test(module, batches, verbose=False)
    assert result["test/mse"] < 1e-3
    assert "test/agreement" not in result


def test_the_first_logged_loss_survives_bfloat16(make_trainer):
    module = KD(network(), network(seed=1))
    trainer = make_trainer(max_epochs=1, precision="bf16-mixed", log_every_n_steps=1)
    trainer.fit(module, loader())
    assert 0 < trainer.callback_metrics["train/loss"] < 10


def test_bf16_true_leaves_the_teacher_its_own_precision(make_trainer):
    teacher = network(seed=1)
    module = KD(network(), teacher)
    make_trainer(max_epochs=1, precision="bf16-true").fit(module, loader(), loader())
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert {p.dtype for p in module.student.parameters()} == {torch.bfloat16}


def test_the_task_and_outputs_may_be_the_users_own(make_trainer):
    class Pairs(Classification):
        def run(self, network, batch):
            return Outputs(network(batch["left"] + batch["right"]))

        def inputs(self, batch):
            return batch["left"]

    x, y = data().tensors
    module = KD(network(), network(seed=1), task=Pairs())
    losses = module.losses(module.observe({"left": x, "right": x, "y": y}))
    assert all(value > 0 for value in losses.values())
    assert isinstance(module, DistillationModule | L.LightningModule)
    assert isinstance(module.task, Task)


def test_scheduler_and_optimizer_are_the_given_ones(make_trainer):
    module = KD(
        network(),
        alpha=1.0,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        lr_interval="step",
    )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5**4)
