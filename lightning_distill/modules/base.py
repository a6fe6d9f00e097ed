"""The LightningModule under every technique."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill.adapters import has_adapter, leave_base_out, put_base_back
from lightning_distill.deferred import give_weights
from lightning_distill.export import merged, standalone, write_network
from lightning_distill.losses.lazy import is_unbuilt
from lightning_distill.losses.term import Term, reduce_items
from lightning_distill.modes import inference
from lightning_distill.modules.arguments import (
    EVERY_TERM,
    ItemWeights,
    OptimizerFactory,
    SchedulerFactory,
    Temperature,
    build_task,
    build_weighting,
    check_optimization,
    check_type,
    checked_item_weights,
    checked_temperature,
    checked_terms,
)
from lightning_distill.modules.evaluations import Evaluations
from lightning_distill.modules.first_batch import check_first_batch
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.modules.hyperparameters import save_plain_hyperparameters
from lightning_distill.modules.item_count import Count, ItemCount
from lightning_distill.modules.loss_log import LossLog
from lightning_distill.modules.random_state import random_states_of_all_ranks, set_random_state
from lightning_distill.outputs import Outputs, Step
from lightning_distill.rules import StatefulRule
from lightning_distill.sharding import average_plain_gradients, data_parallel_mesh, shard, spread_parameters
from lightning_distill.taps import Taps
from lightning_distill.tasks import Task
from lightning_distill.teachers.build import TeacherLike, build_teacher
from lightning_distill.weighting import Live, Weighting

_RULES = ("item_rules.", "temperature.")


class DistillationModule(L.LightningModule):
    """Train ``student`` on a weighted sum of loss terms, each of which may compare it with ``teacher``.

    The loss of an optimizer step is the mean over all of its items (samples, or tokens), each item contributing
    ``sum(weight * term)``; an item without a label contributes nothing to terms on labels. It is the same however the
    items are split over micro-batches (``accumulate_grad_batches``) and processes.

    Callbacks turn the knobs that are public attributes, read anew in every step: ``temperature``, ``weighting``,
    ``item_weights``, ``teacher``, ``terms``, ``batch_transform``. Those that look at gradients find the losses of the
    batch in training, with their graph, in ``live`` (:class:`~lightning_distill.weighting.Live`): set by
    ``training_step``, ``None`` again after the backward.

    Logs, every ``log_every_n_steps`` of the Trainer, the means since the last entry: ``train/loss``, ``train/<term>``
    and ``train_weighted/<term>``, and the present ``train_weight/<term>``; per validation or test epoch the task's
    metrics, ``agreement`` and ``fidelity`` with the teacher, and the losses, as ``val/…`` and ``test/…``.

    Args:
        student: The network that is trained, or a Hugging Face name or path.
        teacher: What teaches: a network (frozen in place), a Hugging Face name or path, a function of the batch that
            returns logits, a :class:`~lightning_distill.teachers.Teacher`; or ``None``, for terms that need none, and
            for inference.
        terms: Loss terms by name.
        weights: Weight of each term by name, or a :class:`~lightning_distill.weighting.Weighting`. Default 1 each.
        temperature: Positive number, or a rule: a function of the :class:`~lightning_distill.outputs.Step` that
            returns one, or one per item.
        task: How a batch is read and what counts as right. Default :class:`~lightning_distill.tasks.Classification`.
        optimizer: Builds the optimizer from parameter groups, as ``partial(SGD, lr=0.1)``. Default ``AdamW(lr=1e-3)``.
        lr_scheduler: Builds the scheduler from the optimizer. Default: none.
        lr_interval: Whether the scheduler steps every ``"epoch"`` or every ``"step"``.
        batch_transform: Changes each training batch before student and teacher both see it (mixup).
        item_weights: Functions of the step that weigh the items, by term name or ``"*"`` for every term. A
            :class:`~lightning_distill.rules.StatefulRule`, here or as ``temperature``, is kept in the checkpoint.

    Raises:
        ValueError: If an argument has a bad value: no terms, a weight for a term that is not there, a term without a
            weight, ``temperature <= 0`` …
        TypeError: If an argument has a wrong type.
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: TeacherLike = None,
        *,
        terms: Mapping[str, Term],
        weights: Mapping[str, float] | Weighting | None = None,
        temperature: Temperature = 1.0,
        task: Task | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Any], Any] | None = None,
        item_weights: ItemWeights | None = None,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        self.task = build_task(task)
        # transformers hands out pretrained models in eval mode, and the Trainer leaves modes as they are
        self.student = self.task.load(student).train() if isinstance(student, str) else student
        check_type("student", self.student, nn.Module)
        if teacher is self.student:
            raise ValueError(
                "`teacher` is the same object as `student`; it would be frozen. Pass `copy.deepcopy(student)`, or, for "
                "a student with a PEFT adapter, `AdapterOffTeacher()`."
            )
        self.teacher = build_teacher(teacher, self.task)
        self.terms = nn.ModuleDict(checked_terms(terms))
        self.weighting = build_weighting(weights, terms)
        self.weighting.bind(list(terms), self.student)
        self.live: Live | None = None
        self.temperature = checked_temperature(temperature)
        self.batch_transform = batch_transform
        self.item_weights = checked_item_weights(item_weights or {}, terms)
        stateful = {name: rule for name, rule in self.item_weights.items() if isinstance(rule, StatefulRule)}
        self.item_rules = nn.ModuleDict(stateful)  # for the checkpoint and the device
        check_optimization(optimizer, lr_scheduler, lr_interval)
        self.optimizer_factory = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
        self.scheduler_factory = lr_scheduler
        self.lr_interval = lr_interval

        self._taps = Taps(self.student, self._tapped())
        if self.teacher is not None:
            self.teacher.attach(self.student)
            self.teacher.tap(dict.fromkeys(name for term in terms.values() for name in term.teacher_taps))
        self._items = ItemCount()
        self._loss_log = LossLog()
        self._evaluations = Evaluations(self.task)
        self._unseen = True  # no batch was checked yet
        self._total_steps = math.inf
        self._last_flush = -1
        self._random_states: list[dict[str, Any]] | None = None
        self._put_together: Callable[[], nn.Module] | None = None  # of a student whose weights are spread

    # A batch on its way: batch -> Step -> losses -> one scalar. Usable without a Trainer: loss(observe(batch)).

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's forward."""
        return self.student(*args, **kwargs)

    def observe(self, batch: Any) -> Step:
        """Let the teacher and the student speak about ``batch``."""
        task = self.task
        teacher = teach(batch, task) if (teach := self.teacher) is not None else None
        with self._taps.recording() as features:
            student = task.run(self.student, batch)
        student.features.update(features)
        step = Step(
            batch=batch,
            student=student,
            teacher=teacher,
            labels=task.labels(batch),
            mask=task.mask(batch, student),
            positions=task.positions(batch),
            token_items=task.token_items,
            index=task.index(batch),
        )
        if (trainer := self._attached) is not None:
            step.step, step.epoch = trainer.global_step, trainer.current_epoch
            step.progress = min(step.step / self._total_steps, 1.0)
        step.temperature = self.temperature(step) if callable(self.temperature) else self.temperature
        if self._unseen:
            check_first_batch(step, task)
            self._unseen = False
        return step

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The loss of each term: scalars, means over the items that count."""
        return {
            name: _nothing(step, term)
            if step.teacher is None and self._awaiting_teacher and _needs_teacher(term)
            else reduce_items(term(step), step.mask, self._weights_of(name, step))
            for name, term in self.terms.items()
        }

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar that is minimised; the loss of each term, for the log (their graphs are in ``live``)."""
        live = self.live if self.live is not None and self.live.step is step else None
        losses = self.losses(step) if live is None else live.losses
        if live is not None:
            self.weighting.look(step, live)
        return self.weighting(losses), dict(losses)

    def other_outputs(self, step: Step) -> Mapping[str, Outputs]:
        """What else said something about ``step``, by name; measured like the student, as ``val/<name>/…``."""
        return {}

    def build(self, batch: Any) -> None:
        """Make the parts of the terms whose shapes a batch tells, such as projections of features.

        ``fit`` does it by itself with two samples of the data module's training set. Call it before where loaders are
        handed to ``fit`` instead: ``module.build(next(iter(loader)))``.
        """
        with inference(self.student):
            step = self.observe(batch)
            if step.teacher is None and self.teacher is not None:
                step.teacher = self.teacher.rehearse(batch, self.task)
            for term in self.terms.values():
                if isinstance(term, Term) and is_unbuilt(term):
                    term.build(step)

    # The Trainer's hooks.

    def setup(self, stage: str) -> None:
        """Build what waits for a first batch."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and stage != "predict" and is_unbuilt(self.terms):
            self.build(first_samples(datamodule.train_dataloader()))

    def configure_model(self) -> None:
        """Bring student and teacher where they will be used.

        Under a strategy with a device mesh, Lightning's ``ModelParallelStrategy``, the student's weights are spread
        over the processes, and those of a teacher that wants it. Networks from
        :func:`~lightning_distill.deferred.on_meta` get their weights. See ``docs/scaling.md``; override it for a plan
        of your own.

        Raises:
            ValueError: If the mesh has a dimension for tensor parallelism.
        """
        mesh = None if self.device_mesh is None else data_parallel_mesh(self.device_mesh)
        device = self.device if self._attached is None else self.trainer.strategy.root_device
        if mesh is not None and self._put_together is None:
            with self.untapped() as student:
                self._put_together = shard(student, mesh)
            for term in self.terms.values():
                spread_parameters(term, mesh)
        give_weights(self.student, device)
        if self.teacher is not None:
            self.teacher.place(device, mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch: its losses, weighted, as one scalar."""
        if self.batch_transform is not None:
            batch = self.batch_transform(batch)
        step = self.observe(batch)
        items, over_ranks = _count(step), self._over_ranks
        self.live = Live(step, self.losses, items, over_ranks, self._scaler)
        total, losses = self.loss(step)
        self._loss_log.add(losses | self._parts(), total)
        if self.teacher is not None:
            self.teacher.see(step)
        return self._items.scale(total, items, over_ranks=over_ranks)

    def on_after_backward(self) -> None:
        """Let go of the graph."""
        self.live = None

    def use_weighting(self, weighting: Weighting) -> None:
        """Combine the terms by ``weighting`` from now on. In a training this must come before the optimizer is built.

        Raises:
            ValueError: If it does not fit the terms, or reads an activation that the student does not have.
        """
        weighting.bind(list(self.terms), self.student)
        self.weighting = weighting
        if set(weighting.student_taps) - set(self._taps.names):
            self._taps.remove()
            self._taps = Taps(self.student, self._tapped())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the accumulated gradient that of the mean over all items of the step; tell the rules that it is over."""
        if self.item_weights or not isinstance(self.temperature, float):
            for rule in {id(rule): rule for rule in (self.temperature, *self.item_weights.values())}.values():
                if isinstance(rule, StatefulRule):
                    rule.end_step(self._over_ranks)
        parameters: Iterable[nn.Parameter] = (p for group in optimizer.param_groups for p in group["params"])
        if self._put_together is not None:  # what is not spread, such as learned weights, nobody else averages
            parameters = list(parameters)
            average_plain_gradients(parameters, self._mean_over_ranks)
        # A strategy that accumulates by itself (DeepSpeed) comes here after every micro-batch.
        accumulate = 1 if self.trainer.strategy.handles_gradient_accumulation else self.trainer.accumulate_grad_batches
        self._items.correct(parameters, accumulate, over_ranks=self._over_ranks)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the losses when the Trainer's log is due."""
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set, but not declared, by Trainer
        if step % max(every, 1) == 0 and step != self._last_flush:
            self._last_flush = step
            entry = self._loss_log.flush(self.weighting.weights(), self._over_ranks)
            if entry:
                self.log("train/loss", entry.pop("train/loss"), prog_bar=True, batch_size=1)
                self.log_dict(entry, batch_size=1)

    def on_fit_start(self) -> None:
        """Refuse a run that lacks a teacher, before anything is written; continue a resumed run's random numbers."""
        if self.teacher is None and (needy := [name for name, term in self.terms.items() if _needs_teacher(term)]):
            raise ValueError(
                f"`teacher` is None, but the loss terms {needy} compare the student with one. Pass `teacher=...`, or "
                "train on labels alone (for `KD`: `alpha=1.0`)."
            )
        _refuse_untrained(self.weighting, self.trainer.optimizers)
        if self.trainer.accumulate_grad_batches > 1 and self.trainer.strategy.handles_gradient_accumulation:
            rank_zero_warn(
                f"{type(self.trainer.strategy).__name__} accumulates gradients by itself, as the mean of the means of "
                "the micro-batches. That is the mean over all items only if every micro-batch has as many (packed "
                "sequences do); with `accumulate_grad_batches=1` it always is."
            )
        if self._random_states is not None:  # before the loader's iterator draws the order of the epoch
            if len(self._random_states) == self.trainer.world_size:
                set_random_state(self._random_states[self.trainer.global_rank])
            self._random_states = None

    def on_train_start(self) -> None:
        """Learn how long the training is."""
        self._total_steps = self.trainer.estimated_stepping_batches or math.inf
        self._last_flush = self.trainer.global_step

    def on_fit_end(self) -> None:
        """Refuse to have trained on nothing."""
        if self.trainer.num_training_batches == 0:
            raise ValueError(
                "The training data loader is empty: it gave 0 batches, expected at least 1. Look at the length of the "
                "data set, `drop_last` (a batch size larger than the data set) and `limit_train_batches`."
            )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure one batch of a validation set."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure one batch of a test set."""
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured as ``val/…``."""
        self._log_evaluations("val")

    def on_test_epoch_end(self) -> None:
        """Log what was measured as ``test/…``."""
        self._log_evaluations("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The student's ``logits`` and ``predictions``, and the samples' ``index`` where the batch has one."""
        logits = self.task.run(self.student, batch).logits
        index = self.task.index(batch)
        said = {"logits": logits, "predictions": self.task.predictions(logits)}
        return said if index is None else said | {"index": index}

    def configure_optimizers(self) -> Any:
        """The optimizer over the student, the terms' own parameters and, without weight decay, the weighting's."""
        if is_unbuilt(self.terms):
            unbuilt = [name for name, term in self.terms.items() if is_unbuilt(term)]
            raise ValueError(
                f"The shapes that the terms {unbuilt} work on are not known. Pass a data module to `fit`, or call "
                "`module.build(next(iter(loader)))` before it."
            )
        groups = self.parameter_groups()
        if not any(group["params"] for group in groups):
            raise ValueError("The student has no trainable parameter: `requires_grad` is False for all of them.")
        if learned := list(self.weighting.parameters()):
            own_rate = self.weighting.learning_rate
            groups.append({"params": learned, "weight_decay": 0.0} | ({} if own_rate is None else {"lr": own_rate}))
        optimizer = self.optimizer_factory(groups)
        if self.scheduler_factory is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler_factory(optimizer), "interval": self.lr_interval},
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained of student, terms and teacher, as the optimizer gets it; those of the weighting are apart."""
        trained = [p for part in (self.student, self.terms) for p in part.parameters() if p.requires_grad]
        if trained and self.teacher is not None:
            trained += [p for p in self.teacher.trained_parameters() if p.requires_grad]
        return [{"params": trained}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of every process's random numbers; leave the frozen base under a PEFT adapter out."""
        checkpoint["random_states"] = random_states_of_all_ranks()
        for name, network in self.student_networks().items():
            leave_base_out(checkpoint, network, prefix=f"{name}.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random numbers' state until the training starts; put the student's own base under an adapter."""
        self._random_states = checkpoint.get("random_states")
        own, stored = self.state_dict().keys(), checkpoint.get("state_dict", {})  # spread weights come by themselves
        for key in [key for key in stored if key not in own and key.startswith(("teacher.", *_RULES))]:
            del stored[key]  # inference needs neither a teacher that was trained along nor rules
        for name, network in self.student_networks().items():
            put_base_back(checkpoint, network, prefix=f"{name}.")
        resumes = self._attached is not None and self.trainer.state.fn == "fit"
        _leave_weighting_out(stored, own, resumes=resumes)

    def export(self, path: str | Path | None = None, *, overwrite: bool = False) -> nn.Module:
        """The student alone: its own class, in eval mode, on the CPU, with no trace of the distillation.

        A PEFT adapter is merged into a copy of its base; :meth:`export_adapter` writes the adapter alone.

        Args:
            path: Where to write it: a ``.safetensors`` file, or, for a transformers model, a folder as
                ``from_pretrained`` reads it. ``None`` writes nothing.
            overwrite: Whether something at ``path`` may be replaced.

        Raises:
            FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
            ValueError: If ``path`` is neither.
        """
        with self.untapped() as network:
            student = standalone(network) if self._put_together is None else merged(self._put_together())
        if path is not None and self._first_process:
            write_network(student, Path(path), overwrite=overwrite)
        return student

    def student_networks(self) -> dict[str, nn.Module]:
        """The student and the copies of it that training needs, by their names in the module's checkpoints."""
        copies = self.teacher.copies() if self.teacher is not None else {}
        return {"student": self.student} | {f"teacher.{name}": network for name, network in copies.items()}

    @contextmanager
    def untapped(self) -> Iterator[nn.Module]:
        """Within this context the student has no taps and can be copied: copied hooks would report to this module."""
        names = self._taps.names
        self._taps.remove()
        try:
            yield self.student
        finally:
            self._taps = Taps(self.student, names)

    def export_adapter(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the student's PEFT adapter without its base: a folder, as ``PeftModel.from_pretrained`` reads it.

        Args:
            path: The folder.
            overwrite: Whether something at ``path`` may be replaced.

        Raises:
            TypeError: If the student has no adapter.
            FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
            ValueError: If ``path`` looks like a file.
        """
        if not has_adapter(self.student):
            raise TypeError(
                f"The student is a {type(self.student).__name__} without a PEFT adapter. Use `export`, which writes it "
                "whole."
            )
        if Path(path).suffix == ".safetensors":
            raise ValueError(f"`path` must be a folder (weights and configuration of the adapter), got {str(path)!r}.")
        write_network(self.student, Path(path), overwrite=overwrite)

    # Helpers.

    @property
    def _attached(self) -> L.Trainer | None:
        """The Trainer, if there is one: the module's step can be used without."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    @property
    def _awaiting_teacher(self) -> bool:
        """Whether there will be a teacher, but it has nothing to say so far."""
        return self.teacher is not None and not self.teacher.ready

    @property
    def _first_process(self) -> bool:
        trainer = self._attached
        return trainer is None or trainer.is_global_zero

    @property
    def _over_ranks(self) -> Callable[[Tensor], Tensor] | None:
        """Mean of a tensor over the processes; ``None`` if there is one process."""
        trainer = self._attached
        return self._mean_over_ranks if trainer is not None and trainer.world_size > 1 else None

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        # a copy: the strategies write the mean into the tensor that they are given
        mean = self.trainer.strategy.reduce(value.to(self.device, copy=True), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    @property
    def _scaler(self) -> Any:
        """The gradient scaler of mixed precision, if there is one."""
        trainer = self._attached
        return None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)

    def _tapped(self) -> list[str]:
        """Names of the student's activations that terms and weighting read."""
        readers = (*self.terms.values(), self.weighting)
        return [name for reader in readers for name in getattr(reader, "student_taps", ())]

    def _weights_of(self, term: str, step: Step) -> Tensor | None:
        weights = None
        for key in (EVERY_TERM, term):
            if key in self.item_weights:
                found = self.item_weights[key](step)
                weights = found if weights is None else weights * found
        return weights

    def _parts(self) -> dict[str, Tensor]:
        """What terms that compute several losses at once have to report beside their value."""
        parts: dict[str, Tensor] = {}
        for term in self.terms.values():
            if isinstance(term, Term) and term.parts:
                parts.update(term.parts)
        return parts

    def _evaluate(self, batch: Any, dataloader_idx: int) -> None:
        step = self.observe(batch)
        evaluation = self._evaluations.of(dataloader_idx, step.student)
        evaluation.update(step)
        if is_unbuilt(self.terms):
            return
        for name, outputs in self.other_outputs(step).items():
            self._evaluations.of(dataloader_idx, outputs, name).update(replace(step, student=outputs))
        if step.teacher is not None or not any(map(_needs_teacher, self.terms.values())):
            losses = self.losses(step)
            evaluation.update_losses({"loss": self.weighting(losses), **losses, **self._parts()}, _count(step))

    def _log_evaluations(self, stage: str) -> None:
        values = self._evaluations.values(stage)
        self.log_dict(values, batch_size=1, sync_dist=self.trainer.world_size > 1)  # equal on all ranks already
        self._evaluations.clear()


def _count(step: Step) -> Count:
    """Items of the step that count; a tensor where only the device knows."""
    return math.prod(step.student.item_shape) if step.mask is None else step.mask.sum()


def _needs_teacher(term: nn.Module) -> bool:
    return bool(getattr(term, "needs_teacher", True))


def _nothing(step: Step, term: nn.Module) -> Tensor:
    """The loss of a term that has nothing to compare yet: 0, with a graph to its parameters (DDP waits for them)."""
    outputs = step.student
    said = outputs.logits if outputs.has_logits or outputs.hidden is None else outputs.hidden
    return sum((parameter.sum() for parameter in term.parameters()), start=said.sum()) * 0.0


def _refuse_untrained(weighting: Weighting, optimizers: Iterable[Optimizer]) -> None:
    """Somebody's own ``configure_optimizers`` may have forgotten the weighting."""
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if any(p.requires_grad and id(p) not in trained for p in weighting.parameters()):
        raise ValueError(
            f"The parameters of {type(weighting).__name__} are in no optimizer. Add a group in `configure_optimizers`, "
            "before the scheduler is built: {'params': self.weighting.parameters(), 'weight_decay': 0.0}."
        )


def _leave_weighting_out(state: dict[str, Any], known: Iterable[str], *, resumes: bool) -> None:
    """Load a checkpoint without the callback that installed its weighting; to go on training, it is needed."""
    left = [key for key in state if key.startswith("weighting.") and key not in set(known)]
    if left and resumes:
        raise ValueError(
            f"The checkpoint holds the state of a weighting, {left}, that this module does not have. Add the callback "
            "that the run began with (`UncertaintyWeighting()`, say), or pass the weighting: `weights=...`."
        )
    for key in left:
        del state[key]
