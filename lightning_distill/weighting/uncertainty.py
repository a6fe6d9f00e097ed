"""Weights learned as the uncertainty of each term (Kendall, Gal and Cipolla 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.weighting.weighting import Weighting, check_several

LIMIT = 10.0  # of log-variances: weights between 2e-5 and 1e4
CHECK_EVERY = 100


def uncertainty_weighted(losses: Tensor, log_variances: Tensor) -> Tensor:
    r"""Sum over the terms of a loss over twice its variance plus the logarithm of its standard deviation.

    .. math:: \sum_i \frac{L_i}{2 \sigma_i^2} + \log \sigma_i = \frac12 \sum_i e^{-s_i} L_i + s_i

    with :math:`s_i = \log \sigma_i^2`.

    It is smallest for :math:`\sigma_i^2 = L_i`, where it is :math:`\frac12 \sum_i (1 + \log L_i)`: negative for small
    losses and without a lower bound as one of them goes to 0. Then the gradient of the networks is that of
    :math:`\frac12 \sum_i \log L_i`: each term is measured by its relative progress.

    Kendall, Gal and Cipolla (2018), section 3.2, https://arxiv.org/abs/1705.07115.

    Args:
        losses: Not negative, shape ``(T,)``.
        log_variances: ``s``, shape ``(T,)``.

    Returns:
        Scalar, float32 or wider.

    Example:
        >>> uncertainty_weighted(torch.tensor([1.0, 4.0]), torch.zeros(2))
        tensor(2.5000)
    """
    dtype = torch.promote_types(torch.promote_types(losses.dtype, log_variances.dtype), torch.float32)
    s = log_variances.to(dtype)
    # no dot product: autocast would take it in float16
    return 0.5 * torch.addcmul(s, torch.exp(-s), losses.to(dtype)).sum()


class UncertaintyWeights(Weighting):
    """Learn a variance for each term and weigh it by half of its inverse; see :func:`uncertainty_weighted`.

    The logarithms of the variances are parameters: they join the optimizer without weight decay, the checkpoint and
    DDP. They stay in ``[-10, 10]`` (projected, so that a gradient leads back from the edge) and in float32 whatever the
    precision of the networks. Their gradient, ``(1 - L / variance) / 2`` each, counts in ``gradient_clip_val`` by norm.

    Args:
        terms: Names of the terms; by default those of the module. Terms may be absent from a step.
        log_variance: Where each starts: one number, or one by term. 0 weighs with 0.5.
        learning_rate: Of the log-variances; by default the optimizer's. A scheduler that sets the learning rate of all
            groups, as ``OneCycleLR`` with one ``max_lr`` does, overrules it.

    Raises:
        ValueError: If a value is outside its range, or names an unknown term; in the training, if a loss is negative
            (looked at in the first and every hundredth batch).
    """

    log_variances: nn.Parameter

    def __init__(
        self,
        terms: Sequence[str] | None = None,
        log_variance: float | Mapping[str, float] = 0.0,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__()
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {learning_rate}.")
        named = log_variance if isinstance(log_variance, Mapping) else {"log_variance": log_variance}
        for name, value in named.items():
            if not -LIMIT <= value <= LIMIT:
                raise ValueError(f"`log_variance` must be in [-10, 10], got {value} for {name!r}.")
        self.log_variance = log_variance
        self.learning_rate = learning_rate
        self.terms: tuple[str, ...] = ()
        self._batches = 0
        if terms is not None:
            self._name(terms)

    def _name(self, terms: Sequence[str]) -> None:
        check_several(type(self).__name__, terms)
        start = self.log_variance
        if isinstance(start, Mapping):
            if unknown := [name for name in start if name not in terms]:
                raise ValueError(f"`log_variance` names {unknown}, which are no terms; there are {list(terms)}.")
            values = [float(start.get(name, 0.0)) for name in terms]
        else:
            values = [float(start)] * len(terms)
        self.terms = tuple(terms)
        self.log_variances = nn.Parameter(torch.tensor(values))

    def bind(self, terms: Sequence[str], student: nn.Module) -> None:
        """Make a parameter for each term, unless the terms were named."""
        if not self.terms:
            self._name(terms)
        elif missing := [name for name in terms if name not in self.terms]:
            raise ValueError(f"`terms` of {type(self).__name__} are {list(self.terms)}; the module also has {missing}.")

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The objective of the terms that are there; scalar."""
        if not torch.is_grad_enabled():
            return self._combined(losses)
        if self._batches % CHECK_EVERY == 0:  # a look at the values waits for the device
            _refuse_negative(losses)
        self._batches += 1
        with torch.no_grad():
            self.log_variances.clamp_(-LIMIT, LIMIT)
        return self._combined(losses)

    def _combined(self, losses: Mapping[str, Tensor]) -> Tensor:
        if unknown := [name for name in losses if name not in self.terms]:
            raise ValueError(
                f"{type(self).__name__} has variances for {list(self.terms)}, but there are losses of {unknown}. Name "
                f"terms that come later from the start: `UncertaintyWeights(terms={[*self.terms, *unknown]})`."
            )
        values = torch.stack([losses[name] for name in self.terms if name in losses])
        if len(values) == len(self.terms):
            return uncertainty_weighted(values, self.log_variances)
        there = [place for place, name in enumerate(self.terms) if name in losses]
        return uncertainty_weighted(values, self.log_variances[there])

    def weights(self) -> dict[str, float | Tensor]:
        """Half of the inverse variance of each term."""
        return dict(zip(self.terms, (0.5 * torch.exp(-self.log_variances.detach())).tolist(), strict=True))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `Trainer(precision="bf16-true")` would round away steps of a hundredth; follow the device only
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32 and not parameter.is_meta:
                parameter.data = parameter.data.float()
        return self


def _refuse_negative(losses: Mapping[str, Tensor]) -> None:
    negative = {name: value for name, loss in losses.items() if (value := loss.item()) < 0}
    if negative:
        raise ValueError(
            f"Uncertainty weighting needs losses that are not negative, got {negative}: the objective would have no "
            "minimum. Use another weighting for these terms, such as fixed weights or GradNorm."
        )
