"""The interface of a weighting."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Weighting(nn.Module):
    """Turns the losses of the terms into the one scalar that is minimised.

    State that must survive a resume (learned weights, running means) stands in parameters and buffers; parameters
    join the optimizer in a group without weight decay.
    """

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Combine scalars by term name into one scalar."""
        raise TypeError(f"{type(self).__name__} is a `Weighting` without a `forward(losses)`; define one.")

    def weights(self) -> Mapping[str, float | Tensor]:
        """The present weight of each term, for the log; tensors are detached."""
        raise TypeError(f"{type(self).__name__} is a `Weighting` without `weights()`; define it.")
