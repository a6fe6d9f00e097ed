"""Two processes that share one student's weights (FSDP2). Run by test_sharded.py."""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill import KD, FeatureKD
from lightning_distill.callbacks import OnPolicy
from lightning_distill.deferred import on_meta
from lightning_distill.export import write_network
from lightning_distill.losses import fused
from lightning_distill.networks import from_config
from lightning_distill.tasks import CausalLM
from lightning_distill.teachers import AdapterOffTeacher, FrozenTeacher, load_network
from lightning_distill.weighting import Weighting


def gpt2(width, seed, layers=2):
    torch.manual_seed(seed)
    config = {"vocab_size": 60, "n_positions": 16, "n_embd": width, "n_layer": layers, "n_head": 2}
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    return from_config("gpt2", "causal-lm", config | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))


class Texts(Dataset):
    """32 rows of 12 tokens; many are masked, in some batches far more than in others."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 60, (32, 12), generator=generator)
        self.labels = self.ids.clone()
        self.labels[20:, 3:] = -100
        self.labels[5, :] = -100  # nothing of it counts

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i], "index": torch.tensor(i)}


def module(student, *, sharded_teacher=False, rate=1.0, optimizer=torch.optim.SGD, **more):
    teacher = FrozenTeacher(gpt2(24, 2), sharded=sharded_teacher)
    return KD(student, teacher, task=CausalLM(), temperature=2.0, optimizer=lambda p: optimizer(p, lr=rate), **more)


def trainer(folder, *, devices=2, whole=False, **more):
    strategy = ModelParallelStrategy(
        data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=not whole
    )
    quiet = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy if devices > 1 else "auto",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**(quiet | more))


def vector(network):
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def gradient(folder, devices, batch_size, accumulate, **more):
    """What a step of ``devices`` processes changed in the whole student, at learning rate 1."""
    student = gpt2(16, 1)
    before = vector(student)
    run = module(student, **more)
    fit = trainer(folder, devices=devices, max_epochs=1, accumulate_grad_batches=accumulate)
    fit.fit(run, DataLoader(Texts(), batch_size=batch_size))
    assert fit.global_step == 1
    whole = run.export()
    return before - vector(whole) if fit.is_global_zero else None


def gradients(folder):
    """By kind of the loss, split and teacher."""
    found = {}
    for kind, threshold in {"logits": 2**40, "chunks": 0}.items():
        fused.PLAIN_BYTES = threshold
        for split in [(16, 1), (3, 6)]:
            found[(kind, *split, "copies")] = gradient(folder, 2, *split)
        found[kind, 8, 2, "spread"] = gradient(folder, 2, 8, 2, sharded_teacher=True)
    fused.PLAIN_BYTES = 256 * 2**20
    return found


class Learned(Weighting):
    """A weight that is trained, a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, losses):
        return losses["hard"] + losses["soft"] + self.weight * losses["features"]

    def weights(self):
        return {"features": self.weight.detach()}


