"""Distillation from what is inside a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from lightning_distill.layer_maps import MapName, named_pairs
from lightning_distill.losses.distances import Distance
from lightning_distill.losses.features import FeatureMatching
from lightning_distill.losses.term import Term
from lightning_distill.modules.arguments import Temperature
from lightning_distill.modules.kd import KD
from lightning_distill.teachers.build import TeacherLike
from lightning_distill.teachers.frozen import FrozenTeacher
from lightning_distill.teachers.teacher import Teacher
from lightning_distill.weighting import Weighting

FEATURES = "features"


class FeatureKD(KD):
    """:class:`KD`, and the student's inner features brought close to the teacher's (FitNets, Romero et al. 2015).

    ``loss = alpha * hard + (1 - alpha) * soft + feature_weight * features``. The term ``"features"`` is a
    :class:`~lightning_distill.losses.FeatureMatching`; for attention maps, contrastive terms or several distances at
    once, add terms to ``terms``. Its projections are trained with the student and left behind at export.

    Args:
        student: See :class:`KD`, as for all arguments not listed here.
        teacher: See :class:`KD`.
        pairs: Tap of the student to tap of the teacher, ``{"blocks.1": "layer2"}`` or ``{"hidden_states.3":
            "hidden_states.6"}``; or ``"uniform"``, ``"last"`` or ``"all"`` where both are networks with a list of
            layers (see :func:`~lightning_distill.layer_maps.named_pairs`).
        temperature: See :class:`KD`.
        alpha: See :class:`KD`.
        feature_weight: Weight of the term ``"features"``, not negative; scales differ, so look at ``train/features``.
            Without effect where ``weights`` is a :class:`~lightning_distill.weighting.Weighting`.
        distance: See :class:`~lightning_distill.losses.FeatureMatching`, as for the next three.
        transform: …
        pair_weights: …
        channel_dim: …
        terms: Further terms, as in :class:`KD`.
        weights: As in :class:`KD`.
        arguments: The other arguments of :class:`KD`.

    Raises:
        ValueError: If a term of ``terms`` is called ``"features"``, or as :class:`KD` and ``FeatureMatching``.

    Example:
        >>> def network(width):
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        >>> module = FeatureKD(network(8), network(32), {"1": "1"}, feature_weight=2.0)
        >>> module.weighting.weights()
        {'features': 2.0, 'hard': 0.3, 'soft': 0.7}
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: TeacherLike,
        pairs: Mapping[str, str] | MapName,
        temperature: Temperature = 4.0,
        alpha: float = 0.3,
        *,
        feature_weight: float = 1.0,
        distance: str | nn.Module | Distance = "mse",
        transform: Literal["linear", "mlp", "identity"] | nn.Module = "linear",
        pair_weights: Sequence[float] | None = None,
        channel_dim: int | None = None,
        terms: Mapping[str, Term] | None = None,
        weights: Mapping[str, float] | Weighting | None = None,
        **arguments: Any,
    ) -> None:
        if not feature_weight >= 0:  # also rejects NaN
            raise ValueError(f"`feature_weight` must not be negative, got {feature_weight}.")
        if terms and FEATURES in terms:
            raise ValueError(f"`terms` has a term named {FEATURES!r}, the name of the one made of `pairs`; rename it.")
        if isinstance(pairs, str):
            pairs = _pairs(student, teacher, pairs)
        matching = FeatureMatching(pairs, distance, transform, pair_weights, channel_dim)
        super().__init__(
            student,
            teacher,
            temperature,
            alpha,
            terms={FEATURES: matching, **(terms or {})},
            weights=weights if isinstance(weights, Weighting) else {FEATURES: feature_weight, **(weights or {})},
            **arguments,
        )


def _pairs(student: object, teacher: object, name: MapName) -> dict[str, str]:
    network = teacher.network if isinstance(teacher, FrozenTeacher) else teacher
    for who, one in (("student", student), ("teacher", network)):
        if not isinstance(one, nn.Module) or isinstance(one, Teacher):
            raise ValueError(
                f"`pairs={name!r}` looks for layers in both networks, but the {who} is a {type(one).__name__}. Pass "
                "the network itself, or the pairs: `pairs={'student.layer': 'teacher.layer'}`."
            )
    assert isinstance(student, nn.Module)
    assert isinstance(network, nn.Module)
    return named_pairs(student, network, name)
