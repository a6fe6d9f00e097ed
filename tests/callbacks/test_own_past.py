"""Snapshots and earlier predictions of the student as its teachers."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from scipy.special import rel_entr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, Outputs, Step
from lightning_distill.callbacks import SnapshotTeacher, SoftLabelRefinement
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import (
    FeatureMatching,
    KnownOutputs,
    PastOutputs,
    RefinedTargets,
    SoftTargets,
    TemporalTargets,
    kl_divergence,
    refined_cross_entropy,
    temporal_kd,
)
from lightning_distill.losses.targets import CrossEntropy
from lightning_distill.tasks import Classification
from lightning_distill.teachers import PastTeacher, PreviousPredictions


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def tensors(items=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(items, 8, generator=generator), torch.randint(0, 3, (items,), generator=generator)


def loader(batch_size=8):
    return DataLoader(TensorDataset(*tensors()), batch_size=batch_size)


def data(**arguments):
    return TensorDataModule(tensors(), tensors(), **({"batch_size": 8} | arguments))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.chapter("B23", api="lightning_distill.losses.temporal_kd")
def test_several_teachers_match_golden_and_their_averages(golden):
    case = golden("temporal_self_kd")
    past = case.inputs["checkpoints"].log().unsqueeze(1)
    weights, student = case.inputs["weights"], case.inputs["p_student"].log().unsqueeze(0).requires_grad_()
    forward = temporal_kd(student, past, weights)
    assert forward.item() == pytest.approx(float(case.expected["forward_sum"]), rel=case.rtol)
    reverse = temporal_kd(student, past, weights, direction="reverse")
    assert reverse.item() == pytest.approx(float(case.expected["as_written_reverse_sum"]), rel=case.rtol)
    arithmetic = (weights[:, None, None] * past.exp()).sum(0).log()
    mean = kl_divergence(student, arithmetic)
    assert mean.item() == pytest.approx(float(case.expected["kl_to_arithmetic_mean"]), rel=1e-8)
    assert (forward - mean).item() == pytest.approx(float(case.expected["constant"]), rel=case.rtol)
    geometric = (weights[:, None, None] * past).sum(0).log_softmax(-1)
    other = kl_divergence(student, geometric, direction="reverse")
    assert other.item() == pytest.approx(float(case.expected["kl_to_geometric_mean"]), rel=1e-7)
    for summed, averaged in ((forward, mean), (reverse, other)):  # one averaged teacher gives the same gradient
        one, two = (torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (summed, averaged))
        torch.testing.assert_close(one, two)


@pytest.mark.chapter("B23", api="lightning_distill.losses.TemporalTargets")
def test_the_term_averages_what_was_softened():
    torch.manual_seed(0)
    student, past, weights = torch.randn(4, 5), torch.randn(3, 4, 5), torch.tensor([0.5, 0.3, 0.2])
    step = Step(None, Outputs(student), PastOutputs(past[0], members=past, weights=weights), temperature=3.0)
    p, q = ((z.double() / 3).softmax(-1).numpy() for z in (past, student))
    expected = 9 * (weights.double().numpy()[:, None] * rel_entr(p, q[None]).sum(-1)).sum(0)
    np.testing.assert_allclose(TemporalTargets()(step).numpy(), expected, rtol=1e-5)
    one = Step(None, Outputs(student), Outputs(past[0]), temperature=3.0)
    torch.testing.assert_close(TemporalTargets()(one), SoftTargets()(one))
    torch.testing.assert_close(TemporalTargets("reverse")(one), SoftTargets(beta=1.0)(one))
    half = temporal_kd(student.bfloat16(), past.bfloat16(), weights)
    assert half.dtype == torch.float32
    assert temporal_kd(1e4 * student, -1e4 * past, weights, temperature=0.01).isfinite().all()


@pytest.mark.chapter("B23", api="lightning_distill.teachers.PastTeacher")
def test_the_last_networks_speak_newest_first():
    student = network().eval()
    teacher = PastTeacher(student, size=2, weights=[0.8, 0.2])
    batch, task = tensors(), Classification()
    assert teacher(batch, task) is None
    said = []
    for seed in (1, 2, 3):
        teacher.remember(network(seed))
        said.append(network(seed).eval()(batch[0]).softmax(-1).detach())
    assert len(teacher.members()) == 2
    outputs = teacher(batch, task)
    torch.testing.assert_close(outputs.logits.exp(), 0.8 * said[2] + 0.2 * said[1])
    torch.testing.assert_close(outputs.weights, torch.tensor([0.8, 0.2]))
    teacher.tap(["2"])
    torch.testing.assert_close(teacher(batch, task).features["2"], network(3)[:3].eval()(batch[0]))
    other = PastTeacher(network(9), size=2)
    other.load_state_dict(teacher.state_dict())
    assert other.remembered == 3
    torch.testing.assert_close(other.members()[0][0].weight, network(3)[0].weight)
    single = PastTeacher(student, size=3, weights=[0.5, 0.3, 0.2])
    single.remember(network(1))
    torch.testing.assert_close(single(batch, task).logits.softmax(-1), said[0])
    single.remember(network(2))  # those that are there share the whole weight
    torch.testing.assert_close(single(batch, task).logits.exp(), 0.625 * said[1] + 0.375 * said[0])


@pytest.mark.chapter("B23", api="lightning_distill.callbacks.SnapshotTeacher")
def test_snapshots_are_taken_between_epochs_and_teach_from_then_on(make_trainer):
    ends, seen = [], []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            ends.append(copy.deepcopy(module.student.state_dict()))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append([copy.deepcopy(member.state_dict()) for member in module.teacher.members()])

    module = KD(network(), alpha=0.5, optimizer=sgd, terms={"soft": TemporalTargets()})
    trainer = make_trainer(
        max_epochs=4, callbacks=[SnapshotTeacher(size=2), Watch()], limit_train_batches=2, log_every_n_steps=2
    )
    trainer.fit(module, loader())
    assert [len(members) for members in seen] == [0, 0, 1, 1, 2, 2, 2, 2]
    for epoch in (1, 2, 3):
        for age, member in enumerate(seen[2 * epoch]):
            assert all(torch.equal(value, ends[epoch - 1 - age][name]) for name, value in member.items())
    assert trainer.callback_metrics["train/soft"] > 0
    assert set(module.export().state_dict()) == set(network().state_dict())
    rare = KD(network(), alpha=0.5, optimizer=sgd)
    make_trainer(max_epochs=5, callbacks=[SnapshotTeacher(size=3, every_n_epochs=2)]).fit(rare, loader())
    assert rare.teacher.remembered == 2


def test_before_the_first_snapshot_the_teachers_terms_are_silent(make_trainer):
    """Also for the optimizer: a projection gets zero gradients, which other processes wait for."""
    module = KD(network(), alpha=0.5, optimizer=sgd, terms={"hint": FeatureMatching({"2": "2"})})
    gradients = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradients.append([p.grad.abs().sum().item() for p in module.terms.parameters()])

    trainer = make_trainer(
        max_epochs=2, callbacks=[SnapshotTeacher(), Watch()], limit_train_batches=1, log_every_n_steps=1
    )
    trainer.fit(module, datamodule=data())
    assert gradients[0]
    assert not any(gradients[0])
    assert any(gradients[1])


@pytest.mark.parametrize("kind", ["snapshots", "refinement"])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path, kind):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step in (6, 8):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def run(seed, callbacks, **fit):
        snapshots = kind == "snapshots"
        module = KD(network(seed), alpha=0.5 if snapshots else 1.0, optimizer=sgd)
        callback = SnapshotTeacher(size=2) if snapshots else SoftLabelRefinement()
        make_trainer(max_epochs=4, callbacks=[callback, *callbacks]).fit(module, datamodule=data(), **fit)
        return module

    straight = run(0, [Save()])
    for step in (6, 8):  # in the middle of an epoch; at the end of one
        resumed = run(5, [], ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        for name, value in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)
        if kind == "refinement":
            assert torch.equal(resumed.teacher.previous[0], straight.teacher.previous[0])


@pytest.mark.chapter("B23", api="lightning_distill.losses.refined_cross_entropy")
def test_refined_targets_are_cross_entropy_with_the_mixture():
    torch.manual_seed(0)
    student, previous, y = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, -100])
    known = torch.tensor([True, True, True, False, True, True])
    term = RefinedTargets(CrossEntropy(), alpha=0.8, epochs=4)
    assert [term.alpha_at(epoch) for epoch in (0, 1, 3, 9)] == pytest.approx([0.2, 0.4, 0.8, 0.8])
    step = Step(None, Outputs(student), KnownOutputs(previous, known=known), labels=y, epoch=1)
    onehot = nn.functional.one_hot(y.clamp_min(0), 4).float() * (y >= 0).unsqueeze(1)
    share = 0.4 * known.float().unsqueeze(1)
    target = (1 - share) * onehot + share * previous.softmax(-1)
    expected = -(target * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(term(step), expected)
    alone = Step(None, Outputs(student), None, labels=y, epoch=3)
    torch.testing.assert_close(term(alone), CrossEntropy()(alone))
    hard = CrossEntropy()(alone)
    torch.testing.assert_close(refined_cross_entropy(hard, student, previous, 0.0), hard)


@pytest.mark.chapter("B23", api="lightning_distill.callbacks.SoftLabelRefinement")
def test_the_targets_are_what_was_said_one_epoch_ago(make_trainer):
    said, given = [{}, {}, {}], []

    class Spy(KD):
        def losses(self, step):
            if not self.training:
                return super().losses(step)
            for index, row in zip(step.index.tolist(), step.student.logits.detach().clone(), strict=True):
                said[step.epoch][index] = row
            given.append((step.epoch, step.index, step.teacher))
            return super().losses(step)

    module = Spy(network(), alpha=1.0, optimizer=sgd)
    trainer = make_trainer(max_epochs=3, callbacks=[SoftLabelRefinement(0.8)], limit_val_batches=0)
    trainer.fit(module, datamodule=data())
    assert [teacher is None for _, _, teacher in given] == [True] * 4 + [False] * 8
    for epoch, index, teacher in given[4:]:
        assert teacher.known.all()
        torch.testing.assert_close(teacher.logits, torch.stack([said[epoch - 1][i] for i in index.tolist()]))
    assert isinstance(module.terms["hard"], RefinedTargets)
    assert module.terms["hard"].epochs == 3
    make_trainer().validate(module, datamodule=data(), verbose=False)


def test_samples_that_never_came_keep_their_labels(make_trainer):
    module = KD(network(), alpha=1.0, optimizer=sgd)
    trainer = make_trainer(max_epochs=2, callbacks=[SoftLabelRefinement()], limit_train_batches=2)
    trainer.fit(module, datamodule=data())
    logits, known = module.teacher.previous
    assert known.sum() == 16
    assert torch.equal(logits[~known], torch.zeros(16, 3))
    module.train()
    index = torch.arange(32)
    outputs = module.teacher((*tensors(), index), module.task)
    assert torch.equal(outputs.known, known)
    module.eval()
    assert module.teacher((*tensors(), index), module.task) is None


def test_a_checkpoint_of_refined_labels_loads_anywhere(make_trainer, tmp_path):
    module = KD(network(), alpha=1.0, optimizer=sgd)
    trainer = make_trainer(max_epochs=2, callbacks=[SoftLabelRefinement()])
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    loaded = KD.load_from_checkpoint(tmp_path / "kd.ckpt", student=network(3), weights_only=True)
    assert torch.equal(loaded.student[0].weight, module.student[0].weight)
    (tested,) = make_trainer(callbacks=[SoftLabelRefinement()]).test(
        KD(network(), alpha=1.0), loader(), ckpt_path=tmp_path / "kd.ckpt", weights_only=True, verbose=False
    )
    assert 0 <= tested["test/accuracy"] <= 1


BAD = {
    "size": (lambda: PastTeacher(network(), 0), "`size`, the number of networks that are kept, must be at least 1"),
    "weights": (lambda: PastTeacher(network(), 2, [1.0]), "`weights` must have one entry for each of the 2 networks"),
    "negative": (lambda: PastTeacher(network(), 2, [1.0, -1.0]), "must be finite and not negative, and the first one"),
    "zero": (lambda: PastTeacher(network(), 2, [0.0, 1.0]), r"the first one positive .* got \[0.0, 1.0\]"),
    "snapshots": (lambda: SnapshotTeacher(0), "`size`, the number of snapshots, must be at least 1, got 0"),
    "every": (lambda: SnapshotTeacher(every_n_epochs=0), "`every_n_epochs` must be at least 1, got 0"),
    "alpha": (lambda: SoftLabelRefinement(1.5), r"`alpha`, the share of .* must be in \[0, 1\], got 1.5"),
    "samples": (lambda: SoftLabelRefinement(samples=0), "`samples`, the size of the training set, must be at least 1"),
    "table": (lambda: PreviousPredictions(0), "`samples`, the size of the training set, must be at least 1, got 0"),
    "epochs": (lambda: RefinedTargets(CrossEntropy(), epochs=0), "`epochs` must be at least 1, got 0"),
    "direction": (lambda: TemporalTargets("both"), "`direction` must be 'forward' or 'reverse', got 'both'"),
    "function's direction": (
        lambda: temporal_kd(torch.ones(1, 2), torch.ones(1, 1, 2), torch.ones(1), direction="x"),
        "`direction` must be",
    ),
    "teachers": (
        lambda: temporal_kd(torch.ones(1, 2), torch.ones(3, 1, 2), torch.ones(2)),
        "one entry for each of the teachers",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


RUNS = {
    "nothing to learn": (KD, {"alpha": 0.0}, [SnapshotTeacher()], "Before the first snapshot there is nobody to learn"),
    "a teacher": (KD, {"teacher": nn.Linear(8, 3)}, [SnapshotTeacher()], "Teacher; SnapshotTeacher brings its own"),
    "averaging": (KD, {}, [WeightAveraging(), SnapshotTeacher()], "WeightAveraging is listed before SnapshotTeacher"),
    "two wishes": (KD, {}, [SoftLabelRefinement(samples=32)], r"the loss terms \['soft'\] need a teacher of their own"),
    "unknown size": (KD, {"alpha": 1.0}, [SoftLabelRefinement()], "know the size of the training set: pass `samples`"),
    "no index": (KD, {"alpha": 1.0}, [SoftLabelRefinement(samples=32)], "The batch has no `index`"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_bad_runs_are_refused(make_trainer, name):
    kind, arguments, callbacks, message = RUNS[name]
    module = kind(network(), **arguments)
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=1, callbacks=callbacks).fit(module, loader())


def test_tokens_have_no_previous_predictions():
    teacher = PreviousPredictions(4)
    step = Step(None, Outputs(torch.zeros(2, 5, 3)), index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"needs one prediction per sample, got logits of shape \(2, 5, 3\)"):
        teacher.see(step)
