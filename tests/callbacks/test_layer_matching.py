"""Callbacks that turn the weights of pairs of layers."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_distill import KD
from lightning_distill.callbacks import (
    DynamicLayerWeights,
    ProgressiveLayers,
    RandomLayers,
    TemperatureAnnealing,
    progressive_layers,
    sample_layers,
    update_layer_weights,
)
from lightning_distill.losses import FeatureMatching
from lightning_distill.networks import MLP
from tests.callbacks.layer_weights_run import PAIRS, data, run

SCRIPT = Path(__file__).with_name("layer_weights_run.py")


class Recorder(L.Callback):
    """Keeps (optimizer step, pair weights) of every training batch, and those of validation."""

    def __init__(self):
        self.seen = []
        self.validation = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append((trainer.global_step, list(pl_module.terms["features"].pair_weights)))

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validation.append(list(pl_module.terms["features"].pair_weights))


@pytest.mark.chapter("A39", api="lightning_distill.callbacks.progressive_layers")
def test_progressive_golden(golden):
    case = golden("progressive_layers")
    steps, num_steps, layers = case.inputs["steps"].int().tolist(), int(case.inputs["T"]), int(case.inputs["L"])
    found = [progressive_layers(step, num_steps, layers) for step in steps]
    assert found == case.expected["n_layers"].int().tolist()


@pytest.mark.erratum("ERR-16")
def test_the_printed_schedule_is_empty_at_first_and_complete_only_at_the_end(golden):
    case = golden("progressive_layers_as_written")
    steps, num_steps, layers = case.inputs["steps"].int().tolist(), int(case.inputs["T"]), int(case.inputs["L"])
    printed = [min(layers, step * layers // num_steps) for step in steps]
    assert printed == case.expected["n_layers"].int().tolist()
    assert sum(step * layers // num_steps == 0 for step in range(num_steps)) == 84
    assert max(step * layers // num_steps for step in range(num_steps)) == layers - 1
    ours = [progressive_layers(step, num_steps, layers) for step in range(num_steps)]
    assert min(ours) == 1
    assert ours == sorted(ours)
    assert sum(n == layers for n in ours) == 83
    # in floating point the printed product is one too small where it is a whole number
    assert int(26 / 90 * 45) == 12
    assert progressive_layers(26, 90, 45) == 13 + 1


@pytest.mark.chapter("A41", api="lightning_distill.callbacks.update_layer_weights")
def test_weight_update_golden(golden):
    case = golden("layer_weight_update")
    found = update_layer_weights(case.inputs["lambdas"], case.inputs["grad_norms"], eta=float(case.inputs["eta"]))
    torch.testing.assert_close(found, case.expected["lambdas"], rtol=case.rtol, atol=case.atol)


@pytest.mark.erratum("ERR-17")
def test_the_printed_update_grows_without_bound_and_ours_keeps_the_sum(golden):
    case = golden("layer_weight_update_as_written")
    weights, norms, eta = case.inputs["lambdas"], case.inputs["grad_norms"], float(case.inputs["eta"])
    printed = weights * (eta * norms / norms.sum()).exp()
    torch.testing.assert_close(printed, case.expected["lambdas"], rtol=case.rtol, atol=case.atol)
    ours = weights
    for _ in range(100):
        weights = weights * (0.1 * norms / norms.sum()).exp()
        ours = update_layer_weights(ours, norms, eta=0.1)
        assert ours.sum().item() == pytest.approx(3.0)
    assert weights.prod().item() == pytest.approx(22026.47, rel=1e-4)
    assert weights[0].item() == pytest.approx(403.4, rel=1e-3)
    torch.testing.assert_close(ours / ours[1], weights / weights[1])


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_weight_update_properties(floor):
    weights, importance = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64)
    found = update_layer_weights(weights, importance, eta=1.0, floor=floor)
    assert found.sum().item() == pytest.approx(weights.sum().item())
    assert found.min() >= floor * weights.mean()
    torch.testing.assert_close(found, update_layer_weights(weights, 7 * importance, eta=1.0, floor=floor))
    even = update_layer_weights(torch.ones(4), torch.full((4,), 0.3), floor=floor)
    torch.testing.assert_close(even, torch.ones(4))
    for nothing in (torch.zeros(5), torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])):
        assert update_layer_weights(weights, nothing, floor=floor) is weights
    long = torch.ones(2)
    for _ in range(3000):
        long = update_layer_weights(long, torch.tensor([3.0, 1.0]), eta=0.5, floor=floor)
    assert long[1].item() == pytest.approx(0.0, abs=1e-6) if floor == 0 else long[1] > floor


@pytest.mark.chapter("A48", api="lightning_distill.callbacks.sample_layers")
def test_the_scaled_sample_is_unbiased(golden):
    case = golden("random_layer_sampling_unbiased")
    losses, k = case.inputs["layer_losses"].tolist(), int(case.inputs["k"])
    subsets = list(itertools.combinations(range(len(losses)), k))
    scaled = sum(len(losses) / k * sum(losses[i] for i in subset) for subset in subsets) / len(subsets)
    assert scaled == pytest.approx(float(case.expected["expected_scaled"]))
    assert scaled == pytest.approx(float(case.expected["full"]))
    drawn = [tuple(sample_layers(len(losses), k, step=step)) for step in range(6000)]
    counts = torch.tensor([drawn.count(subset) for subset in subsets])
    assert counts.sum() == 6000  # each a valid subset, ascending
    assert (counts - 1000).abs().max() < 4 * (6000 * (1 / 6) * (5 / 6)) ** 0.5
    assert drawn != [tuple(sample_layers(len(losses), k, step=step, seed=1)) for step in range(6000)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.chapter("A39", api="lightning_distill.callbacks.ProgressiveLayers")
def test_progressive_layers_in_a_training_and_after_a_resume(tmp_path):
    third = 1 / 3
    recorder = Recorder()
    module, _, trainer = run(tmp_path, 1, 8, callbacks=[ProgressiveLayers(), recorder])
    on = [sum(weight > 0 for weight in weights) for _, weights in recorder.seen]
    assert on == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert recorder.seen[0] == (0, [third, 0.0, 0.0])
    assert module.terms["features"].pair_weights == [third] * 3
    first = Recorder()
    _, _, trainer = run(tmp_path, 1, 8, callbacks=[ProgressiveLayers(12), first], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    rest, callback = Recorder(), ProgressiveLayers()
    resumed = L.Trainer(
        accelerator="cpu", max_epochs=4, callbacks=[callback, rest], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    resumed.fit(fresh(), datamodule=data(8), ckpt_path=tmp_path / "first.ckpt")
    assert (first.seen + rest.seen)[:12] == recorder.seen
    assert {tuple(weights) for _, weights in rest.seen[6:]} == {(third,) * 3}
    assert callback.num_steps == 12


def fresh(**arguments):
    return KD(
        MLP((6, 8, 8, 8, 4)),
        MLP((6, 12, 12, 12, 4)),
        **{"terms": {"features": FeatureMatching(PAIRS)}, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
        | arguments,
    )


@pytest.mark.chapter("A48", api="lightning_distill.callbacks.RandomLayers")
def test_random_layers_are_the_same_for_all_micro_batches_and_scaled():
    recorder = Recorder()
    run(None, 1, 4, accumulate=2, callbacks=[RandomLayers(2, seed=5), recorder])
    steps = [step for step, _ in recorder.seen]
    assert steps == sorted([*range(12), *range(12)])
    for step, weights in recorder.seen:
        drawn = sample_layers(3, 2, step=step, seed=5)
        assert weights == [pytest.approx(0.5) if i in drawn else 0.0 for i in range(3)]
    assert len({tuple(weights) for _, weights in recorder.seen}) == 3


def test_validation_counts_all_pairs_and_the_term_is_left_as_it_was(make_trainer):
    recorder = Recorder()
    module = fresh()
    trainer = make_trainer(callbacks=[RandomLayers(1), recorder], max_epochs=1, val_check_interval=2)
    trainer.fit(module, datamodule=data(8))
    assert {tuple(weights) for weights in recorder.validation} == {(1 / 3,) * 3}
    assert len(recorder.validation) >= 3
    assert all(sorted(weights)[:2] == [0.0, 0.0] for _, weights in recorder.seen)
    assert module.terms["features"].pair_weights == [1 / 3] * 3

    class Fail(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(callbacks=[RandomLayers(1), Fail()], max_epochs=1).fit(module, datamodule=data(8))
    assert module.terms["features"].pair_weights == [1 / 3] * 3


@pytest.mark.chapter("A41", api="lightning_distill.callbacks.DynamicLayerWeights")
def test_dynamic_weights_are_what_autograd_says(make_trainer):
    """One optimizer step, recomputed by hand."""
    module, callback = fresh(), DynamicLayerWeights(eta=2.0)
    student = MLP((6, 8, 8, 8, 4))
    student.load_state_dict(module.student.state_dict())
    make_trainer(callbacks=[callback], max_steps=1).fit(module, datamodule=data(48))
    x, y = data(48).splits.train
    features, state = [], x
    for block in student.blocks:
        state = block(state)
        features.append(state)
    loss = nn.functional.cross_entropy(student.head(state), y, reduction="sum", ignore_index=-100)
    norms = torch.stack([g.norm() for g in torch.autograd.grad(loss, features)])
    expected = torch.full((3,), 1 / 3) * (2.0 * norms / norms.sum()).exp()
    torch.testing.assert_close(torch.tensor(callback.weights), expected / expected.sum(), rtol=1e-4, atol=0)


def test_micro_batches_and_a_resume_do_not_change_the_dynamic_weights(tmp_path):
    _, (callback,), _ = run(tmp_path, 1, 16)
    assert len(set(callback.weights)) == 3
    assert sum(callback.weights) == pytest.approx(1.0)
    _, (split,), _ = run(tmp_path, 1, 4, accumulate=4)
    assert split.weights == pytest.approx(callback.weights, rel=1e-4)
    _, _, trainer = run(tmp_path, 1, 16, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = DynamicLayerWeights(eta=2.0, floor=0.1)
    torch.manual_seed(3)  # the same teacher
    module = fresh()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[resumed], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(16), ckpt_path=tmp_path / "first.ckpt")
    assert resumed.weights == callback.weights


def test_the_weights_reach_the_loss_and_the_log(make_trainer):
    recorder = Recorder()
    callback = DynamicLayerWeights(eta=5.0, every_n_steps=2)
    module = fresh()
    trainer = make_trainer(callbacks=[callback, recorder], max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, datamodule=data(8))
    sets = [tuple(weights) for _, weights in recorder.seen]
    assert sets[0] == (1 / 3,) * 3
    assert sets[1] == sets[2]  # updated after steps 0, 2 and 4
    assert len(set(sets)) == 4 or sets[5] == tuple(callback.weights)
    assert trainer.callback_metrics["layer_weight/blocks.2"].item() == pytest.approx(callback.weights[2])
    assert not module.terms["hard"]._forward_hooks


def test_other_layers_gradients_are_those_of_a_run_without_the_callback(make_trainer):
    """The extra backward pass leaves no trace in the parameters' gradients."""
    torch.manual_seed(0)
    plain = fresh()
    torch.manual_seed(0)
    watched = fresh()
    torch.manual_seed(1)
    make_trainer(max_steps=1).fit(plain, datamodule=data(48))
    torch.manual_seed(1)
    make_trainer(callbacks=[DynamicLayerWeights()], max_steps=1).fit(watched, datamodule=data(48))
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(watched.student.state_dict()[name], value, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_two_processes_have_the_same_weights_as_one(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    _, (one,), _ = run(tmp_path, 1, 16)
    random, _, _ = run(tmp_path, 1, 16, callbacks=[RandomLayers(2, seed=5)])
    ranks = [torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["weights"] == pytest.approx(one.weights, rel=1e-4)
    for name, value in random.student.state_dict().items():
        torch.testing.assert_close(ranks[0]["random"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProgressiveLayers(0), "`num_steps` must be positive, got 0"),
        (lambda: RandomLayers(0), "`k` must be at least 1, got 0"),
        (lambda: DynamicLayerWeights(eta=0.0), "`eta` must be positive, got 0.0"),
        (lambda: DynamicLayerWeights(eta=float("nan")), "`eta` must be finite"),
        (lambda: DynamicLayerWeights(floor=1.0), r"`floor` must be in \[0, 1\), got 1.0"),
        (lambda: DynamicLayerWeights(every_n_steps=0), "`every_n_steps` must be at least 1"),
        (lambda: progressive_layers(-1, 10, 3), "`step` must be at least 0, got -1"),
        (lambda: progressive_layers(0, 10, 0), "`layers` must be at least 1"),
        (lambda: sample_layers(3, 4, step=0), "`k` must be between 1 and the number of pairs, 3, got 4"),
        (lambda: update_layer_weights(torch.ones(2), torch.ones(3)), "must have the same shape"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_what_it_cannot_turn(make_trainer):
    for callback in (ProgressiveLayers(5), RandomLayers(1), DynamicLayerWeights()):
        with pytest.raises(TypeError, match="but BoringModel has none; its terms are"):
            make_trainer(callbacks=[callback], max_steps=1).fit(BoringModel())
    two = {"a": FeatureMatching(PAIRS), "b": FeatureMatching(PAIRS)}
    with pytest.raises(TypeError, match=r"which of the terms \['a', 'b'\] to turn; name one: `term='a'`"):
        make_trainer(callbacks=[RandomLayers(1)], max_steps=1).fit(fresh(terms=two), datamodule=data(8))
    with pytest.raises(TypeError, match="no term 'hard' with pair weights"):
        make_trainer(callbacks=[RandomLayers(1, term="hard")], max_steps=1).fit(fresh(), datamodule=data(8))
    with pytest.raises(ValueError, match="`k` must be between 1 and the number of pairs, 3, got 4"):
        make_trainer(callbacks=[RandomLayers(4)], max_steps=1).fit(fresh(), datamodule=data(8))
    with pytest.raises(ValueError, match="both turn the pair weights of the term 'features'"):
        make_trainer(callbacks=[RandomLayers(1), DynamicLayerWeights()], max_steps=1).fit(fresh(), datamodule=data(8))
    with pytest.raises(ValueError, match="`task_term` names 'own', which is no term of the module; there are"):
        make_trainer(callbacks=[DynamicLayerWeights(task_term="own")], max_steps=1).fit(fresh(), datamodule=data(8))
    with pytest.raises(ValueError, match="`num_steps` of ProgressiveLayers must be given"):
        make_trainer(callbacks=[ProgressiveLayers()], max_epochs=-1).fit(fresh(), datamodule=data(8))


def test_goes_along_with_other_callbacks(make_trainer):
    module = fresh()
    trainer = make_trainer(callbacks=[DynamicLayerWeights(), TemperatureAnnealing(8.0)], max_epochs=1)
    trainer.fit(module, datamodule=data(8))
    assert module.temperature < 8.0
