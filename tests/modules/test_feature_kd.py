"""FeatureKD: its terms, its weights, training on images and transformers, YAML."""

import pytest
import torch
import yaml
from torch import nn

from lightning_distill import KD, CausalLM, FeatureKD, SequenceClassification
from lightning_distill.cli import main
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import FeatureMatching, SoftTargets
from lightning_distill.networks import ConvNet2d, from_config
from lightning_distill.teachers import FrozenTeacher
from lightning_distill.weighting import FixedWeights


def network(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def data():
    x = torch.randn(20, 4)
    return TensorDataModule((x, torch.arange(20) % 3), (x, torch.arange(20) % 3), batch_size=5)


@pytest.mark.chapter("A21", api="lightning_distill.FeatureKD")
def test_loss_is_that_of_kd_and_the_features():
    torch.manual_seed(1)
    student, teacher = network(6), network(9)
    module = FeatureKD(student, teacher, {"1": "1"}, temperature=2.0, alpha=0.4, feature_weight=3.0)
    batch = torch.randn(5, 4), torch.arange(5) % 3
    module.build(batch)
    plain = KD(student, teacher, temperature=2.0, alpha=0.4)
    step = module.observe(batch)
    losses = module.losses(step)
    linear = module.terms["features"].transforms[0].linear
    expected = (linear(student[:2](batch[0])) - teacher[:2](batch[0])).square().mean()
    torch.testing.assert_close(losses["features"], expected)
    base = plain.weighting(plain.losses(plain.observe(batch)))
    torch.testing.assert_close(module.weighting(losses), base + 3.0 * expected)


def test_more_terms_and_weightings_compose():
    module = FeatureKD(
        network(6), network(9), {"1": "1"}, terms={"soft": SoftTargets(beta=1.0), "last": FeatureMatching({"2": "2"})}
    )
    assert module.weighting.weights() == {"features": 1.0, "soft": 0.7, "last": 1.0, "hard": 0.3}
    weighting = FixedWeights({"hard": 1.0, "soft": 1.0, "features": 5.0})
    assert FeatureKD(network(6), network(9), {"1": "1"}, weights=weighting).weighting is weighting
    alone = FeatureKD(network(6), network(9), {"1": "1"}, alpha=1.0, weights={"features": 2.0})
    assert alone.weighting.weights() == {"features": 2.0, "hard": 1.0}


def test_training_brings_the_features_closer(make_trainer):
    torch.manual_seed(1)
    module = FeatureKD(network(6), network(9), {"1": "1"}, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    source = data()
    trainer = make_trainer(max_epochs=15)
    trainer.fit(module, datamodule=source)
    after = trainer.validate(module, datamodule=source, verbose=False)[0]["val/features"]
    torch.manual_seed(1)
    fresh = FeatureKD(network(6), network(9), {"1": "1"})
    before = make_trainer().validate(fresh, datamodule=source, verbose=False)[0]["val/features"]
    assert after < 0.5 * before


def test_convolutional_features_of_other_widths_and_sizes(make_trainer):
    x = torch.randn(12, 1, 8, 8)
    source = TensorDataModule((x, torch.arange(12) % 10), batch_size=6)
    module = FeatureKD(ConvNet2d((4, 8)), ConvNet2d((16, 24, 32)), {"blocks.0": "blocks.1", "blocks.1": "blocks.2"})
    make_trainer(max_epochs=1, limit_val_batches=0).fit(module, datamodule=source)
    widths = [tuple(transform.linear.weight.shape) for transform in module.terms["features"].transforms]
    assert widths == [(24, 4), (32, 8)]


def test_hidden_states_of_encoders_with_padding():
    config = {"vocab_size": 50, "num_attention_heads": 2, "intermediate_size": 32}
    student, teacher = (
        from_config("bert", "sequence-classification", config | {"hidden_size": width, "num_hidden_layers": layers})
        for width, layers in ((8, 2), (16, 4))
    )
    pairs = {"hidden_states.1": "hidden_states.2", "hidden_states.2": "hidden_states.4"}
    module = FeatureKD(student, teacher, pairs, task=SequenceClassification())
    ids, labels = torch.randint(1, 50, (3, 6)), torch.tensor([0, 1, -100])
    padding = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 4 + [0] * 2])
    module.build({"input_ids": ids, "attention_mask": padding})
    student.eval()
    losses = [
        module.losses(module.observe({"input_ids": x, "attention_mask": padding, "labels": labels}))["features"]
        for x in (ids, torch.where(padding.bool(), ids, 7))
    ]
    torch.testing.assert_close(*losses)  # what stands in the padding does not matter


