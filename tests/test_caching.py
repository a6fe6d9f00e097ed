"""A teacher that is run once, where it is named."""

import pytest
import torch

from lightning_distill import KD
from lightning_distill.caching import run_once
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.networks import MLP
from lightning_distill.teachers import CachedTeacher

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'predict_dataloader' does not have many workers"  # tensors in memory need none
)


def teacher(seed=0):
    torch.manual_seed(seed)
    return MLP((4, 8, 3))


def data():
    x = torch.linspace(-1, 1, 80).reshape(20, 4)
    return TensorDataModule((x, torch.arange(20) % 3), batch_size=5)


def test_what_is_cached_is_what_the_teacher_says(tmp_path, make_trainer):
    network = teacher()
    cached = run_once(network, data(), tmp_path / "cache", kind="dense", accelerator="cpu")
    assert isinstance(cached, CachedTeacher)
    trained = []
    for teaching in (cached, network):
        torch.manual_seed(1)
        module = KD(MLP((4, 5, 3)), teaching, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        make_trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data())
        trained.append(module.student.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], msg=name)


def test_is_run_once(tmp_path, monkeypatch):
    run_once(teacher(), data(), tmp_path / "cache", kind="dense", accelerator="cpu")
    network = teacher()
    monkeypatch.setattr(network, "forward", lambda *_: pytest.fail("ran again"))
    assert run_once(network, data(), tmp_path / "cache", kind="dense", accelerator="cpu").spec.width == 3


def test_refuses_the_cache_of_another_teacher(tmp_path):
    run_once(teacher(), data(), tmp_path / "cache", kind="dense", accelerator="cpu")
    with pytest.raises(ValueError, match="teacher"):
        run_once(teacher(1), data(), tmp_path / "cache", kind="dense", accelerator="cpu")
