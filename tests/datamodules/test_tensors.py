import pytest
import torch

from lightning_distill.datamodules import InMemoryDataModule, TensorDataModule, choose_stratified, corrupt_labels
from lightning_distill.outputs import UNLABELLED

# 60, 30 and 10 of 100.
LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
INPUTS = torch.arange(100).float().unsqueeze(1)


def data(**kwargs):
    return TensorDataModule((INPUTS, LABELS), **kwargs)


def epoch(module):
    """Inputs, labels and indices of one epoch, put together."""
    return tuple(torch.cat(parts) for parts in zip(*module.train_dataloader(), strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_inputs_labels_and_positions_and_the_last_is_kept(num_workers):
    batches = list(data(batch_size=30, num_workers=num_workers).train_dataloader())
    assert [len(index) for _, _, index in batches] == [30, 30, 30, 10]
    for inputs, labels, index in batches:
        assert torch.equal(inputs, INPUTS[index])
        assert torch.equal(labels, LABELS[index])
    assert sorted(torch.cat([index for *_, index in batches]).tolist()) == list(range(100))


def test_evaluation_is_in_order_and_without_an_index_that_would_mean_a_training_sample():
    module = TensorDataModule((INPUTS, LABELS), (INPUTS + 100, LABELS), (INPUTS + 200, LABELS), eval_batch_size=64)
    for loader, offset in ((module.val_dataloader(), 100), (module.test_dataloader(), 200)):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [2, 2]
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), INPUTS + offset)
        assert torch.equal(torch.cat([labels for _, labels in batches]), LABELS)


@pytest.mark.parametrize(
    ("count", "expected"), [(3, [1, 1, 1]), (10, [6, 3, 1]), (50, [30, 15, 5]), (100, [60, 30, 10])]
)
def test_the_choice_of_labels_has_the_classes_proportions(count, expected):
    chosen = choose_stratified(LABELS, count, seed=0)
    counts = LABELS[chosen].bincount(minlength=3)
    # One each comes first, which may cost the largest class one of its proportional share.
    assert (counts - torch.tensor(expected)).abs().max() <= 1
    assert counts.sum() == count
    assert chosen.tolist() == sorted(set(chosen.tolist()))


@pytest.mark.parametrize("sizes", [(1, 1, 98), (1, 50), (7, 7, 7, 7), (2, 3, 400, 5)], ids=str)
def test_every_count_gives_each_class_at_least_one_and_never_more_than_it_has(sizes):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    for count in range(len(sizes), len(labels) + 1):
        counts = labels[choose_stratified(labels, count, seed=count)].bincount(minlength=len(sizes))
        assert counts.sum() == count
        assert (counts >= 1).all()
        assert (counts <= torch.tensor(sizes)).all()
        exact = count * torch.tensor(sizes) / len(labels)
        assert ((counts - exact).abs() < 2 + len(sizes)).all()


def test_the_choice_depends_on_the_seed_and_a_smaller_one_is_part_of_a_larger_one():
    labels = torch.arange(200) % 4
    small, large, other = (set(choose_stratified(labels, n, seed=s).tolist()) for n, s in ((20, 0), (40, 0), (20, 1)))
    assert small < large
    assert small != other


def test_hidden_labels_stay_as_an_unlabelled_transfer_set_or_are_dropped_with_their_indices_kept():
    _, labels, index = epoch(data(num_labels=20))
    assert len(index) == 100
    assert (labels != UNLABELLED).sum() == 20
    known = labels != UNLABELLED
    assert torch.equal(labels[known], LABELS[index[known]])

    dropped = epoch(data(num_labels=20, unlabelled=False))
    assert sorted(dropped[2].tolist()) == sorted(index[known].tolist())
    assert torch.equal(dropped[0], INPUTS[dropped[2]])
    assert torch.equal(dropped[1], LABELS[dropped[2]])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.99])
def test_noise_replaces_exactly_that_share_by_other_classes(rate):
    _, labels, index = epoch(data(label_noise=rate))
    assert (labels != LABELS[index]).sum() == round(100 * rate)
    assert labels.min() >= 0
    assert labels.max() <= 2
    assert torch.equal(data(label_noise=rate).splits.train[1], LABELS)


