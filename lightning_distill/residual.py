"""Students that add up: each learns what the ones before it have left of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_distill.tasks import to_outputs


def residual_targets(teacher: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    r"""What is left for the next student: :math:`f_T - \sum_j f_{S_j}`.

    As in boosting, the sum of all students then approaches the teacher. (To subtract only the student before, as it is
    sometimes printed, makes the outputs oscillate: see ERR-49.)

    Args:
        teacher: Its outputs, any shape.
        outputs: Those of all students so far, each of the same shape.

    Example:
        >>> residual_targets(torch.tensor(10.0), [torch.tensor(4.0), torch.tensor(3.0)])
        tensor(3.)
    """
    return teacher - sum(outputs, torch.zeros_like(teacher))


class ResidualEnsemble(nn.Module):
    """Sum of the logits of several networks, of which the last one is trained.

    A student that is trained as this sum learns exactly what its frozen predecessors lack of the teacher (in the form
    of boosting; Gao et al. 2021, https://arxiv.org/abs/2002.09168, have one such assistant). It costs as much as all
    of its members together.

    Args:
        members: Networks with equally many outputs, the new one last. All but the last are frozen in place.

    Raises:
        ValueError: If there are none.

    Example:
        >>> ensemble = ResidualEnsemble([nn.Linear(2, 3), nn.Linear(2, 3)])
        >>> [parameter.requires_grad for parameter in ensemble.parameters()]
        [False, False, True, True]
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("`members` is empty: a sum needs at least one network.")
        self.members = nn.ModuleList(members)
        for member in members[:-1]:
            member.requires_grad_(False)
        self.train(self.training)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Sum of what the members say, logits."""
        said = [to_outputs(member(*inputs, **named)).logits for member in self.members]
        return torch.stack(said).sum(dim=0)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the last member; the others stay in eval mode."""
        super().train(mode)
        for member in self.members[:-1]:
            member.eval()
        return self


def residual_members(network: nn.Module) -> list[nn.Module]:
    """The members of a :class:`ResidualEnsemble`; of any other network, itself."""
    return list(network.members) if isinstance(network, ResidualEnsemble) else [network]


__all__ = ["ResidualEnsemble", "residual_members", "residual_targets"]
