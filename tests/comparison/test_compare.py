import csv
import io
import json
import math
import warnings

import lightning as L
import pytest
import torch
from blobs import METRICS, Classifier, measured, method
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy import stats

from lightning_distill.comparison import Comparison, student_path


class Exporting(Classifier):
    def export(self, path):
        save_file(self.student.state_dict(), path)


def show(comparison):
    """The table on one line."""
    file = io.StringIO()
    Console(file=file, width=160).print(comparison)
    return " ".join(file.getvalue().split())


def test_summary_follows_from_the_runs(methods, run_compare):
    comparison = run_compare(methods, seeds=[3, 5, 8])
    assert comparison.methods == ["student alone", "smoothed", "wide"]
    assert len(comparison.runs) == 9
    control = [comparison.values("student alone")[seed] for seed in (3, 5, 8)]
    for line in comparison.summary()[1:]:
        values = [comparison.values(line.method)[seed] for seed in (3, 5, 8)]
        expected = stats.ttest_rel(values, control)
        assert (line.t, line.p) == pytest.approx((expected.statistic, expected.pvalue))
        assert line.pairs == 3
    parameters = {line.method: line.parameters for line in comparison.summary()}
    assert parameters == {"student alone": 32, "smoothed": 32, "wide": 116}
    assert all(line.steps == 3 * 4 and line.seconds > 0 and line.cpu_seconds > 0 for line in comparison.summary())


def test_less_is_better_for_a_metric_that_is_minimized(methods, run_compare):
    by_nll = run_compare(methods, metric="test/nll", mode="min")
    control = by_nll.values("student alone")
    for line in by_nll.summary()[1:]:
        lower = [control[seed] - value for seed, value in by_nll.values(line.method).items()]
        assert line.gain == pytest.approx(sum(lower) / len(lower))
    by_accuracy = run_compare(methods)  # finished runs, so nothing is trained
    assert by_accuracy.summary("test/nll", "min") == by_nll.summary()


def test_the_seed_decides_everything(methods, run_compare, tmp_path):
    first = run_compare(methods)
    second = run_compare(methods, folder=tmp_path / "again")
    assert measured(first) == measured(second)
    values = first.values("student alone", "test/nll")
    assert values[0] != values[1]


def test_files_hold_the_comparison(methods, run_compare, tmp_path):
    comparison = run_compare(methods, reference={"Teacher": method(width=8)}, title="Blobs")
    stored = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert (stored["control"], stored["metric"], stored["mode"]) == ("student alone", "test/accuracy", "max")
    assert [(run["method"], run["seed"]) for run in stored["runs"]] == [
        (name, seed) for name in methods for seed in (0, 1)
    ]
    for run in [*stored["runs"], *stored["references"]]:
        assert set(run) == {"method", "seed", *METRICS, "parameters", "steps", "seconds", "cpu_seconds"}
    assert [line["method"] for line in stored["summary"]] == list(methods)
    with (tmp_path / "runs" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["role"] for row in rows] == ["control"] * 2 + ["method"] * 4 + ["reference"]
    assert float(rows[3]["test/nll"]) == stored["runs"][3]["test/nll"]
    loaded = Comparison.load(tmp_path / "runs")
    assert loaded == comparison


def test_load_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no comparison: there is no results\.json"):
        Comparison.load(tmp_path)


def test_plots_are_pictures_of_a_readable_size(methods, run_compare, tmp_path):
    comparison = run_compare(methods, reference={"Teacher": method(width=8)})
    plots = sorted((tmp_path / "runs").glob("*.png"))
    assert [plot.name for plot in plots] == ["curves.png", "gain.png", "results.png"]
    for plot in [*plots, *comparison.plot(tmp_path / "elsewhere")]:
        content = plot.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert 600 <= width <= 2400
        assert 250 <= height <= 1200
        assert len(content) > 8000


