"""Draw training samples by their difficulty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_distill.curriculum import Curriculum, SigmoidCurriculum
from lightning_distill.modes import inference
from lightning_distill.modules.base import DistillationModule
from lightning_distill.outputs import Step
from lightning_distill.sample_difficulty import Difficulty, TeacherDivergence, TeacherEntropy, per_sample
from lightning_distill.teachers.cached import sample_index

Order = Literal["easy_first", "hard_first", "random"]
MEASURES: dict[str, Difficulty] = {"entropy": TeacherEntropy(), "divergence": TeacherDivergence()}


class CurriculumResampling(L.Callback):
    """Draw the samples of each epoch by a curriculum of their difficulty.

    Epochs keep their length; what changes is how often each sample comes, by the weights that the curriculum gives at
    the progress that the training has at the beginning of the epoch. The difficulties are measured once before the
    training, by one pass over ``datamodule.predict_dataloader()`` (the training set in order, with each sample's
    ``index``), shared by all processes; or again every ``refresh_every`` epochs. They and the weights are in the
    checkpoint.

    Logs ``curriculum/difficulty``, the mean difficulty of what is drawn in the epoch, and ``curriculum/samples``, the
    effective number of different samples (Kish), as a share of all. At the end of the training draws both and the
    distribution of the difficulties into ``curriculum.png`` in the Trainer's folder.

    Args:
        curriculum: From difficulties and progress to weights. Default
            :class:`~lightning_distill.curriculum.SigmoidCurriculum`.
        difficulty: ``"entropy"`` of the teacher, ``"divergence"`` between student and teacher (refresh it), a function
            of the step such as :class:`~lightning_distill.sample_difficulty.TeacherEntropy`, or known difficulties,
            one per sample of the training set as ``index`` counts.
        order: ``"easy_first"``, ``"hard_first"``, or, as a control group, ``"random"``: the same sizes, with the
            difficulties shuffled over the samples.
        refresh_every: Epochs between two measurements; ``None`` to measure once.
        seed: Of the shuffling for ``order="random"``.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training, if there is no teacher, or the
            data module cannot draw by weights or has no ``index``.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(
        self,
        curriculum: Curriculum | None = None,
        difficulty: str | Difficulty | Tensor = "entropy",
        order: Order = "easy_first",
        refresh_every: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(difficulty, str) and difficulty not in MEASURES:
            raise ValueError(f"`difficulty` must be one of {', '.join(MEASURES)}, or a function, got {difficulty!r}.")
        if order not in ("easy_first", "hard_first", "random"):
            raise ValueError(f"`order` must be 'easy_first', 'hard_first' or 'random', got {order!r}.")
        if refresh_every is not None and not refresh_every >= 1:
            raise ValueError(f"`refresh_every` must be at least 1 epoch, got {refresh_every}.")
        if refresh_every is not None and isinstance(difficulty, Tensor):
            raise ValueError("`refresh_every` has no meaning for known difficulties; leave it out.")
        self.curriculum: Curriculum = SigmoidCurriculum() if curriculum is None else curriculum
        self.measure = MEASURES[difficulty] if isinstance(difficulty, str) else difficulty
        self.order = order
        self.refresh_every = refresh_every
        self.seed = seed
        self.difficulty: Tensor | None = None
        self.history: list[dict[str, float]] = []

    def weights(self, difficulty: Tensor, progress: float) -> Tensor:
        """Sampling weight of each sample at ``progress``, in this callback's order; shape ``(N,)``."""
        if self.order == "hard_first":
            difficulty = difficulty.max() + difficulty.min() - difficulty
        elif self.order == "random":
            generator = torch.Generator().manual_seed(self.seed)
            difficulty = difficulty[torch.randperm(len(difficulty), generator=generator)]
        weights: Tensor = self.curriculum(difficulty, progress)
        return weights

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, and set the weights of the first epoch; a resumed run has both from its checkpoint."""
        module, data = self._checked(trainer, pl_module)
        if self.difficulty is None:
            self.difficulty = self._measured(trainer, module, data)
            self._draw(trainer, data, 0.0)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is drawn."""
        entry = {f"curriculum/{name}": value for name, value in self.history[-1].items()}
        pl_module.log_dict(entry, batch_size=1, sync_dist=trainer.world_size > 1)  # equal on all ranks already

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the weights of the next epoch, before a checkpoint of the last batch is written.

        A run that is resumed from such a checkpoint begins with the next epoch, and its epoch's end never comes.
        """
        if not trainer.is_last_batch:
            return
        module, data = self._checked(trainer, pl_module)
        done = trainer.current_epoch + 1
        if self.refresh_every is not None and done % self.refresh_every == 0:
            self.difficulty = self._measured(trainer, module, data)
        self._draw(trainer, data, _progress(trainer, done))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the plot."""
        folder = trainer.log_dir or trainer.default_root_dir  # asks the other processes
        if trainer.is_global_zero and self.difficulty is not None:
            plot_curriculum(self.difficulty, self.history, Path(folder))

    def state_dict(self) -> dict[str, Any]:
        """The difficulties, and what was drawn."""
        return {"difficulty": self.difficulty, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over; the weights themselves are in the data module's state."""
        self.difficulty, self.history = state_dict["difficulty"], list(state_dict["history"])

    def _draw(self, trainer: L.Trainer, data: Any, progress: float) -> None:
        assert self.difficulty is not None
        weights = self.weights(self.difficulty, progress)
        shares = weights / weights.sum()
        entry = {
            "difficulty": float(shares @ self.difficulty.to(shares.dtype)),
            "samples": float(1 / shares.square().sum() / len(shares)),
        }
        self.history.append(entry)
        data.set_weights(weights)

    def _measured(self, trainer: L.Trainer, module: DistillationModule, data: Any) -> Tensor:
        """Difficulty of each training sample, shape ``(N,)``, on the CPU; each process measures its share."""
        if isinstance(self.measure, Tensor):
            return self.measure.detach().double().cpu()
        values, indices = [], []
        with inference(module.student), trainer.precision_plugin.forward_context():
            for number, batch in enumerate(data.predict_dataloader()):
                index = sample_index(batch, module.task)
                indices.append(index)
                if number % trainer.world_size != trainer.global_rank:
                    values.append(torch.zeros(len(index), dtype=torch.float64))
                    continue
                batch = trainer.strategy.batch_to_device(batch, module.device)
                step = module.observe(batch) if self.measure.needs_student else _teacher_alone(module, batch)
                values.append(per_sample(self.measure(step), step).double().cpu())
        found, order = torch.cat(values), torch.cat(indices).cpu()
        if trainer.world_size > 1:
            summed = trainer.strategy.reduce(found.to(module.device), reduce_op="sum")
            assert isinstance(summed, Tensor)
            found = summed.cpu()
        difficulty = torch.full((int(order.max()) + 1,), float("nan"), dtype=torch.float64)
        difficulty[order] = found
        if not difficulty.isfinite().all():
            missing = int((~difficulty.isfinite()).sum())
            raise ValueError(
                f"{missing} of {len(difficulty)} samples have no finite difficulty. Look at the teacher's logits and "
                "at `predict_dataloader`, which must give every sample of the training set."
            )
        return difficulty

    def _checked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[DistillationModule, Any]:
        if not isinstance(pl_module, DistillationModule):
            raise TypeError(
                f"{type(self).__name__} needs a `DistillationModule` such as `KD`, got {type(pl_module).__name__}."
            )
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "set_weights"):
            raise ValueError(
                f"{type(self).__name__} draws by weights, which {type(data).__name__} cannot. Use a data module of "
                "`lightning_distill.datamodules`, or give yours a `set_weights(weights)` and a `predict_dataloader()` "
                "of the training set."
            )
        if pl_module.teacher is None and not isinstance(self.measure, Tensor):
            raise ValueError(
                f"{type(self).__name__} measures difficulty by the teacher, but there is none. Pass `teacher=...` to "
                "the module (with `alpha=1.0` it teaches nothing), or known difficulties: `difficulty=tensor`."
            )
        return pl_module, data


def plot_curriculum(difficulty: Tensor, history: Sequence[Mapping[str, float]], folder: Path) -> Path:
    """Draw the distribution of the difficulties, and per epoch what was drawn, into ``folder/curriculum.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(difficulty.tolist(), bins=40, color="0.6")
    left.set(xlabel="difficulty", ylabel="samples", title="Training set")
    epochs = range(len(history))
    right.plot(epochs, [entry["difficulty"] for entry in history], color="C0")
    right.axhline(float(difficulty.mean()), color="C0", linestyle=":", linewidth=1)
    right.set(xlabel="epoch", title="What is drawn")
    right.set_ylabel("mean difficulty (dotted: of all)", color="C0")
    shares = right.twinx()
    shares.plot(epochs, [entry["samples"] for entry in history], color="C1")
    shares.set_ylim(0, 1.02)
    shares.set_ylabel("effective share of the samples", color="C1")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "curriculum.png", dpi=120)
    return folder / "curriculum.png"


def _progress(trainer: L.Trainer, epochs_done: int) -> float:
    if trainer.max_steps > 0:
        return min(trainer.global_step / trainer.max_steps, 1.0)
    return min(epochs_done / trainer.max_epochs, 1.0) if trainer.max_epochs and trainer.max_epochs > 0 else 0.0


def _teacher_alone(module: DistillationModule, batch: Any) -> Step:
    """The step without the student, whose place the teacher takes."""
    assert module.teacher is not None
    said = module.teacher(batch, module.task)
    positions, mask = module.task.positions(batch), module.task.mask(batch, said)
    return Step(batch, said, said, mask=mask, positions=positions, token_items=module.task.token_items)
