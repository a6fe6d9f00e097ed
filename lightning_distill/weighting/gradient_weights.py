"""Weights from the inner products of the terms' gradients, anew in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.outputs import Step
from lightning_distill.weighting.fixed import FixedWeights, check_weight
from lightning_distill.weighting.live import Live
from lightning_distill.weighting.min_norm import mgda_weights
from lightning_distill.weighting.weighting import check_several

Normalise = Literal["norm", "loss", "loss and norm"]
GramRule = Callable[[Tensor], Tensor]
OUTPUT = "(output)"  # the last hidden state, or the logits


class GradientWeights(FixedWeights):
    r"""Weigh the terms of each batch by a rule on the inner products of their gradients.

    The gradients are those with respect to a *representation*: a tensor of the student on which all terms depend. By
    the chain rule they bound those of the parameters before it, and the way back from the losses to it is short (Sener
    and Koltun 2018, section 3.3: MGDA-UB). ``exact=True`` takes the gradients of all parameters instead, at the price
    of a full backward pass per term.

    Under DDP all processes get the same weights, equal to those of one process with the whole batch. With
    ``accumulate_grad_batches`` each micro-batch has weights of its own: the result depends on how the step is split.
    A term whose gradient is zero in a step (a term on labels in a batch without) keeps its weight and is not balanced.

    Args:
        rule: From the matrix of inner products, shape ``(T, T)``, to ``T`` weights:
            :func:`~lightning_distill.weighting.mgda_weights`, :func:`~lightning_distill.weighting.pcgrad_weights`,
            :func:`~lightning_distill.weighting.cagrad_weights`, or another function.
        representation: Name of the student's submodule whose output it is. By default the last hidden state or the
            logits, or, if a term does not depend on them, the last tapped activation on which all terms do.
        exact: Whether to use the gradients of the student's parameters.
        normalise: Divide gradients by their norm, by the term's loss, or by both, before the rule sees them. MGDA
            without it favours the term with the smallest gradient. ``None``: as they are.
        priorities: Constant weights that go into the gradients, and into the weights, beside the rule's; by default
            none.

    Attributes:
        representation_in_use: Its name, once it was chosen; ``"(output)"`` for the last hidden state or the logits.

    Raises:
        ValueError: If ``normalise`` is unknown, a priority is negative or for an unknown term, both
            ``representation`` and ``exact`` are given, or there are fewer than two terms; in the training, if no
            representation gets a gradient from all terms.
    """

    def __init__(
        self,
        rule: GramRule = mgda_weights,
        *,
        representation: str | None = None,
        exact: bool = False,
        normalise: Normalise | None = None,
        priorities: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__({})
        if normalise not in (None, "norm", "loss", "loss and norm"):
            raise ValueError(f"`normalise` must be 'norm', 'loss', 'loss and norm' or None, got {normalise!r}.")
        if exact and representation is not None:
            raise ValueError(f"`exact` takes all parameters; leave it or `representation={representation!r}` out.")
        for name, weight in (priorities or {}).items():
            check_weight(name, weight)
        self.rule = rule
        self.representation = representation
        self.exact = exact
        self.normalise: Normalise | None = normalise
        self.priorities = None if priorities is None else dict(priorities)
        self.student_taps = () if representation is None else (representation,)
        self._student: list[nn.Module] = []  # in a list, so that it is no submodule of this one
        self.representation_in_use: str | None = representation

    def bind(self, terms: Sequence[str], student: nn.Module) -> None:
        """Start with the priorities, or with equal weights that sum to 1."""
        check_several(type(self).__name__, terms)
        if unknown := [name for name in self.priorities or {} if name not in terms]:
            raise ValueError(f"`priorities` names {unknown}, which are no terms; there are {list(terms)}.")
        if self.priorities is None:
            self.values = dict.fromkeys(terms, 1 / len(terms))
        else:
            self.values = {name: self.priorities.get(name, 1.0) for name in terms}
        self._student = [student]

    def look(self, step: Step, live: Live) -> None:
        """Set the weights of this batch."""
        inputs = self._trained() if self.exact else [self._representation(step, live)]
        gradients = live.gradients(inputs)
        width = sum(tensor.numel() for tensor in inputs)
        zero = torch.zeros((), device=inputs[0].device).expand(width)
        rows = torch.stack([zero if of is None else of for of in gradients.values()])
        losses = torch.stack([loss.detach() for loss in live.losses.values()]).to(rows.dtype)
        if live.over_ranks is not None:
            # Each process knows the gradient of the mean over its own items. Its share of the gradient of the mean
            # over everybody's items is its number of items over a process's mean number of items.
            items = torch.as_tensor(live.items, dtype=rows.dtype, device=rows.device)
            share = items / live.over_ranks(items).clamp_min(1)
            rows, losses = rows * share, live.over_ranks(losses * share)
            if self.exact:
                rows = live.over_ranks(rows)
        with torch.autocast(rows.device.type, enabled=False):  # it would multiply in float16
            gram = rows @ rows.T
        if live.over_ranks is not None and not self.exact:
            # the whole batch's representation is the processes' ones in a row, and so are its gradients
            gram = live.over_ranks(gram)
        self._set(list(gradients), gram, losses)

    def _set(self, names: list[str], gram: Tensor, losses: Tensor) -> None:
        gram, losses = gram.double().cpu(), losses.double().cpu()
        if not bool(gram.isfinite().all()):
            return  # float16 has overflowed; the scaler skips this step
        priorities = torch.tensor([self._priority(name) for name in names], dtype=gram.dtype)
        gram = gram * priorities[:, None] * priorities
        there = (gram.diagonal() > 0).nonzero().squeeze(1)
        if len(there) < 2:
            return  # nothing to balance in this batch
        scales = gradient_scales(gram.diagonal()[there], losses[there], self.normalise)
        found = self.rule(gram[there][:, there] / (scales[:, None] * scales)).to(gram.dtype)
        weights = found / scales
        weights = weights * (found.sum() / weights.sum())  # normalising changes the proportions, not the sum
        for place, weight in zip(there.tolist(), weights.tolist(), strict=True):
            self.values[names[place]] = self._priority(names[place]) * weight

    def _priority(self, name: str) -> float:
        return 1.0 if self.priorities is None else self.priorities.get(name, 1.0)

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self._student[0].parameters() if parameter.requires_grad]

    def _representation(self, step: Step, live: Live) -> Tensor:
        student = step.student
        output = student.hidden if student.hidden is not None or not student.has_logits else student.logits
        candidates = {} if output is None else {OUTPUT: output}
        candidates |= dict(reversed(student.features.items()))
        usable = {name: tensor for name, tensor in candidates.items() if tensor.requires_grad}
        if self.representation_in_use in usable:
            return usable[self.representation_in_use]
        if self.representation is not None:
            raise ValueError(
                f"`representation={self.representation!r}` gets no gradient: everything before it is frozen. Name a "
                "submodule after the first one that is trained."
            )
        for name, tensor in usable.items():
            if all(
                of is not None or not live.losses[term].requires_grad for term, of in live.gradients([tensor]).items()
            ):
                self.representation_in_use = name
                return tensor
        raise ValueError(
            f"None of the activations {list(candidates)} gets a gradient from each of the terms {list(live.losses)}. "
            "Name a submodule of the student on whose output all terms depend: `representation='...'`; or pass "
            "`exact=True`."
        )


def gradient_scales(squared_norms: Tensor, losses: Tensor, normalise: Normalise | None) -> Tensor:
    """By what the gradient of each term is divided.

    Args:
        squared_norms: Of the gradients, positive, shape ``(T,)``.
        losses: Shape ``(T,)``.
        normalise: See :class:`GradientWeights`.
    """
    scales = torch.ones_like(squared_norms)
    if normalise in ("norm", "loss and norm"):
        scales = scales * squared_norms.sqrt()
    if normalise in ("loss", "loss and norm"):
        scales = scales * losses.abs().clamp_min(torch.finfo(losses.dtype).tiny)
    return scales
