"""TemperatureAnnealing: one value per optimizer step, the same after a resume."""

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import TemperatureAnnealing


class Recorder(L.Callback):
    """Keeps (optimizer step, temperature) as the training step sees them."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.global_step, pl_module.temperature))


def linear(**changes):
    return TemperatureAnnealing(**({"tau_max": 8.0, "tau_min": 2.0, "num_steps": 4, "shape": "linear"} | changes))


def fit(make_trainer, annealing, ckpt_path=None, **arguments):
    recorder = Recorder()
    module = KD(nn.Linear(4, 3), nn.Linear(4, 3))
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,))), batch_size=2)
    trainer = make_trainer(callbacks=[annealing, recorder], **arguments)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, recorder.seen


@pytest.mark.chapter("A15", api="lightning_distill.callbacks.TemperatureAnnealing")
def test_follows_the_schedule_then_holds(make_trainer):
    _, seen = fit(make_trainer, linear(), max_steps=6, max_epochs=2)
    assert seen == [(0, 8.0), (1, 6.5), (2, 5.0), (3, 3.5), (4, 2.0), (5, 2.0)]


def test_counts_optimizer_steps_not_batches(make_trainer):
    _, seen = fit(make_trainer, linear(), max_steps=2, accumulate_grad_batches=2)
    assert seen == [(0, 8.0), (0, 8.0), (1, 6.5), (1, 6.5)]


def test_a_resumed_run_goes_on_with_the_schedule_it_began(make_trainer, tmp_path):
    _, straight = fit(make_trainer, linear(num_steps=None), max_epochs=3)
    assert straight[0] == (0, 8.0)
    assert straight[6] == (6, 5.0)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 0

    recorder = Recorder()
    module = KD(nn.Linear(4, 3), nn.Linear(4, 3))
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,))), batch_size=2)
    trainer = make_trainer(callbacks=[linear(num_steps=None), recorder, Stop()], max_epochs=3)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    # asked for twice as many epochs: the twelve steps of the schedule stay twelve
    _, rest = fit(make_trainer, linear(num_steps=None), max_epochs=6, ckpt_path=tmp_path / "first.ckpt")
    assert recorder.seen + rest[:8] == straight
    assert {temperature for _, temperature in rest[8:]} == {2.0}


@pytest.mark.parametrize(("shape", "middle"), [("exponential", 4.0), ("linear", 5.0), ("cosine", 5.0)])
def test_the_schedule_can_be_looked_at_without_training(shape, middle):
    schedule = linear(shape=shape, num_steps=100)
    assert [schedule.temperature_at(step) for step in (0, 50, 100, 200)] == pytest.approx([8.0, middle, 2.0, 2.0])


def test_rejects_a_module_without_a_constant_temperature(make_trainer):
    trainer = make_trainer(callbacks=[linear()], max_steps=1)
    with pytest.raises(TypeError, match="sets `temperature`, which BoringModel does not have"):
        trainer.fit(BoringModel())
    with pytest.raises(TypeError, match="sets `temperature`, which KD computes by"):
        trainer.fit(KD(nn.Linear(4, 3), nn.Linear(4, 3), temperature=lambda step: 2.0))


def test_needs_to_know_the_length(make_trainer):
    with pytest.raises(ValueError, match="`num_steps` of TemperatureAnnealing must be given"):
        fit(make_trainer, linear(num_steps=None), max_epochs=-1)
    with pytest.raises(ValueError, match="`num_steps` is not known before the training starts"):
        linear(num_steps=None).temperature_at(0)


@pytest.mark.parametrize(
    "change", [{"num_steps": 0}, {"tau_max": 1.0}, {"tau_min": 0.0}, {"tau_max": float("nan")}], ids=str
)
def test_rejects_bad_values(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        linear(**change)
