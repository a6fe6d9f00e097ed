"""Students under a PEFT adapter: their own base as teacher, their checkpoints, their exports."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_distill import KD
from lightning_distill.adapters import frozen_base
from lightning_distill.cli import main
from lightning_distill.export import write_network
from lightning_distill.modes import inference
from lightning_distill.networks import from_config
from lightning_distill.tasks import CausalLM, Classification, SequenceClassification
from lightning_distill.teachers import FrozenTeacher
from lightning_distill.teachers.adapter import AdapterOffTeacher

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft 0.21 asks transformers 5.23 for it
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=24, n_embd=16, n_layer=1, n_head=2))


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24,
        )
    )  # fmt: skip


def lora(base=None, *, moved=True, **more):
    """``base`` under an adapter with dropout, whose factors are not zero unless it has not ``moved``."""
    base = llama() if base is None else base
    config = LoraConfig(r=2, lora_dropout=0.5, **{"target_modules": ["q_proj", "v_proj"]} | more)
    student = get_peft_model(base, config)
    torch.manual_seed(1)
    for parameter in student.parameters():
        if moved and parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return student


def tokens(items=4, length=7):
    return {"input_ids": torch.randint(0, 31, (items, length))}


def loader(batches=2):
    torch.manual_seed(3)
    return DataLoader([tokens() for _ in range(batches)], batch_size=None)


def module_of(student, teacher="base", **more):
    teacher = AdapterOffTeacher(student) if teacher == "base" else teacher
    return KD(student, teacher, task=CausalLM(), temperature=2.0, **more)


def requires_grad(network):
    return [parameter.requires_grad for parameter in network.parameters()]


class TestTeacher:
    def test_says_what_the_base_said_before_the_adapter(self):
        base = gpt2()  # dropout in base and adapter
        reference = FrozenTeacher(copy.deepcopy(base))
        student = lora(base, target_modules=["c_attn"], fan_in_fan_out=True).train()
        batch, task = tokens(), CausalLM()
        said = AdapterOffTeacher(student)(batch, task)
        torch.testing.assert_close(said.logits, reference(batch, task).logits)
        assert not said.logits.requires_grad
        with inference(student):
            assert (task.run(student, batch).logits - said.logits).abs().max() > 1e-2  # the adapter does something

    def test_leaves_modes_adapters_and_gradients_as_they_were(self):
        student = lora().train()
        student.base_model.model.model.norm.eval()
        frozen = next(value for name, value in student.named_parameters() if "lora_A" in name)
        frozen.requires_grad_(False)  # peft itself would make it trainable again
        modes, trained = [module.training for module in student.modules()], requires_grad(student)
        teacher = AdapterOffTeacher(student)
        state = copy.deepcopy(student.state_dict())
        torch.manual_seed(5)
        before = student(**tokens()).logits
        teacher(tokens(), CausalLM())
        assert [module.training for module in student.modules()] == modes
        assert requires_grad(student) == trained
        assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
        torch.manual_seed(5)
        assert torch.equal(student(**tokens()).logits, before)

    def test_leaves_the_student_alone_when_the_base_fails(self):
        student = lora().train()
        trained = requires_grad(student)
        with pytest.raises(IndexError, match="index out of range"):
            AdapterOffTeacher(student)({"input_ids": torch.full((1, 3), 99)}, CausalLM())
        assert student.training
        assert requires_grad(student) == trained
        assert student.get_model_status().enabled is True

    def test_owns_no_weights(self):
        student = lora()
        module = module_of(student)
        assert list(module.teacher.parameters()) == []
        assert set(module.state_dict()) == {f"student.{name}" for name in student.state_dict()}
        copied = copy.deepcopy(module)
        assert copied.teacher.__dict__["_network"] is copied.student

    def test_a_learned_prompt_is_off_too(self):
        base = gpt2()
        reference = FrozenTeacher(copy.deepcopy(base))
        student = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        batch, task = tokens(), CausalLM()
        said = AdapterOffTeacher(student)(batch, task).logits
        torch.testing.assert_close(said, reference(batch, task).logits)
        # the base runs through its output layer; that must not make the student's run skip the prompt
        with inference(student):
            expected = student(**batch).logits[:, -7:-1].flatten(0, 1)
            torch.testing.assert_close(task.run(student, batch).logits, expected)
        assert (expected - said).abs().max() > 1e-3

    def test_speaks_with_the_original_head_of_a_classifier(self):
        config = BertConfig(
            vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
        )
        torch.manual_seed(0)
        base = BertForSequenceClassification(config)
        reference = copy.deepcopy(base).eval()
        student = lora(base, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS").train()
        batch = tokens()
        said = AdapterOffTeacher(student)(batch, SequenceClassification()).logits
        torch.testing.assert_close(said, reference(**batch).logits.detach())
        assert any("modules_to_save" in name and p.requires_grad for name, p in student.named_parameters())

    def test_taps_hold_the_base_and_do_not_outlive_the_pass(self):
        student = lora()
        teacher = AdapterOffTeacher(student)
        teacher.tap(["model.layers.0"])
        hooks = [len(module._forward_hooks) for module in student.modules()]
        said = teacher(tokens(), CausalLM())
        assert said.features["model.layers.0"].shape == (4, 7, 16)
        assert not said.features["model.layers.0"].requires_grad
        assert [len(module._forward_hooks) for module in student.modules()] == hooks
        with pytest.raises(ValueError, match=r"no submodule 'model.layer.0'. Nearest names: 'model.layers.0'"):
            teacher.tap(["model.layer.0"])

    @pytest.mark.parametrize(
        ("student", "error", "message"),
        [
            (llama, TypeError, "must be a network under an adapter.*got LlamaForCausalLM"),
            (lambda: lora(bias="lora_only"), ValueError, "trains the base's biases .bias='lora_only'"),
        ],
    )
    def test_refuses_students_without_a_fixed_base(self, student, error, message):
        with pytest.raises(error, match=message):
            AdapterOffTeacher(student())

    def test_refuses_a_base_that_is_trained(self):
        student = lora()
        student.base_model.model.lm_head.requires_grad_(True)
        with pytest.raises(ValueError, match=r"base is trained too .lm_head.weight and 0 more"):
            AdapterOffTeacher(student)


class TestTraining:
    def test_trains_the_adapter_and_nothing_else(self, make_trainer):
        student = lora(moved=False)
        before = copy.deepcopy(student.state_dict())
        module = module_of(student, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
        make_trainer(max_steps=2).fit(module, loader())
        changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if "lora_" in name}

    def test_an_adapter_that_does_nothing_is_at_no_distance_from_its_base(self):
        """LoRA starts with a product of zero, so the divergence and its gradient are zero; labels move it."""
        student = lora(moved=False).eval()
        module = module_of(student, alpha=0.0)
        loss = module.losses(module.observe(tokens()))["kd"]
        loss.backward()
        assert loss.abs() < 1e-6
        assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in student.parameters())


class TestCheckpoint:
    @pytest.fixture
    def path(self, tmp_path, make_trainer):
        trainer = make_trainer(max_steps=2)
        trainer.fit(module_of(self.student()), loader())
        trainer.save_checkpoint(tmp_path / "adapter.ckpt")
        return tmp_path / "adapter.ckpt"

    @staticmethod
    def student(seed=0, **more):
        return lora(llama(seed), moved=False, modules_to_save=["lm_head"], **more)

    def test_holds_the_adapter_only_and_resumes_exactly(self, path, tmp_path, make_trainer):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert {name.split(".")[-2] for name in state} == {"default"}
        assert all("lora_" in name or "modules_to_save" in name for name in state)
        assert len(state) == 5  # two factors for each of two layers, and the output layer
        straight, resumed = self.student(), self.student()
        make_trainer(max_epochs=2).fit(module_of(straight), loader())
        first = make_trainer(max_epochs=1)
        first.fit(module_of(self.student()), loader())
        first.save_checkpoint(tmp_path / "first.ckpt")
        make_trainer(max_epochs=2).fit(module_of(resumed), loader(), ckpt_path=tmp_path / "first.ckpt")
        for name, value in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name

    def test_loads_into_a_new_base_by_load_from_checkpoint(self, path):
        student = self.student()
        untrained = copy.deepcopy(student.state_dict())
        loaded = KD.load_from_checkpoint(path, student=student, task=CausalLM(), strict=True)
        state = torch.load(path, weights_only=True)["state_dict"]
        for name, value in loaded.student.state_dict().items():
            expected = state.get(f"student.{name}", untrained[name])
            assert torch.equal(value, expected), name
        name = "base_model.model.lm_head.modules_to_save.default.weight"
        assert not torch.equal(loaded.student.state_dict()[name], untrained[name])

    def test_loads_into_the_same_base_in_another_precision(self, path):
        student = self.student()
        for name, parameter in student.named_parameters():
            if name in frozen_base(student):
                parameter.data = parameter.data.bfloat16()
        KD.load_from_checkpoint(path, student=student, task=CausalLM())

    def test_refuses_another_base(self, path):
        with pytest.raises(ValueError, match=r"trained on another base: .* Load the base from the same"):
            KD.load_from_checkpoint(path, student=self.student(seed=1), task=CausalLM())

    def test_refuses_a_student_without_an_adapter(self, path):
        with pytest.raises(ValueError, match="holds only an adapter, but the student is a LlamaForCausalLM without"):
            KD.load_from_checkpoint(path, student=llama(), task=CausalLM())

    def test_refuses_another_adapter(self, path):
        with pytest.raises(RuntimeError, match=r"Missing key.*k_proj.lora_A"):
            KD.load_from_checkpoint(
                path, student=self.student(target_modules=["q_proj", "v_proj", "k_proj"]), task=CausalLM()
            )

    def test_a_checkpoint_without_an_adapter_is_refused_by_a_student_with_one(self, tmp_path, make_trainer):
        trainer = make_trainer(max_steps=1)
        trainer.fit(KD(llama(), alpha=1.0, task=CausalLM()), loader())
        trainer.save_checkpoint(tmp_path / "whole.ckpt")
        with pytest.raises(ValueError, match="is of a student without an adapter, but the student is a PeftModel"):
            KD.load_from_checkpoint(tmp_path / "whole.ckpt", student=lora(), task=CausalLM())

    def test_keeps_what_is_trained_of_the_base_and_frozen_adapters(self):
        student = self.student()
        student.add_adapter("second", LoraConfig(r=1, target_modules=["k_proj"]))  # frozen until it is activated
        student.base_model.model.model.norm.requires_grad_(True)
        left_out = frozen_base(student)
        kept = set(student.state_dict()) - left_out
        assert not any("lora_" in name or "modules_to_save" in name for name in left_out)
        assert "base_model.model.model.norm.weight" in kept
        assert any("second" in name for name in kept)
        assert "base_model.model.model.layers.0.mlp.up_proj.weight" in left_out
        assert "base_model.model.lm_head.original_module.weight" in left_out

    def test_leaves_out_both_names_of_tied_weights(self):
        student = lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
        assert {"base_model.model.lm_head.weight", "base_model.model.transformer.wte.weight"} <= frozen_base(student)


class TestExport:
    def test_merges_the_adapter_into_the_original_class(self, tmp_path):
        student = lora(modules_to_save=["lm_head"])
        module, batch = module_of(student), tokens()
        before = copy.deepcopy(student.state_dict())
        exported = module.export(tmp_path / "student")
        assert type(exported) is LlamaForCausalLM
        assert set(exported.state_dict()) == set(llama().state_dict())
        assert not any(hasattr(part, "peft_config") for part in exported.modules())
        assert all(parameter.requires_grad for parameter in exported.parameters())
        assert not exported.training
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "student").eval()
        with inference(student):
            expected = student(**batch).logits
        torch.testing.assert_close(exported(**batch).logits, expected)
        torch.testing.assert_close(loaded(**batch).logits, expected)
        assert isinstance(module.student, PeftModel)
        assert student.training
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

    def test_tied_weights_stay_tied(self):
        exported = module_of(lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)).export()
        assert exported.lm_head.weight is exported.transformer.wte.weight

    def test_writes_the_adapter_alone(self, tmp_path):
        student, batch = lora(modules_to_save=["lm_head"]), tokens()
        module_of(student).export_adapter(tmp_path / "adapter")
        size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
        assert size < 4 * sum(p.numel() for p in student.parameters() if p.requires_grad) + 2000
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
        with inference(student):
            torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits)
        with pytest.raises(FileExistsError, match=r"exists. Choose another path"):
            module_of(student).export_adapter(tmp_path / "adapter")

    def test_refuses_what_has_no_adapter_or_cannot_be_merged(self, tmp_path):
        with pytest.raises(TypeError, match=r"LlamaForCausalLM without a PEFT adapter. Use `export`"):
            KD(llama(), alpha=1.0, task=CausalLM()).export_adapter(tmp_path / "adapter")
        with pytest.raises(ValueError, match="`path` must be a folder"):
            module_of(lora()).export_adapter(tmp_path / "adapter.safetensors")
        prompt = get_peft_model(gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(ValueError, match=r"type PROMPT_TUNING cannot be merged.*export_adapter"):
            module_of(prompt).export()

    def test_a_plain_network_is_copied_with_its_buffers(self):
        network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        module = KD(network, alpha=1.0, task=Classification())
        exported = module.export()
        assert [p.requires_grad for p in exported.parameters()] == requires_grad(network)
        network[0].weight.data.zero_()
        network[1].running_mean.fill_(7.0)
        assert exported[0].weight.abs().sum() > 0
        assert exported[1].running_mean.abs().sum() == 0


class TestConfigured:
    """A teacher that is told its student by the module, so that YAML can name it."""

    def test_the_module_tells_it_the_student(self):
        student = lora()
        module = module_of(student, teacher=AdapterOffTeacher())
        expected = AdapterOffTeacher(student)(tokens(), CausalLM())
        torch.manual_seed(0)
        assert module.teacher.network is student
        assert module.teacher(tokens(), CausalLM()).logits.shape == expected.logits.shape

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match=r"belongs to no student yet.*AdapterOffTeacher\(student\)"):
            AdapterOffTeacher()(tokens(), CausalLM())
        with pytest.raises(ValueError, match="is of another student"):
            module_of(lora(), teacher=AdapterOffTeacher(lora()))
        with pytest.raises(TypeError, match=r"must be a network under an adapter.*got LlamaForCausalLM"):
            module_of(llama(), teacher=AdapterOffTeacher())

    @pytest.mark.filterwarnings("ignore")  # the command line shows users whatever it has to warn of
    def test_the_example_trains_an_adapter_and_keeps_the_base_out_of_its_checkpoint(self, tmp_path, monkeypatch):
        configuration = yaml.safe_load((EXAMPLES / "text_lora.yaml").read_text())
        base = configuration["model"]["init_args"]["student"]["init_args"]["base"]["init_args"]
        network = from_config(**base["network"]["init_args"])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))
        write_network(network, tmp_path / base["path"])
        (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i}: {i * i} and {i + 7}." for i in range(600)))
        configuration["data"]["init_args"] |= {"files": ["text.txt"], "batch_size": 2}
        configuration["trainer"] |= {
            "max_steps": 2,
            "logger": False,
            "enable_progress_bar": False,
            "limit_val_batches": 1,
        }
        (tmp_path / "lora.yaml").write_text(yaml.safe_dump(configuration))
        main(["fit", "-c", "lora.yaml"])
        (path,) = tmp_path.rglob("*.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["state_dict"]
        assert all("lora_" in name for name in checkpoint["state_dict"])
        module = KD.load_from_checkpoint(path, weights_only=True)  # the configuration is in it
        assert isinstance(module.teacher, AdapterOffTeacher)
        assert module.teacher.network is module.student
