"""Which training sample comes when: a sampler whose order is known, weighted and resumable, and its data module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_distill.datamodules.buckets import bucketed


class ResumableSampler(DistributedSampler[int]):
    """Shuffles by ``(seed, epoch)``, the same on every rank, and can start in the middle of an epoch.

    The order of an epoch is one permutation of all samples; the rank takes every ``num_replicas``-th entry of it. So
    the samples of the first ``k`` optimizer steps depend on the global batch size alone, not on the number of ranks.
    Nothing is dropped: where ``size`` does not divide by ``num_replicas`` the first samples of the epoch's order come
    a second time at its end, at most ``num_replicas - 1`` of them, as torch's ``DistributedSampler`` does.

    With :meth:`set_weights` an epoch keeps its length but draws samples in proportion to weights.

    Lightning recognises the base class: it neither wraps nor replaces the sampler, and calls :meth:`set_epoch`.

    Args:
        size: Number of samples.
        num_replicas: Number of ranks.
        rank: This rank, in [0, num_replicas).
        seed: Of the order, at least 0. Different seeds give unrelated orders in every epoch.

    Raises:
        ValueError: If ``size`` is not positive, ``seed`` is negative or ``rank`` is outside its range.

    Example:
        >>> sampler = ResumableSampler(6)
        >>> order = list(sampler)
        >>> sampler.start_at(epoch=0, position=4)
        >>> list(sampler) == order[4:]
        True
        >>> sampler.set_epoch(1)
        >>> sorted(sampler)
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, size: int, *, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        if not size >= 1:
            raise ValueError(f"`size` must be at least 1, got {size}: there is nothing to sample.")
        check_seed(seed)
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.weights: Tensor | None = None
        self.lengths: tuple[Tensor, int] | None = None
        self.start = (0, 0)

    def set_weights(self, weights: Tensor | None) -> None:
        """Draw the next epochs in proportion to ``weights``; ``None`` goes back to each sample once.

        Sample ``i`` comes ``total * weights[i] / weights.sum()`` times per epoch, rounded up or down at random so
        that this is its expectation (systematic resampling). Call it between epochs: an epoch that has begun keeps
        its order only as long as nobody starts to iterate anew.

        Args:
            weights: Shape ``(size,)``, finite, none negative, not all zero.

        Raises:
            ValueError: If ``weights`` is not that.
        """
        self.weights = None if weights is None else check_weights(weights, self.size)

    def set_lengths(self, lengths: Tensor, batch_size: int) -> None:
        """Put samples of like length into a batch; see :func:`~lightning_distill.datamodules.buckets.bucketed`.

        Args:
            lengths: Of the samples, shape ``(size,)``.
            batch_size: Per rank.
        """
        self.lengths = (lengths, batch_size * self.num_replicas)

    def start_at(self, epoch: int, position: int) -> None:
        """Continue ``epoch`` after ``position`` samples, counted over all ranks; later epochs are whole.

        Args:
            epoch: The epoch that is continued; it becomes the current one.
            position: Samples of its order that are done.
        """
        self.epoch = epoch
        self.start = (epoch, position)

    @property
    def position(self) -> int:
        """Samples of the current epoch, over all ranks, that an iteration leaves out at its beginning."""
        epoch, position = self.start
        return position if self.epoch == epoch else 0

    def order(self) -> Tensor:
        """Indices of the current epoch for all ranks together, shape ``(total_size,)``."""
        # torch seeds with seed + epoch: epoch 1 of seed 0 would be epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is not None:
            order = systematic_resample(self.weights, self.total_size, generator)
        else:
            permutation = torch.randperm(self.size, generator=generator)
            order = permutation.repeat(-(-self.total_size // self.size))[: self.total_size]
        return order if self.lengths is None else bucketed(order, *self.lengths, generator)

    def __iter__(self) -> Iterator[int]:
        mine = self.order()[self.rank :: self.num_replicas]
        return iter(mine[self.position // self.num_replicas :].tolist())


def systematic_resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` indices in random order, each as often as its weight says, up to rounding.

    Index ``i`` is drawn ``floor`` or ``ceil`` of ``count * weights[i] / weights.sum()`` times, in expectation exactly
    that often. Its variance is the smallest that unbiased draws can have; equal weights give a permutation.
    See Carpenter, Clifford and Fearnhead (1999), "Improved particle filter for nonlinear problems".

    Args:
        weights: Shape ``(N,)``, none negative, not all zero.
        count: How many indices to draw.
        generator: Source of randomness.

    Returns:
        Indices in [0, N), shape ``(count,)``.
    """
    cumulative = weights.double().cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + offset) / count * cumulative[-1]
    # right=True never lands on a weight of zero; the clamp is for a last point that rounds up to the sum.
    drawn = torch.searchsorted(cumulative, points, right=True).clamp_max(int(weights.nonzero().max()))
    return drawn[torch.randperm(count, generator=generator)]


class PassSampler(ResumableSampler):
    """Counts epochs by what was used of them, not by the number that the trainer gives them.

    After a resume Lightning's numbers are no guide: it may run an epoch of no batches first, and the rest of an epoch
    that ``max_steps`` had ended comes under the next number.

    Args:
        size: See :class:`ResumableSampler`.
        batches_done: Tells how many training batches have been used in the whole run, earlier attempts included.
        seed: See :class:`ResumableSampler`.
        **ranks: ``num_replicas`` and ``rank``.
    """

    def __init__(self, size: int, *, batches_done: Callable[[], int], seed: int, **ranks: int) -> None:
        super().__init__(size, seed=seed, **ranks)
        self.batches_done = batches_done
        self._done_before: int | None = None

    @property
    def batches_used(self) -> int:
        """Training batches used since the trainer announced the current epoch."""
        return 0 if self._done_before is None else self.batches_done() - self._done_before

    def set_epoch(self, epoch: int) -> None:
        """Go to the next epoch if some of this one was used; ``epoch`` itself is not read."""
        if self.batches_used > 0:
            self.epoch += 1
        self._done_before = self.batches_done()


class ResumableLoader(DataLoader[Any]):
    """A loader of a :class:`ResumableDataModule`: tells Lightning that it can resume in the middle of an epoch.

    The position is the data module's to keep, since only it knows which batches were used and not merely fetched.
    Without these two methods Lightning warns that the loader is not resumable.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing; see the class."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing; see the class."""


class ResumableDataModule(L.LightningDataModule):
    """A data module whose checkpoint says where in the training data it was.

    After a kill in the middle of an epoch, ``fit(ckpt_path=...)`` goes on with exactly the samples that were left, for
    any number of workers and, as long as the global batch size stays, of ranks. Subclasses make their training
    loader, a :class:`ResumableLoader`, with :meth:`train_sampler`.

    Lightning by itself repeats the beginning of the interrupted epoch, and with workers takes epoch 0's order for it
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21938).
    """

    def __init__(self) -> None:
        super().__init__()
        self._sampler: PassSampler | None = None
        self._samples_per_batch = 1
        self._weights: Tensor | None = None
        self._resume: dict[str, int] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Forget the position of an earlier run; one from a checkpoint is loaded after this."""
        self._resume = None

    def train_sampler(
        self, size: int, *, batch_size: int, seed: int, lengths: Tensor | None = None
    ) -> ResumableSampler:
        """The sampler of the training loader, at the position where training stands or resumes.

        Args:
            size: Number of training samples.
            batch_size: Of the loader, per rank.
            seed: Of the order.
            lengths: Of the samples, shape ``(size,)``, to put those of like length into a batch.
        """
        ranks = (
            {} if self.trainer is None else {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        )
        sampler = PassSampler(size, batches_done=self._batches_done, seed=seed, **ranks)
        sampler.set_weights(self._weights)
        if lengths is not None:
            sampler.set_lengths(lengths, batch_size)
        # The first iterator of a loader with workers draws at once, before the trainer calls `set_epoch`, and perhaps
        # before it has loaded its own counters: the position must be right from the beginning.
        if self._resume is not None:
            sampler.start_at(self._resume["epoch"], self._resume["position"])
        elif self._sampler is not None and self._batches_done() > 0:
            sampler.start_at(self._sampler.epoch + 1, 0)  # the same trainer asks for a new loader
        self._resume = None
        self._sampler = sampler
        self._samples_per_batch = batch_size * sampler.num_replicas
        return sampler

    def _batches_done(self) -> int:
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total  # its declared type lacks `processed`
        done: int = progress.processed
        return done

    def set_weights(self, weights: Tensor | None) -> None:
        """Draw the training samples of the next epochs in proportion to ``weights``; ``None``: each once.

        The length of an epoch stays. Call it between epochs (``on_train_epoch_end``) or before the first.

        Args:
            weights: One weight per sample of the sampler, shape ``(size,)``, the same on every rank.

        Raises:
            ValueError: If a weight is negative or not finite, all are zero, or their number is wrong.
        """
        if self._sampler is not None:
            self._sampler.set_weights(weights)
        self._weights = weights

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data and the sampling weights."""
        epoch, position = 0, 0
        if self._sampler is not None and self.trainer is not None:
            epoch, position = self._sampler.epoch, self._sampler.position
            if (used := self._sampler.batches_used) > 0:
                position += used * self._samples_per_batch
                if position >= self.trainer.num_training_batches * self._samples_per_batch:
                    epoch, position = epoch + 1, 0
        return {"epoch": epoch, "position": position, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader continue where ``state_dict`` was taken."""
        self._weights = state_dict["weights"]
        self._resume = {key: state_dict[key] for key in ("epoch", "position")}


def check_weights(weights: Tensor, size: int) -> Tensor:
    """``weights``, if they can be sampling weights of ``size`` samples.

    Raises:
        ValueError: If not.
    """
    if weights.shape != (size,):
        raise ValueError(f"`weights` must have one entry per sample, shape ({size},), got {tuple(weights.shape)}.")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(
            f"`weights` must be finite, none negative and not all zero, got values from {weights.min().item()} to "
            f"{weights.max().item()}."
        )
    return weights


def check_seed(seed: int) -> None:
    """Refuse a seed below 0.

    Raises:
        ValueError: If it is.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be in [0, 2**32), got {seed}.")


__all__ = ["ResumableDataModule", "ResumableLoader", "ResumableSampler", "systematic_resample"]
