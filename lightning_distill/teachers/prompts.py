"""A teacher that is asked in several ways, and answers with the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.soft_targets import softened_log_softmax
from lightning_distill.outputs import UNLABELLED, Outputs
from lightning_distill.tasks import Task
from lightning_distill.teachers.frozen import FrozenTeacher
from lightning_distill.teachers.teacher import Teacher

Mean = Literal["arithmetic", "geometric"]
Template = Callable[[Any], Any]


def prompt_ensemble(
    log_probs: Tensor, *, mode: Mean = "arithmetic", weights: Tensor | Sequence[float] | None = None
) -> Tensor:
    r"""Logarithm of the mean of several predictions of the same items.

    .. math::
        \log \sum_i w_i \, p_i \;\text{(arithmetic)}, \qquad
        \log \frac{\prod_i p_i^{w_i}}{Z} \;\text{(geometric)}

    The arithmetic mean believes what any prompt believes, the geometric mean what all of them do: the first is closest
    to the predictions in forward KL divergence, the second in reverse. Schick and Schütze (2021, PET, section 3.4,
    https://arxiv.org/abs/2001.07676) train a classifier on the mean over prompts, weighted by their accuracy.

    Args:
        log_probs: Logits or log-probabilities of ``P`` predictions, shape ``(P, items..., C)``.
        mode: Which mean.
        weights: One per prediction, none negative, not all zero; only their ratios count. Equal by default.

    Returns:
        Log-probabilities, shape ``(items..., C)``, in float32 or wider.

    Raises:
        ValueError: If ``mode`` is unknown, or ``weights`` has a wrong number of entries or a bad value.

    Example:
        >>> prompt_ensemble(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()).exp()
        tensor([0.7000, 0.3000])
    """
    _check_mode(mode)
    log_probs = softened_log_softmax(log_probs, 1.0)
    shares = _shares(weights, len(log_probs)).to(log_probs)
    shares = shares.reshape(-1, *[1] * (log_probs.ndim - 1))
    if mode == "arithmetic":
        return (log_probs + shares.log()).logsumexp(dim=0)
    return torch.log_softmax((shares * log_probs).sum(dim=0), dim=-1)


class PromptEnsemble(Teacher):
    """One network, asked in several ways: the mean of its predictions over prompt templates.

    Predictions are averaged at temperature 1; the loss softens the mean. For a language model, templates may change
    what is masked in the labels (the prompt) but not the tokens that count.

    Args:
        teacher: A network, which is frozen, or a :class:`Teacher`.
        templates: Functions that turn the batch into the one that is asked, as
            ``partial(prepend_tokens, tokens=[...])``; the student sees the batch as it is.
        mode: See :func:`prompt_ensemble`.
        weights: See :func:`prompt_ensemble`.

    Raises:
        ValueError: If there are no templates, ``mode`` is unknown or ``weights`` do not fit; when called, if the
            predictions for two templates have different shapes.
        TypeError: If a template cannot be called.
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        templates: Sequence[Template],
        mode: Mean = "arithmetic",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if len(templates) == 0:
            raise ValueError("`templates` is empty: give at least one function of the batch.")
        for template in templates:
            if not callable(template):
                raise TypeError(f"`templates` must be functions of the batch, got {type(template).__name__}.")
        _check_mode(mode)
        _shares(weights, len(templates))
        self.teacher = teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher)
        self.templates = list(templates)
        self.mode = mode
        self.weights = None if weights is None else list(weights)

    @torch.no_grad()
    def forward(self, batch: Any, task: Task) -> Outputs:
        """The mean prediction, as log-probabilities."""
        said: list[Tensor] = []
        for number, template in enumerate(self.templates):
            logits = self.teacher(template(batch), task).logits
            if said and logits.shape != said[0].shape:
                raise ValueError(
                    f"For template {number} the teacher's logits have shape {tuple(logits.shape)}, for template 0 "
                    f"{tuple(said[0].shape)}. A template must not change which items count: mark the tokens that it "
                    f"adds with {UNLABELLED} in `labels`."
                )
            said.append(logits)
        return Outputs(prompt_ensemble(torch.stack(said), mode=self.mode, weights=self.weights))


def prepend_tokens(batch: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """``batch`` with the same tokens before each sequence: a prompt template.

    Args:
        batch: With ``input_ids`` and, where there is padding, ``attention_mask``, both ``(B, T)``; padding on the right
            (on the left it would come between prompt and text). ``labels`` of that shape are ``-100`` at the
            new tokens; ``labels`` of another shape, and all other entries, stay as they are.
        tokens: The prompt.

    Returns:
        A new mapping.

    Raises:
        ValueError: If the batch has entries for each token that cannot be extended, such as ``position_ids``.

    Example:
        >>> prepend_tokens({"input_ids": torch.tensor([[5, 6]])}, [1, 2])["input_ids"]
        tensor([[1, 2, 5, 6]])
    """
    ids: Tensor = batch["input_ids"]
    fills = {"input_ids": 0, "attention_mask": 1, "labels": UNLABELLED, "token_type_ids": 0}
    changed = dict(batch)
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            continue
        if key not in fills:
            raise ValueError(f"`prepend_tokens` does not know what to put into {key!r}; remove it from the batch.")
        added = value.new_full((len(ids), len(tokens)), fills[key])
        if key == "input_ids":
            added[:] = torch.tensor(tokens, dtype=value.dtype)
        changed[key] = torch.cat([added, value], dim=1)
    return changed


def _check_mode(mode: str) -> None:
    if mode not in ("arithmetic", "geometric"):
        raise ValueError(f"`mode` must be 'arithmetic' or 'geometric', got {mode!r}.")


def _shares(weights: Tensor | Sequence[float] | None, count: int) -> Tensor:
    """``weights`` over their sum."""
    shares = (
        torch.ones(count, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    )
    if shares.shape != (count,):
        raise ValueError(f"`weights` must have one entry for each of {count} predictions, got {tuple(shares.shape)}.")
    if not (shares.isfinite().all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError(f"`weights` must be finite, none negative and not all zero, got {shares.tolist()}.")
    return shares / shares.sum()
