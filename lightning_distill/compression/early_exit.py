"""A network that stops computing when an inner classifier is sure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_distill.compression.exit_rules import Criterion, check_criterion, exit_confidence
from lightning_distill.compression.folder import write_folder
from lightning_distill.losses.auxiliary_heads import AuxiliaryHeads
from lightning_distill.taps import INPUT, Taps
from lightning_distill.tasks import to_outputs

Leaves = Callable[[int, Tensor], Tensor]
"""Exit number and logits of the samples that got there to which of them leave."""


class EarlyExitNetwork(nn.Module):
    """``network`` with heads on its inner layers, left at the first head that is sure enough.

    The pass is stopped in the tapped layer: nothing after it is computed. With one sample that happens as soon as it
    may leave. With several it happens when the last of them may; until then those that have left are computed along,
    unless ``sub_batches`` is set. Where the layers lie inside ``network`` does not matter, as long as it runs them in
    the order of the taps, once each.

    It returns logits, a tensor of shape ``(B, C)``, whatever ``network`` returns. It is made for inference: the stop
    is a Python exception, which ``torch.compile`` and ``torch.export`` cannot trace; compile or export ``network``.
    An item must be a sample: language models that predict every token need the later layers' keys for later tokens.

    Args:
        network: Any network that returns logits, an object with ``logits`` or a mapping. ``attention_mask`` among its
            keyword arguments, ``(B, T)``, tells a sequence's padding.
        heads: Heads whose taps are submodules of ``network`` (or their ``@input``), made for it.
        thresholds: Confidence in [0, 1] above which a sample leaves, one per head. ``None``: nobody does, as with
            infinity; a negative one lets everybody leave.
        criterion: See :func:`~lightning_distill.compression.exit_confidence`.
        sub_batches: Whether later layers get only the samples that are left. The network must treat the samples of a
            batch apart, and every layer must take all that it knows of a sample from the layer before: masks and
            shortcuts around a tap do not fit. :meth:`can_split` finds out.

    Attributes:
        exits: Where each sample of the last pass left, shape ``(B,)``, from 0 to the number of heads.

    Raises:
        ValueError: If the thresholds are not as many as the heads, the heads were never built, or a tap is no part.
    """

    exits: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        heads: AuxiliaryHeads,
        thresholds: Sequence[float] | None = None,
        criterion: Criterion = "max_prob",
        sub_batches: bool = False,
    ) -> None:
        super().__init__()
        if heads.shapes is None:
            raise ValueError("`heads` were never built: train them first, or call `module.build(batch)`.")
        check_criterion(criterion)
        self.network = network
        self._tapped = _tapped(network, heads.taps)  # a list: the submodules are registered in the network alone
        self.heads = heads
        self.thresholds = [math.inf] * len(heads.taps) if thresholds is None else list(thresholds)
        self.criterion: Criterion = criterion
        self.sub_batches = sub_batches
        self.exits = None

    @property
    def thresholds(self) -> list[float]:
        """Confidence above which a sample leaves, one per head."""
        return list(self._thresholds)

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        wrong = len(values) != len(self.heads.taps) or any(math.isnan(value) for value in values)
        if wrong:
            raise ValueError(
                f"`thresholds` must be one number for each of the {len(self.heads.taps)} heads, got {list(values)}."
            )
        self._thresholds = [float(value) for value in values]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits ``(B, C)`` of each sample where it leaves; where, is in ``exits``."""
        logits, self.exits = self.leave(self._sure, *args, **kwargs)
        return logits

    def leave(self, leaves: Leaves, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run, with ``leaves(exit, logits)`` telling which of the samples that got to an exit leave there, ``(b,)``.

        Returns:
            Logits ``(B, C)``, and where each sample left, ``(B,)``.
        """
        running = _Pass(self, leaves, kwargs.get("attention_mask"))
        handles = [_hook(module, before, running.at(number)) for number, (module, before) in enumerate(self._tapped)]
        try:
            said = to_outputs(self.network(*args, **kwargs)).logits
        except _Left as left:
            if left.running is not running:
                raise
        else:
            running.finish(said)
        finally:
            for handle in handles:
                handle.remove()
        assert running.logits is not None
        assert running.exits is not None
        return running.logits, running.exits

    def all_logits(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """What every head, and last the network itself, says, each ``(B, C)``; nobody leaves.

        Raises:
            ValueError: If the network runs the tapped layers in another order, or not at all.
        """
        taps = Taps(self.network, self.heads.taps)
        try:
            with taps.recording() as features:
                said = to_outputs(self.network(*args, **kwargs)).logits
        finally:
            taps.remove()
        if tuple(features) != self.heads.taps:
            raise ValueError(
                f"The taps are out of order: the network runs {list(features)}, the heads sit on "
                f"{list(self.heads.taps)}. Name the layers as they are run, and only such."
            )
        positions = _positions(kwargs.get("attention_mask"))
        read = [self.heads.read(feature, name, positions) for name, feature in features.items()]
        return [*self.heads(read), said]

    @torch.no_grad()
    def can_split(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``sub_batches`` gives what the whole batch gives, tried on a batch of at least two samples."""
        whole = self.all_logits(*args, **kwargs)
        before, self.sub_batches = self.sub_batches, True
        try:
            logits, exits = self.leave(_every_second, *args, **kwargs)
        except (RuntimeError, IndexError, ValueError):  # what a layer says to a batch of another size
            return False
        finally:
            self.sub_batches = before
        expected = torch.stack(whole)[exits, torch.arange(len(exits), device=exits.device)]
        return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write weights (``model.safetensors``) and settings (``exits.json``) to a folder, whole or not at all.

        Raises:
            FileExistsError: If there is something at ``folder`` and ``overwrite`` is False.
        """
        settings = {
            "heads": self.heads.settings(),
            "shapes": self.heads.get_extra_state(),
            "thresholds": [None if value == math.inf else value for value in self.thresholds],
            "criterion": self.criterion,
            "sub_batches": self.sub_batches,
        }
        write_folder(folder, "exits.json", settings, _weights(self), overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, network: nn.Module) -> EarlyExitNetwork:
        """What :meth:`save` has written.

        Args:
            folder: Where it is.
            network: Built with the arguments of the one that was saved; its weights are replaced.

        Returns:
            In eval mode.

        Raises:
            FileNotFoundError: If there is no such network at ``folder``.
            ValueError: If the weights are those of another network.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "exits.json").is_file():
            raise FileNotFoundError(f"There is no network with exits at {str(folder)!r}; `save` writes one.")
        settings = json.loads((folder / "exits.json").read_text(encoding="utf-8"))
        heads = AuxiliaryHeads(**settings["heads"])
        heads.set_extra_state(settings["shapes"])
        thresholds = [math.inf if value is None else value for value in settings["thresholds"]]
        loaded = cls(network, heads, thresholds, settings["criterion"], settings["sub_batches"])
        weights = load_file(str(folder / "model.safetensors"))
        expected = _weights(loaded)
        wrong = {name for name in expected.keys() | weights.keys() if name not in expected or name not in weights}
        wrong |= {name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape}
        if wrong:
            raise ValueError(
                f"The weights in {str(folder)!r} are not those of this {type(network).__name__}: {sorted(wrong)[:3]} "
                "differ. Build the network with the arguments that it was trained with."
            )
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(weights[name])
        return loaded.eval()

    def _sure(self, number: int, logits: Tensor) -> Tensor:
        return exit_confidence(logits, self.criterion) > self._thresholds[number]


