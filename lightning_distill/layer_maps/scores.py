"""How important a layer is, and how well two layers fit: what maps are chosen by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TaylorMode = Literal["abs_sample", "signed", "abs_element"]


def taylor_importance(gradient: Tensor, hidden: Tensor, *, mode: TaylorMode = "abs_sample") -> Tensor:
    r"""First-order estimate of how much the loss would change without a layer's output.

    .. math:: I = \frac{1}{B} \sum_b \Big| \sum_{k} g_{bk} h_{bk} \Big|

    See Molchanov et al. (2017, eq. 7; 2019); Michel et al. (2019) for heads.

    Args:
        gradient: Of the loss, *summed* over samples, with respect to ``hidden``; shape ``(B, ...)``.
        hidden: The layer's output, same shape.
        mode: ``"abs_sample"``: absolute value per sample, then the mean. ``"signed"``: mean over the batch of the
            signed products, in which samples cancel; only its sign says something. ``"abs_element"``: sum of the
            absolute products, which counts also what cancels within a sample.

    Returns:
        Scalar, in units of the loss.

    Raises:
        ValueError: If the shapes differ or ``mode`` is unknown.

    Example:
        >>> g, h = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [-2.0]])
        >>> taylor_importance(g, h), taylor_importance(g, h, mode="signed")
        (tensor(2.), tensor(0.))
    """
    if gradient.shape != hidden.shape:
        raise ValueError(
            f"`gradient` and `hidden` must have the same shape, got {tuple(gradient.shape)} and {tuple(hidden.shape)}."
        )
    product = _wide(gradient) * _wide(hidden)
    if mode == "abs_element":
        return product.abs().sum()
    per_sample = product.flatten(1).sum(dim=1)
    if mode == "signed":
        return per_sample.mean()
    if mode == "abs_sample":
        return per_sample.abs().mean()
    raise ValueError(f"`mode` must be 'abs_sample', 'signed' or 'abs_element', got {mode!r}.")


def knowledge_density(hidden: Sequence[Tensor], *, mask: Tensor | None = None, relative: bool = False) -> Tensor:
    r"""How far each layer moves its input: the mean over positions of :math:`\|h_l - h_{l-1}\|_2`.

    Related to the block influence of Men et al. (2024), "ShortGPT". It grows with the norm of the residual stream;
    ``relative=True`` divides by :math:`\|h_{l-1}\|_2`.

    Args:
        hidden: Input of the first layer and the output of each, ``L + 1`` tensors of shape ``(..., d)``.
        mask: Which positions count, boolean, shape ``(...)``.
        relative: Whether the movement is measured in lengths of the input.

    Returns:
        Shape ``(L,)``; 0 for a layer that changes nothing.

    Raises:
        ValueError: If there are fewer than two tensors, their shapes differ, or no position counts.

    Example:
        >>> h = torch.ones(2, 3)
        >>> knowledge_density([h, h, 3 * h], relative=True)
        tensor([0., 2.])
    """
    if len(hidden) < 2 or any(state.shape != hidden[0].shape for state in hidden):
        raise ValueError(
            "`hidden` must be the input of the first layer and the output of each, at least two tensors of one shape, "
            f"got {[tuple(state.shape) for state in hidden]}. Layers that change the shape have no such density."
        )
    if mask is not None:
        hidden = [state[mask] for state in hidden]
    if hidden[0].numel() == 0:
        raise ValueError("`mask` leaves no position to average over.")
    moved = []
    for below, above in itertools.pairwise(hidden):
        distance = (_wide(above) - _wide(below)).norm(dim=-1)
        if relative:
            length = _wide(below).norm(dim=-1)
            distance = distance / length.clamp_min(torch.finfo(length.dtype).tiny)
        moved.append(distance.mean())
    return torch.stack(moved)


def gradient_importance(loss: Tensor, features: Sequence[Tensor], *, per_element: bool = False) -> Tensor:
    r"""Norm of the loss's gradient with respect to each feature, :math:`G_l = \|\partial L / \partial F_l\|_2`.

    The norm runs over all elements of a feature, batch included. The graph is kept, so that the loss can still be
    trained on.

    Args:
        loss: Scalar with a graph.
        features: Tensors of that graph; one that the loss does not depend on, or that has no gradient, has importance
            0.
        per_element: Divide by the root of the number of elements, to compare features of different sizes.

    Returns:
        Shape ``(L,)``, detached.

    Example:
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> gradient_importance((x ** 2).sum(), [x])
        tensor([10.])
    """
    open_ones = [feature for feature in features if feature.requires_grad]
    found = torch.autograd.grad(loss, open_ones, retain_graph=True, allow_unused=True) if open_ones else ()
    gradients = dict(zip(map(id, open_ones), found, strict=True))
    norms = []
    for feature in features:
        gradient = gradients.get(id(feature))
        norm = feature.new_zeros((), dtype=_wide(feature).dtype) if gradient is None else _wide(gradient).norm()
        norms.append(norm / feature.numel() ** 0.5 if per_element else norm)
    return torch.stack(norms).detach()


def fitted_cost(student: Sequence[Tensor], teacher: Sequence[Tensor], *, ridge: float = 1e-3) -> Tensor:
    r"""How badly each teacher layer can be predicted linearly from each student layer.

    For every pair a map ``W`` with offset is fitted by ridge regression on half of the rows (every other one), and

    .. math:: c_{ij} = \frac{\sum \|W_{ij} h^S_i - h^T_j\|^2}{\sum \|h^T_j - \bar h^T_j\|^2}

    is measured on the other half: 0 where the student's layer determines the teacher's, about 1 where it says nothing.
    The division keeps layers with large activations from looking bad. The map acts on the student: on the teacher's
    side a teacher that is mapped to nothing would be predicted perfectly.

    Args:
        student: One tensor ``(n, d_S)`` per layer; the same rows (positions) in all.
        teacher: The same, ``(n, d_T)``.
        ridge: Of the regression, relative to the mean variance of the student's features; positive.

    Returns:
        Shape ``(L_S, L_T)``, float64.

    Raises:
        ValueError: If there are fewer than 4 rows, their number differs, or ``ridge`` is not positive.

    Example:
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(fitted_cost([x], [x @ torch.ones(3, 2)]) < 1e-4)
        True
    """
    if not ridge > 0:
        raise ValueError(f"`ridge` must be positive, got {ridge}.")
    rows = _checked_rows(student, teacher)
    if rows < 4:
        raise ValueError(f"The fit needs at least 4 rows, got {rows}.")
    fit, test = slice(0, None, 2), slice(1, None, 2)
    widths = [layer.shape[1] for layer in teacher]
    targets = torch.cat([layer.double() for layer in teacher], dim=1)
    mean = targets[fit].mean(dim=0)
    variation = (targets[test] - targets[test].mean(dim=0)).square().sum(dim=0).split(widths)
    costs = []
    for layer in student:
        inputs = layer.double()
        inputs = inputs - inputs[fit].mean(dim=0)
        gram = inputs[fit].T @ inputs[fit]
        floor = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        gram.diagonal().add_(floor)
        weight = torch.linalg.solve(gram, inputs[fit].T @ (targets[fit] - mean))
        error = (inputs[test] @ weight + mean - targets[test]).square().sum(dim=0).split(widths)
        costs.append(torch.stack([missed.sum() / total.sum() for missed, total in zip(error, variation, strict=True)]))
    return torch.stack(costs)


def cka_similarity(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    r"""Linear centred kernel alignment of each pair of layers, from the unbiased estimate of HSIC.

    The plain estimate is far above 0 for unrelated features where the width is not small against the number of rows
    (about 0.75 for 384 random features of 256 rows); the unbiased one is 0 on average. Invariant to rotations and to a
    common scale of the features. See Kornblith et al. (2019), section 3; Nguyen, Raghu and Kornblith (2021), eq. 3.

    Args:
        student: One tensor ``(n, d_S)`` per layer; the same rows (samples) in all; ``n >= 4``.
        teacher: The same, ``(n, d_T)``.

    Returns:
        Shape ``(L_S, L_T)``, float64; 1 for equal geometry; may be slightly negative.

    Raises:
        ValueError: If there are fewer than 4 rows, their number differs, or a layer is constant.

    Example:
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(cka_similarity([x], [-2 * x]).item(), 6)
        1.0
    """
    rows = _checked_rows(student, teacher)
    if rows < 4:
        raise ValueError(f"CKA needs at least 4 rows, got {rows}.")
    ours, theirs = ([_u_centred(layer.double()) for layer in layers] for layers in (student, teacher))
    norms = [torch.stack([(gram * gram).sum() for gram in grams]) for grams in (ours, theirs)]
    if not all((norm > 0).all() for norm in norms):
        raise ValueError("A layer gives the same features for every row; its similarity is not defined.")
    together = torch.stack([torch.stack([(a * b).sum() for b in theirs]) for a in ours])
    return together / (norms[0][:, None] * norms[1][None, :]).sqrt()


def _u_centred(features: Tensor) -> Tensor:
    """Gram matrix with zero diagonal whose rows sum to zero (Székely and Rizzo 2014, definition 2)."""
    features = features - features.mean(dim=0)
    gram = features @ features.T
    gram.fill_diagonal_(0)
    rows = len(gram)
    sums = gram.sum(dim=1)
    gram = gram - (sums[:, None] + sums[None, :]) / (rows - 2) + sums.sum() / ((rows - 1) * (rows - 2))
    return gram.fill_diagonal_(0)


def _checked_rows(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> int:
    shapes = [tuple(layer.shape) for layer in (*student, *teacher)]
    if not student or not teacher or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"Every layer must have features of shape (n, d) with the same n, got {shapes}.")
    return shapes[0][0]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