def test_table_names_the_test_and_its_limits(methods, run_compare):
    comparison = run_compare(methods, reference={"Teacher": method(width=8)})
    shown = show(comparison)
    for expected in (
        "Teacher", "reference", "Paired t-test (two-sided) against 'student alone'", "n = 2", "p (Holm)",
        "not corrected for the 2 comparisons", "weights of the last epoch", "116",
    ):  # fmt: skip
        assert expected in shown
    line = comparison.summary()[2]
    assert f"{100 * line.mean:.2f} ± {100 * line.sd:.2f}" in shown
    assert f"{100 * line.gain:+.2f}" in shown


@pytest.mark.parametrize("width", [80, 160])
def test_table_cuts_nothing_off(width, methods, run_compare):
    comparison = run_compare(methods)
    file = io.StringIO()
    Console(file=file, width=width).print(comparison)
    shown = file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    for line in comparison.summary():
        assert f"{100 * line.mean:.2f} ± {100 * line.sd:.2f}" in shown


def test_one_seed_shows_no_statistics(methods, run_compare):
    comparison = run_compare(methods, seeds=1)
    line = comparison.summary()[1]
    assert line.verdict == "not tested"
    assert math.isnan(line.p)
    assert "n/a" in show(comparison)
    assert "it needs two seeds or more" in show(comparison)


def test_unequal_budgets_are_named(run_compare):
    comparison = run_compare({"student alone": method(), "longer": method(max_epochs=4)}, seeds=1)
    assert "Not the same number of optimizer steps: student alone 12, longer 16" in show(comparison)


def test_a_diverged_run_is_shown_as_such(run_compare):
    class Diverging(Classifier):
        def test_step(self, batch, batch_idx):
            self.log_dict({"test/accuracy": float("nan"), "test/nll": 1.0})

    comparison = run_compare({"student alone": method(), "diverging": method(module=Diverging)})
    assert comparison.summary()[1].verdict == "diverged"
    again = run_compare({"student alone": method(), "diverging": method(module=Diverging)})
    assert math.isnan(again.values("diverging")[0])
    assert again.summary()[1].verdict == "diverged"
    assert "diverged" in show(again)


def test_methods_find_the_student_of_the_reference(run_compare, tmp_path):
    folder = tmp_path / "runs"

    def taught(seed):
        loaded.append(load_file(student_path(folder, "Teacher")))
        return method()(seed)

    loaded = []
    comparison = run_compare(
        {"student alone": method(), "taught": taught}, seeds=[4, 7], reference={"Teacher": method(8, module=Exporting)}
    )
    assert [weights["0.weight"].shape for weights in loaded] == [(8, 2)] * 2
    assert [run["seed"] for run in comparison.references] == [4]
    assert comparison.methods == ["student alone", "taught"]


def test_exported_student_is_that_of_the_last_epoch(run_compare, tmp_path):
    modules = []

    def keep(seed):
        experiment = method(module=Exporting)(seed)
        modules.append(experiment.module)
        return experiment

    run_compare({"student alone": keep}, seeds=1)
    path = student_path(tmp_path / "runs", "student alone", seed=0)
    exported = load_file(path)
    assert exported.keys() == modules[0].student.state_dict().keys()
    for name, value in modules[0].student.state_dict().items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=0)
    assert not (path.parent / "last.ckpt").exists()


def test_only_unexpected_warnings_come_through(methods, run_compare, capfd):
    class Warning_(L.Callback):
        def on_train_start(self, trainer, pl_module):
            warnings.warn("the user's own", stacklevel=1)

    methods["wide"] = method(width=16, callbacks=[Warning_])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_compare(methods, seeds=1)
    assert [str(warning.message) for warning in caught] == ["the user's own"]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_progress_tells_every_run(methods, run_compare, console):
    comparison = run_compare(methods, seeds=1)
    shown = console.file.getvalue()
    for run in comparison.runs:
        assert f"{run['method']}, seed 0: test/accuracy {100 * run['test/accuracy']:.2f}" in shown
