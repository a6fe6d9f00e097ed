import copy
import csv
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_distill import KD, FeatureKD, QADModule
from lightning_distill.callbacks import BlockSparsity
from lightning_distill.compression import (
    block_masks,
    element_mask,
    read_block_sparse,
    sparsity_report,
    write_block_sparse,
)
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec, quantized_layers, set_bits
from lightning_distill.sharding import ENTRANCE

API = "lightning_distill.callbacks.BlockSparsity"
SCRIPT = Path(__file__).with_name("block_sparsity_run.py")
BLOCK = (4, 2)
NEVER = 10**6


@pytest.fixture
def make_trainer(make_trainer):
    return partial(make_trainer, limit_val_batches=0)


def network():
    torch.manual_seed(1)
    return MLP((8, 12, 12, 4))


def data(rows=40, batch_size=8, **arguments):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 8, generator=generator), torch.randint(0, 4, (rows,), generator=generator)
    return TensorDataModule((x, y), batch_size=batch_size, seed=5, **arguments)


def kd(optimizer=None, student=None, **arguments):
    adam = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return KD(student or network(), MLP((8, 8, 4)), optimizer=optimizer or adam, **arguments)


def weights(module):
    return {name: layer.weight for name, layer in module.student.named_modules() if type(layer) is nn.Linear}


def gone_weights(blocks, module):
    """Masks over the weights that are to be 0."""
    shapes = {name: tuple(weight.shape) for name, weight in weights(module).items()}
    return {name: ~element_mask(mask, shapes[name], blocks.block) for name, mask in blocks.kept.items()}


class Watch(L.Callback):
    """What every step left behind. Stands after the callback that takes blocks."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, gone in gone_weights(self.blocks, pl_module).items():
            left = weights(pl_module)[name][gone]
            assert (left == 0).all()
            assert not left.signbit().any()
        self.kept.append({name: mask.clone() for name, mask in self.blocks.kept.items()})


def share_gone(kept):
    return 1 - sum(int(mask.sum()) for mask in kept.values()) / sum(mask.numel() for mask in kept.values())


@pytest.mark.chapter("D36", api=API)
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        partial(torch.optim.Adam, lr=0.05, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
        partial(torch.optim.Adafactor, lr=0.05),
        partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
    ],
)
def test_blocks_that_have_gone_stay_exactly_zero(make_trainer, optimizer):
    blocks = BlockSparsity(0.5, BLOCK, start_step=2, end_step=8, every=2)
    watch, module = Watch(blocks), kd(optimizer)
    make_trainer(max_epochs=4, callbacks=[blocks, watch], gradient_clip_val=1.0).fit(module, datamodule=data())
    for name, mask in blocks.kept.items():
        assert int(mask.sum()) == mask.numel() // 2, name
    for before, after in zip(watch.kept, watch.kept[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in after)  # nothing comes back
    report = blocks.report(module)
    assert report.block_sparsity == 0.5
    assert all(layer.kept == int(blocks.kept[layer.name].sum()) for layer in report.layers)


@pytest.mark.chapter("D36", api=API)
def test_sparsity_follows_the_cubic(make_trainer):
    blocks = BlockSparsity(0.7, (1, 1), start_step=3, end_step=14, every=4)
    watch = Watch(blocks)
    make_trainer(max_epochs=4, callbacks=[blocks, watch]).fit(kd(), datamodule=data())
    due = [step for step in range(1, 21) if blocks.is_due(step)]
    assert due == [3, 7, 11, 14]
    total = sum(mask.numel() for mask in blocks.kept.values())
    wanted = 0.0
    for step, kept in enumerate(watch.kept, start=1):
        if step in due:
            wanted = blocks.sparsity_at(step)
        assert share_gone(kept) == pytest.approx(wanted, abs=2 / total)


class Record(L.Callback):
    """Weights and gradients of every step, before blocks go. Stands before the callback that takes them."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.gradients.append({name: weight.grad.clone() for name, weight in weights(pl_module).items()})
        self.weights.append({name: weight.detach().clone() for name, weight in weights(pl_module).items()})