def test_hidden_states_of_language_models_are_compared_where_tokens_count():
    config = {"vocab_size": 40, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    student, teacher = (
        from_config("gpt2", "causal-lm", config | {"n_embd": width, "n_layer": layers}).eval()
        for width, layers in ((8, 1), (16, 2))
    )
    module = FeatureKD(student, teacher, {"hidden_states.0": "hidden_states.1"}, task=CausalLM(), temperature=1.0)
    ids = torch.randint(1, 40, (2, 6))
    labels = ids.clone()
    labels[0, :4] = -100
    batch = {"input_ids": ids, "labels": labels}
    module.build(batch)
    assert list(module.terms) == ["kd", "features"] or list(module.terms) == ["features", "kd"]
    step = module.observe(batch)
    linear = module.terms["features"].transforms[0].linear
    ours = linear(student(ids, output_hidden_states=True).hidden_states[0])
    theirs = teacher(ids, output_hidden_states=True).hidden_states[1]
    each = (ours - theirs).square().mean(dim=-1)[:, :-1][labels[:, 1:] != -100]
    assert len(each) == 2 + 5
    torch.testing.assert_close(module.losses(step)["features"], each.mean())


@pytest.mark.filterwarnings("ignore")
def test_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"class_path": "lightning_distill.networks.MLP", "init_args": {"sizes": [64, 8, 10]}}
    large = {"class_path": "lightning_distill.networks.MLP", "init_args": {"sizes": [64, 16, 10]}}
    model = {
        "student": small,
        "teacher": large,
        "pairs": {"blocks.0": "blocks.0"},
        "feature_weight": 0.5,
        "lr_interval": "step",
    }
    trainer = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
    configuration = {
        "model": {"class_path": "FeatureKD", "init_args": model},
        "data": {"class_path": "DigitsDataModule"},
        "trainer": trainer | {"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
    }
    (tmp_path / "feature.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "-c", "feature.yaml", "--model.distance", "mse"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = FeatureKD.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.terms["features"].transforms[0].linear.weight.shape == (16, 8)
    assert loaded.weighting.weights()["features"] == 0.5


def test_layers_are_paired_by_the_name_of_a_map():
    config = {"vocab_size": 50, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 8}
    student, teacher = (
        from_config("bert", "sequence-classification", config | {"num_hidden_layers": layers}) for layers in (2, 4)
    )
    expected = {
        "uniform": (("hidden_states.1", "hidden_states.2"), ("hidden_states.2", "hidden_states.4")),
        "last": (("hidden_states.2", "hidden_states.4"),),
    }
    for name, pairs in expected.items():
        for one in (teacher, FrozenTeacher(teacher)):
            module = FeatureKD(student, one, name, task=SequenceClassification())
            assert module.terms["features"].pairs == pairs
    convolutions = FeatureKD(ConvNet2d((4, 8)), ConvNet2d((4, 8)), "all")
    assert convolutions.terms["features"].pairs == (("blocks.0", "blocks.0"), ("blocks.1", "blocks.1"))
    with pytest.raises(ValueError, match="`all_map` needs networks of equal depth, got a student with 2 layers"):
        FeatureKD(student, teacher, "all", task=SequenceClassification())
    with pytest.raises(ValueError, match="`pairs` must map taps to taps or be one of uniform, last, all, got 'skip'"):
        FeatureKD(student, teacher, "skip", task=SequenceClassification())
    with pytest.raises(ValueError, match="looks for layers in both networks, but the teacher is a function"):
        FeatureKD(student, lambda batch: batch[0], "uniform", task=SequenceClassification())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`feature_weight` must not be negative, got -1"):
        FeatureKD(network(6), network(9), {"1": "1"}, feature_weight=-1)
    with pytest.raises(ValueError, match="`terms` has a term named 'features'"):
        FeatureKD(network(6), network(9), {"1": "1"}, terms={"features": SoftTargets()})
    with pytest.raises(ValueError, match=r"Sequential has no submodule '7'. Nearest names: '0', '1', '2'"):
        FeatureKD(network(6), network(9), {"7": "1"})
    with pytest.raises(ValueError, match=r"Sequential has no submodule '8'"):
        FeatureKD(network(6), network(9), {"1": "8"})
