"""DeepSupervision: what it minimises, measures, keeps and leaves behind."""

import json
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, DeepSupervision, SequenceClassification
from lightning_distill.callbacks import PerformanceHeadWeights
from lightning_distill.compression import EarlyExitNetwork, calibrate_exits
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import AuxiliaryHeads, CrossEntropy, SoftTargets
from lightning_distill.networks import MLP, ConvNet1d, from_config
from lightning_distill.outputs import Outputs
from lightning_distill.tasks import CausalLM, Regression
from lightning_distill.weighting import FixedWeights, LinearDecay

TAPS = ["blocks.0", "blocks.1"]


def network(seed=0, sizes=(8, 12, 12, 12, 3)):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(sizes)


def tensors(items=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, 8, generator=generator)
    return x, (x[:, :3] + 0.3 * torch.randn(items, 3, generator=generator)).argmax(dim=1)


def data(**arguments):
    return TensorDataModule(tensors(), tensors(seed=2), batch_size=8, seed=4, **arguments)


def built(*args, **arguments):
    module = DeepSupervision(*args, **arguments)
    module.build(tensors())
    return module


@pytest.mark.chapter("B05", "B12", api="lightning_distill.DeepSupervision")
def test_the_loss_is_the_sum_over_all_classifiers():
    module = built(network(), AuxiliaryHeads(TAPS, "linear", weights=[0.2, 0.4]), alpha=0.75, temperature=2.0)
    x, y = tensors()
    losses = module.losses(module.observe((x, y)))
    said, h = [], x
    for number in range(2):
        h = module.student.blocks[number](h)
        said.append(module.heads.heads[number](h))
    own = module.student(x)
    ce = [nn.functional.cross_entropy(logits, y) for logits in (*said, own)]
    kl = [
        4 * nn.functional.kl_div((logits / 2).log_softmax(-1), (own / 2).softmax(-1), reduction="batchmean")
        for logits in said
    ]
    assert list(losses) == ["hard", "heads", "layers"]
    torch.testing.assert_close(losses["heads"], 0.2 * ce[0] + 0.4 * ce[1])
    torch.testing.assert_close(losses["layers"], 0.2 * kl[0] + 0.4 * kl[1])
    total = module.weighting(losses)
    expected = ce[2] + 0.2 * (0.75 * ce[0] + 0.25 * kl[0]) + 0.4 * (0.75 * ce[1] + 0.25 * kl[1])
    torch.testing.assert_close(total, expected)


@pytest.mark.chapter("B05")
def test_heads_of_weight_zero_are_plain_training(make_trainer):
    weights = {}
    for name in ("plain", "heads"):
        L.seed_everything(0, verbose=False)
        module = (
            KD(network(), alpha=1.0) if name == "plain" else DeepSupervision(network(), AuxiliaryHeads(TAPS, weights=0))
        )
        make_trainer(max_epochs=2).fit(module, datamodule=data())
        weights[name] = module.student.state_dict()
    for name, value in weights["plain"].items():
        torch.testing.assert_close(weights["heads"][name], value, rtol=1e-5, atol=1e-6)


def test_terms_follow_the_arguments():
    teacher = network(5)
    names = lambda module: module.weighting.weights()  # noqa: E731
    assert names(DeepSupervision(network(), TAPS, alpha=1.0)) == {"hard": 1.0, "heads": 1.0}
    assert names(DeepSupervision(network(), TAPS, teacher, alpha=0.25)) == {
        "hard": 0.25,
        "soft": 0.75,
        "heads": 0.25,
        "layers": 0.75,
    }
    module = built(network(), TAPS, teacher, alpha=0.25, learn_from="teacher", alignment=0.1, weights={"hard": 1.0})
    assert names(module) == {"hard": 1.0, "soft": 0.75, "heads": 0.25, "layers": 0.75, "alignment": 0.1}
    step = module.observe(tensors())
    expected = sum(
        weight * SoftTargets()(_said(step, logits)).mean()
        for weight, logits in zip(module.heads.weights, module.heads.logits(step), strict=True)
    )
    torch.testing.assert_close(module.losses(step)["layers"], expected)
    own = DeepSupervision(network(), TAPS, weights=FixedWeights({"hard": 1.0, "heads": 2.0, "layers": 3.0}))
    assert names(own)["layers"] == 3.0
    more = DeepSupervision(network(), TAPS, terms={"hard": CrossEntropy(0.1), "again": CrossEntropy()})
    assert names(more) == {"hard": 1.0, "heads": 0.7, "layers": pytest.approx(0.3), "again": 1.0}


def _said(step, logits):
    return replace(step, student=Outputs(logits))


