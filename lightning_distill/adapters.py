"""Networks under a PEFT adapter: what of them is trained, kept and handed on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.sharding import is_sharded

BASE = "adapter_base"
SAMPLES = 4


def has_adapter(network: nn.Module) -> bool:
    """Whether ``network`` is a ``peft.PeftModel``."""
    peft = sys.modules.get("peft")  # who has such a network has imported it
    return peft is not None and isinstance(network, peft.PeftModel)


def frozen_base(network: Any) -> set[str]:
    """Names of the parameters of a ``PeftModel`` that stand in its frozen base, and nowhere in an adapter.

    Whatever is trained is none of them, nor is what peft counts among an adapter: low-rank factors,
    ``modules_to_save``, and adapters that are frozen at present.
    """
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = network.state_dict()
    of_adapters: set[int] = set()
    for name in network.peft_config:
        kept = get_peft_model_state_dict(network, state_dict=state, adapter_name=name, save_embedding_layers=False)
        of_adapters |= {id(value) for value in kept.values()}
    parameters = network.named_parameters(remove_duplicate=False)  # tied weights have two names in the state
    return {
        name
        for name, parameter in parameters
        if not parameter.requires_grad and name in state and id(state[name]) not in of_adapters
    }


def leave_base_out(checkpoint: dict[str, Any], student: nn.Module, *, prefix: str = "student.") -> None:
    """Take the frozen base of an adapted ``student`` out of ``checkpoint``; other students are left alone.

    So is one whose weights are spread over processes: strategies that do this load weights before anybody could put
    the base back.

    A few numbers of the base are kept, so that the adapter is never put onto another one.

    Args:
        checkpoint: A Lightning checkpoint; changed in place.
        student: The network whose weights stand in it under ``prefix``.
        prefix: Of the student's names.
    """
    if not has_adapter(student) or is_sharded(student):
        return
    base = frozen_base(student)
    state = checkpoint["state_dict"]
    for key in [key for key in state if key.startswith(prefix) and _belongs(key.removeprefix(prefix), base)]:
        del state[key]
    checkpoint[BASE] = _sample(student, base)


def put_base_back(checkpoint: dict[str, Any], student: nn.Module, *, prefix: str = "student.") -> None:
    """Complete a ``checkpoint`` that holds an adapter alone with the base of ``student``, so that it loads strictly.

    Args:
        checkpoint: As :func:`leave_base_out` made it; changed in place.
        student: The network that the checkpoint is about to be loaded into.
        prefix: Of the student's names.

    Raises:
        ValueError: If the student has no adapter but the checkpoint does, or the other way round; or if the student's
            base is not the one that the adapter was trained on.
    """
    state = checkpoint.get("state_dict")
    if state is None:  # the strategy has loaded the weights itself (shards)
        return
    if BASE not in checkpoint:
        if has_adapter(student) and not any(prefix + name in state for name in student.state_dict()):
            raise ValueError(
                "The checkpoint is of a student without an adapter, but the student is a "
                f"{type(student).__name__}. Load it into the base first: "
                "`get_peft_model(load_network(base, path), config)`, or leave the adapter out."
            )
        return
    if not has_adapter(student):
        raise ValueError(
            f"The checkpoint holds only an adapter, but the student is a {type(student).__name__} without one. Build "
            "the student as it was trained: `peft.get_peft_model(base, config)` with the pretrained base."
        )
    base = frozen_base(student)
    _refuse_other_base(checkpoint[BASE], _sample(student, base))
    for name, value in student.state_dict().items():
        if _belongs(name, base):
            state.setdefault(prefix + name, value)


def merge_adapter(network: Any) -> nn.Module:
    """The base of a ``PeftModel`` with the active adapters added to its weights; ``network`` is used up.

    Raises:
        ValueError: If the adapter is of a kind that cannot be added to weights (a learned prompt).
    """
    if network.active_peft_config.is_prompt_learning or not hasattr(network.base_model, "merge_and_unload"):
        kind = network.active_peft_config.peft_type
        raise ValueError(
            f"An adapter of type {getattr(kind, 'value', kind)} cannot be merged into the network's weights. Write it "
            "beside them: `module.export_adapter(folder)`."
        )
    merged: nn.Module = network.merge_and_unload()
    for parameter in merged.parameters():
        if parameter.is_floating_point():  # only the adapter's training had frozen them
            parameter.requires_grad_(True)
    return merged


def _belongs(key: str, base: set[str]) -> bool:
    """Whether ``key`` is a parameter of the base or something stored beside it (the scales of quantized weights)."""
    return key in base or any(parent in base for parent in _parents(key))


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _sample(network: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """A few values of each floating-point parameter in ``names``: ``values`` of shape ``(len(names), 4)``."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        parameter = parameters[name].detach()
        if parameter.is_floating_point() and parameter.numel() > 0 and not parameter.is_meta:
            places = torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64).long()
            found[name] = parameter.flatten()[places.to(parameter.device)].float().cpu()
    return {"names": list(found), "values": torch.stack(list(found.values())) if found else torch.empty(0, SAMPLES)}


def _refuse_other_base(trained_on: dict[str, Any], present: dict[str, Any]) -> None:
    here = dict(zip(present["names"], present["values"], strict=True))
    for name, there in zip(trained_on["names"], trained_on["values"], strict=True):
        # A tolerance wide enough for a base that is loaded in another precision.
        if name in here and not torch.allclose(here[name], there, rtol=0.1, atol=1e-6):
            raise ValueError(
                f"The adapter in the checkpoint was trained on another base: {name} begins with {there[0]:.4g} there "
                f"and with {here[name][0]:.4g} here. Load the base from the same pretrained weights before "
                "`get_peft_model` (a base with random weights must be built after the same seed)."
            )
