"""All stages at once: what they learn from each other, and what a kill costs."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lightning_distill import KD, Pipeline
from lightning_distill.locks import only_process
from lightning_distill.pipeline import asynchronous, run_asynchronously
from lightning_distill.stages import Earlier, EarlierStage, Following, earlier_stages, stage_network, stage_teacher
from lightning_distill.teachers import FollowedTeacher, FrozenTeacher
from tests.pipeline.parts import chain, net, student

SCRIPT = Path(__file__).with_name("asynchronous_run.py")
ROOT = SCRIPT.parents[2]
STAGES = ("teacher", "assistant", "last")


def run(folder, publish_every, kill_in=""):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(publish_every), kill_in],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def taught(folder, stage):
    """Each step, and the version that taught it."""
    rows = [line.split() for line in (folder / f"{stage}.txt").read_text().splitlines()]
    return [(int(step), None if version == "None" else int(version)) for step, version in rows]


@pytest.mark.chapter("C19", api="lightning_distill.pipeline.run_asynchronously")
def test_with_the_best_checkpoint_alone_it_is_the_sequential_pipeline(tmp_path):
    done = run(tmp_path, 0)
    assert done.returncode == 0, done.stderr
    assert "100.0%" in done.stdout
    chain().run(tmp_path / "straight", console=Console(file=io.StringIO()))
    for stage in STAGES:
        expected = load_file(tmp_path / "straight" / stage / "student.safetensors")
        for name, value in load_file(tmp_path / "run" / stage / "student.safetensors").items():
            assert torch.equal(value, expected[name]), (stage, name)
    # the last version and no other; or, if the teacher was finished before the assistant looked, its network
    assert {version for _, version in taught(tmp_path, "assistant")} <= {10, None}


@pytest.mark.slow
@pytest.mark.chapter("C19", api="lightning_distill.pipeline.run_asynchronously")
def test_a_killed_stage_is_started_again_and_loses_nothing(tmp_path):
    done = run(tmp_path, 1, "assistant")
    assert done.returncode == 0, done.stderr
    assert "assistant: ended with -9; started again, 1 of 1" in done.stdout
    steps = [step for step, _ in taught(tmp_path, "assistant")]
    assert steps == [*range(1, 8), *range(7, 11)]  # from the checkpoint at step 6 on
    for stage in STAGES:
        record = json.loads((tmp_path / "run" / stage / "manifest.json").read_text())
        assert record["finished"]
        assert record["steps"] == 10
    for stage in ("assistant", "last"):
        # After the teacher has finished, a stage that starts again has a teacher that changes no more.
        versions = [version for _, version in taught(tmp_path, stage) if version is not None]
        if stage == "last":
            assert versions == sorted(versions)  # never an older one
        fresh = [version for version in versions if version < 10]
        assert all(fresh.count(version) <= 4 for version in fresh)  # max_staleness
    again = run(tmp_path, 1)
    assert again.returncode == 0, again.stderr
    assert len(taught(tmp_path, "last")) == 10  # nothing was trained again


@pytest.mark.slow
def test_a_stage_that_always_fails_ends_the_pipeline_with_its_output(tmp_path):
    done = run(tmp_path, 1, "assistant always")
    assert done.returncode != 0
    assert "The stage 'assistant' ended with 1, 2 times. Its last words:" in done.stderr
    assert "this stage cannot work" in done.stderr


def unfinished(tmp_path):
    return EarlierStage("teacher", net(8), {}, Following(tmp_path, check_every=3, max_age=7, timeout=1.0))


def test_a_stage_in_progress_is_followed(tmp_path):
    with earlier_stages(Earlier([unfinished(tmp_path)])):
        teacher = stage_teacher("first")
        assert isinstance(teacher, FollowedTeacher)
        assert (teacher.check_every, teacher.max_age, teacher.timeout) == (3, 7, 1.0)
        with pytest.raises(ValueError, match=r"'teacher' is still being trained.*Use `stage_teacher`"):
            stage_network("teacher")
    with earlier_stages(Earlier([EarlierStage("teacher", net(8))])):
        assert type(KD(net(4), stage_teacher()).teacher) is FrozenTeacher


def test_a_stage_that_somebody_trains_is_refused(tmp_path, monkeypatch):
    def start(*_):  # it would start this test, and so on
        raise AssertionError("a process was started")

    monkeypatch.setattr(asynchronous, "_start", start)
    monkeypatch.setenv(asynchronous.CHOSEN, "teacher")
    with (
        only_process(tmp_path / "teacher", "stage"),
        pytest.raises(BlockingIOError, match=rf"The stage in \S+teacher is in use by the process {os.getpid()}\."),
    ):
        run_asynchronously(chain(), tmp_path)
    monkeypatch.delenv(asynchronous.CHOSEN)
    with (
        only_process(tmp_path, "pipeline"),
        pytest.raises(BlockingIOError, match=r"The pipeline in \S+ is in use by the process"),
    ):
        run_asynchronously(chain(), tmp_path)


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`publish_every` must be at least 1, got 0"):
        run_asynchronously(chain(), tmp_path, publish_every=0)
    with pytest.raises(ValueError, match="`restarts` must not be negative, got -1"):
        run_asynchronously(chain(), tmp_path, restarts=-1)
    monkeypatch.setenv(asynchronous.CHOSEN, "nobody")
    with pytest.raises(ValueError, match="LIGHTNING_DISTILL_STAGE must be one of 'teacher', 'assistant', 'last', got"):
        run_asynchronously(chain(), tmp_path)
    monkeypatch.setenv(asynchronous.CHOSEN, "sum")
    stages = [*chain().stages[:2], student("sum", transfer="residual")]
    with pytest.raises(ValueError, match="'assistant' is still being trained"):
        run_asynchronously(Pipeline(stages), tmp_path)
