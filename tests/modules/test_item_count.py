"""The gradient of an optimizer step does not depend on how its items were split."""

import pytest
import torch
from torch import nn

from lightning_distill.modules.item_count import ItemCount


def gradient(parts, accumulate, *, as_tensor):
    """Gradient of ``w`` after a step over ``parts``, each a list of item values; item loss ``w * value``."""
    weight = nn.Parameter(torch.ones(()))
    items = ItemCount()
    for values in parts:
        count = torch.tensor(len(values)) if as_tensor else len(values)
        mean = weight * (sum(values) / max(len(values), 1))
        (items.scale(mean, count) / accumulate).backward()
    items.correct([weight], accumulate)
    return weight.grad.item()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        [[1.0, 2.0, 3.0, 6.0]],
        [[1.0, 2.0], [3.0, 6.0]],
        [[1.0], [2.0, 3.0, 6.0]],
        [[1.0, 2.0, 3.0], [], [6.0]],
        [[], [1.0, 2.0, 3.0, 6.0]],
    ],
    ids=str,
)
def test_every_split_gives_the_mean_over_all_items(parts, as_tensor):
    assert gradient(parts, len(parts), as_tensor=as_tensor) == pytest.approx(3.0, rel=1e-6)


def test_a_last_window_with_fewer_parts_is_a_mean_as_well():
    assert gradient([[2.0, 4.0]], 4, as_tensor=False) == pytest.approx(3.0)


def test_a_second_step_starts_afresh():
    items, weight = ItemCount(), nn.Parameter(torch.ones(()))
    for values in ([1.0, 1.0, 1.0], [5.0]):
        weight.grad = None
        items.scale(weight * (sum(values) / len(values)), len(values)).backward()
        items.correct([weight], 1)
    assert weight.grad.item() == pytest.approx(5.0)


def test_a_step_without_any_item_has_a_zero_gradient():
    assert gradient([[], []], 2, as_tensor=True) == 0
