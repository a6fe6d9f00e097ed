"""The moving average of an adapter as teacher."""

import copy

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import AdapterMeanTeacher
from lightning_distill.networks import MLP, lora
from lightning_distill.tasks import Classification
from lightning_distill.teachers import AdapterEMATeacher, AdapterOffTeacher

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft 0.21 asks transformers 5.23 for it
)


def student(seed=0):
    torch.manual_seed(seed)
    network = lora(MLP((4, 6, 3)), r=2, dropout=0.3, target_modules=["blocks.0.0", "head"])
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return network


def loader(batch_size=4):
    x = torch.linspace(-1, 1, 64).reshape(16, 4)
    return DataLoader(TensorDataset(x, torch.arange(16) % 3), batch_size=batch_size)


def trained(network):
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def module_of(network, **more):
    return KD(network, alpha=0.5, temperature=2.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.02), **more)


class Record(L.Callback):
    """What the student trains, after each optimizer step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if len(self.weights) < trainer.global_step:
            self.weights.append([parameter.detach().clone() for parameter in trained(pl_module.student)])


class TestTeacher:
    def test_says_what_the_student_would_with_the_averages(self):
        network, other = student(0).train(), student(1).eval()
        teacher = AdapterEMATeacher(network)
        for average, parameter in zip(teacher.averages, trained(other), strict=True):
            average.data.copy_(parameter)
        for (name, base), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
            if "lora" not in name:
                theirs.data.copy_(base)
        x = torch.randn(5, 4)
        said = teacher((x,), Classification())
        torch.testing.assert_close(said.logits, other(x).detach())
        assert not said.logits.requires_grad
        assert (said.logits - network.eval()(x)).abs().max() > 1e-2

    def test_leaves_the_student_as_it_was_also_when_it_fails(self):
        network = student().train()
        teacher = AdapterEMATeacher(network)
        teacher.averages[0].data.add_(1.0)
        before, storages = copy.deepcopy(network.state_dict()), [p.data_ptr() for p in trained(network)]
        teacher((torch.randn(2, 4),), Classification())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            teacher((torch.randn(2, 9),), Classification())
        assert network.training
        assert [p.data_ptr() for p in trained(network)] == storages
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def test_averages_the_adapter_alone(self):
        network = student()
        teacher = AdapterEMATeacher(network)
        expected = [
            0.75 * average + 0.25 * (p + 1) for average, p in zip(teacher.averages, trained(network), strict=True)
        ]
        for parameter in trained(network):
            parameter.data.add_(1.0)
        teacher.update(0.75)
        assert teacher.updates == 1
        for average, value in zip(teacher.averages, expected, strict=True):
            torch.testing.assert_close(average.data, value.detach())
        adapter = sum(parameter.numel() for parameter in trained(network))
        assert sum(average.numel() for average in teacher.averages) == adapter
        assert adapter < sum(parameter.numel() for parameter in network.parameters())

    def test_keeps_small_steps_of_a_narrow_adapter(self):
        network = student().to(torch.bfloat16)
        teacher = AdapterEMATeacher(network)
        before = teacher.averages[0].detach().clone()
        for parameter in trained(network):
            parameter.data.add_(1.0)
        teacher.update(0.9999)
        assert teacher.averages[0].dtype == torch.float32
        torch.testing.assert_close(teacher.averages[0].data - before, torch.full_like(before, 1e-4), rtol=0.02, atol=0)

    def test_taps_hold_what_the_teacher_did(self):
        network = student().eval()
        teacher = AdapterEMATeacher(network)
        teacher.averages[0].data.add_(1.0)
        teacher.tap(["base_model.model.blocks.0"])
        x = torch.randn(3, 4)
        said = teacher((x,), Classification())
        assert said.features["base_model.model.blocks.0"].shape == (3, 6)
        assert (said.features["base_model.model.blocks.0"] - network.base_model.model.blocks[0](x)).abs().max() > 1e-2

    def test_errors(self):
        with pytest.raises(TypeError, match=r"must be a network under an adapter.*got MLP\. For other students"):
            AdapterEMATeacher(MLP((4, 6, 3)))
        with pytest.raises(ValueError, match="Nothing of the student is trained"):
            AdapterEMATeacher(student().requires_grad_(False))
        with pytest.raises(ValueError, match="belongs to no student yet"):
            AdapterEMATeacher()((torch.zeros(1, 4),), Classification())
        with pytest.raises(ValueError, match="is of another student"):
            module_of(student(), teacher=AdapterEMATeacher(student()))
        with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got 1.0"):
            AdapterMeanTeacher(1.0)
        with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got -0.1"):
            AdapterEMATeacher(student()).update(-0.1)


class TestTraining:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_the_average_follows_every_optimizer_step(self, make_trainer, accumulate):
        network, record = student(), Record()
        module = module_of(network)
        trainer = make_trainer(
            max_epochs=3, callbacks=[AdapterMeanTeacher(0.6), record], accumulate_grad_batches=accumulate
        )
        trainer.fit(module, loader())
        expected = [torch.zeros_like(weight) for weight in record.weights[0]]
        for t, weights in enumerate(record.weights):
            momentum = min(1 - 1 / (t + 1), 0.6)
            expected = [momentum * e + (1 - momentum) * w for e, w in zip(expected, weights, strict=True)]
        assert module.teacher.updates == len(record.weights) == 12 // accumulate
        for average, value in zip(module.teacher.averages, expected, strict=True):
            torch.testing.assert_close(average.data, value)

    def test_a_resumed_run_is_the_uninterrupted_one_and_checkpoints_hold_no_base(self, make_trainer, tmp_path):
        def run(name, epochs, path=None):
            module = module_of(student())
            trainer = make_trainer(max_epochs=epochs, callbacks=[AdapterMeanTeacher(0.9)])
            trainer.fit(module, loader(), ckpt_path=path)
            trainer.save_checkpoint(tmp_path / name)
            return module

        straight = run("straight", 4)
        run("first", 2)
        resumed = run("resumed", 4, tmp_path / "first")
        assert resumed.teacher.updates == straight.teacher.updates == 16
        for one, other in zip(resumed.teacher.averages, straight.teacher.averages, strict=True):
            assert torch.equal(one, other)
        assert all(torch.equal(a, b) for a, b in zip(trained(resumed.student), trained(straight.student), strict=True))
        state = torch.load(tmp_path / "resumed", weights_only=True)["state_dict"]
        numbers = sum(value.numel() for value in state.values())
        assert numbers == 2 * sum(parameter.numel() for parameter in trained(student())) + 1  # adapter, average, count
        loaded = KD.load_from_checkpoint(
            tmp_path / "resumed", student=student(), teacher=AdapterEMATeacher(), weights_only=True
        )
        assert torch.equal(loaded.teacher.averages[0], resumed.teacher.averages[0])
        assert type(resumed.export()) is MLP

    def test_refuses_other_modules_and_teachers(self, make_trainer):
        callback = AdapterMeanTeacher()
        with pytest.raises(ValueError, match="has a teacher already, a AdapterOffTeacher; AdapterMeanTeacher brings"):
            make_trainer(max_steps=1, callbacks=[callback]).fit(
                module_of(student(), teacher=AdapterOffTeacher()), loader()
            )
        with pytest.raises(TypeError, match=r"needs a module of lightning-distill.*got LightningModule"):
            callback.setup(make_trainer(), L.LightningModule(), "fit")
        with pytest.raises(TypeError, match="must be a network under an adapter"):
            make_trainer(max_steps=1, callbacks=[callback]).fit(module_of(MLP((4, 6, 3))), loader())


def test_lora_trains_low_rank_factors_alone():
    base = MLP((4, 6, 3))
    network = lora(base, r=2, target_modules=["head"], modules_to_save=["blocks.0.0"])
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-3] for name in names if "lora" in name} == {"lora_A", "lora_B"}
    assert len(names) == 4  # two factors, and weight and bias of the layer that is saved whole
    expected = get_peft_model(copy.deepcopy(MLP((4, 6, 3))), LoraConfig(r=2, target_modules=["head"]))
    assert isinstance(network, type(expected))
    assert isinstance(base.head, nn.Module)
