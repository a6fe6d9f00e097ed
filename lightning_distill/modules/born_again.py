"""Self-distillation over generations: the student becomes the teacher of its successor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lightning_distill.export import standalone, write_network
from lightning_distill.losses.targets import CrossEntropy
from lightning_distill.losses.term import Term
from lightning_distill.modules.arguments import ItemWeights, OptimizerFactory, SchedulerFactory, Temperature, build_task
from lightning_distill.modules.base import DistillationModule
from lightning_distill.modules.reinitialize import Reinitialize, check_resettable, reinitialize, reset_parameters
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import Task
from lightning_distill.teachers.past import (
    MeanPrediction,
    PastTeacher,
    copy_weights,
    mean_prediction,
    run_untrained,
    untrained_copy,
)
from lightning_distill.weighting import FixedWeights, Weighting

Which = Literal["last", "best", "ensemble"]


@dataclass(frozen=True)
class Generation:
    """What is particular about one generation; ``None`` is what the module says.

    Attributes:
        batch_transform: Changes each training batch, as augmentation does.
        label_smoothing: Of the loss on labels, in [0, 1).
        alpha: Weight of the labels' loss, in [0, 1]; has no effect in the first generation, which has labels alone.
        seed: Of the initial weights; has no effect in the first generation, which starts with the given ones.
    """

    batch_transform: Callable[[Any], Any] | None = None
    label_smoothing: float | None = None
    alpha: float | None = None
    seed: int | None = None


class BornAgain(DistillationModule):
    """Train ``student`` several times over, each time taught by what it was before (Furlanello et al. 2018).

    All generations are one ``Trainer.fit``: each gets the same share of its ``max_epochs``. Generation 0 learns from
    labels alone, ``loss = hard``. Then, and after every generation but the last, the student becomes the frozen
    teacher, gets new initial weights, and optimizer and scheduler start afresh: ``loss = alpha * hard + (1 - alpha) *
    soft``, where ``soft`` is the forward KL divergence from the teacher. The paper's weight ``lambda`` of the
    divergence beside a hard loss of weight 1 is ``(1 - alpha) / alpha``.

    Nothing is exchanged but numbers: parameters stay the same objects, so that DDP, compiled networks and checkpoints
    go on working. (Projections of the terms are not made anew.) The teacher is in the checkpoints, as training cannot
    go on without it. Schedules that callbacks keep
    (temperature, weights) go over the whole training; schedulers of the optimizer over one generation.

    Logs, beside what :class:`DistillationModule` does, ``generation`` in every epoch and the validation metrics once
    more by generation: ``val/accuracy/generation_0`` ...; ``val/agreement`` and ``val/fidelity`` compare a generation
    with the one before.

    A resumed run continues exactly, but for one thing that is Lightning's: a validation that came right after the step
    of the checkpoint is not made up for, and cannot be the best one.

    Generations of a student that fits soft labels exactly tend to the labels again, at the rate ``1 - alpha``: what
    they gain, they gain from limited capacity, regularization and few steps. See
    :func:`~lightning_distill.diagnostics.convergence_diagnostics` for what yours do.

    Args:
        student: See :class:`DistillationModule`, as for all arguments not listed here. Its weights are those that
            generation 0 starts with.
        generations: How many are trained in all, at least 1.
        epochs: Length of a generation. Default: ``max_epochs`` of the Trainer divided by ``generations``.
        alpha: Weight of the labels' loss from generation 1 on, in [0, 1]. With 1 the generations are independent
            networks, each trained on labels alone.
        temperature: Of the soft targets. Default 1, as in the paper.
        taught_by: ``"previous"``, or ``"ensemble"``: the mean of all generations before.
        keep: Whether all generations stay in memory (and in checkpoints), for :meth:`networks` and ensembles.
        predict_with: What ``test``, ``predict`` and :meth:`export` take: the student as it is (``"last"``), the
            weights with the best ``monitor`` of all epochs (``"best"``), or the mean of all generations
            (``"ensemble"``).
        monitor: Name of a validation metric such as ``"val/accuracy"``. A generation then goes on as teacher and
            ensemble member with the weights of its best validation. Default: with those of its last epoch.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        reinitialize: Gives the student new weights in place. Default: ``reset_parameters`` of each of its modules.
        seed: Of the new weights, together with the number of the generation; the same on every process.
        per_generation: Settings by generation; those at the end may be left out.
        terms: Loss terms beside, or instead of, ``"hard"`` and ``"soft"``. In generation 0 those that need a teacher
            are silent.
        weights: Weights of ``terms``, 1 by default, or a :class:`~lightning_distill.weighting.Weighting` of all terms;
            then ``alpha`` has no effect, and generation 0 is weighed like the others.
        task: See :class:`DistillationModule`.
        optimizer: See :class:`DistillationModule`.
        lr_scheduler: See :class:`DistillationModule`; over one generation.
        lr_interval: See :class:`DistillationModule`.
        batch_transform: See :class:`DistillationModule`.
        item_weights: See :class:`DistillationModule`.

    Raises:
        ValueError: If an argument is outside its range, or a module of the student has weights but no
            ``reset_parameters`` and there is no ``reinitialize``; at the start of the training if its epochs cannot be
            divided into the generations.

    Example:
        >>> module = BornAgain(nn.Linear(4, 3), generations=3, alpha=0.5)  # L.Trainer(max_epochs=30).fit(module, ...)
        >>> module.generation, module.weighting.weights()
        (0, {'hard': 1.0, 'soft': 0.0})
    """

    teacher: PastTeacher

    def __init__(
        self,
        student: nn.Module | str,
        *,
        generations: int = 3,
        epochs: int | None = None,
        alpha: float = 0.5,
        temperature: Temperature = 1.0,
        taught_by: Literal["previous", "ensemble"] = "previous",
        keep: bool = False,
        predict_with: Which = "last",
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        reinitialize: Reinitialize | None = None,
        seed: int = 0,
        per_generation: Sequence[Generation] | None = None,
        terms: Mapping[str, Term] | None = None,
        weights: Mapping[str, float] | Weighting | None = None,
        task: Task | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Any], Any] | None = None,
        item_weights: ItemWeights | None = None,
    ) -> None:
        for name, value in {"generations": generations, "epochs": epochs}.items():
            if value is not None and not value >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        _check_choice("taught_by", taught_by, ("previous", "ensemble"))
        _check_choice("predict_with", predict_with, ("last", "best", "ensemble"))
        _check_choice("mode", mode, ("max", "min"))
        if predict_with == "best" and monitor is None:
            raise ValueError(
                "`predict_with='best'` needs a `monitor` that says what is best: `monitor='val/accuracy'`."
            )
        task = build_task(task)
        network = task.load(student).train() if isinstance(student, str) else student
        if generations > 1 and reinitialize is None and isinstance(network, nn.Module):
            check_resettable(network)
        own: dict[str, Term] = {"hard": task.hard_term(), "soft": task.soft_term()} | dict(terms or {})
        settings = _settings(per_generation or (), generations, own["hard"], alpha)
        keep = keep or taught_by == "ensemble" or predict_with == "ensemble"
        kept = max(generations - 1, 1) if keep else 1
        teacher = (
            PastTeacher(network, kept, None if taught_by == "ensemble" else [1.0] + [0.0] * (kept - 1))
            if isinstance(network, nn.Module)
            else None  # refused by the base class
        )
        # The best weights of this generation, which become the teacher, and of all epochs, which are exported.
        best = {name: untrained_copy(network) for name in ("generation", "run") if monitor is not None and teacher}
        super().__init__(
            network,
            teacher,
            terms=own,
            weights=weights
            if isinstance(weights, Weighting)
            else dict.fromkeys(own, 1.0) | {"hard": 1.0, "soft": 0.0} | dict(weights or {}),
            temperature=temperature,
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            item_weights=item_weights,
        )
        self.generations = generations
        self.epochs = epochs
        self.keep = keep
        self.predict_with: Which = predict_with
        self.monitor = monitor
        self.mode = mode
        self.generation = 0
        self._reinitialize = reinitialize or reset_parameters
        self._seed = seed
        self._settings = settings
        self._own_weights = set(weights) if isinstance(weights, Mapping) else set()
        self._defaults = Generation(batch_transform, getattr(own["hard"], "label_smoothing", None), alpha, None)
        self.best = nn.ModuleDict(best)
        self._best: dict[str, float] = {}
        self._enter()

    @property
    def generation_ends(self) -> bool:
        """Whether the present epoch is the last of its generation."""
        return self.trainer.current_epoch + 1 == (self.generation + 1) * self._length

    def networks(self) -> list[nn.Module]:
        """The generations so far, in their order: those that were kept, and the student."""
        return [*reversed(self.teacher.members()), self.student]

    def student_networks(self) -> dict[str, nn.Module]:
        """The student, the generations before and the best weights, by their names in the module's checkpoints."""
        return super().student_networks() | {f"best.{name}": network for name, network in self.best.items()}

    # The Trainer's hooks.

    def on_fit_start(self) -> None:
        """Divide the epochs into generations."""
        super().on_fit_start()
        average = getattr(L.pytorch.callbacks, "WeightAveraging", ())  # since Lightning 2.6
        if any(isinstance(callback, average) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "A WeightAveraging callback would average the weights of different generations, which start from "
                "unrelated ones. Remove it, or train the generations without `BornAgain`, one `fit` for each."
            )
        self.epochs = self._generation_epochs()
        self._enter()

    def on_train_epoch_start(self) -> None:
        """Begin the next generation when the last one is over."""
        self._begin_due()
        self.log("generation", float(self.generation), batch_size=1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The same; Lightning leaves the start of an epoch out where it resumes from the end of the one before."""
        self._begin_due()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, once more by generation, and keep the best weights."""
        values = {name: float(value) for name, value in self._evaluations.values("val").items()}
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        named = {f"{name}/generation_{self.generation}": value for name, value in values.items()}
        self.log_dict(named, batch_size=1, sync_dist=self.trainer.world_size > 1)
        if self.monitor is not None:
            if self.monitor not in values:
                raise ValueError(f"`monitor` is {self.monitor!r}, but the validation gave {', '.join(values)}.")
            self._keep_best(values[self.monitor])

    def observe(self, batch: Any) -> Step:
        """Let the teacher and the student speak about ``batch``; in a test, what :attr:`predict_with` names."""
        step = super().observe(batch)
        trainer = self._attached
        if trainer is not None and trainer.testing and self.predict_with != "last":
            step.student = Outputs(self._predicted(batch), features=step.student.features)
        return step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``logits`` and ``predictions`` of what :attr:`predict_with` names, and the samples' ``index``."""
        if self.predict_with == "last":
            return super().predict_step(batch, batch_idx, dataloader_idx)
        logits = self._predicted(batch)
        index = self.task.index(batch)
        said = {"logits": logits, "predictions": self.task.predictions(logits)}
        return said if index is None else said | {"index": index}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which generation this is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["born_again"] = {"generation": self.generation, "epochs": self.epochs, "best": dict(self._best)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the generation that the checkpoint is of."""
        super().on_load_checkpoint(checkpoint)
        if (state := checkpoint.get("born_again")) is None:
            raise ValueError("The checkpoint is of no `BornAgain`: it does not say which generation it is of.")
        if self.epochs is not None and state["epochs"] not in (None, self.epochs):
            raise ValueError(
                f"The checkpoint is of generations of {state['epochs']} epochs, `epochs` is {self.epochs}; go on with "
                f"`epochs={state['epochs']}`."
            )
        self.epochs = state["epochs"]
        self.generation = state["generation"]
        self._best = dict(state["best"])
        self._enter()

    def export(
        self, path: str | Path | None = None, *, overwrite: bool = False, which: Which | None = None
    ) -> nn.Module:
        """A trained network alone, in eval mode, on the CPU, with no trace of the distillation.

        Args:
            path: See :meth:`DistillationModule.export`, as for ``overwrite``. An ensemble goes to a ``.safetensors``
                file.
            overwrite: Whether something at ``path`` may be replaced.
            which: As ``predict_with``, which is the default. An ensemble is a
                :class:`~lightning_distill.teachers.MeanPrediction`.

        Raises:
            ValueError: If ``which`` is unknown, or names what was not kept; and as :meth:`DistillationModule.export`.
        """
        which = which or self.predict_with
        _check_choice("which", which, ("last", "best", "ensemble"))
        if which == "last":
            return super().export(path, overwrite=overwrite)
        if which == "best":
            network = standalone(self._best_network())
            for parameter, theirs in zip(network.parameters(), self.student.parameters(), strict=True):
                parameter.requires_grad_(theirs.requires_grad)
        else:
            self._check_kept()
            with self.untapped() as student, self.teacher.untapped() as past:
                members = [standalone(member) for member in (student, *past)]
            network = MeanPrediction(members, probabilities=self.task.imitable).eval()
        if path is not None:
            write_network(network, Path(path), overwrite=overwrite)
        return network

    # Helpers.

    @property
    def _length(self) -> int:
        assert self.epochs is not None  # known since `on_fit_start`
        return self.epochs

    def _generation_epochs(self) -> int:
        """Epochs of a generation.

        Raises:
            ValueError: If the Trainer's do not make whole generations.
        """
        most, generations = self.trainer.max_epochs, self.generations
        if most is None or most < 1:
            raise ValueError("`BornAgain` counts epochs: give the Trainer `max_epochs` (and no `max_steps`).")
        if self.epochs is None and self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 1  # generation 0 alone
        if self.epochs is None and most < generations:
            raise ValueError(
                f"`generations` is {generations}, but the Trainer's `max_epochs` is {most}: each generation needs at "
                f"least one epoch. Set `max_epochs` to a multiple of {generations}."
            )
        if self.epochs is None and most % generations:
            raise ValueError(
                f"The Trainer's `max_epochs`, {most}, cannot be divided into {generations} generations of equal "
                f"length. Set it to {most // generations * generations} or {(most // generations + 1) * generations}."
            )
        epochs = self.epochs or most // generations
        if most > epochs * generations:
            raise ValueError(
                f"The Trainer's `max_epochs` is {most}, but {generations} generations of {epochs} epochs are over "
                f"after {epochs * generations}. Make them equal."
            )
        return epochs

    def _enter(self) -> None:
        """Set what the present generation has of its own."""
        own, default = self._settings[self.generation], self._defaults
        # What no generation has of its own is left alone: a callback may have set it.
        if any(settings.batch_transform is not None for settings in self._settings):
            self.batch_transform = own.batch_transform or default.batch_transform
        if any(settings.label_smoothing is not None for settings in self._settings):
            smoothing = default.label_smoothing if own.label_smoothing is None else own.label_smoothing
            self.terms["hard"].label_smoothing = smoothing  # type: ignore[assignment]  # checked to be a CrossEntropy
        if isinstance(self.weighting, FixedWeights):
            alpha = default.alpha if own.alpha is None else own.alpha
            assert alpha is not None
            present = {"hard": 1.0, "soft": 0.0} if self.generation == 0 else {"hard": alpha, "soft": 1.0 - alpha}
            self.weighting.values.update({k: v for k, v in present.items() if k not in self._own_weights})

    def _begin_due(self) -> None:
        due = min(self.trainer.current_epoch // self._length, self.generations - 1)
        while self.generation < due:
            self._begin_next()

    def _begin_next(self) -> None:
        """The student becomes the teacher and starts anew."""
        if self.monitor is not None:
            if "generation" not in self._best:
                raise ValueError(
                    f"Generation {self.generation} is over without a validation, so that there is no best "
                    f"{self.monitor!r}. Validate in every generation (`check_val_every_n_epoch`), or leave out "
                    "`monitor`."
                )
            copy_weights(self.best["generation"], self.student)
            del self._best["generation"]
        self.teacher.remember(self.student)
        self.generation += 1
        seed = self._settings[self.generation].seed
        reinitialize(
            self.student, self._reinitialize, seed=self._seed * 1009 + self.generation if seed is None else seed
        )
        self.trainer.strategy.setup_optimizers(self.trainer)  # new ones, over the same parameters
        self._enter()

    def _keep_best(self, value: float) -> None:
        """Copy the student's weights to where they beat the best of the generation, or of all epochs."""
        sign = 1 if self.mode == "max" else -1
        for name in ("generation", "run"):
            if math.isfinite(value) and sign * value > sign * self._best.get(name, -sign * math.inf):
                self._best[name] = value
                copy_weights(self.student, self.best[name])

    @torch.no_grad()
    def _predicted(self, batch: Any) -> Tensor:
        """Logits of what :attr:`predict_with` names."""
        if self.predict_with == "best":
            return run_untrained(self._best_network(), batch, self.task).logits
        self._check_kept()
        logits = torch.stack([run_untrained(network, batch, self.task).logits for network in self.networks()])
        return mean_prediction(
            logits, logits.new_full((len(logits),), 1 / len(logits)), probabilities=self.task.imitable
        )

    def _best_network(self) -> nn.Module:
        if "run" not in self._best:
            raise ValueError(
                "There are no best weights: `monitor` was not given, or there was no validation. Use `which='last'`, "
                "or train with `monitor='val/accuracy'`."
            )
        return self.best["run"]

    def _check_kept(self) -> None:
        if not self.keep and self.generation > 1:
            raise ValueError(
                f"The ensemble needs all {self.generation + 1} generations, but only the last two were kept. Train "
                "with `keep=True` or `predict_with='ensemble'`."
            )


def _settings(given: Iterable[Generation], generations: int, hard: Term, alpha: float) -> list[Generation]:
    """One entry per generation.

    Raises:
        ValueError: If there are too many, or a value is outside its range.
    """
    settings = [Generation(**entry) if isinstance(entry, Mapping) else entry for entry in given]
    if len(settings) > generations:
        raise ValueError(f"`per_generation` has {len(settings)} entries for {generations} generations.")
    for weight in (alpha, *(entry.alpha for entry in settings)):
        if weight is not None and not 0 <= weight <= 1:
            raise ValueError(f"`alpha`, the weight of the labels' loss, must be in [0, 1], got {weight}.")
    for entry in settings:
        if entry.label_smoothing is None:
            continue
        CrossEntropy(label_smoothing=entry.label_smoothing)  # checks the value
        if not isinstance(hard, CrossEntropy):
            raise ValueError(
                f"`per_generation` sets `label_smoothing`, which the term 'hard', a {type(hard).__name__}, does not "
                "have; it needs a `CrossEntropy`."
            )
    return settings + [Generation()] * (generations - len(settings))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