@pytest.mark.chapter("B05")
def test_each_head_is_measured_in_validation(make_trainer, tmp_path):
    module = DeepSupervision(network(), TAPS, optimizer=partial(torch.optim.AdamW, lr=0.03))
    trainer = make_trainer(max_epochs=5, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(module, datamodule=data())
    found = trainer.callback_metrics
    x, y = tensors(seed=2)
    with torch.no_grad():
        step = module.eval().observe((x, y))
        for tap, logits in zip(TAPS, module.heads.logits(step), strict=True):
            assert found[f"val/{tap}/accuracy"] == (logits.argmax(-1) == y).float().mean()
            torch.testing.assert_close(found[f"val/{tap}/nll"], nn.functional.cross_entropy(logits, y))
        assert found["val/accuracy"] == (step.student.logits.argmax(-1) == y).float().mean()
    assert found["val/blocks.1/accuracy"] > 0.5
    assert {"train/heads", "train/layers", "train_weighted/heads", "val/heads"} <= set(found)
    several = make_trainer(max_epochs=1, num_sanity_val_steps=0)
    loaders = [DataLoader(TensorDataset(*tensors(seed=seed)), batch_size=8) for seed in (2, 3)]
    several.validate(module, loaders, verbose=False)
    assert {"val/accuracy/loader_1", "val/blocks.0/accuracy/loader_0"} <= set(several.callback_metrics)


@pytest.mark.chapter("B09")
def test_the_weights_of_the_heads_fall_with_the_training(make_trainer):
    heads = AuxiliaryHeads(TAPS, weights=0.4, schedule=LinearDecay(0.9))
    module = DeepSupervision(network(), heads)
    recorded = []
    original = heads.weights_at
    heads.weights_at = lambda step: recorded.append(original(step)) or recorded[-1]
    make_trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data())
    train = recorded[::2]  # asked by "heads" and by "layers"
    assert recorded[1::2] == train
    assert [weights[0] for weights in train] == pytest.approx([0.4 * (1 - 0.9 * step / 12) for step in range(12)])


def test_checkpoints_hold_the_heads_and_the_export_does_not(make_trainer, tmp_path):
    module = DeepSupervision(network(), TAPS, alpha=0.6, alignment=0.1)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DeepSupervision.load_from_checkpoint(tmp_path / "last.ckpt", student=network(9))
    x, y = tensors()
    with torch.no_grad():
        ours, theirs = (m.eval().losses(m.observe((x, y))) for m in (module, loaded))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value)
    exported = module.export(tmp_path / "student.safetensors")
    assert exported.state_dict().keys() == network().state_dict().keys()
    torch.testing.assert_close(exported(x), module.student(x))


@pytest.mark.chapter("D44")
@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_the_student_is_exported_with_its_heads_on_request(make_trainer, tmp_path):
    module = DeepSupervision(network(), TAPS, optimizer=partial(torch.optim.AdamW, lr=0.01))
    make_trainer(max_epochs=8).fit(module, datamodule=data())
    exits = module.export_with_exits(tmp_path / "exits")
    x, y = tensors()
    torch.testing.assert_close(exits(x), module.student(x))
    module.eval()
    step = module.observe((x, y))
    for ours, theirs in zip(exits.all_logits(x)[:-1], module.heads.logits(step), strict=True):
        torch.testing.assert_close(ours, theirs)
    report = calibrate_exits(exits, data_loader(), max_drop=0.1)
    assert report.relative_cost < 1
    exits.save(tmp_path / "calibrated")
    loaded = EarlyExitNetwork.load(tmp_path / "calibrated", network(9))
    assert torch.equal(loaded(x), exits(x))
    assert json.loads((tmp_path / "calibrated" / "exits.json").read_text())["heads"]["taps"] == TAPS
    assert not any(p is q for p in exits.parameters() for q in module.parameters())


def data_loader():
    return DataLoader(TensorDataset(*tensors(seed=2)), batch_size=16)


@pytest.mark.chapter("B11", api="lightning_distill.callbacks.PerformanceHeadWeights")
@pytest.mark.parametrize("invert", [False, True])
def test_weights_by_performance_are_those_of_the_last_validation(make_trainer, tmp_path, invert):
    module = DeepSupervision(network(), AuxiliaryHeads(TAPS, weights=[0.2, 0.4]))
    assert module.heads.weights == [0.2, 0.4]
    callback = PerformanceHeadWeights(invert=invert)
    trainer = make_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(module, datamodule=data())
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ratios = [found["val/accuracy"] / found[f"val/{tap}/accuracy"] for tap in TAPS]
    expected = [w * (1 / r if invert else r) for w, r in zip([0.2, 0.4], ratios, strict=True)]
    assert module.heads.weights == pytest.approx(expected, rel=1e-6)
    assert callback.state_dict() == {"first": [0.2, 0.4], "present": module.heads.weights}

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = DeepSupervision(network(3), AuxiliaryHeads(TAPS, weights=[0.2, 0.4]))
    longer = make_trainer(max_epochs=2, callbacks=[PerformanceHeadWeights(invert=invert)])
    longer.fit(fresh, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    assert fresh.heads.weights == module.heads.weights


def test_weights_by_performance_need_heads_and_a_validation(make_trainer):
    with pytest.raises(TypeError, match="weighs auxiliary heads, which KD does not have"):
        make_trainer(max_steps=1, callbacks=[PerformanceHeadWeights()]).fit(KD(network(), alpha=1.0), datamodule=data())
    with pytest.raises(ValueError, match="reads validation accuracies, but there is no validation"):
        make_trainer(max_steps=1, limit_val_batches=0, callbacks=[PerformanceHeadWeights()]).fit(
            DeepSupervision(network(), TAPS), datamodule=data()
        )
    with pytest.raises(ValueError, match=r"logged no \['val/f1', 'val/blocks.0/f1', 'val/blocks.1/f1'\]"):
        make_trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=[PerformanceHeadWeights(metric="f1")]).fit(
            DeepSupervision(network(), TAPS), datamodule=data()
        )


