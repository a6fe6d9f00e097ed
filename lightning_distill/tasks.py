"""How a network reads a batch, and what counts as right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from lightning_distill.losses.fused import FusedKD
from lightning_distill.losses.soft_targets import SoftTargets
from lightning_distill.losses.targets import CrossEntropy, SquaredError, TeacherSquaredError
from lightning_distill.losses.term import Term
from lightning_distill.metrics import Accuracy, Agreement, Fidelity, NegativeLogLikelihood
from lightning_distill.modes import inference
from lightning_distill.outputs import UNLABELLED, Outputs
from lightning_distill.pretrained import load_pretrained
from lightning_distill.sharding import inside

INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values")
LABEL_KEYS = ("y", "label", "labels", "target", "targets")
SEQUENCES = (tuple, list, Sequence)  # asking the abstract class takes longer, so it comes last
KEPT_FROM_MODELS = (*LABEL_KEYS, "index", "distill_mask", "teacher")
"""Entries of a batch of tokens that no model gets."""


class Task:
    """How a network reads a batch, and what counts as right.

    A batch is a tuple ``(inputs, labels)``, ``(inputs, labels, index)`` or ``(inputs,)``, a bare tensor of inputs, or
    a mapping. In a mapping the inputs, labels and index stand under ``input_key``, ``label_key`` and ``"index"``.

    Args:
        input_key: Key of the inputs in a mapping; by default the first of ``INPUT_KEYS`` that is there.
        label_key: Key of the labels in a mapping; by default the first of ``LABEL_KEYS`` that is there.
    """

    imitable = False
    """Whether agreement and KL divergence with a teacher say something about the outputs."""

    token_items = False
    """Whether an item is a token, and not a sample."""

    def __init__(self, input_key: str | None = None, label_key: str | None = None) -> None:
        self.input_key = input_key
        self.label_key = label_key

    def run(self, network: nn.Module, batch: Any) -> Outputs:
        """What ``network`` says about ``batch``."""
        return to_outputs(network(self.inputs(batch)))

    def inputs(self, batch: Any) -> Tensor:
        """The network's input, shape ``(B, ...)``.

        Raises:
            ValueError: If the batch is a mapping without a known key.
            TypeError: If it is no batch at all.
        """
        if isinstance(batch, SEQUENCES) and len(batch) > 0:
            inputs = batch[0]
        elif isinstance(batch, Mapping):
            key = self.input_key or next((key for key in INPUT_KEYS if key in batch), None)
            if key is None or key not in batch:
                raise ValueError(
                    f"The batch has no inputs: its keys are {list(batch)}, expected "
                    f"{self.input_key or 'one of ' + ', '.join(INPUT_KEYS)}. Name the key: "
                    f"`task={type(self).__name__}(input_key=...)`."
                )
            inputs = batch[key]
        else:
            inputs = batch
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"{type(self).__name__} expects a batch that is a tensor, a tuple (inputs, labels) or a mapping, "
                f"got {type(batch).__name__} with inputs of type {type(inputs).__name__}."
            )
        return inputs

    def labels(self, batch: Any) -> Tensor | None:
        """Labels, or ``None`` if the batch has none."""
        if isinstance(batch, SEQUENCES):
            return batch[1] if len(batch) > 1 else None
        if isinstance(batch, Mapping):
            if self.label_key is not None and self.label_key not in batch:
                raise ValueError(f"The batch has no labels {self.label_key!r}: its keys are {list(batch)}.")
            key = self.label_key or next((key for key in LABEL_KEYS if key in batch), None)
            return None if key is None else batch[key]
        return None

    def mask(self, batch: Any, outputs: Outputs) -> Tensor | None:
        """Which items count, of the item shape; ``None`` if all do."""
        return None

    def positions(self, batch: Any) -> Tensor | None:
        """Which positions of a sequence count, boolean, shape ``(B, T)``; ``None`` where samples are no sequences."""
        return None

    def index(self, batch: Any) -> Tensor | None:
        """Identity of each sample in its data set, shape ``(B,)``, or ``None``."""
        if isinstance(batch, SEQUENCES):
            return batch[2] if len(batch) > 2 else None
        return batch.get("index") if isinstance(batch, Mapping) else None

    def batch_size(self, batch: Any) -> int:
        """Number of samples."""
        return len(self.inputs(batch))

    def load(self, name: str) -> nn.Module:
        """A pretrained network by Hugging Face name or local path."""
        raise ValueError(f"{type(self).__name__} cannot load a network by name, got {name!r}; pass a module.")

    def hard_term(self) -> Term:
        """The loss on labels."""
        raise TypeError(f"{type(self).__name__} is a `Task` without `hard_term()`; define it.")

    def soft_term(self) -> Term:
        """The loss on what the teacher says that :class:`~lightning_distill.KD` uses by default."""
        raise TypeError(f"{type(self).__name__} is a `Task` without `soft_term()`; define it.")

    def joint_term(self, alpha: float) -> Term | None:
        """``alpha * hard + (1 - alpha) * soft`` as one term, where computing both at once is cheaper; else ``None``."""
        return None

    def predictions(self, logits: Tensor) -> Tensor:
        """What the logits mean: the value that a user wants for each item."""
        return logits

    def metrics(self, outputs: Outputs) -> dict[str, Metric]:
        """Metrics by name, each fed with ``(predictions, labels)`` by :meth:`evaluable`."""
        return {}

    def imitation_metrics(self) -> dict[str, Metric]:
        """Metrics by name of how well a student imitates, each fed with what student and teacher say."""
        return {"agreement": Agreement(), "fidelity": Fidelity()} if self.imitable else {}

    def comparable(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether these can be compared by :meth:`imitation_metrics`."""
        return student.shape == teacher.shape

    def evaluable(self, outputs: Outputs, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Predictions and labels of the items that can be scored, or ``None`` if there are none."""
        return None

    def check(self, outputs: Outputs, labels: Tensor | None) -> None:
        """Look for labels that cannot be right; called with the first batch of a run.

        Raises:
            ValueError: If the labels do not fit the outputs.
        """


class Classification(Task):
    """One label per sample out of ``C`` classes; ``-100`` marks a sample without a label.

    Labels may also be class probabilities of shape ``(B, C)`` (mixup). Loss on labels: cross-entropy. Metrics:
    accuracy, negative log-likelihood (nats) and expected calibration error (15 bins).

    Args:
        label_smoothing: Share of the label's probability that is spread over all classes, in [0, 1).
        input_key: See :class:`Task`.
        label_key: See :class:`Task`.

    Raises:
        ValueError: If ``label_smoothing`` is outside [0, 1).
    """

    imitable = True

    def __init__(
        self, label_smoothing: float = 0.0, input_key: str | None = None, label_key: str | None = None
    ) -> None:
        super().__init__(input_key, label_key)
        self.label_smoothing = label_smoothing
        self.hard_term()  # checks the value

    def load(self, name: str) -> nn.Module:
        """An image classifier by Hugging Face name or local path."""
        return load_pretrained("AutoModelForImageClassification", name)

    def hard_term(self) -> Term:
        """Cross-entropy with ``label_smoothing``."""
        return CrossEntropy(label_smoothing=self.label_smoothing)

    def soft_term(self) -> Term:
        """Forward KL divergence from the softened teacher."""
        return SoftTargets()

    def predictions(self, logits: Tensor) -> Tensor:
        """The class with the largest logit."""
        return logits.argmax(dim=-1)

    def metrics(self, outputs: Outputs) -> dict[str, Metric]:
        """``accuracy``, ``nll`` and ``ece``."""
        classes = outputs.logits.shape[-1]
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "nll": NegativeLogLikelihood(),
            "ece": MulticlassCalibrationError(classes, n_bins=15, validate_args=False),
        }

    def evaluable(self, outputs: Outputs, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Logits ``(n, C)`` and labels ``(n,)`` of the labelled items that count."""
        if labels is None or labels.is_floating_point():
            return None
        keep = labels != UNLABELLED
        if mask is not None:
            keep = keep & mask
        if not keep.any():
            return None
        return outputs.logits[keep].float(), labels[keep]

    def check(self, outputs: Outputs, labels: Tensor | None) -> None:
        """Refuse labels outside [0, C) other than ``-100``, and label shapes that do not fit."""
        if labels is None:
            return
        classes = outputs.logits.shape[-1]
        if labels.is_floating_point():
            if labels.shape != outputs.logits.shape:
                raise ValueError(
                    f"Labels are floating-point, so they are taken for class probabilities of shape "
                    f"{tuple(outputs.logits.shape)}, but they have shape {tuple(labels.shape)}. Class indices must "
                    "be integers: `labels.long()`."
                )
            return
        if labels.shape != outputs.item_shape:
            raise ValueError(
                f"Labels have shape {tuple(labels.shape)}, expected one class index per item: "
                f"{tuple(outputs.item_shape)}."
            )
        wrong = labels[(labels != UNLABELLED) & ((labels < 0) | (labels >= classes))]
        if wrong.numel() > 0:
            raise ValueError(
                f"Label {wrong[0].item()} is outside [0, {classes}): the student has {classes} outputs. Give the "
                f"student more outputs, fix the labels, or mark items without a label with {UNLABELLED}."
            )


class SequenceClassification(Classification):
    """Classification of token sequences by a transformers model.

    The batch is a mapping as tokenizers and collators make it (``input_ids``, ``attention_mask``, ``labels`` …); what
    the model does not take (``labels``, ``index``) is kept from it.
    """

    def run(self, network: nn.Module, batch: Any) -> Outputs:
        """Call ``network`` with the tokenizer's entries of ``batch``."""
        return to_outputs(network(**{key: batch[key] for key in batch if key not in KEPT_FROM_MODELS}))

    def inputs(self, batch: Any) -> Tensor:
        """``input_ids``, shape ``(B, T)``, or ``inputs_embeds``."""
        if not isinstance(batch, Mapping) or not ("input_ids" in batch or "inputs_embeds" in batch):
            kind = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"SequenceClassification expects a mapping with `input_ids`, got {kind}.")
        inputs: Tensor = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
        return inputs

    def positions(self, batch: Any) -> Tensor:
        """Those that are no padding."""
        if (padding := batch.get("attention_mask")) is not None:
            return padding.bool()  # type: ignore[no-any-return]
        inputs = self.inputs(batch)
        return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)

    def load(self, name: str) -> nn.Module:
        """A sequence classifier by Hugging Face name or local path."""
        return load_pretrained("AutoModelForSequenceClassification", name)


