"""search: settings in, trials out."""

import io
import sys

import lightning as L
import optuna
import pytest
from rich.console import Console

from lightning_distill.search import Parameter, ReportToOptuna, Search, Trial, read_space, search
from lightning_distill.search.result import short_names
from lightning_distill.search.study import make_sampler
from tests.search.problem import SPACE, Data, Line, build, found


@pytest.fixture
def run(tmp_path):
    """A search of a few trials."""

    def call(build=build, space=SPACE, folder="search", **arguments):
        console = Console(file=io.StringIO(), width=160)
        defaults = {"metric": "val/loss", "mode": "min", "trials": 5, "pruner": "none", "console": console}
        if isinstance(arguments.get("metric"), list):
            del defaults["mode"]
        result = search(build, space, folder=tmp_path / folder, **(defaults | arguments))
        return result, console.file.getvalue()

    return call


def quick(settings, seed):
    return build(settings, seed, epochs=1)


def test_the_best_trial_has_the_lowest_loss_and_everything_is_written(run, tmp_path):
    result, printed = run()
    assert [trial.number for trial in result.trials] == list(range(5))
    assert result.best.values == (min(trial.values[0] for trial in result.complete),)
    assert "trial 4: val/loss" in printed
    assert f"trial {result.best.number}" in printed
    files = {path.name for path in (tmp_path / "search").iterdir()}
    assert {"results.json", "results.csv", "history.png", "settings.png", "study", "trials"} <= files
    assert "front.png" not in files
    lines = (tmp_path / "search" / "results.csv").read_text().splitlines()
    assert lines[0] == "trial,state,val/loss,lr,momentum,seconds"
    assert len(lines) == 6
    assert not list((tmp_path / "search").rglob("*.ckpt"))


def test_the_same_seed_proposes_the_same_and_another_one_does_not(run):
    first, _ = run(quick, folder="a", trials=3)
    again, _ = run(quick, folder="b", trials=3)
    other, _ = run(quick, folder="c", trials=3, seed=1)
    assert found(first) == found(again)
    settings = [tuple(trial.settings.values()) for trial in (*first.trials, *other.trials)]
    assert len(set(settings)) == 6


@pytest.mark.parametrize(
    "sampler", ["tpe", pytest.param("cmaes", marks=pytest.mark.slow), pytest.param("random", marks=pytest.mark.slow)]
)
def test_every_sampler_goes_on_after_an_interruption_as_if_there_were_none(run, sampler):
    straight, _ = run(quick, folder="straight", sampler=sampler, trials=12)
    for trials in (3, 12):
        parts, _ = run(quick, folder="parts", sampler=sampler, trials=trials)
    assert found(parts) == found(straight)
    assert len({trial.settings["lr"] for trial in parts.trials}) == 12