def slow_norms(matrix, block):
    rows = [matrix[i : i + block[0]] for i in range(0, matrix.shape[0], block[0])]
    return torch.tensor(
        [[row[:, j : j + block[1]].square().sum().sqrt() for j in range(0, row.shape[1], block[1])] for row in rows]
    )


@pytest.mark.chapter("D38", api=API)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("block", [(5, 4), (1, 2)])
def test_the_least_important_blocks_go(make_trainer, scope, block):
    record = Record()
    blocks = BlockSparsity(0.6, block, ["blocks.*"], start_step=2, end_step=7, every=2, scope=scope)
    make_trainer(max_steps=9, max_epochs=-1, callbacks=[record, blocks]).fit(kd(), datamodule=data())
    kept, names = None, list(blocks.kept)
    for step, since in ((2, 0), (4, 2), (6, 4), (7, 6)):
        importance = {}
        for name in names:
            seen = [slow_norms(gradients[name], block).square() for gradients in record.gradients[since:step]]
            root_mean_square = torch.stack(seen).mean(dim=0).sqrt()
            importance[name] = slow_norms(record.weights[step - 1][name], block) * root_mean_square
        kept = block_masks(importance, blocks.sparsity_at(step), scope=scope, kept=kept)
    assert 0.5 < share_gone(kept) < 0.7
    assert all(torch.equal(kept[name], blocks.kept[name]) for name in names)


