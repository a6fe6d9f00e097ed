"""Gradients of single loss terms with respect to a layer of the student, for callbacks that compare them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn


def layer_parameters(pl_module: L.LightningModule, layer: str | None) -> list[nn.Parameter]:
    """Trainable parameters of the student's submodule ``layer``; by default of its last one that has any.

    Raises:
        ValueError: If there is no such submodule, or it has no trainable parameter.
    """
    student = getattr(pl_module, "student", None)
    network: nn.Module = student if isinstance(student, nn.Module) else pl_module
    modules = dict(network.named_modules())
    if layer is None:
        trainable = [m for m in modules.values() if any(p.requires_grad for p in m.parameters(recurse=False))]
        if not trainable:
            raise ValueError(f"{type(network).__name__} has no trainable parameter whose gradient could be looked at.")
        return [p for p in trainable[-1].parameters(recurse=False) if p.requires_grad]
    if layer not in modules:
        near = difflib.get_close_matches(layer, modules, n=3)
        raise ValueError(
            f"`layer` is {layer!r}, which the student does not have; nearest: {near or list(modules)[1:6]}."
        )
    found = [p for p in modules[layer].parameters() if p.requires_grad]
    if not found:
        raise ValueError(f"`layer` {layer!r} has no trainable parameter; choose one whose gradient can be looked at.")
    return found


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


def term_gradients(
    trainer: L.Trainer, pl_module: L.LightningModule, names: Sequence[str], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Gradient of each of the live losses, before the backward pass of a training step.

    The graph is kept for the backward pass, and no hook of DDP fires. With float16 the losses are scaled on the way.

    Args:
        trainer: The Trainer.
        pl_module: With ``live_losses``.
        names: Terms.
        parameters: Of one layer.

    Returns:
        Shape ``(len(names), P)``, float32; zeros for a term that does not depend on the parameters.
    """
    losses: dict[str, Tensor] = pl_module.live_losses  # type: ignore[assignment]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
    rows = []
    for name in names:
        loss = losses[name]
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found, strict=True)
        ]
        rows.append(torch.cat([part.flatten().float() for part in parts]) / scale)
    return torch.stack(rows)
