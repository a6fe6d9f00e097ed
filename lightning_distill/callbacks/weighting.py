"""Callbacks that give a module a weighting: uncertainty, MGDA, PCGrad, CAGrad."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import lightning as L
import torch
from torch import Tensor

from lightning_distill.modules.base import DistillationModule
from lightning_distill.weighting import (
    FixedWeights,
    GradientWeights,
    UncertaintyWeights,
    Weighting,
    cagrad_weights,
    mgda_weights,
    pcgrad_weights,
)
from lightning_distill.weighting.gradient_weights import Normalise


def distillation_module(callback: L.Callback, module: L.LightningModule) -> DistillationModule:
    """``module``, which must have named terms and a weighting.

    Raises:
        TypeError: If it has not.
    """
    if not isinstance(module, DistillationModule):
        raise TypeError(
            f"{type(callback).__name__} weighs the loss terms of a `DistillationModule` such as `KD`, but the module "
            f"is a {type(module).__name__}."
        )
    return module


def fixed_weights(callback: L.Callback, module: L.LightningModule) -> FixedWeights:
    """The constant weights of ``module``, for a callback that turns or replaces them.

    Raises:
        TypeError: If the module is no :class:`~lightning_distill.DistillationModule`.
        ValueError: If something else weighs its terms already, or there is one term only.
    """
    weighting = distillation_module(callback, module).weighting
    if type(weighting) is not FixedWeights:
        raise ValueError(
            f"{type(callback).__name__} and {type(weighting).__name__} would both weigh the terms. Remove the "
            "callback, or the other callback or `weights=...` that brings the weighting."
        )
    return weighting


class InstalledWeighting(L.Callback):
    """Replaces a module's constant weights before the checkpoint is loaded and the optimizer is built.

    The base of the callbacks in this file.
    """

    _installed: Weighting | None = None

    def build(self, present: Mapping[str, float]) -> Weighting:
        """The weighting, given the module's constant weights."""
        raise TypeError(f"{type(self).__name__} has no `build(present)` that returns a `Weighting`; define it.")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install the weighting, once per module."""
        module = distillation_module(self, pl_module)
        if stage == "fit" and (self._installed is None or module.weighting is not self._installed):
            self._installed = self.build(fixed_weights(self, pl_module).values)
            module.use_weighting(self._installed)


class UncertaintyWeighting(InstalledWeighting):
    """Learn an uncertainty for each term that sets its weight (Kendall et al. 2018).

    Adding it is the same as ``weights=UncertaintyWeights()``; see
    :class:`~lightning_distill.weighting.UncertaintyWeights`. It replaces the constant weights of the module, whose
    values have no effect any more. The variances are in the module's checkpoint: add the callback again to go on
    training; to evaluate, it is not needed.

    Args:
        log_variance: Where the logarithms of the variances start: one number, or one by term.
        learning_rate: Of the log-variances; by default the optimizer's.

    Raises:
        ValueError: If a value is outside its range, or names an unknown term; at the start of the training, if there
            is one term only, or something else weighs the terms already.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(self, log_variance: float | Mapping[str, float] = 0.0, learning_rate: float | None = None) -> None:
        self.log_variance = log_variance
        self.learning_rate = learning_rate
        self.build({})  # checks the values

    def build(self, present: Mapping[str, float]) -> UncertaintyWeights:
        """A variance for each term."""
        return UncertaintyWeights(None, self.log_variance, self.learning_rate)


class MGDA(InstalledWeighting):
    """In every step, weigh the terms such that none of their losses rises (Sener and Koltun 2018).

    The weights are those of the shortest convex combination of the terms' gradients; see
    :func:`~lightning_distill.weighting.mgda_weights`. They replace the constant weights of the module, whose values
    have no effect any more. By default the gradients are those in a representation (MGDA-UB), which is cheap; see
    :class:`~lightning_distill.weighting.GradientWeights`, also for what it means with several processes and
    ``accumulate_grad_batches``.

    Args:
        representation: Name of the student's submodule whose output is the representation. Default: chosen in the
            first batch.
        exact: Whether to use the gradients of all parameters of the student instead.
        normalise: ``"norm"``, ``"loss"``, ``"loss and norm"`` or ``None``. Without it the term with the smallest
            gradient gets most of the weight. The direction lowers all losses either way.

    Raises:
        ValueError: If arguments contradict each other or are unknown; at the start of the training, if there is one
            term only, or something else weighs the terms already.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(
        self, representation: str | None = None, exact: bool = False, normalise: Normalise | None = "norm"
    ) -> None:
        self.representation = representation
        self.exact = exact
        self.normalise: Normalise | None = normalise
        self.build({})  # checks the values

    def build(self, present: Mapping[str, float]) -> GradientWeights:
        """Weights of the shortest combination."""
        return GradientWeights(
            mgda_weights, representation=self.representation, exact=self.exact, normalise=self.normalise
        )


class PCGrad(InstalledWeighting):
    """In every step, take out of each term's gradient what works against another term (Yu et al. 2020).

    The gradients are those of the terms times the constant weights of the module, which keep their meaning. Where no
    two gradients conflict, nothing changes. See :func:`~lightning_distill.weighting.pcgrad_weights` and
    :class:`~lightning_distill.weighting.GradientWeights`.

    Args:
        representation: Name of the student's submodule whose output is the representation. Default: chosen in the
            first batch.
        exact: Whether to use the gradients of all parameters of the student instead.

    Raises:
        ValueError: As for :class:`MGDA`.
        TypeError: As for :class:`MGDA`.
    """

    def __init__(self, representation: str | None = None, exact: bool = False) -> None:
        self.representation = representation
        self.exact = exact
        self.build({})  # checks the values

    def build(self, present: Mapping[str, float]) -> GradientWeights:
        """The constant weights, corrected for conflicts."""
        return GradientWeights(pcgrad_weights, representation=self.representation, exact=self.exact, priorities=present)


class CAGrad(InstalledWeighting):
    """In every step, follow the direction near the weighted sum that helps the worst-off term most (Liu et al. 2021).

    The gradients are those of the terms times the constant weights of the module, which keep their meaning. See
    :func:`~lightning_distill.weighting.cagrad_weights` and :class:`~lightning_distill.weighting.GradientWeights`.

    Args:
        c: How far from the weighted sum, relative to its length; 0 is the sum itself.
        representation: Name of the student's submodule whose output is the representation. Default: chosen in the
            first batch.
        exact: Whether to use the gradients of all parameters of the student instead.

    Raises:
        ValueError: As for :class:`MGDA`, or if ``c`` is negative.
        TypeError: As for :class:`MGDA`.
    """

    def __init__(self, c: float = 0.4, representation: str | None = None, exact: bool = False) -> None:
        cagrad_weights(torch.eye(2), c=c)  # checks the value
        self.c = c
        self.representation = representation
        self.exact = exact
        self.build({})  # checks the values

    def build(self, present: Mapping[str, float]) -> GradientWeights:
        """The constant weights, turned towards the worst-off term."""
        return GradientWeights(
            partial(_cagrad_sum, c=self.c),
            representation=self.representation,
            exact=self.exact,
            priorities=present,
        )


def _cagrad_sum(gram: Tensor, c: float) -> Tensor:
    """CAGrad around the sum instead of the mean."""
    return len(gram) * cagrad_weights(gram, c=c)