def test_steps_without_gradients_leave_those_before_in_force(make_trainer):
    class Off(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step >= 3:
                optimizer.zero_grad()

    blocks = BlockSparsity(0.6, (1, 2), ["blocks.*"], start_step=3, end_step=7, every=4)
    seen = []
    blocks_after = Watch(blocks)
    blocks_after.on_train_batch_end = lambda *_: seen.append(blocks._gradients.state_dict()["squares"])
    make_trainer(max_steps=8, max_epochs=-1, callbacks=[blocks, blocks_after, Off()]).fit(kd(), datamodule=data())
    assert share_gone(blocks.kept) == pytest.approx(0.6, abs=0.02)
    assert all(torch.equal(squares, seen[2][name]) for name, squares in seen[6].items())


def test_blocks_go_later_where_no_gradient_was_there_in_time(make_trainer, tmp_path):
    class Off(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step < 5:
                optimizer.zero_grad()

    def fit(max_steps, ckpt_path=None):
        blocks = BlockSparsity(0.5, BLOCK, start_step=2, end_step=3)
        watch, module = Watch(blocks), kd()
        trainer = make_trainer(max_steps=max_steps, max_epochs=-1, callbacks=[blocks, watch, Off(), Save(tmp_path)])
        trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path)
        return blocks, [share_gone(kept) for kept in watch.kept]

    blocks, shares = fit(8)
    assert shares == [0, 0, 0, 0, 0, 0.5, 0.5, 0.5]
    for step, expected in ((7, [0.5, 0.5]), (4, [0, 0.5, 0.5, 0.5, 0.5])):
        again, shares = fit(9, tmp_path / f"{step}.ckpt")
        assert shares == expected
        assert all(torch.equal(mask, again.kept[name]) for name, mask in blocks.kept.items())


def test_a_resumed_run_may_ask_for_more(make_trainer, tmp_path):
    first, module = BlockSparsity(0.5, BLOCK, end_step=2), kd()
    trainer = make_trainer(max_steps=4, max_epochs=-1, callbacks=[first])
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    more, module = BlockSparsity(0.75, BLOCK, end_step=2), kd()
    make_trainer(max_steps=7, max_epochs=-1, callbacks=[more]).fit(
        module, datamodule=data(), ckpt_path=tmp_path / "c.ckpt"
    )
    assert more.report(module).block_sparsity == more.block_sparsity > 0.7
    assert all(not (mask & ~first.kept[name]).any() for name, mask in more.kept.items())


def test_by_default_half_of_the_training_is_left_to_recover(make_trainer):
    for start_step, steps, end_step in ((0, 8, 4), (0, 1, 1), (6, 8, 6)):
        blocks = BlockSparsity(0.5, BLOCK, start_step=start_step)
        make_trainer(max_steps=steps, max_epochs=-1, callbacks=[blocks]).fit(kd(), datamodule=data())
        assert blocks.end_step == end_step
        assert blocks.block_sparsity == 0.5


def test_magnitude_looks_at_weights_alone(make_trainer):
    record, blocks = Record(), BlockSparsity(0.5, BLOCK, end_step=2, start_step=2, score="magnitude")
    make_trainer(max_steps=3, max_epochs=-1, callbacks=[record, blocks]).fit(kd(), datamodule=data())
    norms = {name: slow_norms(weight, BLOCK) for name, weight in record.weights[1].items()}
    assert all(torch.equal(mask, blocks.kept[name]) for name, mask in block_masks(norms, 0.5).items())
    assert not blocks._gradients


def test_gradients_of_blocks_that_have_gone_do_not_count_in_clipping(make_trainer):
    class Norm(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, gone in gone_weights(blocks, pl_module).items():
                assert (weights(pl_module)[name].grad[gone] == 0).all()

    blocks = BlockSparsity(0.8, BLOCK, start_step=1, end_step=1)
    make_trainer(max_epochs=1, callbacks=[blocks, Norm()]).fit(kd(), datamodule=data())
    assert share_gone(blocks.kept) > 0.7


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_other_widths(make_trainer, precision):
    blocks, module = BlockSparsity(0.5, BLOCK, end_step=6, every=2), kd()
    trainer = make_trainer(max_steps=8, max_epochs=-1, callbacks=[blocks, Watch(blocks)], precision=precision)
    trainer.fit(module, datamodule=data())
    assert blocks.report(module).block_sparsity == 0.5


@pytest.mark.parametrize("score", ["saliency", "magnitude"])
def test_masks_do_not_depend_on_how_a_step_is_split(make_trainer, score):
    def fit(batch_size, accumulate):
        blocks, module = BlockSparsity(0.5, BLOCK, start_step=1, end_step=8, every=3, score=score), kd()
        trainer = make_trainer(max_epochs=2, callbacks=[blocks], accumulate_grad_batches=accumulate)
        trainer.fit(module, datamodule=data(rows=36, batch_size=batch_size))  # the last step has 4 samples
        assert trainer.global_step == 10
        return blocks.kept, module.student.state_dict()

    kept, student = fit(8, 1)
    split_kept, split_student = fit(4, 2)
    assert all(torch.equal(kept[name], split_kept[name]) for name in kept)
    for name, value in student.items():
        torch.testing.assert_close(split_student[name], value, rtol=1e-3, atol=1e-5)


class Save(L.Callback):
    """A checkpoint of every step, as ``ModelCheckpoint`` writes them: after the other callbacks."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path):
    def fit(folder, max_steps, ckpt_path=None):
        blocks, module = BlockSparsity(0.6, (1, 2), every=3, scope="global"), kd()
        trainer = make_trainer(max_epochs=-1, max_steps=max_steps, callbacks=[blocks, Save(folder)])
        trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path)
        return blocks, module

    straight, module = fit(tmp_path / "straight", 16)
    assert straight.end_step == 8
    for step in (4, 5, 6, 10):  # 5 steps an epoch, blocks go after 3, 6 and 8
        again, resumed = fit(tmp_path / f"from-{step}", 16, tmp_path / "straight" / f"{step}.ckpt")
        assert again.end_step == 8
        assert all(torch.equal(mask, again.kept[name]) for name, mask in straight.kept.items())
        for name, value in module.student.state_dict().items():
            assert torch.equal(resumed.student.state_dict()[name], value), (step, name)
    longer, _ = fit(tmp_path / "longer", 30, tmp_path / "straight" / "4.ckpt")
    assert longer.end_step == 8  # the schedule that was begun


def test_a_checkpoint_of_other_blocks_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, max_epochs=-1, callbacks=[BlockSparsity(0.5, BLOCK, end_step=2)])
    trainer.fit(kd(), datamodule=data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    other = make_trainer(max_steps=4, max_epochs=-1, callbacks=[BlockSparsity(0.5, (2, 2), end_step=2)])
    with pytest.raises(ValueError, match="was made with blocks of 4x2, but `block` is 2x2"):
        other.fit(kd(), datamodule=data(), ckpt_path=tmp_path / "c.ckpt")
    other = make_trainer(max_steps=4, max_epochs=-1, callbacks=[BlockSparsity(0.5, BLOCK, skip=["head"], end_step=2)])
    with pytest.raises(ValueError, match=r"has masks for the layers .*'head'.* but this run takes blocks of"):
        other.fit(kd(), datamodule=data(), ckpt_path=tmp_path / "c.ckpt")


def test_the_student_is_a_plain_network_with_zeros(make_trainer, tmp_path):
    blocks, module = BlockSparsity(0.5, BLOCK, start_step=1, end_step=3), kd()
    trainer = make_trainer(max_steps=5, max_epochs=-1, callbacks=[blocks])
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    student = module.export(tmp_path / "student.safetensors")
    assert list(student.state_dict()) == list(network().state_dict())
    assert sparsity_report(student, BLOCK).block_sparsity == 0.5
    loaded = KD.load_from_checkpoint(tmp_path / "c.ckpt", student=network(), weights_only=False)
    assert sparsity_report(loaded.student, BLOCK).block_sparsity == 0.5


def test_zeros_that_are_there_stay_and_new_students_begin_anew(make_trainer):
    blocks, module = BlockSparsity(0.5, BLOCK, start_step=1, end_step=3), kd()
    make_trainer(max_steps=4, max_epochs=-1, callbacks=[blocks]).fit(module, datamodule=data())
    first, student = blocks.kept, copy.deepcopy(module.student)
    holding, again = BlockSparsity(0.0, BLOCK, end_step=2), kd(student=student)
    make_trainer(max_steps=6, max_epochs=-1, callbacks=[holding]).fit(again, datamodule=data())
    assert all(torch.equal(mask, holding.kept[name]) for name, mask in first.items())
    assert holding.report(again).block_sparsity == 0.5
    assert not torch.equal(again.student.head.weight, module.student.head.weight)
    other = kd(student=MLP((8, 12, 12, 4)))
    make_trainer(max_steps=2, max_epochs=-1, callbacks=[holding]).fit(other, datamodule=data())
    assert all(mask.all() for mask in holding.kept.values())


def test_a_callback_is_used_again_for_another_student(make_trainer):
    blocks = BlockSparsity(0.5, BLOCK, start_step=2, end_step=4)
    with pytest.warns(UserWarning, match="ends after 3 steps"):
        make_trainer(max_steps=3, max_epochs=-1, callbacks=[blocks]).fit(kd(), datamodule=data())
    module = kd(student=MLP((8, 16, 16, 4)))
    make_trainer(max_steps=4, max_epochs=-1, callbacks=[blocks]).fit(module, datamodule=data())
    assert blocks.report(module).block_sparsity == 0.5
    module = kd()
    make_trainer(max_steps=4, max_epochs=-1, callbacks=[blocks]).fit(module, datamodule=data())
    assert blocks.report(module).block_sparsity == 0.5


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_optimizer_is_left_alone(make_trainer, fails):
    optimizers = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            optimizers[:] = trainer.optimizers
            if fails and trainer.global_step == 3:
                raise RuntimeError("stop here")

    blocks, module = BlockSparsity(0.5, BLOCK, start_step=1, end_step=1), kd()
    trainer = make_trainer(max_steps=4, max_epochs=-1, callbacks=[blocks, Keep()])
    with pytest.raises(RuntimeError, match="stop here") if fails else nullcontext():
        trainer.fit(module, datamodule=data())
    for weight in weights(module).values():
        weight.data.fill_(1.0)
    optimizers[0].step()
    assert all((weight != 0).all() for weight in weights(module).values())


def test_a_layer_of_zeros_starts_whole(make_trainer):
    student = network()
    nn.init.zeros_(student.head.weight)
    blocks, module = BlockSparsity(0.5, BLOCK, start_step=2, end_step=3), kd(student=student)
    make_trainer(max_steps=4, max_epochs=-1, callbacks=[blocks]).fit(module, datamodule=data())
    assert int(blocks.kept["head"].sum()) == 3
    assert student.head.weight.any()


def test_features_may_be_matched_as_well(make_trainer):
    module = FeatureKD(network(), MLP((8, 8, 8, 4)), {"blocks.0": "blocks.0"})
    blocks = BlockSparsity(0.5, BLOCK, end_step=4, every=2)
    make_trainer(max_steps=6, max_epochs=-1, callbacks=[blocks]).fit(module, datamodule=data())
    assert blocks.report(module).block_sparsity == 0.5


def test_bfloat16(make_trainer):
    blocks, module = BlockSparsity(0.5, BLOCK, end_step=6, every=2), kd()
    watch = Watch(blocks)
    trainer = make_trainer(max_steps=8, max_epochs=-1, callbacks=[blocks, watch], precision="bf16-mixed")
    trainer.fit(module, datamodule=data())
    assert blocks.report(module).block_sparsity == 0.5
    assert all(weight.isfinite().all() for weight in weights(module).values())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_whose_float16_gradients_overflow_do_not_count(make_trainer, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # float16 ends at 2^16
    blocks = BlockSparsity(0.5, BLOCK, start_step=4, end_step=60, every=20)
    module = kd(partial(torch.optim.AdamW, lr=0.01, fused=fused))
    watch = Watch(blocks)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    make_trainer(max_steps=64, max_epochs=-1, callbacks=[blocks, watch], plugins=[precision]).fit(
        module, datamodule=data()
    )
    assert 1 < scaler.get_scale() < 2.0**40
    assert all(mask.all() for mask in watch.kept[4].values())  # nothing was seen yet that could choose blocks
    assert blocks.report(module).block_sparsity == 0.5
    assert all(weight.isfinite().all() for weight in weights(module).values())


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4),
        QuantSpec(8, 8),
        QuantSpec(2, scheme="lsq"),
        QuantSpec("ternary"),
        QuantSpec(4, scheme="minmax", granularity="tensor"),
        QuantSpec(4, gradient="dsq"),
        QuantSpec(16),
        QuantSpec(32, scheme="seq"),
    ],
    ids=str,
)
def test_zeros_stay_zeros_through_quantization(make_trainer, spec):
    module = QADModule(network(), spec=spec, optimizer=partial(torch.optim.AdamW, lr=0.01))
    blocks = BlockSparsity(0.75, BLOCK, start_step=1, end_step=5, every=2, scope="global")
    make_trainer(max_steps=8, max_epochs=-1, callbacks=[blocks]).fit(module, datamodule=data())
    assert share_gone(blocks.kept) == pytest.approx(0.75, abs=0.02)
    for name, layer in quantized_layers(module.student).items():
        gone = ~element_mask(blocks.kept[name], tuple(layer.weight.shape), BLOCK)
        assert (layer.quantized_weight()[gone] == 0).all()
        assert layer.quantized_weight().isfinite().all()


def test_a_sparse_student_gets_few_bits_and_stays_sparse(make_trainer, tmp_path):
    blocks, module = BlockSparsity(0.5, BLOCK, start_step=1, end_step=3), kd()
    make_trainer(max_steps=4, max_epochs=-1, callbacks=[blocks]).fit(module, datamodule=data())
    student, holding = module.export().train(), BlockSparsity(0.0, BLOCK, end_step=1)
    module = QADModule(student, spec=QuantSpec(4), optimizer=partial(torch.optim.AdamW, lr=0.01))
    make_trainer(max_steps=6, max_epochs=-1, callbacks=[holding]).fit(module, datamodule=data())
    assert holding.report(module).block_sparsity == 0.5
    written = write_block_sparse(module.student, tmp_path / "s.safetensors", BLOCK)
    assert written.sparse["blocks.1.0.codes"] == (9, 18)
    again = read_block_sparse(network(), tmp_path / "s.safetensors")
    x = torch.randn(5, 8)
    torch.testing.assert_close(again(x), module.export()(x))


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(1), QuantSpec("binary"), QuantSpec(4, scheme="seq")], ids=str)
def test_levels_without_zero_are_refused(make_trainer, spec):
    record = Record()
    trainer = make_trainer(max_steps=1, max_epochs=-1, callbacks=[record, BlockSparsity(0.5, BLOCK, end_step=1)])
    record.on_train_start = lambda *_: record.weights.append("started")
    with pytest.raises(ValueError, match=r"have no level at 0 \(\d bits, .*Use scheme='lsq' with 2 bits or more"):
        trainer.fit(QADModule(network(), spec=spec), datamodule=data())
    assert record.weights == []


def test_bits_that_are_set_later_need_a_zero_too(make_trainer):
    class Plan(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                set_bits(pl_module.student, {"head": 2})

    trainer = make_trainer(max_steps=4, max_epochs=-1, callbacks=[BlockSparsity(0.5, BLOCK, end_step=1), Plan()])
    with pytest.raises(ValueError, match=r"The quantized layers \['head'\] have no level at 0 \(2 bits"):
        trainer.fit(QADModule(network(), spec=QuantSpec(4)), datamodule=data())


BAD = {
    "all": ({"sparsity": 1.0}, r"`sparsity`, a share of blocks, must be in \[0, 1\), got 1.0"),
    "negative": ({"sparsity": -0.1}, "got -0.1"),
    "percent": ({"sparsity": 50}, "got 50"),
    "block": ({"block": (16,)}, r"`block` must be two positive whole numbers.*got \(16,\)"),
    "set": ({"block": "sse"}, "`isa` must be one of"),
    "start": ({"start_step": -1}, "`start_step` must not be negative, got -1"),
    "end": ({"start_step": 5, "end_step": 4}, "`end_step` must be at least `start_step` and 1, got 4 with 5"),
    "end 0": ({"end_step": 0}, "got 0 with 0"),
    "every": ({"every": 0}, "`every` must be at least 1, got 0"),
    "scope": ({"scope": "network"}, "`scope` must be 'layer' or 'global', got 'network'"),
    "score": ({"score": "taylor"}, "`score` must be 'saliency' or 'magnitude', got 'taylor'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        BlockSparsity(**({"sparsity": 0.5} | arguments))


def frozen():
    student = network()
    student.head.weight.requires_grad_(False)
    return student


def spread():
    module = kd()
    setattr(module.student, ENTRANCE, lambda function: function())  # as spread weights have it
    return module


def with_adapter():
    from peft import LoraConfig, get_peft_model

    return kd(student=get_peft_model(network(), LoraConfig(target_modules=["head"], r=2)))


UNFIT = {
    "no module of ours": (BoringModel, {}, TypeError, "of a `DistillationModule` such as `KD`, but .* a BoringModel"),
    "too large": (kd, {"block": "avx512"}, ValueError, r"16x16 is larger than the layers 'blocks.0.0' \(12x8\)"),
    "unknown layer": (kd, {"layers": ["tail"]}, ValueError, "`layers` has 'tail', which fits no layer"),
    "nothing": (kd, {"skip": ["*"]}, ValueError, "has no layer to take blocks from"),
    "spread": (spread, {}, ValueError, "spread over the processes, .* Use strategy='ddp'"),
    "adapter": (with_adapter, {}, ValueError, "has a PEFT adapter, .* `student.merge_and_unload"),
    "frozen": (lambda: kd(student=frozen()), {}, ValueError, r"The weights of \['head'\] are not trained"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_modules_are_refused(make_trainer, case):
    make, arguments, error, message = UNFIT[case]
    blocks = BlockSparsity(**({"sparsity": 0.5, "block": BLOCK, "end_step": 1} | arguments))
    module = make()
    trainer = make_trainer(max_steps=1, max_epochs=-1, callbacks=[blocks])
    with pytest.raises(error, match=message):
        trainer.fit(module, datamodule=None if isinstance(module, BoringModel) else data())


def test_the_length_of_the_training_must_be_known_or_not_matter(make_trainer):
    trainer = make_trainer(max_epochs=-1, max_time={"seconds": 5}, callbacks=[BlockSparsity(0.5, BLOCK)])
    with pytest.raises(ValueError, match="`end_step` of BlockSparsity must be given: the length"):
        trainer.fit(kd(), datamodule=data())
    with pytest.raises(ValueError, match="`end_step` is not known before the training starts"):
        BlockSparsity(0.5).sparsity_at(3)
    trainer = make_trainer(max_steps=2, max_epochs=-1, callbacks=[BlockSparsity(0.5, BLOCK, end_step=5)])
    with pytest.warns(UserWarning, match=r"ends after 2 steps, before BlockSparsity .* 0.5 at `end_step=5`"):
        trainer.fit(kd(), datamodule=data())


def test_the_share_of_blocks_is_logged(make_trainer, tmp_path):
    blocks = BlockSparsity(0.75, BLOCK, ["blocks.1.*"], start_step=3, end_step=3)
    assert blocks.block_sparsity == 0
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = make_trainer(max_steps=8, max_epochs=-1, callbacks=[blocks], logger=logger, log_every_n_steps=2)
    trainer.fit(kd(), datamodule=data())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [float(row["block_sparsity"]) for row in csv.DictReader(file) if row["block_sparsity"]]
    assert logged == pytest.approx([0, 14 / 18, 14 / 18, 14 / 18])
    assert blocks.block_sparsity == blocks.report(trainer.lightning_module).block_sparsity == pytest.approx(14 / 18)


def run(folder, devices, kill_at):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, SCRIPT, folder, str(devices), str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_equal_one_and_a_killed_run_resumes_exactly(tmp_path):
    finals = {}
    for devices in (1, 2):
        straight = run(tmp_path / f"straight-{devices}", devices, NEVER)
        assert straight.returncode == 0, straight.stderr
        killed = run(tmp_path / f"killed-{devices}", devices, 17)  # 10 steps an epoch; the checkpoint is of step 15
        assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
        resumed = run(tmp_path / f"killed-{devices}", devices, NEVER)
        assert resumed.returncode == 0, resumed.stderr
        for rank in range(devices):
            expected = torch.load(tmp_path / f"straight-{devices}" / f"final-{rank}.pt")
            found = torch.load(tmp_path / f"killed-{devices}" / f"final-{rank}.pt")
            assert found["steps"] == expected["steps"] == 30
            for part in ("student", "kept"):
                for name, value in expected[part].items():
                    assert torch.equal(found[part][name], value), (devices, rank, name)
            finals[devices, rank] = expected
    one, two, other = finals[1, 0], finals[2, 0], finals[2, 1]
    assert 0.55 < share_gone(one["kept"]) < 0.65
    for name, mask in one["kept"].items():
        assert torch.equal(mask, two["kept"][name])
        assert torch.equal(mask, other["kept"][name])
    for name, value in one["student"].items():
        assert torch.equal(two["student"][name], other["student"][name])
        torch.testing.assert_close(two["student"][name], value, rtol=1e-3, atol=1e-4)
