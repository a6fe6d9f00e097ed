"""A network that teaches the random parts of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_distill.export import write_network
from lightning_distill.losses.term import Term
from lightning_distill.modules.arguments import ItemWeights, OptimizerFactory, SchedulerFactory, Temperature, build_task
from lightning_distill.modules.kd import KD
from lightning_distill.stochastic_depth import (
    Mode,
    Scale,
    StochasticDepth,
    add_stochastic_depth,
    remove_stochastic_depth,
)
from lightning_distill.tasks import Task
from lightning_distill.teachers.whole_network import WholeNetworkTeacher
from lightning_distill.weighting import Weighting


class StochasticDepthSelfKD(KD):
    """Train on labels and on what the whole network says, with residual blocks left out at random.

    ``loss = alpha * hard + (1 - alpha) * KL(whole network || sub-network)``: the sub-network that a step draws learns
    from the network with all blocks, in eval mode and detached. Stochastic depth alone (Huang et al. 2016) is
    ``alpha=1``. Costs a second forward pass without gradients.

    The blocks are wrapped in place in :class:`~lightning_distill.stochastic_depth.StochasticDepth`; ``export`` takes
    the wrappers out again (with ``scale="test"`` they stay, as the blocks must go on being scaled).

    Args:
        student: See :class:`~lightning_distill.DistillationModule`, as for all arguments not listed here.
        blocks: Dotted paths of the residual blocks, from the first to the last; each keeps the shape of its input.
        last: Probability that the last block is kept, in (0, 1]; that of the others rises linearly to 1 at the input.
        temperature: Of the soft targets, positive; or a rule.
        alpha: Weight of the labels' loss, in [0, 1].
        mode: ``"row"`` draws for each sample, ``"batch"`` once for all, which saves computing.
        scale: See :class:`~lightning_distill.stochastic_depth.StochasticDepth`.
        terms: See :class:`~lightning_distill.KD`.
        weights: See :class:`~lightning_distill.KD`.
        task: See :class:`~lightning_distill.DistillationModule`.
        optimizer: See :class:`~lightning_distill.DistillationModule`.
        lr_scheduler: See :class:`~lightning_distill.DistillationModule`.
        lr_interval: See :class:`~lightning_distill.DistillationModule`.
        batch_transform: See :class:`~lightning_distill.DistillationModule`.
        item_weights: See :class:`~lightning_distill.DistillationModule`.

    Raises:
        ValueError: If ``student`` has no block of a name, or a value is outside its range.
    """

    def __init__(
        self,
        student: nn.Module | str,
        blocks: Sequence[str],
        last: float = 0.5,
        temperature: Temperature = 4.0,
        alpha: float = 0.5,
        *,
        mode: Mode = "row",
        scale: Scale = "train",
        terms: Mapping[str, Term] | None = None,
        weights: Mapping[str, float] | Weighting | None = None,
        task: Task | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Any], Any] | None = None,
        item_weights: ItemWeights | None = None,
    ) -> None:
        network = build_task(task).load(student).train() if isinstance(student, str) else student
        add_stochastic_depth(network, blocks, last=last, mode=mode, scale=scale)
        super().__init__(
            network,
            WholeNetworkTeacher(network),
            temperature,
            alpha,
            terms=terms,
            weights=weights,
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            item_weights=item_weights,
        )

    def export(self, path: str | Path | None = None, *, overwrite: bool = False) -> nn.Module:
        """The whole network without its wrappers; see :meth:`lightning_distill.DistillationModule.export`."""
        student = super().export()
        wrappers = [module for module in student.modules() if isinstance(module, StochasticDepth)]
        if all(module.scale == "train" or module.survival == 1 for module in wrappers):
            remove_stochastic_depth(student)
        if path is not None:
            write_network(student, Path(path), overwrite=overwrite)
        return student
