"""A network with fewer channels is a student like any other."""

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, QADModule
from lightning_distill.cli import main
from lightning_distill.compression import factorize, prune_channels
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.networks import MLP, ConvNet1d, ResNet1d
from lightning_distill.quantization import QuantSpec, export_onnx, quantized_layers, run_onnx


def signals(number=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(number, 1, 40, generator=generator), torch.randint(10, (number,), generator=generator)


def student():
    torch.manual_seed(1)
    network = ResNet1d((16, 16))
    report = prune_channels(network, torch.randn(2, 1, 40), keep=0.5)
    assert set(report.channels.values()) == {8}
    return network


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


class Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(step, make_trainer, tmp_path):
    def fit(ckpt_path=None, callbacks=()):
        network = student()
        torch.manual_seed(2)
        module = KD(network, ResNet1d((16, 16)), temperature=2.0, optimizer=adam)
        trainer = make_trainer(max_epochs=2, limit_val_batches=0, callbacks=list(callbacks))
        trainer.fit(module, datamodule=TensorDataModule(signals(), batch_size=8, seed=5), ckpt_path=ckpt_path)
        assert trainer.global_step == 10  # 5 steps an epoch
        return module.student.state_dict()

    straight = fit(callbacks=[Save(tmp_path)])
    resumed = fit(tmp_path / f"{step}.ckpt")
    start = student().state_dict()
    assert not torch.equal(straight["stem.0.weight"], start["stem.0.weight"])
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


def test_the_exported_student_fits_the_same_shapes(make_trainer, tmp_path):
    module = KD(student(), ResNet1d((16, 16)), optimizer=adam)
    make_trainer(max_steps=2).fit(module, DataLoader(TensorDataset(*signals()), 8))
    path = tmp_path / "student.safetensors"
    exported = module.export(path)
    assert type(exported) is ResNet1d
    assert type(exported.stem[0]) is nn.Conv1d
    assert not any(parameter.grad_fn or parameter.grad is not None for parameter in exported.parameters())
    again = student().eval()
    again.load_state_dict(load_file(path))
    x, _ = signals()
    torch.testing.assert_close(again(x), module.student.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ResNet1d((16, 16)).load_state_dict(load_file(path))


def test_a_pruned_student_is_quantized_trained_and_written(make_trainer, tmp_path):
    network, (x, y) = student(), signals()
    module = QADModule(network, spec=QuantSpec(weights=8, activations=8), alpha=0.2, optimizer=adam)
    assert module.teacher.network.stem[0].out_channels == 8
    before = {name: value.clone() for name, value in module.student.named_parameters()}
    make_trainer(max_steps=2, limit_val_batches=0).fit(module, datamodule=TensorDataModule((x, y), batch_size=8))
    assert all(not torch.equal(value, before[name]) for name, value in module.student.named_parameters())
    exported = module.export()
    assert quantized_layers(exported)["stem.0"].weight.shape == (8, 1, 5)
    export_onnx(exported, x, tmp_path / "student.onnx")
    with torch.inference_mode():
        expected = exported(x)
    found = run_onnx(tmp_path / "student.onnx", x)
    assert (found - expected).norm() <= 0.05 * expected.norm()


def test_a_pruned_network_is_factorized(make_trainer):
    network = MLP((40, 64, 64, 10))
    x, y = signals()
    prune_channels(network, x.flatten(1), keep=0.5)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with torch.inference_mode():
        before = network(x)
    report = factorize(network, rank={"blocks.1.0": 4})
    assert [(layer.name, layer.rank) for layer in report.layers] == [("blocks.1.0", 4)]
    assert [layer.weight.shape for layer in network.blocks[1][0]] == [(4, 32), (32, 4)]
    assert parameters - sum(parameter.numel() for parameter in network.parameters()) == 32 * 32 - 4 * (32 + 32)
    assert network(x).shape == before.shape
    module = KD(network, MLP((40, 8, 10)), optimizer=adam)
    start = network.blocks[0][0].weight.detach().clone()
    make_trainer(max_steps=1).fit(module, DataLoader(TensorDataset(x, y), 8))
    assert not torch.equal(network.blocks[0][0].weight, start)


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_student_from_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    widths = {"class_path": "lightning_distill.networks.ConvNet1d", "init_args": {"widths": [16, 16]}}
    pruned = {
        "class_path": "lightning_distill.compression.pruned",
        "init_args": {"network": widths, "shape": [2, 1, 40], "keep": {"blocks.0.0": 8}, "skip": ["blocks.1.0"]},
    }
    configuration = {
        "model": {"class_path": "KD", "init_args": {"student": pruned, "teacher": widths}},
        "data": {"class_path": "MNIST1DDataModule"},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
        },
    }
    save = {"dirpath": "saved", "save_last": True}
    configuration["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}
    ]
    (tmp_path / "pruned.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "-c", "pruned.yaml"])
    module = KD.load_from_checkpoint(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert type(module.student) is ConvNet1d
    assert module.student.blocks[0][0].weight.shape == (8, 1, 5)
    assert module.student.blocks[1][0].weight.shape == (16, 8, 5)
    assert module.teacher.network.blocks[0][0].weight.shape == (16, 1, 5)
