"""BornAgain: what a generation is, what it learns from, what stays and what is exported."""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import BornAgain
from lightning_distill.callbacks import GenerationEarlyStopping
from lightning_distill.callbacks.generations import best_generation
from lightning_distill.diagnostics import convergence_diagnostics
from lightning_distill.losses import CrossEntropy, FeatureMatching
from lightning_distill.modules import Generation, reset_parameters
from lightning_distill.modules.reinitialize import reinitialize
from lightning_distill.tasks import Regression
from lightning_distill.teachers import MeanPrediction
from lightning_distill.weighting import FixedWeights


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def loader(items=32, batch_size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(items, 8, generator=generator), torch.randint(0, 3, (items,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Spy(L.Callback):
    """What each training step sees: generation, the student's weights before it, optimizer, teacher."""

    def __init__(self):
        self.seen = []
        self.ends = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(
            {
                "generation": module.generation,
                "student": copy.deepcopy(module.student.state_dict()),
                "teacher": [copy.deepcopy(member.state_dict()) for member in module.teacher.members()],
                "fresh": not optimizer.state,
                "lr": optimizer.param_groups[0]["lr"],
                "weights": dict(module.weighting.weights()),
                "smoothing": module.terms["hard"].label_smoothing,
                "transform": module.batch_transform,
            }
        )

    def on_train_epoch_end(self, trainer, module):
        self.ends.append(copy.deepcopy(module.student.state_dict()))


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def fit(make_trainer, module, epochs=3, **trainer):
    spy = Spy()
    trainer = make_trainer(max_epochs=epochs, callbacks=[spy, *trainer.pop("callbacks", [])], **trainer)
    trainer.fit(module, loader(), loader(seed=2))
    return trainer, spy


@pytest.mark.chapter("B01", api="lightning_distill.BornAgain")
def test_a_generation_is_taught_by_the_one_before_and_starts_afresh(make_trainer):
    student = network()
    module = BornAgain(
        student,
        generations=3,
        alpha=0.25,
        optimizer=sgd,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
    )
    parameters = list(student.parameters())
    trainer, spy = fit(make_trainer, module, epochs=6)
    assert [step["generation"] for step in spy.seen] == [0] * 8 + [1] * 8 + [2] * 8
    assert [step["fresh"] for step in spy.seen] == ([True] + [False] * 7) * 3
    assert [step["lr"] for step in spy.seen] == pytest.approx(([0.1] * 4 + [0.01] * 4) * 3)
    assert spy.seen[0]["weights"] == {"hard": 1.0, "soft": 0.0}
    assert spy.seen[8]["weights"] == {"hard": 0.25, "soft": 0.75}
    assert spy.seen[0]["teacher"] == []
    for first, end in ((8, 1), (16, 3)):  # the teacher is bit by bit what the generation before ended with
        (teacher,) = spy.seen[first]["teacher"]
        assert equal(teacher, spy.ends[end])
        assert equal(spy.seen[first + 7]["teacher"][0], teacher)
    starts = [spy.seen[i]["student"]["0.weight"] for i in (0, 8, 16)]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
    assert spy.seen[8]["student"]["1.num_batches_tracked"] == 1  # reset, and one batch seen
    assert all(ours is theirs for ours, theirs in zip(student.parameters(), parameters, strict=True))
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in parameters}
    assert len(trainer.lr_scheduler_configs) == 1
    assert not any(p.requires_grad or p.grad is not None for p in module.teacher.parameters())


@pytest.mark.chapter("B01")
def test_generation_zero_is_plain_training(make_trainer):
    """The same weights as a plain loop on labels gives."""
    student, by_hand = network(), network()
    torch.manual_seed(5)
    make_trainer(max_epochs=1).fit(BornAgain(student, generations=1, optimizer=sgd), loader())
    torch.manual_seed(5)
    optimizer = sgd(by_hand.parameters())
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(x), y).backward()
        optimizer.step()
    assert equal(student.state_dict(), by_hand.state_dict())


def test_new_weights_are_those_of_the_seed_and_leave_the_generators_alone(make_trainer):
    starts = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        module = BornAgain(network(), generations=2, optimizer=sgd, seed=seed)
        _, spy = fit(make_trainer, module, epochs=2, limit_train_batches=1)
        starts.append(spy.seen[1]["student"]["0.weight"])
    before = torch.get_rng_state()
    expected = network()
    reinitialize(expected, reset_parameters, seed=1)  # generation 1 of seed 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(expected[0].weight, starts[0])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.chapter("B04", api="lightning_distill.modules.Generation")
def test_generations_have_settings_of_their_own(make_trainer):
    def shift(batch):
        return (batch[0] + 1, batch[1])

    settings = [Generation(), Generation(shift, label_smoothing=0.2, alpha=0.9), Generation(seed=77)]
    module = BornAgain(network(), generations=3, per_generation=settings, optimizer=sgd, batch_transform=tuple)
    _, spy = fit(make_trainer, module, limit_train_batches=1)
    assert [step["transform"] for step in spy.seen] == [tuple, shift, tuple]
    assert [step["smoothing"] for step in spy.seen] == [0.0, 0.2, 0.0]
    assert [step["weights"]["hard"] for step in spy.seen] == [1.0, 0.9, 0.5]
    expected = network()
    torch.manual_seed(77)
    reset_parameters(expected)
    assert torch.equal(spy.seen[2]["student"]["0.weight"], expected[0].weight)


def test_the_best_weights_of_a_generation_go_on(make_trainer):
    module = BornAgain(
        network(), generations=2, monitor="val/accuracy", mode="min", predict_with="best", optimizer=sgd, keep=True
    )
    values = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                values.append(trainer.callback_metrics["val/accuracy"].item())

    _, spy = fit(make_trainer, module, epochs=8, callbacks=[Watch()])
    first = min(range(4), key=lambda epoch: values[epoch])
    assert equal(module.teacher.members()[0].state_dict(), spy.ends[first])
    overall = min(range(8), key=lambda epoch: values[epoch])
    exported = module.export()
    assert equal(exported.state_dict(), spy.ends[overall])
    assert all(parameter.requires_grad for parameter in exported.parameters())
    assert not exported.training
    assert equal(module.export(which="last").state_dict(), spy.ends[-1])
    (tested,) = make_trainer().test(module, loader(seed=2), verbose=False)
    assert tested["test/accuracy"] == pytest.approx(values[overall])
    (said, *_) = make_trainer().predict(module, loader(seed=2))
    torch.testing.assert_close(said["logits"], exported(loader(seed=2).dataset.tensors[0][:8]))


def test_each_generation_has_a_best_of_its_own(make_trainer):
    """Also where all of its values are worse than those of the generation before."""
    module = BornAgain(network(), generations=3, monitor="val/accuracy", optimizer=sgd, keep=True)
    keep_best = module._keep_best
    module._keep_best = lambda value: keep_best(-float(module.trainer.current_epoch))
    _, spy = fit(make_trainer, module, epochs=6)
    first, second = module.networks()[:2]
    assert equal(first.state_dict(), spy.ends[0])
    assert equal(second.state_dict(), spy.ends[2])
    assert equal(module.export(which="best").state_dict(), spy.ends[0])


@pytest.mark.chapter("B04", api="lightning_distill.teachers.MeanPrediction")
def test_the_ensemble_predicts_is_exported_and_is_no_worse_than_its_members_on_average(make_trainer, tmp_path):
    module = BornAgain(network(), generations=3, predict_with="ensemble", optimizer=sgd)
    _, spy = fit(make_trainer, module)
    assert [equal(net.state_dict(), end) for net, end in zip(module.networks(), spy.ends, strict=True)] == [True] * 3
    x, y = loader(seed=2).dataset.tensors
    module.eval()
    with torch.no_grad():
        members = torch.stack([net.eval()(x).log_softmax(-1) for net in module.networks()])
    mean = members.exp().mean(0).log()
    exported = module.export(tmp_path / "ensemble.safetensors")
    assert isinstance(exported, MeanPrediction)
    torch.testing.assert_close(exported(x), mean)
    assert len(load_file(tmp_path / "ensemble.safetensors")) == 3 * len(network().state_dict())
    (tested,) = make_trainer().test(module, loader(seed=2), verbose=False)
    nll = nn.functional.nll_loss(mean, y).item()
    assert tested["test/nll"] == pytest.approx(nll, rel=1e-5)
    assert nll <= sum(nn.functional.nll_loss(member, y).item() for member in members) / 3
    report = convergence_diagnostics([member.exp() for member in members])
    assert len(report.gaps) == 2


def test_the_ensemble_teaches(make_trainer):
    module = BornAgain(network(), generations=3, taught_by="ensemble", optimizer=sgd)
    fit(make_trainer, module)
    module.eval()
    x, y = loader().dataset.tensors
    said = module.teacher((x, y), module.task).logits
    past = torch.stack([net(x).softmax(-1) for net in module.teacher.members()])
    torch.testing.assert_close(said.exp(), past.mean(0).detach())
    previous = BornAgain(network(), generations=3, keep=True, optimizer=sgd)
    fit(make_trainer, previous)
    previous.eval()
    torch.testing.assert_close(
        previous.teacher((x, y), previous.task).logits, previous.networks()[1].eval()(x).detach()
    )


def test_metrics_are_logged_by_generation(make_trainer):
    module = BornAgain(network(), generations=2, optimizer=sgd)
    trainer, _ = fit(make_trainer, module, epochs=4)
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy/generation_1"] == metrics["val/accuracy"]
    assert "val/accuracy/generation_0" in metrics
    assert "val/fidelity/generation_0" not in metrics  # there is nobody to agree with
    assert metrics["val/fidelity/generation_1"] > 0
    assert metrics["generation"] == 1


def test_resumed_equals_uninterrupted_in_the_middle_of_a_generation(make_trainer, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step in (6, 8):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    straight = BornAgain(network(), generations=3, optimizer=sgd, seed=4)
    make_trainer(max_epochs=6, limit_train_batches=2, callbacks=[Save()]).fit(straight, loader())
    for step, generation in ((6, 1), (8, 2)):
        resumed = BornAgain(network(seed=9), generations=3, optimizer=sgd, seed=4)
        seen = Spy()
        trainer = make_trainer(max_epochs=6, limit_train_batches=2, callbacks=[seen])
        trainer.fit(resumed, loader(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert equal(resumed.state_dict(), straight.state_dict())
        assert seen.seen[0]["generation"] == generation
        assert resumed.generation == 2


def test_accumulation_and_clipping_count_per_generation(make_trainer):
    module = BornAgain(network(), generations=2, optimizer=sgd)
    trainer, spy = fit(make_trainer, module, epochs=2, accumulate_grad_batches=3, gradient_clip_val=1.0)
    assert [step["generation"] for step in spy.seen] == [0, 0, 1, 1]
    assert trainer.global_step == 4


def test_a_checkpoint_loads_without_a_trainer(make_trainer, tmp_path):
    module = BornAgain(network(), generations=2, alpha=0.4, optimizer=sgd)
    trainer, _ = fit(make_trainer, module, epochs=2)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    loaded = BornAgain.load_from_checkpoint(tmp_path / "b.ckpt", student=network(5), weights_only=True)
    assert loaded.generation == 1
    assert loaded.weighting.weights() == {"hard": 0.4, "soft": 0.6}
    x = loader().dataset.tensors[0]
    module.eval(), loaded.eval()
    torch.testing.assert_close(loaded.student(x), module.student(x))
    torch.testing.assert_close(loaded.teacher.members()[0](x), module.teacher.members()[0](x))


def test_features_of_the_generation_before_can_be_matched(make_trainer):
    module = BornAgain(
        network(), generations=2, optimizer=sgd, terms={"hint": FeatureMatching({"2": "2"})}, weights={"hint": 0.1}
    )
    module.build(next(iter(loader())))
    trainer, _ = fit(make_trainer, module, epochs=2)
    assert trainer.callback_metrics["val/hint/generation_1"] > 0
    exported = module.export()
    assert not any(part._forward_hooks for part in exported.modules())
    assert module.networks()[-1] is module.student


def test_a_compiled_student_goes_on_through_generations(make_trainer):
    students = []
    for compiled in (False, True):
        torch.manual_seed(3)
        module = BornAgain(network(), generations=3, optimizer=sgd, predict_with="ensemble")
        if compiled:
            module.student.compile(backend="eager")
        make_trainer(max_epochs=3).fit(module, loader())
        students.append(module.export(which="ensemble").state_dict())
    assert students[0].keys() == students[1].keys()
    assert equal(students[1], students[0])


def test_regression_generations_average_predictions(make_trainer):
    x = torch.randn(32, 8)
    data = DataLoader(TensorDataset(x, x[:, :2] * 2), batch_size=8)
    module = BornAgain(nn.Linear(8, 2), generations=2, task=Regression(), predict_with="ensemble", optimizer=sgd)
    make_trainer(max_epochs=2).fit(module, data)
    mean = torch.stack([net(x) for net in module.networks()]).mean(0)
    torch.testing.assert_close(module.export()(x), mean)


def test_what_no_generation_has_of_its_own_is_left_to_callbacks(make_trainer):
    class Shift(L.Callback):
        def setup(self, trainer, module, stage):
            module.batch_transform = lambda batch: (batch[0] + 1, batch[1])

    module = BornAgain(network(), generations=2, optimizer=sgd)
    _, spy = fit(make_trainer, module, epochs=2, limit_train_batches=1, callbacks=[Shift()])
    assert [step["transform"] is module.batch_transform for step in spy.seen] == [True, True]


def test_a_fast_dev_run_is_one_batch_of_the_first_generation(make_trainer):
    module = BornAgain(network(), generations=3, optimizer=sgd)
    make_trainer(fast_dev_run=True).fit(module, loader(), loader())
    assert module.generation == 0


def test_the_user_may_weigh_the_terms(make_trainer):
    weighting = FixedWeights({"hard": 0.3, "soft": 2.0})
    module = BornAgain(network(), generations=2, weights={"hard": 0.3}, optimizer=sgd)
    _, spy = fit(make_trainer, module, epochs=2, limit_train_batches=1)
    assert [step["weights"] for step in spy.seen] == [{"hard": 0.3, "soft": 0.0}, {"hard": 0.3, "soft": 0.5}]
    assert BornAgain(network(), weights=weighting).weighting is weighting


@pytest.mark.chapter("B18", api="lightning_distill.callbacks.GenerationEarlyStopping")
def test_generations_end_when_they_do_not_help():
    errors = [0.30, 0.27, 0.26, 0.262, 0.27]
    stops = [best_generation(errors[: k + 1]) for k in range(5)]
    assert stops == [(0, False), (1, False), (2, False), (2, True), (2, True)]
    assert best_generation(errors, patience=3) == (2, False)
    assert best_generation(errors[:2], max_generations=2) == (1, True)
    assert best_generation([0.3, 0.2999], min_delta=0.01) == (0, True)
    assert best_generation([0.3, 0.4], mode="max") == (1, False)
    assert best_generation([math.nan, 0.4]) == (1, False)
    assert best_generation([0.3, math.nan]) == (0, True)


@pytest.mark.chapter("B18")
def test_early_stopping_ends_the_run(make_trainer, tmp_path):
    stopping = GenerationEarlyStopping("val/accuracy", "min", patience=1)
    module = BornAgain(network(), generations=5, optimizer=sgd)
    trainer, _ = fit(make_trainer, module, epochs=5, callbacks=[stopping])
    expected = [trainer.callback_metrics[f"val/accuracy/generation_{k}"].item() for k in range(module.generation + 1)]
    assert stopping.values == pytest.approx(expected)
    assert stopping.best == best_generation(stopping.values)[0]
    assert best_generation(stopping.values)[1]  # with this seed before the fifth
    assert len(stopping.values) < 5
    assert not best_generation(stopping.values[:-1])[1]
    again = GenerationEarlyStopping()
    again.load_state_dict(stopping.state_dict())
    assert (again.values, again.best) == (stopping.values, stopping.best)
    unknown = GenerationEarlyStopping("val/nothing")
    with pytest.raises(
        ValueError, match=r"`monitor` is 'val/nothing', but generation 0 has no such metric.*val/accuracy"
    ):
        fit(make_trainer, BornAgain(network(), generations=2), callbacks=[unknown], epochs=2)
    with pytest.raises(TypeError, match="needs a BornAgain module, got BoringModel"):
        make_trainer(max_epochs=1, callbacks=[GenerationEarlyStopping()]).fit(BoringModel())


class Naked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.body = nn.Linear(8, 3)

    def forward(self, x):
        return self.body(x) * self.scale


def test_a_student_that_cannot_be_reset_is_refused_unless_told_how(make_trainer):
    with pytest.raises(
        ValueError, match=r"The student's Naked '1' has \['scale'\] but no `reset_parameters\(\)`.*pass `reinitialize`"
    ):
        BornAgain(nn.Sequential(nn.Linear(8, 8), Naked()))
    with pytest.raises(ValueError, match=r"Naked '\(the student itself\)'"):
        BornAgain(Naked())
    BornAgain(Naked(), generations=1)  # nothing is reset
    module = BornAgain(
        Naked(), generations=2, reinitialize=lambda student: nn.init.constant_(student.scale, 3.0), optimizer=sgd
    )

    class Watch(L.Callback):
        scales = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.scales += (pl_module.student.scale.detach().clone(),)

    watch = Watch()
    make_trainer(max_epochs=2, limit_train_batches=2, callbacks=[watch]).fit(module, loader())
    assert not torch.equal(watch.scales[3], torch.full((3,), 3.0))
    assert module.generation == 1


BAD = {
    "generations": ({"generations": 0}, "`generations` must be at least 1, got 0"),
    "epochs": ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
    "alpha": ({"alpha": 1.5}, r"`alpha`, the weight of the labels' loss, must be in \[0, 1\], got 1.5"),
    "taught_by": ({"taught_by": "all"}, "`taught_by` must be one of 'previous', 'ensemble', got 'all'"),
    "predict_with": ({"predict_with": "first"}, "`predict_with` must be one of 'last', 'best', 'ensemble'"),
    "best of what": ({"predict_with": "best"}, "`predict_with='best'` needs a `monitor`"),
    "mode": ({"monitor": "val/nll", "mode": "low"}, "`mode` must be one of 'max', 'min', got 'low'"),
    "settings": ({"per_generation": [Generation()] * 4}, "`per_generation` has 4 entries for 3 generations"),
    "their alpha": ({"per_generation": [Generation(alpha=-1)]}, r"must be in \[0, 1\], got -1"),
    "their smoothing": ({"per_generation": [Generation(label_smoothing=2)]}, r"must be in \[0, 1\), got 2"),
    "smoothing of a regression": (
        {"per_generation": [Generation(label_smoothing=0.1)], "task": Regression()},
        "sets `label_smoothing`, which the term 'hard', a SquaredError, does not have",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        BornAgain(network(), **arguments)


BAD_RUNS = {
    "more generations than epochs": ({"generations": 5}, 3, "`generations` is 5, but the Trainer's `max_epochs` is 3"),
    "no whole generations": ({"generations": 2}, 3, "`max_epochs`, 3, cannot be divided into 2 .* Set it to 2 or 4"),
    "epochs left": ({"generations": 2, "epochs": 1}, 3, "is 3, but 2 generations of 1 epochs are over after 2"),
    "no epochs": ({}, -1, "`BornAgain` counts epochs: give the Trainer `max_epochs`"),
    "monitor": ({"monitor": "val/f1"}, 3, "`monitor` is 'val/f1', but the validation gave val/accuracy, val/nll"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_runs_are_refused(make_trainer, name):
    arguments, epochs, message = BAD_RUNS[name]
    trainer = make_trainer(max_epochs=epochs, max_steps=-1 if epochs > 0 else 5)
    with pytest.raises(ValueError, match=message):
        trainer.fit(BornAgain(network(), **arguments), loader(), loader(seed=2))


def test_other_bad_runs_are_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="Generation 0 is over without a validation"):
        make_trainer(max_epochs=2, limit_val_batches=0).fit(
            BornAgain(network(), generations=2, monitor="val/accuracy"), loader(), loader()
        )
    with pytest.raises(
        ValueError, match="A WeightAveraging callback would average the weights of different generations"
    ):
        make_trainer(max_epochs=2, callbacks=[WeightAveraging()]).fit(BornAgain(network(), generations=2), loader())
    module = BornAgain(network(), generations=3)
    trainer = make_trainer(max_epochs=3, limit_train_batches=1)
    trainer.fit(module, loader())
    with pytest.raises(ValueError, match="There are no best weights: `monitor` was not given"):
        module.export(which="best")
    with pytest.raises(ValueError, match="The ensemble needs all 3 generations, but only the last two were kept"):
        module.export(which="ensemble")
    with pytest.raises(ValueError, match="`which` must be one of 'last', 'best', 'ensemble', got 'first'"):
        module.export(which="first")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="The checkpoint is of generations of 1 epochs, `epochs` is 2"):
        BornAgain.load_from_checkpoint(tmp_path / "b.ckpt", student=network(), epochs=2)
    with pytest.raises(ValueError, match="The checkpoint is of no `BornAgain`"):
        module.on_load_checkpoint({"state_dict": {}})
    with pytest.raises(TypeError, match="`student` must be a torch Module, got int"):
        BornAgain(3)
    assert isinstance(module.terms["hard"], CrossEntropy)


def test_several_validation_sets_are_logged_by_their_numbers_and_generation(make_trainer):
    trainer = make_trainer(max_epochs=2)
    module = BornAgain(network(), generations=2, optimizer=sgd)
    trainer.fit(module, loader(), [loader(seed=2), loader(seed=3)])
    names = {name for name in trainer.callback_metrics if name.startswith("val/accuracy")}
    assert names == {
        f"val/accuracy/loader_{number}{generation}"
        for number in (0, 1)
        for generation in ("", "/generation_0", "/generation_1")
    }