@pytest.mark.parametrize("kind", ["linear", "tiered", "inverse", "shared"])
def test_convolutions_with_every_kind_of_head(make_trainer, kind):
    x, y = torch.randn(16, 1, 40), torch.arange(16) % 10
    heads = AuxiliaryHeads(["blocks.0", "blocks.1"], kind, channel_dim=1)
    module = DeepSupervision(ConvNet1d((4, 6, 8)), heads, alignment=0.1)
    make_trainer(max_steps=3).fit(module, datamodule=TensorDataModule((x, y), (x, y), batch_size=8))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    exits = module.export_with_exits()
    assert exits(x).shape == (16, 10)


def bert():
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return from_config("bert", "sequence-classification", settings | {"intermediate_size": 32, "num_labels": 4})


@pytest.mark.parametrize("tap", ["hidden_states.{}", "bert.encoder.layer.{}"])
def test_transformers_have_heads_on_hidden_states_or_layers(make_trainer, tap):
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(0, 50, (4, length), generator=generator),
            "attention_mask": torch.ones(4, length).long(),
            "labels": torch.randint(0, 4, (4,), generator=generator),
        }
        for length in (5, 7)
    ]
    module = DeepSupervision(bert(), [tap.format(1), tap.format(2)], task=SequenceClassification(), alignment=0.1)
    module.build(batches[0])
    make_trainer(max_epochs=2).fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
    assert module.heads.heads[0][0].weight.grad is None or module.heads.heads[0][0].weight.grad.isfinite().all()


def test_heads_of_a_language_model_and_of_a_regression(make_trainer):
    settings = {"vocab_size": 30, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
    model = from_config("gpt2", "causal-lm", settings | {"bos_token_id": 0, "eos_token_id": 0})
    batch = {
        "input_ids": torch.randint(0, 30, (4, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2),
    }
    module = DeepSupervision(model, ["transformer.h.0", "transformer.h.1"], task=CausalLM())
    module.build(batch)
    step = module.observe(batch)
    assert [logits.shape for logits in module.heads.logits(step)] == [(16, 30)] * 2
    make_trainer(max_steps=2).fit(module, DataLoader([batch], batch_size=None), DataLoader([batch], batch_size=None))

    x, y = torch.randn(16, 8), torch.randn(16, 3)
    regression = DeepSupervision(network(), TAPS, task=Regression())
    trainer = make_trainer(max_steps=2, val_check_interval=1)
    regression.build((x, y))
    trainer.fit(
        regression, DataLoader(TensorDataset(x, y), batch_size=8), DataLoader(TensorDataset(x, y), batch_size=8)
    )
    assert {"val/blocks.0/mse", "val/mse"} <= set(trainer.callback_metrics)


def test_accumulation_gives_the_gradient_of_the_whole_batch(make_trainer):
    students = []
    for size, accumulate in ((16, 1), (4, 4)):
        L.seed_everything(0, verbose=False)
        module = DeepSupervision(
            network(), AuxiliaryHeads(TAPS, dropout=0.0), alignment=0.1, optimizer=partial(torch.optim.SGD, lr=0.1)
        )
        loader = TensorDataModule(tensors(), batch_size=size, seed=4)
        make_trainer(max_epochs=2, limit_val_batches=0, accumulate_grad_batches=accumulate).fit(
            module, datamodule=loader
        )
        students.append(module.state_dict())
    for name, value in students[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(students[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"`alpha`, the weight of the labels' loss, must be in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, r"must be in \[0, 1\], got nan"),
        ({"alignment": -1.0}, "`alignment` must not be negative, got -1.0"),
        ({"learn_from": "first"}, "`learn_from` must be 'deepest', 'next' or 'teacher', got 'first'"),
        ({"learn_from": "teacher"}, "`learn_from` is 'teacher', but there is none"),
        ({"heads": ["blocks.9"]}, "no submodule 'blocks.9'. Nearest names: 'blocks"),
        ({"heads": ["blocks.0"], "alignment": 1.0}, "`layers` must be at least 2, got 1"),
        ({"weights": {"soft": 1.0}}, r"`weights` names \['soft'\], which are no terms"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepSupervision(network(), **{"heads": TAPS, **arguments})


def test_refuses_layers_that_no_head_fits_when_the_shapes_are_known(make_trainer):
    with pytest.raises(
        ValueError, match=r"`taps` are out of order: the network computes them as \['blocks.0', 'blocks.1'\]"
    ):
        make_trainer(max_steps=1).fit(DeepSupervision(network(), TAPS[::-1]), datamodule=data())
    with pytest.raises(ValueError, match="`heads` were never built"):
        DeepSupervision(network(), TAPS).export_with_exits()
