"""Following another training's weights: whole versions only, agreed, fresh enough, or a clear error."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import PublishStudent
from lightning_distill.tasks import Classification
from lightning_distill.teachers import FollowedTeacher
from lightning_distill.teachers.follow import newest

SCRIPT = Path(__file__).with_name("follow_run.py")
TASK = Classification()


def network(seed=0, width=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def loader():
    return DataLoader(TensorDataset(*batch()), batch_size=4)


def publish(folder, seed, step, finished=False):
    folder.mkdir(exist_ok=True)
    file = folder / f"student-{step}.safetensors"
    save_file(network(seed).state_dict(), folder / ".draft")
    os.replace(folder / ".draft", file)
    (folder / ".latest").write_text(json.dumps({"file": file.name, "step": step, "finished": finished}))
    os.replace(folder / ".latest", folder / "latest.json")


def says(teacher, seed):
    return torch.equal(teacher(batch(), TASK).logits, network(seed)(batch()[0]).detach())


def test_a_training_publishes_and_another_follows(make_trainer, tmp_path):
    publisher = KD(network(1), alpha=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    steps = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            found = newest(tmp_path / "out")
            steps.append(None if found is None else found.step)

    callbacks = [PublishStudent(str(tmp_path / "out"), every_n_steps=3, keep=2), Watch()]
    make_trainer(max_epochs=2, callbacks=callbacks).fit(publisher, loader())
    assert steps == [None, None, 3, 3, 3, 6, 6, 6]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["latest.json", "student-000000006.safetensors", "student-000000008.safetensors"]
    last = newest(tmp_path / "out")
    assert (last.step, last.finished) == (8, True)
    assert torch.equal(load_file(last.file)["0.weight"], publisher.student[0].weight)
    teacher = FollowedTeacher(str(tmp_path / "out"), network(5))
    student = KD(network(2), teacher, alpha=0.5)
    make_trainer(max_epochs=1).fit(student, loader(), loader())
    assert teacher.version.step == 8
    assert torch.equal(teacher.network[0].weight, publisher.student[0].weight)
    assert not any(name.startswith("teacher") for name in student.state_dict())


def test_newer_versions_are_taken_at_the_next_look(tmp_path):
    publish(tmp_path, 1, step=10)
    teacher = FollowedTeacher(str(tmp_path), network(), check_every=2)
    assert says(teacher, 1)  # batch 0
    publish(tmp_path, 2, step=20)
    assert says(teacher, 1)  # batch 1 of version 10
    assert says(teacher, 2)  # batch 2: it looks
    assert says(teacher, 2)
    publish(tmp_path, 3, step=30)
    teacher.eval()
    assert says(teacher, 2)  # it is time, but outside training it does not look
    teacher.train()
    assert says(teacher, 3)


def test_half_a_file_is_no_version(tmp_path):
    publish(tmp_path, 1, step=10)
    teacher = FollowedTeacher(str(tmp_path), network(), check_every=1)
    assert says(teacher, 1)
    whole = (tmp_path / "student-10.safetensors").read_bytes()
    (tmp_path / "student-20.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latest.json").write_text('{"file": "student-20.safetensors", "step": 20, "finished": false}')
    assert says(teacher, 1)
    (tmp_path / "latest.json").write_text('{"file": "student-20')
    assert says(teacher, 1)
    (tmp_path / "latest.json").write_text('{"file": "gone.safetensors", "step": 30, "finished": false}')
    assert says(teacher, 1)
    publish(tmp_path, 2, step=40)
    assert says(teacher, 2)


def test_a_file_a_lightning_checkpoint_and_a_folder_of_files_will_do(make_trainer, tmp_path):
    file = tmp_path / "one.safetensors"
    save_file(network(1).state_dict(), file)
    teacher = FollowedTeacher(str(file), network(), check_every=1)
    assert says(teacher, 1)
    save_file(network(2).state_dict(), tmp_path / "new")
    os.replace(tmp_path / "new", file)
    assert says(teacher, 2)
    module = KD(network(3), alpha=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert says(FollowedTeacher(str(tmp_path / "last.ckpt"), network()), 3)
    folder = tmp_path / "plain"
    folder.mkdir()
    for seed in (1, 2):
        save_file(network(seed).state_dict(), folder / f"{seed}.safetensors")
        os.utime(folder / f"{seed}.safetensors", ns=(seed, seed))
    (folder / ".half-3.safetensors").write_bytes(b"")
    assert says(FollowedTeacher(str(folder), network()), 2)


def test_it_waits_for_the_first_version(tmp_path):
    teacher = FollowedTeacher(str(tmp_path / "late"), network(), timeout=30)
    late = threading.Timer(0.5, publish, (tmp_path / "late", 1, 10))
    late.start()
    assert says(teacher, 1)
    late.join()


def test_a_version_may_only_get_so_old(tmp_path):
    publish(tmp_path, 1, step=10)
    teacher = FollowedTeacher(str(tmp_path), network(), check_every=1, max_age=2, timeout=30)
    assert says(teacher, 1)
    assert says(teacher, 1)
    start, late = time.monotonic(), threading.Timer(0.5, publish, (tmp_path, 2, 20))
    late.start()
    assert says(teacher, 2)  # waited
    assert time.monotonic() - start >= 0.5
    late.join()
    teacher.timeout = 0.3
    assert says(teacher, 2)
    with pytest.raises(TimeoutError, match=r"found no newer weights than those of step 20 in .* after 0.3 seconds"):
        teacher(batch(), TASK)
    last = {"file": "student-20.safetensors", "step": 20, "finished": True}  # the same weights, but the last ones
    (tmp_path / "latest.json").write_text(json.dumps(last))
    for _ in range(4):
        assert says(teacher, 2)  # nothing newer will come
    assert teacher.version.finished


def test_a_folder_that_never_gets_weights_is_a_clear_error(make_trainer, tmp_path):
    teacher = FollowedTeacher(str(tmp_path / "nobody"), network(), timeout=0.2)
    module = KD(network(), teacher)
    with pytest.raises(
        TimeoutError,
        match=r"found no weights in '.*nobody' after 0.2 seconds: there is nothing to read",
    ):
        make_trainer(max_epochs=1).fit(module, loader(), loader())
    (tested,) = make_trainer().test(module, loader(), verbose=False)  # a student can be measured without it
    assert "test/agreement" not in tested


def test_weights_of_another_network_are_refused_at_once(tmp_path):
    publish(tmp_path, 1, step=10)
    teacher = FollowedTeacher(str(tmp_path), network(width=7), timeout=30)
    with pytest.raises(ValueError, match="are not those of this Sequential"):
        teacher(batch(), TASK)


BAD = {
    "check": ({"check_every": 0}, "`check_every` must be at least 1, got 0"),
    "age": ({"max_age": 0}, "`max_age` must be at least 1, got 0"),
    "timeout": ({"timeout": 0}, "`timeout` must be positive, got 0 seconds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        FollowedTeacher("folder", network(), **arguments)


def test_bad_publishers_are_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="`every_n_steps` must be at least 1, got 0"):
        PublishStudent("folder", every_n_steps=0)
    with pytest.raises(ValueError, match=r"`keep` must be at least 2 .* got 1"):
        PublishStudent("folder", keep=1)
    with pytest.raises(TypeError, match=r"PublishStudent needs a module of lightning-distill.*got BoringModel"):
        make_trainer(max_epochs=1, callbacks=[PublishStudent(str(tmp_path))]).fit(BoringModel())


@pytest.mark.slow
def test_two_processes_follow_a_third(tmp_path):
    """A writer in a process of its own, a reader with two: all of the readers' batches are taught by one version."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    writer = subprocess.Popen([sys.executable, SCRIPT, tmp_path, "write"], **arguments)
    reader = subprocess.Popen([sys.executable, SCRIPT, tmp_path, "read"], **arguments)
    for process in (writer, reader):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    seen = [json.loads((tmp_path / f"versions-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert len(set(seen[0])) >= 3
    assert seen[0] == sorted(seen[0])
