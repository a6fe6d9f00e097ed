"""Write down what a teacher says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn

from lightning_distill.modules.teacher_prediction import Prediction, TeacherPrediction
from lightning_distill.outputs import Outputs
from lightning_distill.teachers.cache import (
    DTYPES,
    CacheSpec,
    ShardWriter,
    data_fingerprint,
    finished_ids,
    read_spec,
    require_same,
    teacher_fingerprint,
    write_head,
)
from lightning_distill.top_k import TopK, encode_top_k


class CacheWriter(BasePredictionWriter):
    """Write what a teacher says about each sample into a folder, once, for :class:`CachedTeacher` to read.

    For ``Trainer.predict`` with a :class:`~lightning_distill.modules.TeacherPrediction`; the Trainer brings devices,
    processes and precision. Each process writes its own files, finished ones of at most ``shard_minutes`` each, with
    checksums. Run again after a crash, with any number of processes, it computes what is missing.

    Samples are told apart by the batch's ``index``. Give the teacher the training set without random transforms, or
    with transforms that are seeded per sample, and the student the same.

    Args:
        folder: Of this cache alone.
        kind: ``"top_k"``: the ``k`` largest logits and the mass of the others; for many classes. ``"dense"``: all
            logits. ``"hidden"``: a language model's last hidden states and its output layer, which give exact logits.
        k: Classes kept by ``"top_k"``.
        temperatures: At which ``"top_k"`` keeps the mass of the others: those that will be trained with.
        transform_seed: Seed of the random transforms that the data set applies; 0 if there are none.
        vocabulary: Number of classes to keep, if the teacher's output layer is padded beyond the tokenizer's size.
        teacher: Name of the teacher. Default: a hash of its weights.
        data: Name of the data set. Default: a hash of its size and of some of its samples.
        shard_minutes: So much work at most is lost in a crash; about so often a set of files is finished.

    Raises:
        ValueError: If an argument is outside its range; at the start of the prediction if the folder holds a cache of
            something else, or the teacher or the data set cannot be told from others without a name.
        TypeError: If the module is no :class:`~lightning_distill.modules.TeacherPrediction`.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: Literal["top_k", "dense", "hidden"] = "top_k",
        k: int = 64,
        temperatures: Sequence[float] = (1.0, 2.0, 4.0),
        *,
        transform_seed: int = 0,
        vocabulary: int | None = None,
        teacher: str | None = None,
        data: str | None = None,
        shard_minutes: float = 10.0,
    ) -> None:
        super().__init__("batch")
        if not shard_minutes >= 0:
            raise ValueError(f"`shard_minutes` must not be negative, got {shard_minutes}.")
        if vocabulary is not None and (kind == "hidden" or not vocabulary >= 1):
            raise ValueError(
                f"`vocabulary` must be at least 1, and given for logits only, got {vocabulary} with kind={kind!r}. "
                "Hidden states go with the whole output layer: give `vocabulary` to the loss term instead."
            )
        # The parts that no teacher is needed for are checked now; a width of `k` is the least that could be.
        self._spec = CacheSpec(kind, width=max(k, 1), k=k, temperatures=tuple(temperatures))
        self.folder = Path(folder)
        self.kind: Literal["top_k", "dense", "hidden"] = kind
        self.k = k
        self.temperatures = self._spec.temperatures
        self.transform_seed = transform_seed
        self.vocabulary = vocabulary
        self.teacher = teacher
        self.data = data
        self.shard_minutes = shard_minutes
        self._identity: dict[str, Any] = {}
        self._head: nn.Linear | None = None
        self._writer: ShardWriter | None = None
        self._since = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Learn which teacher it is, before a strategy takes its weights apart."""
        super().setup(trainer, pl_module, stage)
        if not isinstance(pl_module, TeacherPrediction):
            raise TypeError(
                f"CacheWriter writes what a teacher says, so the module must be a `TeacherPrediction(teacher, task)`, "
                f"got {type(pl_module).__name__}."
            )
        self._identity = {
            "kind": self.kind,
            "teacher": self.teacher or teacher_fingerprint(pl_module.teacher),
            "transform_seed": self.transform_seed,
        }
        if self.kind == "top_k":
            self._identity |= {"k": self.k, "temperatures": self.temperatures}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn which data set it is and what is there already; refuse a folder with something else."""
        assert isinstance(pl_module, TeacherPrediction)
        loaders: Any = trainer.predict_dataloaders
        if isinstance(loaders, (list, tuple)):
            if len(loaders) != 1:
                raise ValueError(
                    f"A cache is of one data set, but there are {len(loaders)} prediction loaders. Write one cache for "
                    "each, in different folders."
                )
            loaders = loaders[0]
        self._identity["data"] = self.data or data_fingerprint(loaders)
        if (self.folder / "manifest.json").exists():
            spec = read_spec(self.folder)
            require_same(self.folder, spec, self._identity)
            pl_module.finished = finished_ids(self.folder, spec)
        pl_module.keep = self._keep

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Prediction,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write what was said about one batch."""
        if prediction.kept is None:
            return
        if self._writer is None:
            self._writer = self._open(prediction, trainer.global_rank)
        if prediction.lengths is None:
            self._writer.write(prediction.index, prediction.kept, signatures=prediction.signatures)
        else:
            self._writer.write_packed(
                prediction.index, prediction.kept, prediction.lengths, signatures=prediction.signatures
            )
        if time.monotonic() - self._since >= 60 * self.shard_minutes:
            self._writer.close()
            self._since = time.monotonic()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the last files."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what was written before a failure."""
        self._close()

    def _keep(self, outputs: Outputs) -> TopK | Tensor:
        """What is stored of the outputs; runs where the teacher runs, under its precision."""
        if self.kind == "hidden":
            head = outputs.head
            plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
            if outputs.hidden is None or not isinstance(head, nn.Linear) or not plain:
                raise ValueError(
                    "`kind='hidden'` needs a teacher whose logits are a linear layer over its last hidden state, as "
                    "`task=CausalLM()` finds them in most language models; this one gives logits. Use 'top_k' or "
                    "'dense'."
                )
            self._head = head
            return outputs.hidden
        if self.kind == "dense":
            return outputs.logits[..., : self.vocabulary]
        parts = [
            encode_top_k(logits[..., : self.vocabulary], k=self.k, temperatures=self.temperatures)
            for _, logits in list(outputs.chunks()) or [(slice(0), outputs.logits)]  # no token may count
        ]
        planes = [torch.cat(plane) for plane in zip(*(part[:3] for part in parts), strict=True)]
        return TopK(planes[0], planes[1], planes[2], self.temperatures, parts[0].classes)

    def _open(self, prediction: Prediction, rank: int) -> ShardWriter:
        kept = prediction.kept
        first, width = (kept.ids, kept.classes) if isinstance(kept, TopK) else (kept, kept.shape[-1])
        dtype = str(first.dtype).removeprefix("torch.")
        spec = CacheSpec(
            self.kind,
            width=width,
            sequences=prediction.lengths is not None or first.ndim == 3,
            k=self.k,
            temperatures=self.temperatures,
            dtype=dtype if dtype in DTYPES else "float32",
            teacher=self._identity["teacher"],
            data=self._identity["data"],
            transform_seed=self.transform_seed,
        )
        if self._head is not None:
            write_head(self.folder, self._head)
        self._since = time.monotonic()
        return ShardWriter(self.folder, spec, rank=rank)

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