def test_an_error_leaves_the_trial_to_be_taken_up_again(run):
    straight, _ = run(folder="straight")

    class Fail(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("the disk is full")

    calls = []

    def failing(settings, seed):
        calls.append(settings)
        return build(settings, seed, callbacks=[Fail()] if len(calls) == 2 else [])

    with pytest.raises(RuntimeError, match="the disk is full"):
        run(failing, folder="failed")
    result, _ = run(failing, folder="failed")
    assert calls[1] == calls[2]
    assert found(result) == found(straight)


def test_a_loss_that_is_not_finite_fails_the_trial_and_not_the_search(run):
    result, printed = run(space={"lr": [0.1, 1e12], "momentum": [0.0]}, sampler="random", trials=6)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert all(trial.settings["lr"] == 1e12 for trial in failed)
    assert "not finite" in failed[0].note
    assert {trial.settings["lr"] for trial in result.complete} == {0.1}
    assert "failed" in printed
    nothing, _ = run(space={"lr": [1e12], "momentum": [0.0]}, trials=1, folder="nothing")
    with pytest.raises(ValueError, match="None of the 1 trials is complete"):
        nothing.best  # noqa: B018


def test_hopeless_trials_are_pruned(run):
    rates = iter([0.05, 0.06, 0.07, 0.08, 1e-6, 0.05])
    trained = []

    def falling(settings, seed):
        class Count(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trained.append(pl_module.lr)

        return build({"lr": next(rates), "momentum": 0.0}, seed, callbacks=[Count()])

    result, printed = run(falling, pruner="median", trials=6)
    assert [trial.state for trial in result.trials].count("pruned") >= 1
    assert result.trials[4].state == "pruned"
    assert result.trials[4].steps == 2  # the second validation is the first that may prune
    assert trained.count(1e-6) < 4
    assert "pruned after 2 validations" in printed
    assert len(result.trials[4].values) == 1


def test_several_metrics_give_a_front(run, tmp_path):
    result, _ = run(quick, metric=["val/loss", "val/accuracy"], mode=["min", "max"], trials=12, pruner=None)
    costs = {t.number: (t.values[0], -t.values[1]) for t in result.complete}
    expected = {
        n for n, c in costs.items() if not any(o != c and o[0] <= c[0] and o[1] <= c[1] for o in costs.values())
    }
    assert {trial.number for trial in result.front} == expected
    assert {trial.number for trial in result.ranked()[: len(expected)]} == expected
    assert (tmp_path / "search" / "front.png").exists()


def test_each_trial_is_the_mean_over_its_seeds(run):
    result, _ = run(quick, seeds=[3, 4], trials=1)
    alone = [run(quick, seeds=[seed], trials=1, folder=f"only{seed}")[0] for seed in (3, 4)]
    assert result.trials[0].values[0] == pytest.approx(sum(one.trials[0].values[0] for one in alone) / 2)
    assert alone[0].trials[0].values != alone[1].trials[0].values


def test_the_first_trial_is_what_one_has(run):
    result, _ = run(quick, start={"lr": 0.123, "momentum": 0.5})
    assert result.trials[0].settings == {"lr": 0.123, "momentum": 0.5}
    assert result.trials[1].settings["lr"] != 0.123


def test_choices_may_be_anything_that_yaml_can_hold(run):
    space = {"lr": [0.1, {"a": 1}, None, "text"], "momentum": [0.0]}
    seen = []

    def note(settings, seed):
        seen.append(settings["lr"])
        return quick({"lr": 0.1, "momentum": 0.0}, seed)

    result, _ = run(note, space=space, trials=12, sampler="random")
    assert {str(value) for value in seen} == {"0.1", "{'a': 1}", "None", "text"}
    assert [trial.settings["lr"] for trial in result.trials] == seen


def test_a_folder_keeps_one_search(run, tmp_path):
    run(quick, trials=1)
    with pytest.raises(ValueError, match=r"`space\.lr\.high` was 10.0, is 5.0"):
        run(quick, space=SPACE | {"lr": {"low": 0.01, "high": 5.0, "log": True}})
    with pytest.raises(ValueError, match=r"`search\.seed` was 0, is 1"):
        run(quick, seed=1)
    result, _ = run(quick, seed=1, trials=2, fresh=True)
    assert len(result.trials) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and not the folder"):
        run(quick, folder="other", fresh=True)


def test_a_search_that_runs_is_not_deleted(run, tmp_path):
    def fresh_inside(settings, seed):
        with pytest.raises(ValueError, match="Another process is at the search in"):
            run(quick, fresh=True, trials=1)
        return quick(settings, seed)

    run(fresh_inside, trials=1)


def test_the_reference_is_trained_once_and_before_the_trials(run, tmp_path):
    order = []

    def teacher(seed):
        order.append("teacher")
        with pytest.raises(ValueError, match="Another process is at the search in"):
            run(quick, fresh=True, trials=1)
        experiment = build({"lr": 0.1, "momentum": 0.0}, seed, epochs=1)
        experiment.datamodule.test_dataloader = experiment.datamodule.val_dataloader
        experiment.module.test_step = lambda batch, batch_idx: None
        return experiment

    def student(settings, seed):
        order.append("trial")
        return quick(settings, seed)

    run(student, reference={"teacher": teacher}, trials=2)
    run(student, reference={"teacher": teacher}, trials=3)
    assert order == ["teacher", "trial", "trial", "trial"]
    assert (tmp_path / "search" / "teacher" / "result.json").exists()


def test_optuna_s_own_loop_can_prune_with_the_callback(make_trainer):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="minimize", pruner=optuna.pruners.ThresholdPruner(upper=1.0, n_warmup_steps=1)
    )
    epochs = []

    def objective(trial):
        module = Line(0.05, 0.0, shift=trial.suggest_categorical("shift", [0.0, 100.0]))
        trainer = make_trainer(max_epochs=3, callbacks=[ReportToOptuna(trial, "val/loss")])
        try:
            trainer.fit(module, datamodule=Data())
        finally:
            epochs.append(trainer.current_epoch)
        return trainer.callback_metrics["val/loss"].item()

    for shift in (0.0, 100.0):
        study.enqueue_trial({"shift": shift})
    study.optimize(objective, n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert list(study.trials[0].intermediate_values) == [0, 1, 2]
    assert list(study.trials[1].intermediate_values) == [0, 1]
    assert epochs == [3, 1]


def test_table_and_names():
    assert short_names(["a.init_args.lr", "b.init_args.lr", "c.x"]) == {
        "a.init_args.lr": "a.lr", "b.init_args.lr": "b.lr", "c.x": "x",
    }  # fmt: skip
    trials = tuple(Trial(i, "complete", {"m.lr": 0.1 * i}, (0.5 + i / 10,), 2.0) for i in range(3))
    result = Search(None, ("val/accuracy",), ("max",), (0, 1), (*trials, Trial(3, "pruned", {"m.lr": 9.0}, (0.1,))))
    console = Console(file=io.StringIO(), width=120)
    console.print(result)
    text = console.file.getvalue()
    assert text.index("70.00") < text.index("60.00") < text.index("50.00")
    assert "0, 1" in text
    assert "The best of 4 trials (1 pruned) by val/accuracy" in text
    assert "10.00" not in text


def test_samplers_draw_for_every_trial_and_seed_anew():
    draws = {
        make_sampler("random", seed, trial).sample_independent(
            None, None, "x", optuna.distributions.FloatDistribution(0, 1)
        )
        for seed in range(5)
        for trial in range(5)
    }
    assert len(draws) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "test/accuracy"}, "chosen by test data cannot be tested any more. .* such as 'val/accuracy'"),
        ({"metric": []}, "`metric` must be one name"),
        ({"metric": ["a", "b"], "mode": ["max"]}, "`mode` must be 'max' or 'min' for each"),
        ({"mode": "most"}, "`mode` must be 'max' or 'min'"),
        ({"trials": 0}, "`trials` must be at least 1, got 0"),
        ({"seeds": []}, "`seeds` must be one or more different numbers"),
        ({"seeds": [1, 1]}, "`seeds` must be one or more different numbers"),
        ({"sampler": "grid"}, "`sampler` must be 'tpe', 'cmaes', 'nsga2' or 'random', got 'grid'"),
        ({"pruner": "all"}, "`pruner` must be 'median', 'halving' or 'none', got 'all'"),
        ({"metric": ["a", "b"], "mode": "max", "pruner": "median"}, "no trial can be called hopeless"),
        ({"metric": ["a", "b"], "mode": "max", "sampler": "cmaes"}, "'cmaes', which has one metric"),
        ({"space": {"lr": [1, 2]}, "sampler": "cmaes"}, "needs two or more ranges"),
        ({"space": {}}, "`space` is empty"),
        ({"start": {"lr": 0.1}}, "`start` must have a value for each setting"),
        ({"start": {"lr": 99.0, "momentum": 0.0}}, r"99.0 is not in `space\['lr'\]`"),
        ({"metric": "val/f1"}, r"'val/f1', which the validation did not log; there are \['val/accuracy', 'val/loss'\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(quick, **({"trials": 1} | arguments))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"low": 1.0}, "must be a list of choices, or a range"),
        ({"low": 1.0, "high": 2.0, "width": 3}, "must be a list of choices, or a range"),
        ("1 to 2", "must be a list of choices, or a range"),
        ([], "must be a list of choices, or a range"),
        ({"low": "1e-3", "high": 1.0}, "`low` of `space.*` must be a number, got '1e-3' .YAML reads 1e-3 as a text"),
        ({"low": 2.0, "high": 1.0}, "must have `low` below `high`, got 2.0 and 1.0"),
        ({"low": 0.0, "high": 1.0, "log": True}, "`low` must be positive, got 0.0"),
        ({"low": 1.0, "high": 2.0, "log": True, "step": 0.1}, "there is none with `log`"),
        ({"low": 1.5, "high": 3.0, "integer": True}, "has integers"),
        ([1, 1], "has the same choice twice"),
    ],
)
def test_bad_ranges_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        read_space({"lr": entry})


def test_ranges_and_what_is_in_them():
    depth = Parameter("depth", 2, 8, integer=True, step=2)
    assert depth.distribution() == optuna.distributions.IntDistribution(2, 8, step=2)
    assert depth.examples() == [2, 8]
    assert depth.label_of(4) == 4
    for bad in (3, 10, "4", True):
        with pytest.raises(ValueError, match="is not in `space"):
            depth.label_of(bad)
    rate = Parameter("lr", 0.1, 1.0, log=True)
    assert rate.label_of(0.3) == 0.3
    assert isinstance(read_space({"x": {"low": 1, "high": 3}})[0].examples()[0], float)
    choice = Parameter("c", choices=({"a": 1}, 2))
    assert choice.value(choice.label_of({"a": 1})) == {"a": 1}


def test_without_optuna_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lightning_distill.search")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-distill\[search\]'"):
        import lightning_distill.search  # noqa: F401
