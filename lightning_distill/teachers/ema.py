"""The moving average of the student as its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.outputs import Outputs
from lightning_distill.taps import Taps
from lightning_distill.tasks import Task
from lightning_distill.teachers.past import run_untrained, untrained_copy
from lightning_distill.teachers.teacher import Teacher

Buffers = Literal["ema", "copy"]

# On a CPU the multi-tensor kernel pays off once the weights do not fit into its cache: measured between 1.8 million
# numbers (0.37 ms one by one, 1.34 ms together) and 11.5 million (9.0 ms and 4.5 ms).
FOREACH_FROM = 5_000_000


def momentum_alpha(batch_size: int, samples: int, averaging: float = 4.0) -> float:
    r"""Momentum with which an average looks back over ``1 / averaging`` epochs: ``1 / (1 + averaging * B / N)``.

    Its horizon, ``1 / (1 - alpha)``, is ``1 + N / (averaging * B)`` steps. It agrees with the scaling rule
    (:func:`scale_momentum`) for large data sets: half the batch size gives about the square root.

    Args:
        batch_size: Samples of an optimizer step, over all processes and micro-batches.
        samples: In the training set.
        averaging: How many horizons there are in an epoch, positive; not the temperature of the distillation.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> round(momentum_alpha(256, 1281167), 6)
        0.999201
    """
    for name, value in {"batch_size": batch_size, "samples": samples, "averaging": averaging}.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    return 1 / (1 + averaging * batch_size / samples)


def scale_momentum(alpha: float, k: float) -> float:
    """Momentum for a batch ``k`` times as large: ``alpha ** k`` (Busbridge et al. 2023, https://arxiv.org/abs/2307.13813).

    One step then forgets as much as ``k`` steps did. The same holds for an average that is updated every ``k`` steps.

    Raises:
        ValueError: If ``alpha`` is outside [0, 1) or ``k`` is not positive.
    """
    check_momentum(alpha)
    if not k > 0:
        raise ValueError(f"`k` must be positive, got {k}.")
    return float(alpha**k)


def warmed_up_momentum(alpha: float, updates: int) -> float:
    """``min(1 - 1 / (t + 1), alpha)`` after ``t`` updates: a plain mean at first, so that the start is soon forgotten.

    Tarvainen and Valpola (2017), https://arxiv.org/abs/1703.01780.

    Example:
        >>> [warmed_up_momentum(0.9, t) for t in (0, 1, 3, 99)]
        [0.0, 0.5, 0.75, 0.9]
    """
    return min(1 - 1 / (updates + 1), alpha)


@torch.no_grad()
def ema_update_(averages: Sequence[Tensor], values: Sequence[Tensor], alpha: float) -> None:
    """``average = alpha * average + (1 - alpha) * value``, in place; what is not floating point is copied.

    Args:
        averages: Changed.
        values: Of the same shapes, in the same order, on the same devices. Those that are the same objects are left
            alone.
        alpha: In [0, 1).
    """
    pairs = [(a, v) for a, v in zip(averages, values, strict=True) if a is not v]
    floating = [(a, v) for a, v in pairs if a.is_floating_point() or a.is_complex()]
    for average, value in pairs:
        if not (average.is_floating_point() or average.is_complex()):  # counters: an average of them would be cut off
            average.copy_(value)
    if not floating:
        return
    numbers = sum(average.numel() for average, _ in floating)
    if floating[0][0].device.type == "cpu" and numbers < FOREACH_FROM:
        for average, value in floating:
            average.lerp_(value, 1 - alpha)
    else:
        torch._foreach_lerp_([a for a, _ in floating], [v for _, v in floating], 1 - alpha)


class EMATeacher(Teacher):
    """The exponential moving average of a student's weights: the mean teacher (Tarvainen and Valpola 2017).

    It is part of the module: in its checkpoints, on its device, the same in every process; no optimizer trains it, it
    runs in eval mode, and an exported student knows nothing of it. Somebody must call :meth:`update` after each
    optimizer step: :class:`~lightning_distill.callbacks.MeanTeacher` does, and makes the teacher as well.

    Parameters that the student does not train (the base under an adapter) are shared with it.

    Args:
        student: Copied: the average starts here.
        buffers: ``"ema"`` averages floating-point buffers (running statistics of normalization) like weights, so that
            they fit the averaged weights; ``"copy"`` takes the student's. Counters are always copied.

    Raises:
        ValueError: If ``buffers`` is unknown.

    Attributes:
        updates: How many there were.
    """

    def __init__(self, student: nn.Module, buffers: Buffers = "ema") -> None:
        super().__init__()
        if buffers not in ("ema", "copy"):
            raise ValueError(f"`buffers` must be 'ema' or 'copy', got {buffers!r}.")
        self.network = untrained_copy(student)
        self.buffers_are: Buffers = buffers
        self.updates = 0
        self._taps = Taps(self.network, ())

    @torch.no_grad()
    def update(self, student: nn.Module, alpha: float) -> None:
        """Move the average towards ``student``.

        Args:
            student: The network that was copied, now further trained.
            alpha: How much of the average stays, in [0, 1).
        """
        ours: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(student.parameters())
        if self.buffers_are == "ema":
            ours += self.network.buffers()
            theirs += student.buffers()
        else:
            ema_update_(list(self.network.buffers()), list(student.buffers()), 0.0)
        ema_update_(ours, theirs, alpha)
        self.updates += 1

    def forward(self, batch: Any, task: Task) -> Outputs:
        """What the average says about ``batch``, without a graph."""
        return run_untrained(self.network, batch, task, self._taps)

    def copies(self) -> dict[str, nn.Module]:
        """The average."""
        return {"network": self.network}

    def tap(self, names: Iterable[str]) -> None:
        """Keep the activations with these names in ``Outputs.features``; replaces earlier taps."""
        self._taps.remove()
        self._taps = Taps(self.network, names)

    def distance(self, student: nn.Module) -> float:
        """How far the average is behind: distance of the weights over their norm; 0 if they are equal."""
        pairs = list(zip(self.network.parameters(), student.parameters(), strict=True))
        apart = torch.stack([(ours.detach() - theirs.detach()).float().norm() for ours, theirs in pairs]).norm()
        size = torch.stack([theirs.detach().float().norm() for _, theirs in pairs]).norm()
        return float(apart / size.clamp_min(torch.finfo(size.dtype).tiny))

    def get_extra_state(self) -> Tensor:
        """The number of updates, for the checkpoint."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Put :meth:`get_extra_state` back."""
        self.updates = int(state)


def check_momentum(alpha: float) -> None:
    """Refuse a momentum with which nothing would move, or something would grow.

    Raises:
        TypeError: If ``alpha`` is no number.
        ValueError: If it is outside [0, 1).
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"The momentum of a moving average must be a number, got {alpha!r}.")
    if not 0 <= alpha < 1:  # also rejects NaN
        raise ValueError(
            f"The momentum of a moving average must be in [0, 1), got {alpha}. 0.99 looks back over about 100 updates; "
            "1 would never move."
        )