def test_noise_is_uniform_over_the_other_classes():
    """Pearson's statistic of 9 cells against the 99.9 % quantile of chi-squared with 8 degrees of freedom."""
    labels = torch.full((9000,), 3)
    wrong = corrupt_labels(labels, 0.5, classes=10, seed=0)
    counts = wrong[wrong != 3].bincount(minlength=10)
    assert counts[3] == 0
    observed = counts[torch.arange(10) != 3].float()
    assert ((observed - 500) ** 2 / 500).sum() < 26.12


def test_noise_falls_on_labels_that_stay_and_leaves_hidden_ones_hidden():
    _, labels, index = epoch(data(num_labels=50, label_noise=0.2))
    known = labels != UNLABELLED
    assert known.sum() == 50
    assert (labels[known] != LABELS[index[known]]).sum() == 10


def test_labels_that_are_missing_already_are_no_class_and_are_never_chosen_or_falsified():
    partly = LABELS.clone()
    partly[::2] = UNLABELLED
    module = TensorDataModule((INPUTS, partly), num_labels=10, label_noise=0.5)
    _, labels, index = epoch(module)
    assert module.classes == 3
    known = index[labels != UNLABELLED]
    assert len(known) == 10
    assert (known % 2 == 1).all()


def test_seeds_give_other_choices_noise_and_orders_and_the_same_seed_the_same():
    def everything(seed):
        return torch.stack(epoch(data(seed=seed, num_labels=30, label_noise=0.3))[1:])

    assert torch.equal(everything(0), everything(0))
    assert not torch.equal(everything(0), everything(1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_leave_the_global_random_state_alone(num_workers):
    module = TensorDataModule(
        (INPUTS, LABELS), (INPUTS, LABELS), num_labels=10, label_noise=0.1, num_workers=num_workers
    )
    before = torch.get_rng_state()
    list(module.train_dataloader())
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_weights_count_as_the_indices_do_also_when_samples_were_dropped():
    module = data(num_labels=20, unlabelled=False)
    favourite = module.train_set.tensors[2][7]
    module.set_weights(torch.nn.functional.one_hot(favourite, 100).float())
    assert epoch(module)[2].tolist() == [favourite] * 20
    module.set_weights(None)
    assert len(set(epoch(module)[2].tolist())) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 101}, r"`num_labels` must be between 3 \(one per class\) and 100 \(all labels\), got 101"),
        ({"num_labels": 2}, "`num_labels` must be between 3 .* got 2"),
        ({"label_noise": 1.0}, r"`label_noise` must be in \[0, 1\), got 1.0"),
        ({"label_noise": 40}, "got 40; it is a share, not a percentage"),
        ({"label_noise": float("nan")}, "`label_noise` must be in .* got nan"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"seed": -1}, r"`seed` must be in \[0, 2\*\*32\), got -1"),
        ({"test": (INPUTS[:0], LABELS[:0])}, r"`test` is empty: inputs of shape \(0, 1\)"),
        ({"validation": (INPUTS, LABELS[:5])}, r"`validation` needs one label per input, .* \(100, 1\) .* \(5,\)"),
    ],
)
def test_rejects_arguments_outside_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        data(**arguments)


def test_other_errors_say_what_to_do():
    with pytest.raises(TypeError, match=r"`train` needs integer class indices .* torch.float32; `labels.long\(\)`"):
        TensorDataModule((INPUTS, LABELS.float()))
    with pytest.raises(ValueError, match=r"TensorDataModule has no test set; give it one: `test=\(inputs, labels\)`"):
        data().test_dataloader()
    with pytest.raises(ValueError, match=r"original training set, shape \(100,\), got \(20,\)"):
        data(num_labels=20, unlabelled=False).set_weights(torch.ones(20))
    with pytest.raises(ValueError, match="`classes` must be at least 2 for noise in labels, got 1"):
        corrupt_labels(torch.zeros(4, dtype=torch.long), 0.5, classes=1, seed=0)
    with pytest.raises(ValueError, match=r"`rate` must be in \[0, 1\), got 1"):
        corrupt_labels(LABELS, 1, classes=3, seed=0)
    with pytest.raises(TypeError, match=r"InMemoryDataModule is an `InMemoryDataModule` without a `load\(\)`"):
        InMemoryDataModule().setup()
