"""What a stage is made of: layers that it keeps, weights that it learns, and what describes it."""

import io
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from lightning_distill import KD, Pipeline, ProgressiveStage, Stage
from lightning_distill.callbacks.stage_checkpoint import checkpoints
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.layer_maps import choose_layers
from lightning_distill.losses import DKD
from lightning_distill.pipeline import describe
from lightning_distill.stages import Earlier, EarlierStage, Following, earlier_stages, shortened
from lightning_distill.tasks import Classification, Regression
from lightning_distill.teachers import EnsembleTeacher, learn_weights
from tests.pipeline.parts import SGD, data, experiment, net, student, teacher

QUIET = Console(file=io.StringIO())


class Block(nn.Module):
    """Adds ``scale`` times a direction to its input: its density is known."""

    def __init__(self, scale, read):
        super().__init__()
        self.direction = nn.Parameter(torch.zeros(6))
        with torch.no_grad():
            self.direction[read] = scale

    def forward(self, x):
        return x + self.direction * x.norm(dim=-1, keepdim=True)


class Net(nn.Module):
    """Four blocks and a head that reads the first three numbers only."""

    def __init__(self):
        super().__init__()
        # The second changes most, in what the head does not read.
        self.blocks = nn.ModuleList([Block(0.01, 0), Block(4.0, 5), Block(1.0, 1), Block(0.1, 2)])
        self.head = nn.Linear(6, 3, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(6)[:3])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.chapter("B34", api="lightning_distill.layer_maps.choose_layers")
def test_layers_are_kept_by_place_by_density_and_by_importance():
    network, loader = Net(), [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(3)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    assert choose_layers(network, 2) == (2, 4)
    options = {"loader": loader, "task": Classification()}
    assert choose_layers(network, 2, "density", **options) == (2, 3)
    assert choose_layers(network, 1, "density", **options) == (2,)
    assert choose_layers(network, 4, "density", **options) == (1, 2, 3, 4)
    # By the definition: the mean over the samples of |sum of gradient times state|, of each layer's output.
    scores = torch.zeros(4)
    for x, y in loader:
        states = [x]
        for block in network.blocks:
            states.append(block(states[-1]).detach().requires_grad_())
        for i in range(4):
            h = states[i + 1]
            out = h
            for block in network.blocks[i + 1 :]:
                out = block(out)
            loss = nn.functional.cross_entropy(network.head(out), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, h)
            scores[i] += (gradient * h).sum(-1).abs().mean()
    expected = tuple(sorted((scores.argsort(descending=True)[:2] + 1).tolist()))
    assert choose_layers(network, 2, "importance", **options) == expected
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 5}, "has 4 layers in 'blocks', so from 1 to 4 can be kept, got 5"),
        ({"count": 0}, "from 1 to 4 can be kept, got 0"),
        ({"count": 2, "by": "size"}, "`by` must be 'uniform', 'importance' or 'density', got 'size'"),
        ({"count": 2, "by": "density"}, "measures the layers on data: pass `loader` and `task`"),
        (
            {"count": 2, "by": "importance", "loader": [(torch.randn(4, 6),)], "task": Classification()},
            "have no importance: the batches have no labels",
        ),
        ({"count": 2, "by": "density", "loader": [], "task": Classification()}, "gave no batch"),
    ],
)
def test_refuses_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(Net(), **arguments)


def test_a_stage_keeps_the_layers_that_its_own_data_choose():
    network = Net().eval()
    with earlier_stages(Earlier([EarlierStage("teacher", network)])):
        kept = shortened(2, by="density", data=data())
        for block, layer in zip(kept.blocks, (1, 2), strict=True):
            assert torch.equal(block.direction, network.blocks[layer].direction)
        assert len(shortened(3).blocks) == 3
        with pytest.raises(ValueError, match="measures the layers of the stage 'teacher': pass `data`"):
            shortened(2, by="importance")
        with pytest.raises(ValueError, match="`layers` must be from 1 to 4, as many as the stage 'teacher' has"):
            shortened(5, by="importance", data=data())


# Weights of an ensemble that are learned


def right_and_wrong(classes=3):
    """A network that knows the rule of ``data()``, and one that answers at random."""
    generator = torch.Generator().manual_seed(7)
    torch.randn(120, 6, generator=generator)
    right, wrong = nn.Linear(6, classes, bias=False), nn.Linear(6, classes, bias=False)
    with torch.no_grad():
        right.weight.copy_(torch.randn(6, classes, generator=generator).T)
    return right, wrong


