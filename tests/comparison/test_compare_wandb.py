import json
import os
import socket
import struct
import subprocess
import sys

import pytest
from blobs import StopAt, method


def wandb_runs(folder):
    return sorted(path.name for path in folder.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_records(path):
    """Records of a run's log: blocks of 32 KiB as in LevelDB, protobuf inside."""
    from wandb.proto import wandb_internal_pb2

    content, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def test_wandb_has_a_run_per_method_and_seed_and_a_summary(methods, run_compare, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    run_compare(methods, wandb="offline", reference={"Teacher": method(width=8)})
    assert "WANDB_MODE" not in os.environ
    identifier = json.loads((tmp_path / "runs" / "configuration.json").read_text())["id"]
    names = [f"{name}-seed{seed}" for name in ("student-alone", "smoothed", "wide") for seed in (0, 1)]
    expected = sorted(f"run-{identifier}-{name}.wandb" for name in [*names, "teacher-seed0", "summary"])
    assert wandb_runs(tmp_path / "runs") == expected

    records = list(wandb_records(next((tmp_path / "runs").glob(f"wandb/*/run-{identifier}-wide-seed1.wandb"))))
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_group, run.job_type, run.display_name) == ("runs", "wide", "wide-seed1")
    logged = {item.key or item.nested_key[0] for record in records for item in record.history.item}
    assert {"val/accuracy", "test/accuracy", "epoch"} <= logged
    assert records[-1].exit.exit_code == 0

    tables = list((tmp_path / "runs").glob(f"wandb/*-{identifier}-summary/files/media/table/summary_*.table.json"))
    table = json.loads(tables[0].read_text())
    assert [row[table["columns"].index("method")] for row in table["data"]] == list(methods)


def test_wandb_has_no_half_run_of_a_resumed_one(methods, run_compare, tmp_path):
    stop = StopAt(RuntimeError("power cut"), epoch=1)
    broken = {"student alone": method(callbacks=[lambda: stop])}
    with pytest.raises(RuntimeError, match="power cut"):
        run_compare(broken, wandb="offline", seeds=1)
    assert len(wandb_runs(tmp_path / "runs")) == 1
    run_compare({"student alone": method()}, wandb="offline", seeds=1)
    assert len(wandb_runs(tmp_path / "runs")) == 2  # the run, and the summary
    (path,) = (tmp_path / "runs").glob("wandb/*/run-*-student-alone-seed0.wandb")
    epochs = [
        json.loads(item.value_json)
        for record in wandb_records(path)
        if any("val/nll" in (item.key, *item.nested_key) for item in record.history.item)
        for item in record.history.item
        if "epoch" in (item.key, *item.nested_key)
    ]
    assert epochs == [0, 1, 2]


def test_wandb_off_does_not_even_import_it(methods, run_compare, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_compare(methods, seeds=1)
    assert not (tmp_path / "runs" / "wandb").exists()


def test_a_wandb_run_in_progress_is_refused(methods, run_compare, tmp_path):
    import wandb

    run = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    try:
        with pytest.raises(RuntimeError, match=r"A W&B run is in progress.*wandb\.finish\(\)"):
            run_compare(methods, wandb="offline")
    finally:
        run.finish()


COMPARE_OFFLINE = """
import sys
from blobs import method
from lightning_distill.comparison import compare
compare({"student alone": method(max_epochs=1)}, control="student alone", seeds=1, folder=sys.argv[1])
"""


@pytest.mark.slow  # a process of its own, which imports everything
def test_wandb_offline_does_not_try_the_network(tmp_path):
    """W&B 0.31 sends telemetry from offline runs; here its server would be this socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-c", COMPARE_OFFLINE, str(tmp_path / "runs")]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
        assert len(wandb_runs(tmp_path / "runs")) == 2
        with pytest.raises(BlockingIOError, match="temporarily unavailable"):
            server.accept()
