import pytest
import torch

from lightning_distill.hardware import from_nchwc, pad_to_cacheline, to_nchwc


@pytest.mark.chapter("D41", api="lightning_distill.hardware.to_nchwc")
def test_blocks_are_the_golden_ones(golden):
    case = golden("nchw_to_nchwc")
    y = to_nchwc(case.inputs["x"], int(case.inputs["v"]))
    assert list(y.shape) == [int(size) for size in case.expected["shape"]]
    assert torch.equal(y, case.expected["y"])
    assert y.is_contiguous()


@pytest.mark.chapter("D41", api="lightning_distill.hardware.pad_to_cacheline")
def test_sizes_are_whole_cache_lines():
    assert [pad_to_cacheline(n) for n in (1, 64, 65, 200)] == [64, 64, 128, 256]
    assert pad_to_cacheline(0) == 0
    assert pad_to_cacheline(7, 3) == 9


@pytest.mark.chapter("D41", api="lightning_distill.hardware.from_nchwc")
@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("channels", [1, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_round_trip_is_exact(spatial, channels, dtype):
    x = (100 * torch.randn(2, channels, *spatial)).to(dtype)
    y = to_nchwc(x, 4)
    assert y.shape == (2, -(-channels // 4), *spatial, 4)
    assert torch.equal(from_nchwc(y, channels), x)
    for channel in range(channels):  # the definition
        assert torch.equal(y[:, channel // 4, ..., channel % 4], x[:, channel])


def test_gradients_go_through():
    x = torch.randn(2, 3, 4, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: to_nchwc(t, 2), (x,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_nchwc(torch.zeros(1, 2), 0), "`v` must be positive, got 0"),
        (lambda: to_nchwc(torch.zeros(3), 2), r"shape \(N, C, ...\) with at least one channel, got \(3,\)"),
        (lambda: from_nchwc(torch.zeros(1, 2, 4), 4), "from 5 to 8 for 2 blocks of 4, got 4"),
        (lambda: from_nchwc(torch.zeros(1, 2, 4), 9), "from 5 to 8 for 2 blocks of 4, got 9"),
        (lambda: from_nchwc(torch.zeros(2, 4), 4), "blocks, ..., v"),
        (lambda: pad_to_cacheline(-1), "`nbytes` must be at least 0"),
        (lambda: pad_to_cacheline(1, 0), "`line` positive, got 1 and 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