@pytest.mark.chapter("C17", api="lightning_distill.ProgressiveStage")
def test_the_weights_of_an_ensemble_are_learned_on_validation_data(make_trainer):
    right, wrong = right_and_wrong()
    stages = Earlier([EarlierStage("right", right), EarlierStage("wrong", wrong)])
    module = ProgressiveStage(net(4), "ensemble", member_weights="learned", earlier=stages, optimizer=SGD)
    assert module.teacher.shares == [0.5, 0.5]
    module_data = data()
    make_trainer(max_steps=1).fit(module, datamodule=module_data)
    x, y = (torch.cat(parts) for parts in zip(*[batch[:2] for batch in module_data.val_dataloader()], strict=True))
    expected = learn_weights(torch.stack([right(x).log_softmax(-1), wrong(x).log_softmax(-1)]).detach(), y)
    assert module.teacher.shares == pytest.approx(expected, abs=1e-4)
    assert module.teacher.shares[0] > 0.8
    again = ProgressiveStage(net(4), "ensemble", member_weights="learned", earlier=stages, optimizer=SGD)
    make_trainer(max_steps=1).fit(again, datamodule=data())
    assert again.teacher.shares == module.teacher.shares


def test_unlabelled_items_do_not_count_and_some_must_be_labelled():
    right, wrong = right_and_wrong()
    x = torch.randn(40, 6)
    y = right(x).argmax(-1)
    ensemble = EnsembleTeacher([right, wrong])
    alone = ensemble.learned_shares([(x, y)], Classification())
    hidden = torch.full_like(y, -100)
    batches = [(x, y), (torch.randn(40, 6), hidden), (torch.randn(3, 6),)]
    assert ensemble.learned_shares(batches, Classification()) == pytest.approx(alone, abs=1e-6)
    with pytest.raises(ValueError, match="learned on labels, but the batches have none"):
        ensemble.learned_shares([(x, hidden)], Classification())
    with pytest.raises(ValueError, match="learned on classes; Regression has none"):
        ensemble.learned_shares([(x, y)], Regression())


def test_learned_weights_need_data_and_finished_stages(make_trainer, tmp_path):
    right, wrong = right_and_wrong()
    finished = [EarlierStage("right", right), EarlierStage("wrong", wrong)]
    module = ProgressiveStage(net(4), "ensemble", member_weights="learned", earlier=Earlier(finished), optimizer=SGD)
    loader = torch.utils.data.DataLoader([(torch.randn(6), 1)] * 4)
    with pytest.raises(ValueError, match="needs a data module with validation data, got none"):
        make_trainer(max_steps=1).fit(module, loader)
    running = replace(finished[1], following=Following(tmp_path))
    with pytest.raises(ValueError, match="needs finished stages, but 'wrong' is still being trained"):
        ProgressiveStage(net(4), "ensemble", member_weights="learned", earlier=Earlier([finished[0], running]))


def test_reuse_in_the_second_stage_has_one_teacher_only():
    stages = Earlier([EarlierStage("teacher", net(16).eval())])
    module = ProgressiveStage(net(4), "reuse", earlier=stages)
    assert not isinstance(module.teacher, EnsembleTeacher)
    assert torch.equal(module.teacher.network[0].weight, stages.first.network[0].weight)


def test_a_pipeline_of_all_transfers(tmp_path):
    learned = {"transfer": "ensemble", "member_weights": "learned"}
    stages = [teacher(), student("reuse", transfer="reuse"), student("last", **learned)]
    report = Pipeline(stages).run(tmp_path, console=QUIET)
    assert [stage.name for stage in report.stages] == ["teacher", "reuse", "last"]
    assert Pipeline(stages).run(tmp_path, console=QUIET) == report


# What describes a stage


class Annealing(L.Callback):
    def __init__(self, rate):
        self.rate = rate
        self._private = object()


def described(optimizer=SGD, term=None, rate=0.1, **options):
    terms = {} if term is None else {"soft": term}
    module = KD(net(4), net(8), optimizer=optimizer, terms=terms, **options)
    return describe(experiment(module, callbacks=[Annealing(rate)]))


