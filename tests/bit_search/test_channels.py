"""Importance and bits of channels."""

import pytest
import torch

from lightning_distill.bit_search import channel_bits, channel_importance

API = "lightning_distill.bit_search."


@pytest.mark.chapter("D17", api=API + "channel_importance")
def test_importance_is_the_golden_one(golden):
    case = golden("channel_importance")
    gradient = case.inputs["grad_NCHW"]
    torch.testing.assert_close(channel_importance(gradient), case.expected["I"], rtol=case.rtol, atol=case.atol)


def test_importance_follows_the_channels_wherever_they_are():
    gradient, hidden = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    order = torch.randperm(5)
    found = channel_importance(gradient, hidden)
    assert bool((found >= 0).all())
    torch.testing.assert_close(channel_importance(gradient[:, order], hidden[:, order]), found[order])
    last = channel_importance(gradient.transpose(1, 2), hidden.transpose(1, 2), channel_dim=-1)
    torch.testing.assert_close(last, found)
    torch.testing.assert_close(found[2], sum((gradient[:, 2] * hidden[:, 2]).abs().flatten()))
    assert channel_importance(gradient.bfloat16()).dtype == torch.float32


@pytest.mark.chapter("D17", api=API + "channel_bits")
def test_the_most_important_channels_get_the_most_bits():
    importance = torch.tensor([3.0, 1.0, 10.0, 2.0, 2.0, 0.0, 7.0, 4.0, 5.0, 6.0])
    assert channel_bits(importance, (0.1, 0.9), (8, 4)).tolist() == [4, 4, 8, 4, 4, 4, 4, 4, 4, 4]
    assert channel_bits(importance, (0.3, 0.4, 0.3), (8, 4, 2)).tolist() == [4, 2, 8, 4, 2, 2, 8, 4, 4, 8]
    assert channel_bits(importance[:3], (0.5, 0.5), (8, 2)).tolist() == [8, 2, 8]
    assert channel_bits(importance, (0.0, 1.0), (8, 2)).tolist() == [2] * 10


def test_bad_shares_and_shapes_are_refused():
    importance = torch.ones(4)
    with pytest.raises(ValueError, match=r"`shares` must not be negative and sum to 1, got \[0.5, 0.4\]"):
        channel_bits(importance, (0.5, 0.4), (8, 4))
    with pytest.raises(ValueError, match=r"`bits` must fall, with one share each, got bits \[4, 8\]"):
        channel_bits(importance, (0.5, 0.5), (4, 8))
    with pytest.raises(ValueError, match="`importance` must be finite"):
        channel_bits(torch.tensor([1.0, float("nan")]), (1.0,), (8,))
    with pytest.raises(ValueError, match=r"must have the same shape, got \(2, 3\) and \(2, 4\)"):
        channel_importance(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="must have samples and channels"):
        channel_importance(torch.ones(3))
