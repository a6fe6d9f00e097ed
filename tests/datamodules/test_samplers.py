import pytest
import torch

from lightning_distill.datamodules import ResumableSampler, systematic_resample


def ranks(size, world, **kwargs):
    return [ResumableSampler(size, num_replicas=world, rank=rank, **kwargs) for rank in range(world)]


def interleaved(samplers):
    """The global order that the ranks' orders come from."""
    return [index for step in zip(*samplers, strict=True) for index in step]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_number_of_ranks_walks_through_the_same_permutation(world):
    whole = list(ResumableSampler(24, seed=3))
    assert sorted(whole) == list(range(24))
    assert interleaved(ranks(24, world, seed=3)) == whole


@pytest.mark.parametrize(("size", "world"), [(23, 2), (10, 4), (1, 3), (3, 8)])
def test_nothing_is_dropped_and_padding_repeats_the_beginning(size, world):
    order = interleaved(ranks(size, world))
    length = -(-size // world) * world
    assert len(order) == length == world * len(ranks(size, world)[0])
    assert sorted(order[:size]) == list(range(size))
    assert order == (order[:size] * world)[:length]


def test_orders_differ_between_epochs_and_seeds_and_are_not_the_neighbouring_seeds_next_epoch():
    orders = []
    for seed in (0, 1, 2):
        sampler = ResumableSampler(50, seed=seed)
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            orders.append(tuple(sampler))
    assert len(set(orders)) == 9


def test_iteration_is_repeatable_and_leaves_the_global_generator_alone():
    sampler = ResumableSampler(50)
    before = torch.get_rng_state()
    first = list(sampler)
    torch.rand(3)
    after = torch.get_rng_state()
    assert list(sampler) == first
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(before)
    list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("position", [0, 8, 22, 24])
def test_starting_in_the_middle_leaves_the_rest_of_that_epoch_and_whole_later_ones(world, position):
    straight, resumed = ranks(23, world), ranks(23, world)
    for sampler in (*straight, *resumed):
        sampler.set_epoch(1)
    for sampler in resumed:
        sampler.start_at(1, position)
    assert interleaved(resumed) == interleaved(straight)[position:]
    for sampler in (*straight, *resumed):
        sampler.set_epoch(2)
    assert interleaved(resumed) == interleaved(straight)


def test_weights_draw_in_proportion_keep_the_length_and_agree_between_ranks():
    weights = torch.tensor([0.0, 1.0, 1.0, 2.0, 4.0, 0.0])
    one = ResumableSampler(6)
    one.set_weights(weights)
    pair = ranks(6, 2)
    for sampler in pair:
        sampler.set_weights(weights)
    assert len(list(one)) == 6
    assert interleaved(pair) == list(one)
    one.set_weights(None)
    assert sorted(one) == list(range(6))


def test_systematic_resampling_is_within_one_of_its_expectation_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 0.3, 0.5, 1.7, 2.5])
    expected = 9 * weights / weights.sum()
    repeats = 2000
    counts = torch.stack(
        [systematic_resample(weights, 9, generator).bincount(minlength=5) for _ in range(repeats)]
    ).float()
    assert (counts.sum(dim=1) == 9).all()
    assert ((counts - expected).abs() < 1).all()
    # A count takes two neighbouring values, so its standard deviation is at most 1/2: five standard errors.
    torch.testing.assert_close(counts.mean(dim=0), expected, rtol=0, atol=5 * 0.5 / repeats**0.5)


def test_equal_weights_use_each_sample_once_in_random_order():
    drawn = systematic_resample(torch.ones(100), 100, torch.Generator().manual_seed(0))
    assert sorted(drawn.tolist()) == list(range(100))
    assert drawn.tolist() != sorted(drawn.tolist())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(5), r"one entry per sample, shape \(6,\), got \(5,\)"),
        (torch.zeros(6), "not all zero, got values from 0.0 to 0.0"),
        (torch.tensor([1.0, 1, 1, 1, 1, -1]), "none negative and not all zero, got values from -1.0"),
        (torch.tensor([1.0, 1, 1, 1, 1, float("nan")]), "`weights` must be finite"),
        (torch.tensor([1.0, 1, 1, 1, 1, float("inf")]), "`weights` must be finite"),
    ],
)
def test_rejects_weights_that_cannot_be_drawn_from(weights, message):
    with pytest.raises(ValueError, match=message):
        ResumableSampler(6).set_weights(weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"size": 4, "seed": -1}, r"`seed` must be in \[0, 2\*\*32\), got -1"),
        ({"size": 4, "num_replicas": 2, "rank": 2}, "Invalid rank 2"),
    ],
)
def test_rejects_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResumableSampler(**arguments)


@pytest.mark.parametrize("offset", [0.0, 1 - 2**-53])
def test_a_weight_of_zero_is_never_drawn_even_where_the_points_meet_the_ends(monkeypatch, offset):
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.tensor(offset, dtype=torch.float64))
    weights = torch.tensor([0.0, 0.1, 0.0, 0.1, 0.1, 0.0])
    for count in range(1, 50):
        drawn = systematic_resample(weights, count, torch.Generator())
        assert len(drawn) == count
        assert set(drawn.tolist()) <= {1, 3, 4}
