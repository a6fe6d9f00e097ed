"""Networks of several precisions: the cheapest speaks first, and hard samples go on to more bits."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_distill.compression.exit_rules import Criterion, check_criterion, exit_confidence, exit_indices
from lightning_distill.compression.folder import write_folder
from lightning_distill.quantization import quantized_layers, set_bits, size_report
from lightning_distill.tasks import to_outputs

Escalate = Literal["next", "direct"]


def dynamic_bits(
    probs: Tensor, theta_low: float, theta_high: float, *, bits: tuple[int, int, int] = (2, 4, 8)
) -> Tensor:
    r"""Bits for each sample from the entropy of a first, cheap prediction.

    The largest above ``theta_high``, the middle one above ``theta_low``, else the smallest. The first prediction has to
    be paid for: :class:`PrecisionCascade` with ``escalate="direct"`` does what this says.

    Args:
        probs: Probabilities, shape ``(..., C)``; of logits, ``logits.float().softmax(-1)``.
        theta_low: Entropy in nats, from 0 to ``log C``.
        theta_high: Same, not below ``theta_low``.
        bits: For easy, middling and hard samples.

    Returns:
        Whole numbers, shape ``(...)``.

    Raises:
        ValueError: If the thresholds are out of order, or ``probs`` are negative or do not sum to 1.

    Example:
        >>> dynamic_bits(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 0.1, 0.6).tolist()
        [8, 2]
    """
    if not 0 <= theta_low <= theta_high:
        raise ValueError(f"`theta_low` must be from 0 to `theta_high`, got {theta_low} and {theta_high}.")
    wide = probs.to(torch.promote_types(probs.dtype, torch.float32))
    if not bool((wide >= 0).all()) or not bool(((wide.sum(dim=-1) - 1).abs() < 1e-2).all()):
        raise ValueError("`probs` must be probabilities that sum to 1; of logits take `logits.float().softmax(-1)`.")
    entropy = torch.special.entr(wide).sum(dim=-1)
    level = (entropy > theta_low).long() + (entropy > theta_high).long()
    return torch.tensor(bits, device=probs.device)[level]


def confidence_of_entropy(entropy: float, classes: int) -> float:
    """The threshold of confidence, ``1 - entropy / log(classes)``, that an entropy in nats stands for.

    Raises:
        ValueError: If there are fewer than two classes, or the entropy is outside ``[0, log(classes)]``.

    Example:
        >>> confidence_of_entropy(0.0, 10)
        1.0
    """
    if classes < 2 or not 0 <= entropy <= math.log(classes) + 1e-9:
        raise ValueError(
            f"`entropy` must be in [0, log(classes)] with `classes` of at least 2, got {entropy} for {classes} classes."
        )
    return 1 - entropy / math.log(classes)


def members_at_bits(network: nn.Module, bits: Sequence[int] = (2, 4, 8)) -> list[nn.Module]:
    """Copies of one quantized network, with all of its quantized layers at each number of bits.

    Weights are shared in value, not in memory. Steps of the weights are found anew at widths other than its own.

    Args:
        network: As :func:`~lightning_distill.quantization.prepare` made it, its inputs calibrated.
        bits: Of each copy, rising.

    Raises:
        ValueError: If ``network`` is not quantized, ``bits`` do not rise, or one has no quantizer.
    """
    layers = quantized_layers(network)
    if not layers:
        raise ValueError("`network` has no quantized layer; call `prepare(network, spec)` first.")
    if list(bits) != sorted(set(bits)) or not bits:
        raise ValueError(f"`bits` must rise, got {list(bits)}.")
    members = []
    for width in bits:
        member = copy.deepcopy(network)
        set_bits(member, dict.fromkeys(layers, width))
        members.append(member)
    return members


class PrecisionCascade(nn.Module):
    """Several networks for one task, cheapest first; each answers the samples that it is sure of.

    The others go on to the next one. Made for students of 2, 4 and 8 bits, but any networks with the same classes will
    do. A sample gets exactly what the network that answers says about it. It is made for inference: call ``eval()``.

    Args:
        networks: At least two, cheapest first. They share no parameter.
        thresholds: Confidence above which a network answers, one for all but the last. Infinity (the default): it never
            does, and is not run. A negative one: it answers whoever comes.
            :func:`~lightning_distill.compression.calibrate_cascade` finds them.
        criterion: See :func:`~lightning_distill.compression.exit_confidence`; ``"entropy"`` is ``1 - H / log C``, see
            :func:`confidence_of_entropy`.
        escalate: ``"next"``: the rest goes to the next network, which decides again. ``"direct"``: the first network's
            confidence picks who answers, as :func:`dynamic_bits`; finite thresholds must then fall.
        costs: What a pass of each network costs per sample, in a unit of your own such as seconds; all positive.
            Default: bit operations, counted when it is calibrated.

    Attributes:
        exits: Which network answered each sample of the last pass, shape ``(B,)``.

    Raises:
        ValueError: If there are fewer than two networks, two share a parameter, or thresholds or costs do not fit.
    """

    exits: Tensor | None

    def __init__(
        self,
        networks: Sequence[nn.Module],
        thresholds: Sequence[float] | None = None,
        criterion: Criterion = "entropy",
        escalate: Escalate = "next",
        costs: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if len(networks) < 2:
            raise ValueError(f"`networks` must be at least two, cheapest first, got {len(networks)}.")
        _refuse_shared(networks)
        check_criterion(criterion)
        if escalate not in ("next", "direct"):
            raise ValueError(f"`escalate` must be 'next' or 'direct', got {escalate!r}.")
        if costs is not None and (len(costs) != len(networks) or not all(0 < cost < math.inf for cost in costs)):
            raise ValueError(
                f"`costs` must be one positive number for each of the {len(networks)} networks, got {list(costs)}."
            )
        self.networks = nn.ModuleList(networks)
        self.criterion: Criterion = criterion
        self.escalate: Escalate = escalate
        self.costs = None if costs is None else tuple(map(float, costs))
        self.thresholds = [math.inf] * (len(networks) - 1) if thresholds is None else list(thresholds)
        self.exits = None

    @property
    def thresholds(self) -> list[float]:
        """Confidence above which a network answers, one for all but the last."""
        return list(self._thresholds)

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        if len(values) != len(self.networks) - 1 or any(math.isnan(value) for value in values):
            raise ValueError(
                f"`thresholds` must be one number for each of the {len(self.networks)} networks but the last, got "
                f"{list(values)}."
            )
        finite = [value for value in values if value < math.inf]
        if self.escalate == "direct" and finite != sorted(finite, reverse=True):
            raise ValueError(
                f"`thresholds` must fall where escalate='direct': less sure samples get more bits, got {list(values)}."
            )
        self._thresholds = [float(value) for value in values]

    @property
    def bits(self) -> tuple[float, ...]:
        """Bits of a weight of each network; the mean over its quantized layers."""
        return tuple(_weight_bits(network) for network in self.networks)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the networks: their bits, where these tell them apart."""
        bits = [f"{value:.3g} bits" for value in self.bits]
        return tuple(bits if len(set(bits)) == len(bits) else map(str, range(len(bits))))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits ``(B, C)`` of whoever answers; who did, is in ``exits``. Tensors with ``B`` rows are split."""
        rows = next((len(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)), None)
        if rows is None:
            raise TypeError("A cascade needs a tensor with one row per sample among its inputs, got none.")
        run = _direct if self.escalate == "direct" else _next
        logits, self.exits = run(self, rows, (args, kwargs))
        return logits

    def all_logits(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """What every network says about every sample, each ``(B, C)``."""
        return [to_outputs(network(*args, **kwargs)).logits for network in self.networks]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write weights (``model.safetensors``) and settings (``cascade.json``) to a folder, whole or not at all.

        Weights are those in floating point with their steps; write single networks with ``export_onnx`` or
        ``write_packed`` to get their size down.

        Raises:
            FileExistsError: If there is something at ``folder`` and ``overwrite`` is False.
        """
        settings = {
            "thresholds": [None if value == math.inf else value for value in self.thresholds],
            "criterion": self.criterion,
            "escalate": self.escalate,
            "costs": self.costs,
        }
        write_folder(folder, "cascade.json", settings, self.state_dict(), overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, networks: Sequence[nn.Module]) -> PrecisionCascade:
        """What :meth:`save` has written.

        Args:
            folder: Where it is.
            networks: Built, and prepared for quantization, as those that were saved; weights, steps and bits are
                replaced.

        Returns:
            In eval mode.

        Raises:
            FileNotFoundError: If there is no cascade at ``folder``.
            ValueError: If the weights are those of other networks.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "cascade.json").is_file():
            raise FileNotFoundError(f"There is no cascade at {str(folder)!r}; `save` writes one.")
        settings = json.loads((folder / "cascade.json").read_text(encoding="utf-8"))
        settings["thresholds"] = [math.inf if value is None else value for value in settings["thresholds"]]
        loaded = cls(networks, **settings)
        try:
            loaded.load_state_dict(load_file(str(folder / "model.safetensors")))
        except RuntimeError as error:
            raise ValueError(
                f"The weights in {str(folder)!r} are not those of these networks. Build and prepare them as those that "
                f"were saved. {error}"
            ) from error
        return loaded.eval()


def pass_costs(costs: Sequence[float], thresholds: Sequence[float], escalate: Escalate) -> list[float]:
    """What a sample has cost once each network has answered: all passes that it took.

    Args:
        costs: Of one pass of each of ``M`` networks.
        thresholds: ``M - 1`` numbers; networks with infinity are not run, but for the first one where it chooses.
        escalate: See :class:`PrecisionCascade`.

    Example:
        >>> pass_costs([1.0, 2.0, 4.0], [0.9, 0.5], "next"), pass_costs([1.0, 2.0, 4.0], [0.9, 0.5], "direct")
        ([1.0, 3.0, 7.0], [1.0, 3.0, 5.0])
    """
    if escalate == "direct":
        first = 0.0 if all(value == math.inf for value in thresholds) else costs[0]
        return [first, *(first + cost for cost in costs[1:])]
    total, found = 0.0, []
    for number, cost in enumerate(costs):
        if number == len(costs) - 1 or thresholds[number] < math.inf:
            total += cost
        found.append(total)
    return found


def _next(cascade: PrecisionCascade, rows: int, inputs: Any) -> tuple[Tensor, Tensor]:
    """Each network that may answer decides over those who are left."""
    inside, taken = torch.arange(rows), _Taken(rows)
    limits = [*cascade.thresholds, -math.inf]
    for number, network in enumerate(cascade.networks):
        if limits[number] == math.inf:
            continue
        said = _said(network, _part(inputs, inside, rows))
        inside = inside.to(said.device)
        if number == len(limits) - 1:
            taken.put(said, inside, number)
            break
        sure = exit_confidence(said, cascade.criterion) > limits[number]
        taken.put(said[sure], inside[sure], number)
        inside = inside[~sure]
        if len(inside) == 0:
            break
    return taken.result()


def _direct(cascade: PrecisionCascade, rows: int, inputs: Any) -> tuple[Tensor, Tensor]:
    """The first network's confidence picks who answers."""
    taken, last = _Taken(rows), len(cascade.networks) - 1
    if all(value == math.inf for value in cascade.thresholds):
        taken.put(_said(cascade.networks[last], inputs), torch.arange(rows), last)
        return taken.result()
    first = _said(cascade.networks[0], inputs)
    confidence = exit_confidence(first, cascade.criterion)
    chosen = exit_indices(confidence[:, None].expand(-1, last), cascade.thresholds)
    taken.put(first[chosen == 0], (chosen == 0).nonzero().flatten(), 0)
    for number in range(1, last + 1):
        if len(inside := (chosen == number).nonzero().flatten()) > 0:
            taken.put(_said(cascade.networks[number], _part(inputs, inside, rows)), inside, number)
    return taken.result()


