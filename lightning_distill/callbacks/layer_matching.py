"""Which pairs of layers count, and how much, as the training goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_distill.layer_maps import gradient_importance
from lightning_distill.outputs import Step


def progressive_layers(step: int, num_steps: int, layers: int) -> int:
    r"""How many of the lower layers are matched at a step: :math:`\min(L, \lfloor t L / T \rfloor + 1)`.

    One from the beginning, one more every ``num_steps / layers`` steps, all in the last such stretch.

    Args:
        step: ``t``, optimizer steps done, at least 0.
        num_steps: ``T``, positive.
        layers: ``L``, positive.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> [progressive_layers(step, 90, 45) for step in (0, 26, 88, 90)]
        [1, 14, 45, 45]
    """
    for name, value, least in (("step", step, 0), ("num_steps", num_steps, 1), ("layers", layers, 1)):
        if not value >= least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return min(layers, step * layers // num_steps + 1)  # integers: t / T * L in floating point is one too few at times


def update_layer_weights(weights: Tensor, importance: Tensor, *, eta: float = 0.1, floor: float = 0.0) -> Tensor:
    r"""One step of multiplicative weights, which keeps their sum.

    .. math:: \lambda'_l \propto \lambda_l \exp\left(\eta \frac{G_l}{\sum_k G_k}\right), \quad
        \sum_l \lambda'_l = \sum_l \lambda_l

    Unequal importance that lasts moves all weight to one layer; a ``floor`` keeps a share of the mean for every layer
    (the fixed share of Herbster and Warmuth 1998).

    Args:
        weights: ``lambda``, shape ``(L,)``, none negative, not all zero.
        importance: ``G``, shape ``(L,)``, none negative. If all are zero, or one is not finite, nothing changes.
        eta: Step size, at least 0.
        floor: In [0, 1).

    Returns:
        Shape ``(L,)``.

    Raises:
        ValueError: If an argument is outside its range or the shapes differ.

    Example:
        >>> update_layer_weights(torch.ones(3), torch.tensor([3.0, 1.0, 1.0]), eta=0.5)
        tensor([1.1375, 0.9313, 0.9313])
    """
    _check_rates(eta, floor)
    if weights.shape != importance.shape:
        raise ValueError(
            f"`weights` and `importance` must have the same shape, got {tuple(weights.shape)} and "
            f"{tuple(importance.shape)}."
        )
    whole = importance.sum()
    if not (whole.isfinite() and whole > 0):
        return weights
    grown = weights * (eta * importance / whole).exp()
    total = weights.sum()
    return (1 - floor) * grown * (total / grown.sum()) + floor * total / len(weights)


def sample_layers(layers: int, k: int, *, step: int, seed: int = 0) -> list[int]:
    """``k`` of ``layers`` positions, without replacement, ascending; a function of ``(seed, step)``.

    Args:
        layers: How many there are.
        k: How many to draw, from 1 to ``layers``.
        step: Optimizer step.
        seed: Of the draws.

    Raises:
        ValueError: If ``k`` is outside its range.

    Example:
        >>> sample_layers(12, 3, step=7) == sample_layers(12, 3, step=7)
        True
    """
    if not 1 <= k <= layers:
        raise ValueError(f"`k` must be between 1 and the number of pairs, {layers}, got {k}.")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return sorted(torch.randperm(layers, generator=generator)[:k].tolist())


class _PairWeights(L.Callback):
    """Common part of the callbacks that turn ``pair_weights`` of a term.

    During validation all pairs count as the term was built, so that its values can be compared over the training. The
    weights are put back when the training ends.

    Args:
        term: Name of the term; may be left out where the module has one with ``pair_weights``.
    """

    def __init__(self, term: str | None = None) -> None:
        self.term = term
        self._matching: Any = None
        self._built: list[float] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the term."""
        name = _find_term(self.term, pl_module, type(self).__name__)
        rivals = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]  # set, but not declared, by Trainer
            if isinstance(other, _PairWeights)
            and other is not self
            and _find_term(other.term, pl_module, type(other).__name__) == name
        ]
        if rivals:
            raise ValueError(
                f"{type(self).__name__} and {type(rivals[0]).__name__} both turn the pair weights of the term "
                f"{name!r}; keep one of them."
            )
        terms: Any = pl_module.terms
        self._matching = terms[name]
        self._built = list(self._matching.pair_weights)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All pairs count in validation."""
        if self._matching is not None:
            self._set(self._built)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the term as it was."""
        self._put_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the term as it was."""
        self._put_back()

    def _set(self, weights: Sequence[float]) -> None:
        self._matching.pair_weights = list(weights)

    def _put_back(self) -> None:
        if self._matching is not None:
            self._set(self._built)
            self._matching = None


class ProgressiveLayers(_PairWeights):
    """Match the lowest pair first and one more every ``num_steps / L`` steps, in the order of the term's ``pairs``.

    See :func:`progressive_layers`. A function of the optimizer step, so it continues after a resume; the length of the
    schedule is kept in the checkpoint.

    Args:
        num_steps: Length in optimizer steps; default: the whole training, of which the last ``1 / L`` has all pairs.
        term: Name of the term; may be left out where the module has one with ``pair_weights``.

    Raises:
        ValueError: If ``num_steps`` is not positive; at the start of a training of unknown length without it.
        TypeError: At the start of the training, if the module has no such term.
    """

    def __init__(self, num_steps: int | None = None, term: str | None = None) -> None:
        super().__init__(term)
        if num_steps is not None and not num_steps > 0:
            raise ValueError(f"`num_steps` must be positive, got {num_steps}.")
        self.num_steps = num_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the length of the training."""
        if self.num_steps is None:
            total = trainer.estimated_stepping_batches
            if not 0 < total < math.inf:
                raise ValueError(
                    "`num_steps` of ProgressiveLayers must be given: the length of this training is unknown "
                    "(no `max_steps`, `max_epochs`, or a data loader without a length)."
                )
            self.num_steps = int(total)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Turn the pairs of this step on."""
        assert self.num_steps is not None
        on = progressive_layers(trainer.global_step, self.num_steps, len(self._built))
        self._set([weight if i < on else 0.0 for i, weight in enumerate(self._built)])

    def state_dict(self) -> dict[str, Any]:
        """The length of the schedule."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the schedule that was begun, unless another was asked for."""
        self.num_steps = self.num_steps or state_dict["num_steps"]


