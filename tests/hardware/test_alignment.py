import pytest

from lightning_distill.hardware import align_channels, is_aligned, simd_width


@pytest.mark.chapter("D39", api="lightning_distill.hardware.simd_width")
def test_alignment_depends_on_the_width_of_the_values(golden):
    case = golden("simd_friendly")
    for width in (8, 16):
        got = [is_aligned(int(channels), width) for channels in case.inputs["channels"]]
        assert got == [bool(ok) for ok in case.expected[f"ok_V{width}"]]
    assert [simd_width("neon", bits) for bits in (8, 16, 32)] == [16, 8, 4]
    assert [simd_width("avx2", 32), simd_width("avx512", 32)] == [8, 16]


@pytest.mark.chapter("D40", api="lightning_distill.hardware.align_channels")
def test_channels_are_rounded_down_but_to_one_vector_at_least(golden):
    case = golden("channel_alignment")
    width = int(case.inputs["V"])
    got = [align_channels(int(channels), width) for channels in case.inputs["C"]]
    assert got == case.expected["floor_min_one_vector"].int().tolist()


@pytest.mark.erratum("ERR-65")
def test_printed_alignment_leaves_no_channels(golden):
    case = golden("channel_alignment")
    width = int(case.inputs["V"])
    printed = [int(channels) // width * width for channels in case.inputs["C"]]
    assert printed == case.expected["as_written"].int().tolist()
    assert printed[:2] == [0, 0]


@pytest.mark.parametrize("width", [1, 3, 4, 7, 16])
def test_modes_bracket_the_number_of_channels(width):
    for channels in range(1, 70):
        low, near, high = (align_channels(channels, width, mode=mode) for mode in ("floor", "nearest", "ceil"))
        assert {low % width, near % width, high % width} == {0}
        assert width <= low <= near <= high < channels + width
        assert low <= max(channels, width)
        candidates = range(width, 70 + width, width)
        assert abs(near - channels) == min(abs(candidate - channels) for candidate in candidates)
    if width % 2 == 0:
        assert align_channels(width + width // 2, width, mode="nearest") == 2 * width


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"`isa` must be one of .*, got 'sse'"):
        simd_width("sse", 8)
    with pytest.raises(ValueError, match="`bits` must be 8, 16, 32 or 64, got 4"):
        simd_width("neon", 4)
    with pytest.raises(ValueError, match="`channels` must be positive, got 0"):
        align_channels(0, 8)
    with pytest.raises(ValueError, match="`width` must be positive, got 0"):
        is_aligned(8, 0)
    with pytest.raises(ValueError, match=r"`mode` must be .* got 'up'"):
        align_channels(8, 8, mode="up")
