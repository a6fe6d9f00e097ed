"""Lend a quantized network some of its teacher's features while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def feature_injection(hidden: Tensor, teacher: Tensor, alpha: float | Tensor) -> Tensor:
    r"""Move features towards the teacher's: :math:`h + \alpha (h_T - h)`.

    The features' own gradient is multiplied by :math:`1 - \alpha`; the teacher's features get none.

    Args:
        hidden: The quantized network's features, any shape.
        teacher: The teacher's features, same shape; detached here.
        alpha: In [0, 1]: a number, or a tensor that broadcasts to ``hidden``. 0 leaves ``hidden`` alone.

    Raises:
        ValueError: If the shapes differ, or a number ``alpha`` is outside [0, 1].

    Example:
        >>> feature_injection(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), 0.25)
        tensor([1.2500, 2.5000])
    """
    _check_shapes(hidden, teacher)
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"`alpha`, the teacher's share, must be in [0, 1], got {alpha}.")
    return hidden + alpha * (teacher.detach().to(hidden.dtype) - hidden)


def adaptive_alpha(hidden: Tensor, teacher: Tensor) -> Tensor:
    r"""Share of the teacher's features by how far a sample's are off: :math:`\tanh(e / 2)`, 0 without an error.

    .. math:: e = \|h_T - h\|_2 / \|h_T\|_2

    That is :math:`2 \sigma(e) - 1`; a logistic function of an error alone would never be below one half.

    Args:
        hidden: The quantized network's features, shape ``(B, ...)``.
        teacher: The teacher's features, same shape.

    Returns:
        In [0, 1), without a graph, shape ``(B, 1, ...)``, which broadcasts to ``hidden``; float32 or wider.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> h = torch.tensor([[1.0, 2.0, 2.0]])
        >>> adaptive_alpha(h, torch.tensor([[2.0, 2.0, 4.0]])), adaptive_alpha(h, h)
        (tensor([[0.2243]]), tensor([[0.]]))
    """
    _check_shapes(hidden, teacher)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    ours, theirs = hidden.detach().to(wide).flatten(1), teacher.detach().to(wide).flatten(1)
    error = (theirs - ours).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-8)
    return torch.tanh(error / 2).reshape(-1, *[1] * (hidden.ndim - 1))


class FeatureInjector:
    """Blends the outputs of a network's submodules with those of another network, by forward hooks.

    The teacher has to run first, on the same batch. Each of its outputs is used once: a pass of the student alone is
    left as it is.

    Args:
        student: The network whose features are changed.
        teacher: The network that lends its features.
        layers: Names of submodules, the student's to the teacher's.
        adaptive: Whether each sample's share is ``alpha`` times :func:`adaptive_alpha`.

    Attributes:
        alpha: The teacher's share, in [0, 1]; with 0, the initial value, nothing is done.

    Raises:
        ValueError: If there are no layers, or a network has no submodule of a name; in a pass, if the features of a
            pair have different shapes.

    Example:
        >>> student, teacher = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> injector = FeatureInjector(student, teacher, {"0": "0"})
        >>> injector.alpha, x = 1.0, torch.ones(1, 2)
        >>> torch.allclose(teacher(x), student(x))
        True
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, layers: Mapping[str, str], *, adaptive: bool = False
    ) -> None:
        if not layers:
            raise ValueError("`layers` names no layer to inject features into.")
        self.alpha = 0.0
        self.adaptive = adaptive
        self._lent: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        pairs = {
            ours: (_submodule(student, ours, "student"), _submodule(teacher, theirs, "teacher"))
            for ours, theirs in layers.items()
        }
        for name, (ours, theirs) in pairs.items():
            self._handles.append(theirs.register_forward_hook(self._lend(name)))
            self._handles.append(ours.register_forward_hook(self._inject(name)))

    def remove(self) -> None:
        """Take the hooks out of both networks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._lent = [], {}

    def _lend(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.alpha > 0:
                self._lent[name] = _tensor(output, name).detach()

        return keep

    def _inject(self, name: str) -> Any:
        def blend(module: nn.Module, inputs: Any, output: Any) -> Any:
            lent = self._lent.pop(name, None)
            if lent is None or self.alpha == 0:
                return output
            hidden = _tensor(output, name)
            if hidden.shape != lent.shape:
                raise ValueError(
                    f"The features of {name!r} have shape {tuple(hidden.shape)}, the teacher's {tuple(lent.shape)}; "
                    "only features of one shape can be injected. Choose other layers, or the network's own "
                    "full-precision copy as teacher."
                )
            share = self.alpha * adaptive_alpha(hidden, lent).to(hidden.dtype) if self.adaptive else self.alpha
            return feature_injection(hidden, lent, share)

        return blend


def _submodule(network: nn.Module, name: str, who: str) -> nn.Module:
    known: dict[str, nn.Module] = dict(network.named_modules())
    if name not in known or name == "":
        raise ValueError(f"The {who} has no submodule {name!r}; there are {[key for key in known if key][:20]}.")
    return known[name]


def _tensor(output: Any, name: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"The output of {name!r} must be a tensor to be injected, got {type(output).__name__}.")
    return output


def _check_shapes(hidden: Tensor, teacher: Tensor) -> None:
    if hidden.shape != teacher.shape:
        raise ValueError(
            f"`hidden` and `teacher` must have the same shape, got {tuple(hidden.shape)} and {tuple(teacher.shape)}."
        )


__all__ = ["FeatureInjector", "adaptive_alpha", "feature_injection"]