class RandomLayers(_PairWeights):
    """Match ``k`` pairs drawn anew for every optimizer step; their weights are scaled by ``L / k``.

    So the expected loss is that of all pairs, at the cost of ``k`` distances (the forward passes stay). The draw
    depends on ``seed`` and the step alone: it is the same on every rank and micro-batch, and after a resume.

    Args:
        k: How many pairs, from 1 to their number.
        seed: Of the draws.
        term: Name of the term; may be left out where the module has one with ``pair_weights``.

    Raises:
        ValueError: If ``k`` is not positive; at the start of the training, if it is more than there are pairs.
        TypeError: At the start of the training, if the module has no such term.
    """

    def __init__(self, k: int, seed: int = 0, term: str | None = None) -> None:
        super().__init__(term)
        if not k >= 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.k = k
        self.seed = seed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the term, and see that it has enough pairs."""
        super().on_fit_start(trainer, pl_module)
        sample_layers(len(self._built), self.k, step=0, seed=self.seed)  # checks `k`

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Turn the pairs of this step on."""
        drawn = sample_layers(len(self._built), self.k, step=trainer.global_step, seed=self.seed)
        scale = len(self._built) / self.k
        self._set([scale * weight if i in drawn else 0.0 for i, weight in enumerate(self._built)])