CHANGES = {
    "learning rate": ({"optimizer": partial(torch.optim.SGD, lr=0.3)}, "optimizer_factory"),
    "optimizer": ({"optimizer": partial(torch.optim.Adam, lr=0.2)}, "optimizer_factory"),
    "schedule": ({"lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3)}, "scheduler_factory"),
    "term": ({"term": DKD()}, "terms"),
    "term's argument": ({"term": DKD(beta=3.0)}, "terms"),
    "callback's argument": ({"rate": 0.2}, "trainer"),
    "temperature": ({"temperature": 2.0}, "temperature"),
    "weight": ({"weights": {"soft": 2.0}}, "weighting"),
}


@pytest.mark.parametrize(("change", "key"), CHANGES.values(), ids=CHANGES)
def test_what_changes_a_training_changes_its_description(change, key):
    base = {"term": DKD(beta=2.0)} if "term" in change and change["term"].beta == 3.0 else {}
    before, after = described(**base), described(**change)
    assert before[key] != after[key] if key in before else key in after
    assert described(**change) == after


def test_a_changed_learning_rate_is_refused_by_name(tmp_path):
    def stage(lr):
        module = partial(torch.optim.SGD, lr=lr)
        return Stage("teacher", lambda earlier: experiment(KD(net(8), alpha=1.0, optimizer=module), max_epochs=1))

    Pipeline([stage(0.2)]).run(tmp_path, console=QUIET)
    with pytest.raises(ValueError, match=r"`optimizer_factory.lr` was 0.2, is 0.1"):
        Pipeline([stage(0.1)]).run(tmp_path, console=QUIET)


def test_another_data_module_is_another_stage():
    x, y = torch.randn(8, 6), torch.zeros(8, dtype=torch.long)
    one, other = (
        describe(replace(experiment(KD(net(4))), datamodule=TensorDataModule((x, y), batch_size=size)))
        for size in (4, 8)
    )
    assert one["data"] != other["data"]


# Resumed in mid-stage, whenever validations and checkpoints fall


class Fails(L.Callback):
    def __init__(self, at):
        self._at = at

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == self._at:
            raise RuntimeError("power failure")


@pytest.mark.chapter("C18", api="lightning_distill.callbacks.StageCheckpoint")
@pytest.mark.parametrize("at", [3, 5, 6])
@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"val_check_interval": 0.5, "limit_train_batches": 4},
        {"check_val_every_n_epoch": 2},
        {"accumulate_grad_batches": 2},
        {"lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)},
    ],
    ids=str,
)
def test_a_resumed_stage_is_an_uninterrupted_one(tmp_path, options, at):
    trainer = {key: value for key, value in options.items() if key != "lr_scheduler"}
    module = {key: value for key, value in options.items() if key == "lr_scheduler"}

    def run(folder, fail_at=None):
        def build(earlier):
            own = KD(net(8), alpha=1.0, optimizer=SGD, **module)
            return experiment(own, callbacks=[Fails(fail_at)], **{"max_epochs": 3, **trainer})

        (stage,) = Pipeline([Stage("teacher", build)]).run(folder, console=QUIET).stages
        weights = load_file(folder / "teacher" / "student.safetensors")
        return replace(stage, seconds=0.0), {name: value.clone() for name, value in weights.items()}

    stage, weights = run(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power failure"):
        run(tmp_path / "killed", at)
    again, found = run(tmp_path / "killed")
    assert again == stage
    assert all(torch.equal(value, found[name]) for name, value in weights.items())


class Validations(L.Callback):
    def __init__(self):
        self._seen = {}

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._seen.setdefault(trainer.global_step, float(trainer.callback_metrics["val/accuracy"]))


def test_the_best_may_be_of_the_middle_of_an_epoch(tmp_path):
    validations = Validations()
    options = {"max_epochs": 3, "val_check_interval": 2, "callbacks": [validations]}
    stage = Stage("teacher", lambda earlier: experiment(KD(net(8), alpha=1.0, optimizer=SGD), **options))
    (report,) = Pipeline([stage]).run(tmp_path, console=QUIET).stages
    seen = {step: value for step, value in validations._seen.items() if step < 15}
    best = max(seen, key=seen.get)
    assert best % 5  # of an epoch of 5 steps
    assert report.metric == report.metrics["val/accuracy"] == seen[best]
    assert any(saved.step == best for saved in checkpoints(tmp_path / "teacher" / "checkpoints"))


def test_another_monitor_makes_another_best_checkpoint(tmp_path):
    def stage(*monitor):
        return Stage(
            "teacher", lambda earlier: experiment(KD(net(8), alpha=1.0, optimizer=SGD), max_epochs=1), *monitor
        )

    Pipeline([stage()]).run(tmp_path, console=QUIET)
    with pytest.raises(
        ValueError, match=r"`monitor` was \"val/accuracy\", is \"val/nll\"; `mode` was \"max\", is \"min\""
    ):
        Pipeline([stage("val/nll", "min")]).run(tmp_path, console=QUIET)
