import pytest
import torch

from lightning_distill.weighting import depth_weights


@pytest.mark.chapter("A55", api="lightning_distill.weighting.depth_weights")
def test_weights_grow_with_depth(golden):
    case = golden("layer_weights_linear")
    weights = torch.tensor(depth_weights(int(case.inputs["L"])), dtype=torch.float64)
    torch.testing.assert_close(weights, case.expected["normalised"], rtol=case.rtol, atol=case.atol)
    assert depth_weights(3, normalise="max") == pytest.approx([1 / 3, 2 / 3, 1])
    assert sum(depth_weights(17)) == pytest.approx(1)


def test_rejects_bad_values():
    with pytest.raises(ValueError, match="`layers` must be positive, got 0"):
        depth_weights(0)
    with pytest.raises(ValueError, match="`normalise` must be 'sum' or 'max', got 'mean'"):
        depth_weights(2, normalise="mean")