class DynamicLayerWeights(_PairWeights):
    r"""Give more weight to the pairs whose student layer the task's loss depends on most.

    After an optimizer step the weights become :func:`update_layer_weights` of
    :math:`G_l = \|\partial L_{task} / \partial F_l\|_2`, the norm over all features of all items of the step: over
    micro-batches and ranks too, so that the weights are the same on every rank and for every split. Their sum stays.
    They are in the checkpoint, and logged as ``layer_weight/<student tap>``.

    The gradient takes one more backward pass through the student above the lowest tap; ``every_n_steps`` spares most
    of them.

    Args:
        eta: Step size of the weights, positive.
        floor: Share of the mean weight that every pair keeps, in [0, 1). Without one, importance that does not change
            moves all weight to one pair in the end.
        every_n_steps: How often the weights are updated, in optimizer steps.
        task_term: Name of the term that is the task's loss; its items, without weights, are summed.
        term: Name of the term whose pairs are weighted; may be left out where the module has one with ``pair_weights``.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training, if there is no term
            ``task_term``.
        TypeError: At the start of the training, if the module has no term with ``pair_weights``.
    """

    def __init__(
        self,
        eta: float = 0.1,
        floor: float = 0.0,
        every_n_steps: int = 1,
        task_term: str = "hard",
        term: str | None = None,
    ) -> None:
        super().__init__(term)
        _check_rates(eta, floor)
        if not eta > 0:
            raise ValueError(f"`eta` must be positive, got {eta}.")
        if not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.eta = eta
        self.floor = floor
        self.every_n_steps = every_n_steps
        self.task_term = task_term
        self.weights: list[float] | None = None
        self._squares: list[float] = []  # of the norms, over the micro-batches of the present step
        self._seen: tuple[Step, Tensor] | None = None
        self._handle: RemovableHandle | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find both terms; go on with the weights of a checkpoint."""
        super().on_fit_start(trainer, pl_module)
        terms: Any = pl_module.terms
        if self.task_term not in terms:
            raise ValueError(
                f"`task_term` names {self.task_term!r}, which is no term of the module; there are {list(terms)}."
            )
        if self.weights is None:
            self.weights = list(self._built)
        if len(self.weights) != len(self._built):
            raise ValueError(
                f"The checkpoint has weights for {len(self.weights)} pairs, but the term has {len(self._built)}."
            )
        self._handle = terms[self.task_term].register_forward_hook(self._see)

    def _see(self, term: nn.Module, arguments: tuple[Any, ...], values: Tensor) -> None:
        if torch.is_grad_enabled():
            self._seen = (arguments[0], values)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Use the present weights."""
        assert self.weights is not None
        self._set(self.weights)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add what the task's loss of this batch says about each layer."""
        if self._seen is None or not self._due(trainer):
            self._seen = None
            return
        (step, values), self._seen = self._seen, None
        if values.ndim > 0 and step.mask is not None:
            values = values[step.mask]
        features = [step.student.features[ours] for ours, _ in self._matching.pairs]
        total = values.float().sum()
        if not total.requires_grad:
            return
        squares = gradient_importance(total, features).double().square().tolist()
        self._squares = [a + b for a, b in zip(self._squares or [0.0] * len(squares), squares, strict=True)]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Update the weights for the steps that follow."""
        if not self._due(trainer):
            return
        assert self.weights is not None
        device = pl_module.device
        squares = torch.tensor(self._squares or [0.0] * len(self.weights), dtype=torch.float32, device=device)
        squares = trainer.strategy.reduce(squares, reduce_op="sum")
        assert isinstance(squares, Tensor)
        before = torch.tensor(self.weights, dtype=torch.float64)
        importance = squares.cpu().double().sqrt()
        self.weights = update_layer_weights(before, importance, eta=self.eta, floor=self.floor).tolist()
        self._squares = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the weights when the Trainer's log is due."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set, but not declared, by Trainer
        if trainer.global_step % max(every, 1) == 0:
            assert self.weights is not None
            names = [ours for ours, _ in self._matching.pairs]
            pl_module.log_dict(
                {f"layer_weight/{name}": value for name, value in zip(names, self.weights, strict=True)}, batch_size=1
            )

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the weights that were learnt."""
        self.weights = state_dict["weights"]

    def _due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0

    def _put_back(self) -> None:
        super()._put_back()
        self._seen = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _find_term(name: str | None, pl_module: L.LightningModule, who: str) -> str:
    """Name of the term whose pair weights ``who`` turns."""
    terms: Any = getattr(pl_module, "terms", {})
    weighted: list[str] = [key for key, term in terms.items() if hasattr(term, "pair_weights")]
    if name is None and len(weighted) == 1:
        return weighted[0]
    if name is not None and name in weighted:
        return name
    if name is not None or not weighted:
        asked = "" if name is None else f" no term {name!r} with pair weights;"
        raise TypeError(
            f"{who} turns `pair_weights` of a term such as `FeatureMatching`, but {type(pl_module).__name__} has"
            f"{asked or ' none;'} its terms are {list(terms)}."
        )
    raise TypeError(f"{who} does not know which of the terms {weighted} to turn; name one: `term={weighted[0]!r}`.")


def _check_rates(eta: float, floor: float) -> None:
    if not 0 <= eta < math.inf:
        raise ValueError(f"`eta` must be finite and not negative, got {eta}.")
    if not 0 <= floor < 1:
        raise ValueError(f"`floor` must be in [0, 1), got {floor}.")


__all__ = [
    "DynamicLayerWeights",
    "ProgressiveLayers",
    "RandomLayers",
    "progressive_layers",
    "sample_layers",
    "update_layer_weights",
]
