"""Take blocks of weights out of a student while it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.adapters import has_adapter
from lightning_distill.callbacks.block_gradients import BlockGradients
from lightning_distill.compression.block_sparsity import Scope, block_masks, check_sparsity, cubic_sparsity
from lightning_distill.compression.blocks import Block, as_block, bits_of_present, block_norms, set_to_zero
from lightning_distill.compression.sparse_layers import (
    SparsityReport,
    require_zero_level,
    sparse_layers,
    sparsity_report,
)
from lightning_distill.modules import DistillationModule
from lightning_distill.sharding import is_sharded

Score = Literal["saliency", "magnitude"]


class BlockSparsity(L.Callback):
    r"""Set more and more blocks of the student's weights to 0, the least important first, while the rest is trained.

    Every ``every`` optimizer steps from ``start_step`` to ``end_step``, blocks go until their share is that of
    :func:`~lightning_distill.compression.cubic_sparsity`; then the student has time to recover. The importance of a
    block is :math:`\|W_b\| \, \|\nabla_b\|` (:func:`~lightning_distill.compression.block_importance`) with the weights
    of the moment and the root mean square of the gradient's norm over the steps since the last time.

    A block that has gone stays gone: its weights are 0, hence also its importance, whatever its gradient. Its gradient
    is set to 0 before the optimizer steps, so that it counts neither in clipping nor in the optimizer's statistics; and
    its weights again after, since momentum of the time before would still move them. No state of the optimizer has to
    be known or changed for that. Blocks that are all zeros when the training starts have gone already: a sparse student
    that is trained further, say with few bits, stays sparse with ``sparsity=0.0``.

    The student is a plain network with zeros at any time, as are its exports. Masks are the callback's state, equal in
    all processes; they do not depend on how the items of a step are split.

    Args:
        sparsity: Share of the blocks that has gone in the end, in [0, 1). Each layer keeps one.
        block: Rows and columns of a block, or ``"neon"`` (4x4), ``"avx512"``, ``"tensor_core"`` (16x16); see
            :func:`~lightning_distill.compression.block_size`. A layer's weight counts as a matrix of its outputs and
            everything else.
        layers: Names of the student's layers, or patterns (``"blocks.*.mlp"``). Default: all linear and convolution
            layers.
        skip: Names or patterns of layers that stay dense.
        start_step: Optimizer steps after which blocks begin to go; the first can go after the first step.
        end_step: Optimizer steps after which ``sparsity`` is reached, at least ``start_step`` and 1; equal to it, all
            blocks go at once. Default: half of the training.
        every: Optimizer steps between two times, at least 1.
        scope: ``"layer"`` takes the same share of each layer, ``"global"`` the least important blocks of all.
        score: ``"saliency"`` as above, or ``"magnitude"``: only the weights' norm, without looking at gradients.

    Attributes:
        kept: Which blocks each layer still has, by name, boolean; empty before a training.

    Logs ``block_sparsity``, the share of blocks that has gone.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training, if there are no such layers, a
            block is larger than one, its weight is shared, not trained or spread over processes, its quantizer has no
            level at 0, or the length of the training is unknown and there is no ``end_step``.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.

    Example:
        >>> [round(BlockSparsity(0.8, end_step=100).sparsity_at(step), 3) for step in (0, 50, 100)]
        [0.0, 0.7, 0.8]
    """

    def __init__(
        self,
        sparsity: float,
        block: str | tuple[int, int] = "avx512",
        layers: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        *,
        start_step: int = 0,
        end_step: int | None = None,
        every: int = 20,
        scope: Scope = "layer",
        score: Score = "saliency",
    ) -> None:
        check_sparsity("sparsity", sparsity)
        if not start_step >= 0:
            raise ValueError(f"`start_step` must not be negative, got {start_step}.")
        if end_step is not None and not end_step >= max(start_step, 1):
            raise ValueError(f"`end_step` must be at least `start_step` and 1, got {end_step} with {start_step}.")
        if not every >= 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        for name, value, known in (("scope", scope, ("layer", "global")), ("score", score, ("saliency", "magnitude"))):
            if value not in known:
                raise ValueError(f"`{name}` must be {known[0]!r} or {known[1]!r}, got {value!r}.")
        self.sparsity = sparsity
        self.block: Block = as_block(block)
        self.layers = layers
        self.skip = skip
        self.start_step = start_step
        self.end_step = end_step
        self.every = every
        self.scope: Scope = scope
        self.score: Score = score
        self.kept: dict[str, Tensor] = {}
        self._gradients = BlockGradients(self.block)
        self._finished = False  # whether the last blocks have gone; to choose again would change nothing
        self._resumed = False
        self._layers: dict[str, Any] = {}
        self._present: dict[str, Tensor | None] = {}  # bits of the weights that are there
        self._last_step = -1
        self._skips_overflows = False
        self._hooks: list[Any] = []

    def sparsity_at(self, step: int) -> float:
        """Share of the blocks that is to have gone after ``step`` optimizer steps.

        Raises:
            ValueError: If ``end_step`` is not known yet.
        """
        if self.end_step is None:
            raise ValueError("`end_step` is not known before the training starts; pass it to look at the schedule.")
        return cubic_sparsity(step, start=self.start_step, end=self.end_step, final=self.sparsity)

    def is_due(self, step: int) -> bool:
        """Whether blocks may go after ``step`` optimizer steps."""
        if self.end_step is None or not self.start_step <= step <= self.end_step:
            return False
        return (step - self.start_step) % self.every == 0 or step == self.end_step

    @property
    def block_sparsity(self) -> float:
        """Share of the blocks that has gone; 0 before a training."""
        blocks = sum(mask.numel() for mask in self.kept.values())
        return 1 - sum(int(mask.sum()) for mask in self.kept.values()) / blocks if blocks else 0.0

    def report(self, module: DistillationModule) -> SparsityReport:
        """The blocks of the module's student."""
        return sparsity_report(module.student, self.block, layers=self.layers, skip=self.skip)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the layers, and the blocks that are there."""
        if not isinstance(pl_module, DistillationModule):
            raise TypeError(
                "BlockSparsity takes blocks of the student of a `DistillationModule` such as `KD`, but the module is a "
                f"{type(pl_module).__name__}."
            )
        if is_sharded(pl_module.student):
            raise ValueError(
                "The student's weights are spread over the processes, where no process sees whole blocks. Use "
                "strategy='ddp'."
            )
        if has_adapter(pl_module.student):
            raise ValueError(
                "The student has a PEFT adapter, which would fill the zeros of its base when it is merged. Merge it "
                "first: `student.merge_and_unload()`."
            )
        self._layers = sparse_layers(pl_module.student, self.block, layers=self.layers, skip=self.skip)
        require_zero_level(self._layers)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        if frozen := [name for name, layer in self._layers.items() if id(layer.weight) not in trained]:
            raise ValueError(
                f"The weights of {frozen} are not trained, so that nothing makes up for lost blocks. Leave them dense, "
                f"`skip={frozen}`, or train them: `requires_grad_(True)`."
            )
        if self._resumed:
            self._check_resumed()
        else:
            self.kept = {name: _present(layer.weight, self.block) for name, layer in self._layers.items()}
            self._gradients = BlockGradients(self.block)
        self._resumed = self._finished = False
        self._gradients.to({name: layer.weight.device for name, layer in self._layers.items()})
        self._mask_weights()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the length of the training; look after each optimizer step from now on."""
        total = trainer.estimated_stepping_batches
        if self.end_step is None:
            if not 0 < total < math.inf:
                raise ValueError(
                    "`end_step` of BlockSparsity must be given: the length of this training is unknown (no "
                    "`max_steps`, `max_epochs`, or a data loader without a length)."
                )
            self.end_step = max(self.start_step, int(total) // 2, 1)
        if total < self.end_step:
            rank_zero_warn(
                f"The training ends after {int(total)} steps, before BlockSparsity reaches its sparsity of "
                f"{self.sparsity} at `end_step={self.end_step}`."
            )
        self._last_step = trainer.global_step
        self._skips_overflows = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse bits that were set in the meantime and have no level at 0."""
        require_zero_level(self._layers)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients of blocks that have gone away."""
        for name, layer in self._layers.items():
            if layer.weight.grad is not None:
                set_to_zero(layer.weight.grad, self._present[name])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let blocks go, if it is time."""
        step = trainer.global_step
        if step == self._last_step:  # in the middle of an accumulation
            return
        self._last_step = step
        assert self.end_step is not None
        late = step > self.end_step and not self._finished  # no gradient was there to choose by
        due = (late or self.is_due(step)) and (self.score == "magnitude" or bool(self._gradients))
        if due:
            self._let_go(trainer, self.sparsity_at(step))
            self._finished = step >= self.end_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set, but not declared, by Trainer
        if due or step % max(every, 1) == 0:
            pl_module.log("block_sparsity", self.block_sparsity, batch_size=1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop looking after the optimizer's steps."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop looking after the optimizer's steps."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """The blocks that are there, the gradients seen since blocks went, and the end of the schedule."""
        return {
            "block": list(self.block),
            "kept": dict(self.kept),
            "gradients": self._gradients.state_dict(),
            "end_step": self.end_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was; with the schedule that was begun, unless another was asked for."""
        if tuple(state_dict["block"]) != self.block:
            raise ValueError(
                f"The checkpoint was made with blocks of {'x'.join(map(str, state_dict['block']))}, but `block` is "
                f"{self.block[0]}x{self.block[1]}. Use the same one."
            )
        self.kept = dict(state_dict["kept"])
        self._gradients.load_state_dict(state_dict["gradients"])
        self._resumed = bool(self.kept)
        self.end_step = self.end_step or state_dict["end_step"]

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Look at the gradients that the optimizer has used, then undo what it did to blocks that have gone."""
        if self.score == "saliency" and not self._finished:
            weights = {name: layer.weight for name, layer in self._layers.items()}
            gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
            # fused optimizers are called, and skip an overflow of float16 by themselves
            self._gradients.add(gradients, finite_only=self._skips_overflows)
        for name, layer in self._layers.items():
            set_to_zero(layer.weight, self._present[name])

    def _importance(self) -> dict[str, Tensor]:
        norms = {name: block_norms(layer.weight.detach(), self.block) for name, layer in self._layers.items()}
        if self.score == "magnitude":
            return norms
        return {name: norm * self._gradients.norms(name, norm) for name, norm in norms.items()}

    def _let_go(self, trainer: L.Trainer, sparsity: float) -> None:
        # the same everywhere but for rounding: let the first process decide
        masks = block_masks(self._importance(), sparsity, scope=self.scope, kept=self.kept)
        self.kept = trainer.strategy.broadcast(masks)
        self._gradients.close()
        self._mask_weights()

    @torch.no_grad()
    def _mask_weights(self) -> None:
        for name, layer in self._layers.items():
            self._present[name] = bits_of_present(self.kept[name], layer.weight, self.block)
            set_to_zero(layer.weight, self._present[name])

    def _check_resumed(self) -> None:
        if list(self.kept) != list(self._layers):
            raise ValueError(
                f"The checkpoint has masks for the layers {list(self.kept)}, but this run takes blocks of "
                f"{list(self._layers)}. Use the `layers` and `skip` that the run began with."
            )


def _present(weight: Tensor, block: Block) -> Tensor:
    """The blocks that are not all zeros; all of a layer that has only zeros, as some are initialized."""
    present = (block_norms(weight.detach(), block) != 0).cpu()
    return present if present.any() else torch.ones_like(present)


__all__ = ["BlockSparsity"]