class _Left(Exception):
    """Everybody has left."""

    def __init__(self, running: _Pass) -> None:
        super().__init__()
        self.running = running


@dataclass
class _Pass:
    """One forward pass: who is still inside, and what those who left got."""

    owner: EarlyExitNetwork
    leaves: Leaves
    mask: Tensor | None
    inside: Tensor | None = None  # numbers of the samples that have not left
    logits: Tensor | None = None
    exits: Tensor | None = None

    def at(self, number: int) -> Callable[[Tensor], Tensor | None]:
        """What is done with the activation of exit ``number``; it may return another one."""
        tap, head = self.owner.heads.taps[number], self.owner.heads.heads[number]

        def decide(features: Tensor) -> Tensor | None:
            split = self.owner.sub_batches
            positions = _positions(self.mask)
            if self.inside is None:
                self.inside = torch.arange(len(features), device=features.device)
            kept = features if split else features[self.inside] if self.logits is not None else features
            if positions is not None and self.logits is not None:
                positions = positions[self.inside]
            logits = head(self.owner.heads.read(kept, tap, positions))
            leaves = self.leaves(number, logits)
            if bool(leaves.all()):
                self.take(logits, self.inside, number)
                raise _Left(self)
            if not bool(leaves.any()):
                return None
            self.take(logits[leaves], self.inside[leaves], number)
            self.inside = self.inside[~leaves]
            return features[~leaves] if split else None

        return decide

    def finish(self, logits: Tensor) -> None:
        """Give the network's own logits to those who are still inside."""
        if self.inside is None:
            raise ValueError(
                f"The network ran none of the tapped layers {list(self.owner.heads.taps)}. Tap layers that it runs."
            )
        if self.logits is not None and not self.owner.sub_batches:
            logits = logits[self.inside]
        if len(logits) != len(self.inside):
            raise ValueError(
                f"{len(self.inside)} samples are left, but the network made {len(logits)} rows: it does not pass on "
                "what it gets. Set `sub_batches=False`."
            )
        self.take(logits, self.inside, len(self.owner.heads.taps))

    def take(self, logits: Tensor, rows: Tensor, number: int) -> None:
        """``logits`` are what the samples ``rows`` get."""
        if self.logits is None or self.exits is None:
            total = len(rows) if self.inside is None else len(self.inside)
            if len(rows) == total:
                self.logits, self.exits = logits, torch.full_like(rows, number)
                return
            self.logits = logits.new_zeros(total, logits.shape[-1])
            self.exits = torch.full((total,), number, device=rows.device)
        self.logits[rows] = logits.to(self.logits.dtype)
        self.exits[rows] = number


