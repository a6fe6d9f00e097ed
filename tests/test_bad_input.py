"""Bad input to the module gets an error that names the value, what was expected and the fix."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, DistillationModule, Outputs
from lightning_distill.cli import main
from lightning_distill.losses import CrossEntropy, SoftTargets, Term
from lightning_distill.losses.term import reduce_items
from lightning_distill.tasks import Classification
from lightning_distill.teachers import FrozenTeacher, FunctionTeacher
from lightning_distill.weighting import FixedWeights


def net(outputs=3):
    return nn.Linear(4, outputs)


def frozen_student():
    return net().requires_grad_(False)


TERMS = {"hard": CrossEntropy()}
NAN = float("nan")

CONSTRUCTION = {
    "temperature zero": (lambda: KD(net(), net(), temperature=0), ValueError, "`temperature` must be positive and finite, got 0"),
    "temperature negative": (lambda: KD(net(), net(), temperature=-1.0), ValueError, "positive and finite, got -1.0"),
    "temperature NaN": (lambda: KD(net(), net(), temperature=NAN), ValueError, "positive and finite, got nan"),
    "temperature infinite": (lambda: KD(net(), net(), temperature=float("inf")), ValueError, "got inf"),
    "temperature text": (lambda: KD(net(), net(), temperature="4"), TypeError, "`temperature` must be a number or a function of the step, got str"),
    "temperature bool": (lambda: KD(net(), net(), temperature=True), TypeError, "got bool"),
    "alpha above 1": (lambda: KD(net(), net(), alpha=1.5), ValueError, r"must be in \[0, 1\], got 1.5"),
    "alpha negative": (lambda: KD(net(), net(), alpha=-0.1), ValueError, r"must be in \[0, 1\], got -0.1"),
    "alpha NaN": (lambda: KD(net(), net(), alpha=NAN), ValueError, r"must be in \[0, 1\], got nan"),
    "student no module": (lambda: KD(lambda x: x, net()), TypeError, "`student` must be a torch Module, got function"),
    "student a name that images cannot have": (lambda: KD(3, net()), TypeError, "`student` must be a torch Module, got int"),
    "teacher the student itself": (lambda: KD(*[net()] * 2), ValueError, "`teacher` is the same object as `student`; it would be frozen"),
    "teacher a number": (lambda: KD(net(), 3), TypeError, "`teacher` must be a module, a Hugging Face name or path.*got int"),
    "frozen teacher no module": (lambda: FrozenTeacher("x"), TypeError, "`network` must be a `torch.nn.Module`, got str"),
    "function teacher no function": (lambda: FunctionTeacher(3), TypeError, "`function` must be callable, got int"),
    "task no task": (lambda: KD(net(), net(), task="images"), TypeError, "`task` must be a lightning_distill Task, got str"),
    "label smoothing 1": (lambda: Classification(label_smoothing=1.0), ValueError, r"`label_smoothing` must be in \[0, 1\), got 1.0"),
    "no terms": (lambda: DistillationModule(net(), terms={}), ValueError, "`terms` must be loss terms by name, at least one, got {}"),
    "term a class": (lambda: DistillationModule(net(), terms={"soft": SoftTargets}), TypeError, r"`terms\['soft'\]` must be a loss term"),
    "term a function": (lambda: KD(net(), net(), terms={"x": lambda step: 0}), TypeError, r"`terms\['x'\]` must be a loss term.*got function"),
    "weight of no term": (lambda: KD(net(), net(), weights={"hint": 1.0}), ValueError, r"`weights` names \['hint'\], which are no terms; there are \['hard', 'soft'\]"),
    "term without weight": (lambda: DistillationModule(net(), terms=TERMS | {"b": CrossEntropy()}, weights={"hard": 1.0}), ValueError, r"`weights` has no weight for \['b'\]"),
    "negative weight": (lambda: FixedWeights({"hard": -1.0}), ValueError, "The weight of the term 'hard' must not be negative, got -1.0"),
    "NaN weight": (lambda: FixedWeights({"hard": NAN}), ValueError, "must not be negative, got nan"),
    "item weights of no term": (lambda: KD(net(), net(), item_weights={"hint": len}), ValueError, r"`item_weights` names \['hint'\]"),
    "optimizer an instance": (lambda: KD(net(), net(), optimizer=torch.optim.SGD(net().parameters())), TypeError, r"`optimizer` must build one, for instance `functools.partial"),
    "scheduler a number": (lambda: KD(net(), net(), lr_scheduler=3), TypeError, "`lr_scheduler` must build one.*got int"),
    "interval": (lambda: KD(net(), net(), lr_interval="batch"), ValueError, "`lr_interval` must be 'epoch' or 'step', got 'batch'"),
    "outputs of nothing": (lambda: Outputs(), ValueError, "`Outputs` needs `logits`"),
    "term of the wrong shape": (lambda: reduce_items(torch.ones(3), torch.ones(4, dtype=torch.bool)), ValueError, r"shape \(3,\) for items of shape \(4,\)"),
    "term without forward": (lambda: Term()(None), TypeError, r"Term is a `Term` without a `forward\(step\)`"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_construction_refuses(case):
    build, error, message = case
    with pytest.raises(error, match=message):
        build()


def data(x=None, y=None, items=8):
    x = torch.randn(items, 4) if x is None else x
    y = torch.randint(0, 3, (items,)) if y is None else y
    return DataLoader(TensorDataset(x, y), batch_size=4)


def broken(value):
    network = net()
    nn.init.constant_(network.bias, value)
    return network


FIT = {
    "class counts": (lambda: KD(net(3), net(5)), data, ValueError, "3.*5"),
    "labels too large": (lambda: KD(net(3), net(3)), lambda: data(y=torch.full((8,), 7)), ValueError, r"Label 7 is outside \[0, 3\)"),
    "labels as a column": (lambda: KD(net(), net()), lambda: data(y=torch.zeros(8, 1).long()), ValueError, r"Labels have shape \(4, 1\)"),
    "teacher missing": (lambda: KD(net()), data, ValueError, r"`teacher` is None, but the loss terms \['soft'\]"),
    "teacher NaN": (lambda: KD(net(), broken(NAN)), data, ValueError, "The teacher's logits are not finite for the first batch: 12 of 12"),
    "student infinite": (lambda: KD(broken(float("inf")), net()), data, ValueError, "The student's logits are not finite"),
    "NaN inputs": (lambda: KD(net(), net()), lambda: data(x=torch.full((8, 4), NAN)), ValueError, "inputs' scale"),
    "nothing to train": (lambda: KD(frozen_student(), net()), data, ValueError, "The student has no trainable parameter"),
    "empty loader": (lambda: KD(net(), net()), lambda: data(items=0), ValueError, "The training data loader is empty: it gave 0 batches"),
    "batch of text": (lambda: KD(net(), net()), lambda: DataLoader(["a", "b"]), TypeError, "expects a batch that is a tensor"),
    "unknown keys": (lambda: KD(net(), net()), lambda: DataLoader([{"wave": torch.zeros(4)}]), ValueError, r"its keys are \['wave'\], expected one of"),
    "network that returns a tuple": (lambda: KD(nn.LSTM(4, 3), net()), data, TypeError, "A network must return logits"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Total length of .* is zero", "ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("case", FIT.values(), ids=FIT)
def test_fit_refuses(case, make_trainer):
    build, loader, error, message = case
    with pytest.raises(error, match=message):
        make_trainer(max_epochs=1).fit(build(), loader())


def test_a_loss_that_stops_being_finite_stops_the_run_by_name(make_trainer):
    class Explodes(Term):
        needs_teacher = False

        def forward(self, step):
            return step.student.logits.sum(-1) * (float("inf") if step.step >= 3 else 1.0)

    module = DistillationModule(net(), terms={"steady": CrossEntropy(), "bang": Explodes()})
    with pytest.raises(FloatingPointError, match=r"A loss is not finite: bang = "):
        make_trainer(max_epochs=4, log_every_n_steps=2).fit(module, data())


CLI = {
    "no such command": (["fot"], "unknown command 'fot'"),
    "no such file": (["fit", "-c", "nowhere.yaml"], "nowhere.yaml"),
    "misspelt argument": (["fit", "--model", "KD", "--model.temprature", "2"], "temprature"),
    "wrong type": (["fit", "--model", "KD", "--model.alpha", "much"], "alpha"),
    "unknown class": (["fit", "--model", "KDD"], "KDD"),
    "comparison without methods": (["compare", "--folder", "x", "--control", "a"], "methods"),
    "comparison of nothing": (["compare", "--folder", "x", "--control", "a", "--methods", "{}"], "methods"),
}


@pytest.mark.parametrize("case", CLI.values(), ids=CLI)
def test_the_command_line_refuses(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = case
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code not in (0, None)
    said = capsys.readouterr().err + str(stopped.value.code)
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_is_misconfigured_is_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        """
folder: runs/x
control: alone
common:
  data: {class_path: MNIST1DDataModule}
  model: {class_path: KD, init_args: {alpha: 1.0, student: {class_path: lightning_distill.networks.ConvNet1d}}}
methods:
  alone: {}
  typo: {model: {init_args: {temprature: 2}}}
"""
    )
    with pytest.raises(SystemExit, match=r"The configuration of the method 'typo' is not valid[\s\S]*temprature"):
        main(["compare", "-c", "c.yaml"])
    assert not (tmp_path / "runs").exists()
