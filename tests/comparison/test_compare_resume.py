import signal

import pytest
from blobs import CountEpochs, StopAt, measured, method

from lightning_distill.comparison import Comparison
from lightning_distill.locks import only_process


def histories(comparison):
    return [comparison.history(run["method"], run["seed"]) for run in comparison.runs]


def test_a_comparison_that_failed_continues_with_what_is_missing(methods, run_compare, tmp_path):
    uninterrupted = run_compare(methods, folder=tmp_path / "straight")
    built = []

    def counted(name):
        def make(seed):
            built.append((name, seed))
            if len(built) == 3:
                raise RuntimeError("power cut")
            return methods[name](seed)

        return make

    broken = {name: counted(name) for name in methods}
    with pytest.raises(RuntimeError, match="power cut"):
        run_compare(broken)
    partial = Comparison.load(tmp_path / "runs")
    assert list(measured(partial)) == built[:2]
    finished = run_compare(broken)
    assert built[3:] == [("wide", 0), ("student alone", 1), ("smoothed", 1), ("wide", 1)]
    assert measured(finished) == measured(uninterrupted)
    run_compare(broken)
    assert len(built) == 7


@pytest.mark.parametrize("error", [RuntimeError("power cut"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_run_that_was_killed_continues_exactly(error, methods, run_compare, tmp_path):
    uninterrupted = run_compare(methods, folder=tmp_path / "straight")
    stop, epochs = StopAt(error, epoch=2), []
    methods["smoothed"] = method(label_smoothing=0.2, callbacks=[lambda: CountEpochs(epochs)])
    methods["wide"] = method(width=16, callbacks=[lambda: stop])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(type(error)):
        run_compare(methods)
    assert signal.getsignal(signal.SIGINT) is handler
    assert epochs == [0, 1, 2]
    epochs.clear()
    methods["wide"] = method(width=16, callbacks=[lambda: CountEpochs(epochs)])
    resumed = run_compare(methods)
    assert measured(resumed) == measured(uninterrupted)
    assert histories(resumed) == histories(uninterrupted)
    assert [run["steps"] for run in resumed.runs] == [12] * 6
    assert epochs == [2, 0, 1, 2, 0, 1, 2]  # the rest of the killed run, and seed 1 of both


def test_seeds_and_methods_can_be_added(methods, run_compare):
    added = methods.pop("wide")
    first = run_compare(methods, seeds=1)
    second = run_compare(methods | {"wide": added}, seeds=2)
    assert second.runs[0] == first.runs[0]
    assert len(second.runs) == 6


def test_fresh_trains_again(methods, run_compare):
    first = run_compare(methods, seeds=1, configuration={"epochs": 3})
    with pytest.raises(ValueError, match="`epochs` was 3, is 4"):
        run_compare(methods, seeds=1, configuration={"epochs": 4})
    second = run_compare(methods, seeds=1, configuration={"epochs": 4}, fresh=True)
    assert second.runs[0]["cpu_seconds"] != first.runs[0]["cpu_seconds"]
    assert measured(second) == measured(first)


def test_a_folder_has_one_comparison_at_a_time(methods, run_compare, tmp_path):
    with (
        only_process(tmp_path / "runs", "comparison"),
        pytest.raises(BlockingIOError, match=r"The comparison in \S+runs is in use by the process \d+\. Wait"),
    ):
        run_compare(methods, fresh=True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["running.lock"]
    assert len(run_compare(methods, seeds=1, fresh=True).runs) == 3  # a folder with a lock alone is an empty one