def _tapped(network: nn.Module, taps: Sequence[str]) -> list[tuple[nn.Module, bool]]:
    """The tapped submodules, and whether their input is meant."""
    modules = dict(network.named_modules())
    found = []
    for tap in taps:
        path = tap.removesuffix(INPUT)
        if not path or path not in modules:
            raise ValueError(
                f"An exit must sit on a submodule, where the pass can be stopped, but {type(network).__name__} has "
                f"none named {path!r}. For a hidden state of a transformers model name the layer that makes it, as "
                "'bert.encoder.layer.2'."
            )
        found.append((modules[path], tap.endswith(INPUT)))
    return found


def _hook(module: nn.Module, before: bool, decide: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    if before:

        def at_input(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if inputs:
                changed = _decided(inputs, decide)
                return None if changed is None else (changed, keywords)
            name = next(iter(keywords), "")
            changed = _decided((keywords.get(name),), decide)
            return None if changed is None else (inputs, keywords | {name: changed[0]})

        return module.register_forward_pre_hook(at_input, with_kwargs=True)

    def at_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        return decide(output) if isinstance(output, Tensor) else _decided(output, decide)

    return module.register_forward_hook(at_output)


def _decided(values: Any, decide: Callable[[Tensor], Tensor | None]) -> tuple[Any, ...] | None:
    """``values`` with another first tensor, or ``None`` if it stays."""
    if not isinstance(values, (tuple, list)) or not values or not isinstance(values[0], Tensor):
        raise TypeError(f"An exit needs a layer that gives a tensor, or a tuple that begins with one, got {values!r}.")
    changed = decide(values[0])
    return None if changed is None else (changed, *values[1:])


def _positions(mask: Tensor | None) -> Tensor | None:
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def _every_second(number: int, logits: Tensor) -> Tensor:
    """Of those who are left every second leaves, as long as somebody stays."""
    rows = torch.arange(len(logits), device=logits.device)
    return (rows % 2 == 0) & (len(logits) > 1)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Persistent parameters and buffers by name, shared ones once."""
    saved = network.state_dict().keys()
    return {name: value for name, value in (*network.named_parameters(), *network.named_buffers()) if name in saved}
