"""Add a share of the teacher's gradient to the student's own."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_distill.callbacks.weighting import InstalledWeighting
from lightning_distill.weighting import InjectionWeights
from lightning_distill.weighting.injection import Alignment


class GradientInjection(InstalledWeighting):
    r"""In every step, add to the student's own gradient a share of its gradient towards the teacher.

    .. math:: g = g_s + \beta_0 e^{-\gamma t / T} \, \mathrm{align}(g_t)

    :math:`g_t` is the gradient of the term ``teacher``, whose constant weight in the module has no effect any more;
    :math:`g_s` is that of all other terms, each with its constant weight. By default only what is orthogonal to
    :math:`g_s` is added, so that the student's own loss falls as it would without; ``"direction"`` gives the teacher's
    gradient the length of :math:`g_s`; ``"none"`` adds it as it is, which is a weighted sum of losses. See
    :class:`~lightning_distill.weighting.InjectionWeights`. Each step takes one more backward pass per term.

    Args:
        beta: Share of the teacher's gradient at the beginning, not negative.
        gamma: How fast it falls, not negative: to ``exp(-gamma)`` of it at the end of the training.
        alignment: ``"projection"``, ``"direction"`` or ``"none"``.
        teacher: Name of the term against the teacher.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training, if there is no term ``teacher``
            or no other, or something else weighs the terms already.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(
        self, beta: float = 0.5, gamma: float = 2.0, alignment: Alignment = "projection", teacher: str = "soft"
    ) -> None:
        self.beta = beta
        self.gamma = gamma
        self.alignment: Alignment = alignment
        self.teacher = teacher
        self.build({})  # checks the values

    def build(self, present: Mapping[str, float]) -> InjectionWeights:
        """The constant weights of the student's own terms, with the teacher's injected."""
        own = {name: weight for name, weight in present.items() if name != self.teacher}
        return InjectionWeights(self.beta, self.gamma, self.alignment, self.teacher, own)
