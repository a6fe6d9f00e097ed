"""InfoNCE of a batch that two processes share. Run by test_contrastive.py with a rank, a port and a folder."""

import sys
from pathlib import Path

import torch
from torch import distributed

from lightning_distill.losses.contrastive import InfoNCE


def whole_batch():
    generator = torch.Generator().manual_seed(0)
    inputs, teacher = (torch.randn(7, width, generator=generator, dtype=torch.float64) for width in (3, 4))
    return inputs, teacher, torch.tensor([0, 1, 2, 0, 3, 1, 4])


def loss_and_gradients(kind, inputs, teacher, labels):
    """Values of the samples, and gradients of their sum with respect to a linear student and the similarity."""
    torch.manual_seed(1)
    student = torch.nn.Linear(3, 4).double()
    distance = InfoNCE(0.2, similarity=kind).double()
    distance.build((0, 4), (0, 4))
    distance.double()
    values = distance(student(inputs), teacher, labels=labels)
    values.sum().backward()
    parameters = {**dict(student.named_parameters()), **dict(distance.named_parameters())}
    return {"values": values.detach(), "gradients": {name: p.grad for name, p in parameters.items()}}


if __name__ == "__main__":
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = slice(0, 3) if rank == 0 else slice(3, 7)
    found = {kind: loss_and_gradients(kind, *(side[part] for side in whole_batch())) for kind in ("cosine", "bilinear")}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()
