"""A student whose weights two processes share (FSDP2): the same gradients, checkpoints that resume, a whole export."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader

from lightning_distill import KD
from lightning_distill.tasks import CausalLM
from lightning_distill.teachers import load_network
from tests.contracts import sharded_run

SCRIPT = Path(sharded_run.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes wrote and saw; all in one start, which takes most of the time."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_each_process_holds_a_share_of_the_student_and_the_whole_teacher(found):
    looks = [of_rank["shards"]["look"] for of_rank in found]
    assert all(look["spread"] and not look["teacher spread"] for look in looks)
    assert sum(look["held"] for look in looks) == looks[0]["all"]
    assert max(look["held"] for look in looks) < 0.6 * looks[0]["all"]


def test_the_gradient_is_that_of_one_process(found, tmp_path):
    """Masked tokens, unequal micro-batches, logits and chunks, teachers that are copied or spread as well."""
    whole = sharded_run.gradient(tmp_path, 1, 32, 1)
    assert whole.norm() > 1e-3
    gradients = found[0]["gradients"]
    assert len(gradients) == 6
    for split, value in gradients.items():
        assert (value - whole).norm() <= 1e-5 * whole.norm(), split


def test_projections_and_learned_weights_get_the_gradient_of_one_process(found, tmp_path):
    whole = sharded_run.with_projections(tmp_path, 1, 32, 1)
    for split in found[0]["projections"]:
        for part, value in split.items():
            assert whole[part].norm() > 1e-3
            assert (value - whole[part]).norm() <= 1e-5 * whole[part].norm(), part


def test_clipping_takes_all_gradients_together(found, tmp_path):
    """Those that are spread, and that of a learned weight, which is not."""
    whole = sharded_run.with_projections(tmp_path, 1, 32, 1, gradient_clip_val=0.1)
    total = sum(value.norm() ** 2 for value in whole.values()).sqrt()
    torch.testing.assert_close(total, torch.tensor(0.1), rtol=1e-4, atol=0)  # something was clipped
    for part, value in found[0]["clipped"].items():
        assert (value - whole[part]).norm() <= 1e-5 * whole[part].norm(), part


@pytest.mark.parametrize("kind", ["shards", "whole"])
def test_resumes_exactly_from_both_kinds_of_checkpoint(folder, found, kind):
    assert (folder / "shards-1.ckpt" / "meta.pt").is_file()
    assert (folder / "whole-1.ckpt").is_file()
    straight, resumed = found[0][kind]["weights"]
    assert same(straight, resumed)
    assert all(value.is_meta for value in found[1][kind]["weights"][0].values())  # the others get no weights


def test_the_whole_checkpoint_loads_in_one_process_and_holds_no_teacher(folder, found):
    state = torch.load(folder / "whole-2.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("student.") for name in state)
    student = sharded_run.gpt2(16, 9)
    KD.load_from_checkpoint(folder / "whole-2.ckpt", student=student, task=CausalLM(), weights_only=True)
    assert same(student.state_dict(), found[0]["whole"]["weights"][1])


def test_torch_puts_shards_together(folder, found):
    dcp_to_torch_save(folder / "shards-2.ckpt", folder / "together.pt")
    student = load_network(sharded_run.gpt2(16, 9), str(folder / "together.pt"))
    assert same(student.state_dict(), found[0]["shards"]["weights"][1])


def test_the_export_is_a_plain_network_with_the_losses_of_the_spread_one(folder, found, make_trainer):
    exported = load_network(sharded_run.gpt2(16, 9), str(folder / "shards-1.safetensors"))
    assert same(exported.state_dict(), found[0]["shards"]["weights"][0])
    assert exported.transformer.wte.weight is exported.lm_head.weight
    module = sharded_run.module(exported)
    alone = make_trainer().validate(module, DataLoader(sharded_run.Texts(), batch_size=8), verbose=False)[0]
    for name in ("val/nll", "val/soft", "val/agreement", "val/fidelity"):
        assert found[0]["evaluated"][name] == pytest.approx(alone[name], rel=1e-5), name


def test_adapters_train_resume_and_merge(found):
    straight, resumed = found[0]["adapter"]["weights"]
    assert found[0]["adapter"]["class"] == "GPT2LMHeadModel"
    assert same(straight, resumed)
    base = sharded_run.gpt2(16, 1).state_dict()
    changed = {name for name, value in straight.items() if not torch.equal(value, base[name])}
    assert changed == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)}


def test_networks_that_no_process_ever_held_whole_train_the_same(found, tmp_path):
    whole = sharded_run.gradient(tmp_path, 1, 32, 1)
    assert (found[0]["from files"] - whole).norm() <= 1e-5 * whole.norm()


def test_students_write_their_own_batches_together(found):
    before = sharded_run.gpt2(16, 1).state_dict()
    after = found[0]["on policy"]
    assert all(value.isfinite().all() for value in after.values())
    assert (after["transformer.wte.weight"] - before["transformer.wte.weight"]).abs().max() > 1e-5


def test_tensor_parallelism_is_refused_with_the_fix(found):
    for of_rank in found:
        assert "has tensor_parallel_size=2" in of_rank["refused"]
        assert "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in of_rank["refused"]
