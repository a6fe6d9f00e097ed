"""The task of a sentence encoder: one embedding per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_distill.losses.embeddings import EmbeddingDistance, PairSimilarity, pair_similarity
from lightning_distill.losses.term import Term
from lightning_distill.metrics import RankCorrelation, SimilaritySpearman
from lightning_distill.outputs import Outputs
from lightning_distill.packages import package_path
from lightning_distill.tasks import KEPT_FROM_MODELS, Task

Pooling = Literal["mean", "first"]


def pool(hidden: Tensor, positions: Tensor, pooling: Pooling = "mean") -> Tensor:
    """One vector per sequence.

    Args:
        hidden: Shape ``(B, T, d)``.
        positions: Which positions are no padding, boolean, ``(B, T)``.
        pooling: ``"mean"`` over these, or ``"first"`` of them (the class token of BERT-like models).

    Returns:
        Shape ``(B, d)``; zeros for a sequence without positions.

    Example:
        >>> h = torch.tensor([[[1.0], [3.0], [100.0]]])
        >>> pool(h, torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """
    if pooling == "first":
        first = positions.int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first] * positions.any(dim=1, keepdim=True)
    kept = positions.unsqueeze(-1).to(hidden.dtype)
    return (hidden * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)


class Embedding(Task):
    """One embedding per text, from a transformers encoder; outputs are vectors ``(B, d)`` of length 1.

    The batch is a mapping with ``input_ids`` and, where there is padding, ``attention_mask``. A network may also
    return the vectors itself, shape ``(B, d)``.

    Labels, if there are any, are similarities of pairs: texts 0 and 1, 2 and 3, … of a batch, one number per text, the
    same for both, NaN where it is not known. Loss on labels: :class:`~lightning_distill.losses.PairSimilarity`. Loss on
    the teacher: :class:`~lightning_distill.losses.EmbeddingDistance`; without labels use ``KD(..., alpha=0.0)``.
    Metrics: ``spearman``, how well the similarities of all pairs of texts are in the teacher's order
    (:class:`~lightning_distill.metrics.SimilaritySpearman`), and, with labels, ``similarity``, the rank correlation of
    the pairs' cosines and labels.

    Args:
        pooling: ``"mean"`` over the text, or its ``"first"`` token.
        normalize: Whether embeddings get length 1.

    Raises:
        ValueError: If ``pooling`` is unknown.
    """

    def __init__(self, pooling: Pooling = "mean", normalize: bool = True) -> None:
        super().__init__()
        if pooling not in ("mean", "first"):
            raise ValueError(f"`pooling` must be 'mean' or 'first', got {pooling!r}.")
        self.pooling: Pooling = pooling
        self.normalize = normalize

    def run(self, network: nn.Module, batch: Any) -> Outputs:
        """Embeddings of the texts, as ``logits``."""
        self.inputs(batch)  # checks the batch
        said = network(**{key: batch[key] for key in batch if key not in KEPT_FROM_MODELS})
        if isinstance(said, Tensor):
            vectors = said
        elif (hidden := getattr(said, "last_hidden_state", None)) is not None:
            vectors = pool(hidden, self.positions(batch), self.pooling)
        else:
            raise TypeError(
                "A network for embeddings must return vectors (a tensor) or an object with `last_hidden_state`, got "
                f"{type(said).__name__} from {type(network).__name__}. Use the model without its head, as "
                "`AutoModel` loads it."
            )
        return Outputs(F.normalize(vectors, dim=-1) if self.normalize else vectors)

    def inputs(self, batch: Any) -> Tensor:
        """``input_ids``, shape ``(B, T)``."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            kind = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"Embedding expects a mapping with `input_ids`, got {kind}.")
        ids: Tensor = batch["input_ids"]
        return ids

    def positions(self, batch: Any) -> Tensor:
        """Those that are no padding."""
        padding = batch.get("attention_mask")
        return padding.bool() if padding is not None else torch.ones_like(batch["input_ids"], dtype=torch.bool)

    def load(self, name: str) -> nn.Module:
        """An encoder by Hugging Face name, local path or ``package:NAME/folder``."""
        return load_encoder(name)

    def hard_term(self) -> Term:
        """Squared error of the pairs' cosines."""
        return PairSimilarity()

    def soft_term(self) -> Term:
        """``1 - cos`` to the teacher's embedding."""
        return EmbeddingDistance()

    def metrics(self, outputs: Outputs) -> dict[str, Metric]:
        """``similarity``, for pairs with labels."""
        return {"similarity": RankCorrelation()}

    def imitation_metrics(self) -> dict[str, Metric]:
        """``spearman``, beside a teacher."""
        return {"spearman": SimilaritySpearman()}

    def comparable(self, student: Tensor, teacher: Tensor) -> bool:
        """Embeddings of any widths are."""
        return len(student) == len(teacher)

    def evaluable(self, outputs: Outputs, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and labels of the labelled pairs."""
        if labels is None:
            return None
        labels = labels[::2].float()
        known = ~labels.isnan()
        return (pair_similarity(outputs.logits)[known], labels[known]) if known.any() else None

    def check(self, outputs: Outputs, labels: Tensor | None) -> None:
        """Refuse labels that are not one per text and equal within pairs."""
        if labels is None:
            return
        if labels.shape != outputs.item_shape or not labels.is_floating_point():
            raise ValueError(
                f"Labels must be similarities of pairs, one floating-point number per text, shape "
                f"{tuple(outputs.item_shape)}, got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        if len(labels) % 2 or not torch.equal(labels[::2].nan_to_num(), labels[1::2].nan_to_num()):
            raise ValueError(
                "Labels must be equal within each pair of rows 0 and 1, 2 and 3, …: the batch has "
                f"{len(labels)} rows with labels {labels[:4].tolist()} …"
            )


def load_encoder(name: str) -> nn.Module:
    """A transformers encoder without a head.

    The layer over the class token that BERT-like models have is left out: an average over the text does not use it.

    Args:
        name: Hugging Face name, local folder, or ``package:NAME/folder`` for weights that an installed Python package
            holds; see :func:`~lightning_distill.packages.package_path`.
    """
    from transformers import AutoModel

    load: Any = AutoModel.from_pretrained
    return without_pooler(load(package_path(name)))


def without_pooler(network: nn.Module) -> nn.Module:
    """The same ``network``; its ``pooler``, which would never get a gradient, is taken out."""
    if isinstance(getattr(network, "pooler", None), nn.Module):
        network.pooler = None  # type: ignore[assignment]
    return network


__all__ = ["Embedding", "load_encoder", "pool"]