class _Taken:
    """What samples got, and from whom."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._logits: Tensor | None = None
        self._exits: Tensor | None = None

    def put(self, logits: Tensor, rows: Tensor, number: int) -> None:
        if self._logits is None or self._exits is None:
            self._logits = logits.new_zeros(self._rows, logits.shape[-1])
            self._exits = torch.zeros(self._rows, dtype=torch.long, device=logits.device)
        rows = rows.to(logits.device)
        self._logits[rows] = logits.to(self._logits.dtype)
        self._exits[rows] = number

    def result(self) -> tuple[Tensor, Tensor]:
        assert self._logits is not None
        assert self._exits is not None
        return self._logits, self._exits


def _said(network: nn.Module, inputs: Any) -> Tensor:
    args, kwargs = inputs
    return to_outputs(network(*args, **kwargs)).logits


def _part(inputs: Any, inside: Tensor, rows: int) -> Any:
    """The samples ``inside`` of everything that has one row per sample."""
    if len(inside) == rows:
        return inputs

    def part(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        return value[inside.to(value.device)] if batched else value

    return tree_map(part, inputs)


def _weight_bits(network: nn.Module) -> float:
    if quantized_layers(network):
        return size_report(network).average_bits
    return next((8.0 * p.element_size() for p in network.parameters() if p.is_floating_point()), 32.0)


def _refuse_shared(networks: Sequence[nn.Module]) -> None:
    owners: dict[int, int] = {}
    for number, network in enumerate(networks):
        for name, parameter in network.named_parameters():
            if (owner := owners.setdefault(id(parameter), number)) != number:
                raise ValueError(
                    f"The networks {owner} and {number} share the parameter {name!r}, which has one number of bits. "
                    "Give each its own: `copy.deepcopy(network)`, or `members_at_bits(network, bits)`."
                )
