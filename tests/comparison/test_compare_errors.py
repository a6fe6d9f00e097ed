import pytest
import torch
from blobs import Blobs, Classifier, CountEpochs, method

from lightning_distill.comparison import Experiment


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": {}}, ValueError, "`methods` is empty"),
        ({"control": "studnet"}, ValueError, "`control` must be one of the methods, 'student alone'.*got 'studnet'"),
        ({"seeds": 0}, ValueError, "`seeds` must be at least 1.*got 0"),
        ({"seeds": []}, ValueError, "`seeds` is empty"),
        ({"seeds": [1, 2, 1]}, ValueError, r"`seeds` has duplicates: \[1, 2, 1\]"),
        ({"seeds": [-1]}, ValueError, r"`seeds` must be integers in \[0, 2\*\*32\), got -1"),
        ({"seeds": [0.5]}, ValueError, "`seeds` must be integers"),
        ({"mode": "best"}, ValueError, "`mode` must be 'max' or 'min', got 'best'"),
        ({"wandb": "on"}, ValueError, "`wandb` must be 'offline', 'online' or 'off', got 'on'"),
        ({"methods": {"student alone": 3}}, TypeError, "'student alone' must be a function.*got int"),
        (
            {"methods": {"student alone": method(), "Student-alone": method()}},
            ValueError,
            "'student alone' and 'Student-alone' would share the folder 'student-alone'",
        ),
        ({"reference": {"student alone": method()}}, ValueError, "would share the folder 'student-alone'"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message, run_compare, tmp_path):
    with pytest.raises(error, match=message):
        run_compare(**{"methods": {"student alone": method()}, **arguments})
    assert not (tmp_path / "runs" / "results.json").exists()


def test_a_missing_metric_is_named_after_the_first_run_and_costs_no_training(methods, run_compare, tmp_path):
    with pytest.raises(ValueError, match=r"no metric 'test/acc'.*logged: test/accuracy, test/nll") as error:
        run_compare(methods, metric="test/acc")
    assert "not trained again" in str(error.value)
    assert len(list((tmp_path / "runs").glob("*/*/result.json"))) == 1
    first = next((tmp_path / "runs").glob("*/*/result.json")).read_text()
    run_compare(methods)
    assert (tmp_path / "runs" / "student-alone" / "seed0" / "result.json").read_text() == first


def test_a_module_made_outside_its_method_is_refused(run_compare):
    """It would go into the second seed with the training of the first."""
    student = torch.nn.Linear(2, 4)

    def shared(seed):
        experiment = method()(seed)
        experiment.module.student = student
        return experiment

    with pytest.raises(ValueError, match=r"'student alone' returned for seed 1 a part.*trained: module\.student"):
        run_compare({"student alone": shared})


def test_a_callback_made_outside_its_method_is_refused(run_compare):
    callback = CountEpochs([])
    with pytest.raises(ValueError, match="trained: callback CountEpochs"):
        run_compare({"student alone": method(callbacks=[lambda: callback])})


def test_a_frozen_teacher_may_be_shared(run_compare):
    teacher = torch.nn.Linear(2, 4).requires_grad_(False)

    def taught(seed):
        experiment = method()(seed)
        experiment.module.teacher = teacher
        return experiment

    assert len(run_compare({"student alone": taught}).runs) == 2


def test_a_method_must_return_an_experiment(run_compare):
    with pytest.raises(TypeError, match=r"'student alone' must return an `Experiment.*got Classifier"):
        run_compare({"student alone": lambda seed: Classifier(4)})


@pytest.mark.parametrize("owned", ["logger", "default_root_dir", "enable_checkpointing"])
def test_what_belongs_to_the_comparison_is_not_for_the_method(owned, run_compare):
    with pytest.raises(ValueError, match=f"sets `{owned}` of the Trainer"):
        run_compare({"student alone": lambda seed: Experiment(Classifier(4), Blobs(), {owned: False})})


def test_several_devices_are_refused(run_compare):
    trainer = {"accelerator": "cpu", "devices": 2}
    with pytest.raises(ValueError, match=r"trains on 2 devices.*`devices=1`"):
        run_compare({"student alone": lambda seed: Experiment(Classifier(4), Blobs(), trainer)})