class CausalLM(Task):
    """Next-token prediction by a transformers causal language model; an item is a token.

    The batch is a mapping with ``input_ids`` and, where there is padding, ``attention_mask``, both ``(B, T)``;
    ``labels`` of the same shape are ``-100`` where a token is not to be learnt (prompts, padding, the first token of a
    packed sequence). Without ``labels`` every token that is no padding counts. The shift by one happens here: position
    ``t`` is compared with label ``t + 1``. Unlabelled tokens count for terms on the teacher where ``distill_mask``,
    boolean ``(B, T)``, is true (:class:`~lightning_distill.callbacks.OnPolicy` sets it on what the student generated).

    Only the tokens that count are projected to the vocabulary, and only when a loss asks for logits: outputs hold
    hidden states ``(n, d)`` of the ``n`` tokens that count, and the output layer. Models whose logits are more than an
    output layer over the last hidden state (soft-capped, scaled, with prompt adapters) are found out by a trial with
    the first batch and run as they are. Any other module that maps ``input_ids`` to logits ``(B, T, V)`` works too.

    Args:
        distill_prompt: Whether tokens without a label that are no padding count for terms on the teacher.
    """

    imitable = True
    token_items = True

    def __init__(self, distill_prompt: bool = False) -> None:
        super().__init__()
        self.distill_prompt = distill_prompt
        self._linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def run(self, network: nn.Module, batch: Any) -> Outputs:
        """Hidden states of the tokens that count and the output layer, or their logits."""
        inputs = {key: batch[key] for key in batch if key not in KEPT_FROM_MODELS}
        keep = self.counts(batch)
        if network not in self._linear:
            self._linear[network] = _has_linear_head(network, inputs)
        if self._linear[network]:
            model: Any = network
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            hidden: Tensor = inside(network, lambda: model.base_model(**inputs).last_hidden_state)
            return Outputs(hidden=hidden[:, :-1][keep], head=model.get_output_embeddings())
        said = to_outputs(network(**inputs) if hasattr(network, "config") else network(inputs["input_ids"]))
        logits = said.logits[:, -batch["input_ids"].shape[1] :]  # a learned prompt has added positions in front
        return Outputs(logits[:, :-1][keep], features=said.features)

    def counts(self, batch: Any) -> Tensor:
        """Which of the positions ``0 .. T - 2`` count, boolean, shape ``(B, T - 1)``."""
        padding = batch.get("attention_mask")
        real = padding[:, 1:].bool() if padding is not None else torch.ones_like(batch["input_ids"][:, 1:]).bool()
        if "labels" not in batch or self.distill_prompt:
            return real
        labels: Tensor = batch["labels"]
        wanted = labels[:, 1:] != UNLABELLED
        if "distill_mask" in batch:
            wanted = wanted | batch["distill_mask"][:, 1:]
        return real & wanted

    def positions(self, batch: Any) -> Tensor:
        """Those whose next token counts: the items of the batch, in their order."""
        return torch.nn.functional.pad(self.counts(batch), (0, 1))

    def inputs(self, batch: Any) -> Tensor:
        """``input_ids``, shape ``(B, T)``."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            kind = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"CausalLM expects a mapping with `input_ids`, got {kind}.")
        ids: Tensor = batch["input_ids"]
        return ids

    def labels(self, batch: Any) -> Tensor | None:
        """The next token of each position that counts, shape ``(n,)``."""
        labels: Tensor = batch.get("labels", batch["input_ids"])
        return labels[:, 1:][self.counts(batch)]

    def load(self, name: str) -> nn.Module:
        """A causal language model by Hugging Face name or local path."""
        return load_pretrained("AutoModelForCausalLM", name)

    def hard_term(self) -> Term:
        """Cross-entropy of the next token."""
        return CrossEntropy()

    def soft_term(self) -> Term:
        """Forward KL divergence from the teacher's softened prediction of each token."""
        return SoftTargets()

    def joint_term(self, alpha: float) -> Term | None:
        """Both at once, in chunks of tokens where the vocabulary is large."""
        return FusedKD(alpha=alpha)

    def predictions(self, logits: Tensor) -> Tensor:
        """The most likely next token."""
        return logits.argmax(dim=-1)

    def metrics(self, outputs: Outputs) -> dict[str, Metric]:
        """``nll`` (nats per token) and ``accuracy`` of the next token."""
        return {"nll": NegativeLogLikelihood(), "accuracy": Accuracy()}

    def evaluable(self, outputs: Outputs, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Logits ``(n, V)`` and labels ``(n,)`` of the labelled tokens."""
        if labels is None or not (keep := labels != UNLABELLED).any():
            return None
        return outputs.logits[keep].float(), labels[keep]

    def check(self, outputs: Outputs, labels: Tensor | None) -> None:
        """Refuse tokens that the student's vocabulary does not have."""
        if labels is None or labels.numel() == 0:
            return
        size = getattr(outputs.head, "out_features", None) or outputs.logits.shape[-1]
        largest = int(labels.max())
        if largest >= size:
            raise ValueError(
                f"Token {largest} is outside the student's vocabulary of {size}. Tokenize with the student's "
                f"tokenizer, or `student.resize_token_embeddings({largest + 1})`."
            )


def _has_linear_head(network: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the logits of ``network`` are its output layer over its last hidden state; tried on a few tokens."""
    model: Any = network
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(model, "base_model"):
        return False
    few = {key: value[:1, :8] for key, value in inputs.items() if isinstance(value, Tensor) and value.ndim == 2}
    with inference(network):
        logits = network(**few).logits
        rebuilt = inside(network, lambda: head(model.base_model(**few).last_hidden_state))
    return logits.shape == rebuilt.shape and bool(torch.allclose(logits, rebuilt, rtol=1e-3, atol=1e-3))


class Regression(Task):
    """Real-valued targets, shape ``(B, D)``; a NaN target marks an item without a label.

    Loss on labels and on the teacher's predictions: squared error, mean over ``D``. Metrics: ``mse`` and ``mae``.
    """

    def hard_term(self) -> Term:
        """Squared error against the labels."""
        return SquaredError()

    def soft_term(self) -> Term:
        """Squared error against the teacher's predictions."""
        return TeacherSquaredError()

    def metrics(self, outputs: Outputs) -> dict[str, Metric]:
        """``mse`` and ``mae``."""
        return {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}

    def evaluable(self, outputs: Outputs, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Predictions and targets ``(n, D)`` of the labelled items."""
        if labels is None:
            return None
        keep = ~labels.isnan().any(dim=-1)
        if not keep.any():
            return None
        return outputs.logits[keep].float(), labels[keep].float()

    def check(self, outputs: Outputs, labels: Tensor | None) -> None:
        """Refuse targets of another shape than the predictions."""
        if labels is not None and labels.shape != outputs.logits.shape:
            raise ValueError(
                f"Targets have shape {tuple(labels.shape)}, the student's predictions {tuple(outputs.logits.shape)}; "
                "they must be equal, `(B, D)`."
            )


def to_outputs(said: Any) -> Outputs:
    """Read what a network returned: logits, an :class:`Outputs`, or a transformers output or mapping with ``logits``.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(said, Outputs):
        return said
    if isinstance(said, Tensor):
        return Outputs(said)
    logits = said.get("logits") if isinstance(said, Mapping) else getattr(said, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "A network must return logits (a tensor), `Outputs`, or an object with `logits`, "
            f"got {type(said).__name__}."
        )
    return Outputs(logits)


__all__ = ["CausalLM", "Classification", "Regression", "SequenceClassification", "Task", "to_outputs"]