def with_projections(folder, devices, batch_size, accumulate, **more):
    """What a step changed in the student, in a projection of features and in a learned weight."""
    student, pairs = gpt2(16, 1), {"hidden_states.1": "hidden_states.2"}
    teacher = gpt2(24, 2)
    run = FeatureKD(
        student, teacher, pairs, task=CausalLM(), weights=Learned(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    torch.manual_seed(4)
    run.build(next(iter(DataLoader(Texts(), batch_size=2))))
    projection = vector(run.terms["features"])
    fit = trainer(folder, devices=devices, max_epochs=1, accumulate_grad_batches=accumulate, **more)
    fit.fit(run, DataLoader(Texts(), batch_size=batch_size))
    after = run.terms["features"].state_dict().values()
    after = torch.cat(
        [(v.full_tensor() if isinstance(v, DTensor) else v).flatten() for v in after if isinstance(v, torch.Tensor)]
    )
    weight, whole = run.weighting.weight.detach().clone(), run.export()
    if fit.is_global_zero:
        return {
            "student": vector(gpt2(16, 1)) - vector(whole),
            "projection": projection - after,
            "weight": 0.5 - weight,
        }
    return None


class Look(L.Callback):
    """What each process holds in the middle of the training."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        self.found = {
            "spread": all(isinstance(p, DTensor) for p in parameters),
            "held": sum(p.to_local().numel() for p in parameters),
            "all": sum(p.numel() for p in parameters),
            "teacher spread": any(isinstance(p, DTensor) for p in pl_module.teacher.network.parameters()),
        }


def resumed(folder, *, whole):
    """Weights after two epochs at once, and after one, a checkpoint, and another; validated on the way."""
    loader = DataLoader(Texts(), batch_size=4)
    kind = "whole" if whole else "shards"
    results, look = [], Look()
    for stops in ([2], [1, 2]):
        path = None
        for stop in stops:
            run = module(gpt2(16, 1), rate=0.01, optimizer=torch.optim.AdamW)
            fit = trainer(folder, whole=whole, max_epochs=stop, callbacks=[look], gradient_clip_val=0.5)
            fit.fit(run, loader, loader, ckpt_path=path)
            path = folder / f"{kind}-{stop}.ckpt"
            fit.save_checkpoint(path)
        results.append(run.export(folder / f"{kind}-{len(stops)}.safetensors").state_dict())
    validated = {name: float(value) for name, value in fit.callback_metrics.items()}
    return {"weights": results, "look": look.found, "validated": validated}


def evaluated(folder):
    """Losses of the exported student, on one process as on two."""
    run = module(load_network(gpt2(16, 5), str(folder / "shards-1.safetensors")))
    fit = trainer(folder)
    return fit.validate(run, DataLoader(Texts(), batch_size=4), verbose=False)[0]


def adapter(folder):
    """A LoRA student with its own base as teacher: one epoch, a checkpoint, resumed, merged."""
    from peft import LoraConfig, get_peft_model

    results = []
    for stops in ([2], [1, 2]):
        path = None
        for stop in stops:
            torch.manual_seed(3)
            student = get_peft_model(gpt2(16, 1), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
            run = KD(
                student,
                AdapterOffTeacher(student),
                task=CausalLM(),
                alpha=0.5,
                optimizer=lambda p: torch.optim.AdamW(p, lr=0.1),
            )
            fit = trainer(folder, max_epochs=stop)
            fit.fit(run, DataLoader(Texts(), batch_size=4), ckpt_path=path)
            path = folder / f"adapter-{stop}.ckpt"
            fit.save_checkpoint(path)
        results.append(run.export())
    return {"weights": [network.state_dict() for network in results], "class": type(results[0]).__name__}


def from_files(folder):
    """Student and teacher that were never whole in a process; what came out must be what went in."""
    write_network(gpt2(16, 1), folder / "student.safetensors", overwrite=True)
    gpt2(24, 2).save_pretrained(folder / "teacher")
    torch.distributed.barrier() if torch.distributed.is_initialized() else None
    student = on_meta(lambda: gpt2(16, 7), folder / "student.safetensors")
    teacher = FrozenTeacher(on_meta(lambda: gpt2(24, 8), folder / "teacher"), sharded=True)
    before = vector(gpt2(16, 1))
    run = KD(student, teacher, task=CausalLM(), temperature=2.0, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    fit = trainer(folder, max_epochs=1)
    fit.fit(run, DataLoader(Texts(), batch_size=16))
    whole = run.export()
    return before - vector(whole) if fit.is_global_zero else None


def on_policy(folder):
    """Batches that the student writes itself."""
    run = module(gpt2(16, 1), rate=0.01)
    # half of the tokens end a text, so that the texts of one process are finished before those of the other
    run.student.generation_config.eos_token_id = list(range(30))
    # one row is a prompt as a whole, so that one process has room for fewer tokens than the other
    fit = trainer(folder, max_epochs=1, callbacks=[OnPolicy(1.0, max_new_tokens=8, min_prompt=4)])
    fit.fit(run, DataLoader(Texts(), batch_size=4))
    return run.export().state_dict()


def refused(folder):
    """The message about tensor parallelism, which is what the strategy does without arguments."""
    fit = trainer(folder, max_steps=1, strategy=ModelParallelStrategy())
    try:
        fit.fit(module(gpt2(16, 1)), DataLoader(Texts(), batch_size=4))
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = {
        "gradients": lambda: gradients(target),
        "projections": lambda: [with_projections(target, 2, *split) for split in [(16, 1), (3, 6)]],
        "clipped": lambda: with_projections(target, 2, 3, 6, gradient_clip_val=0.1),
        "shards": lambda: resumed(target, whole=False),
        "whole": lambda: resumed(target, whole=True),
        "evaluated": lambda: evaluated(target),
        "adapter": lambda: adapter(target),
        "from files": lambda: from_files(target),
        "on policy": lambda: on_policy(target),
        "refused": lambda: refused(target),
    }
    wanted = sys.argv[2:] or list(found)
    results = {name: found[name]() for name in wanted}
    torch.save(results, target / f"found-{torch.distributed.get_rank()}.pt")
