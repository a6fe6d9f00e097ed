"""Gradients of single loss terms with respect to a layer of the student, for callbacks that compare them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import lightning as L
import torch
from torch import Tensor, nn

from lightning_distill.modules.base import DistillationModule
from lightning_distill.weighting import layer_parameters


def student_layer(pl_module: L.LightningModule, layer: str | None) -> list[nn.Parameter]:
    """Trainable parameters of the student's submodule ``layer``; by default of its last one that has any.

    Raises:
        ValueError: If there is no such submodule, or it has no trainable parameter.
    """
    student = getattr(pl_module, "student", None)
    network: nn.Module = student if isinstance(student, nn.Module) else pl_module
    if layer is not None:
        return layer_parameters(network, layer)
    for module in reversed(list(network.modules())):
        if found := [p for p in module.parameters(recurse=False) if p.requires_grad]:
            return found
    raise ValueError(f"{type(network).__name__} has no trainable parameter whose gradient could be looked at.")


def require_terms(callback: object, pl_module: L.LightningModule, names: Sequence[str]) -> None:
    """Refuse a module that lacks one of the loss terms ``names``.

    Raises:
        TypeError: If it has no named terms at all.
        ValueError: If it has others.
    """
    terms = getattr(pl_module, "terms", None)
    if terms is None:
        raise TypeError(
            f"{type(callback).__name__} compares the gradients of loss terms, which {type(pl_module).__name__} does "
            "not have. Use a DistillationModule, such as KD."
        )
    if missing := [name for name in names if name not in terms]:
        raise ValueError(
            f"{type(callback).__name__} looks at the terms {list(names)}, but the module's are {list(terms)}; "
            f"{missing} {'is' if len(missing) == 1 else 'are'} not there. (A fused term is split by naming 'hard' and "
            "'soft' in `weights`.)"
        )


def gradient_rows(pl_module: L.LightningModule, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradient of each of the terms ``names`` in the batch before its backward pass.

    Returns:
        Shape ``(len(names), P)``, float32 or wider; zeros for a term that does not depend on the parameters.
    """
    live = cast(DistillationModule, pl_module).live
    assert live is not None  # it is there from the training step to the end of the backward pass
    found = live.gradients(parameters)
    nothing = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    return torch.stack([nothing if (row := found[name]) is None else row for name in names])
