"""New statistics of batch normalizations, against PyTorch's own and against all values at once."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_distill.recovery import Moments, recalibrate_batch_norm

API = "lightning_distill.recovery."


@pytest.mark.chapter("D34", api=API + "recalibrate_batch_norm")
def test_statistics_are_the_golden_ones(golden):
    case = golden("bn_recalibration")
    network = nn.BatchNorm1d(2).double()
    for kind in ("cumulative", "pooled"):
        assert recalibrate_batch_norm(network, list(case.inputs["batches"]), statistics=kind) == 1
        torch.testing.assert_close(network.running_mean, case.expected[f"{kind}_mean"], rtol=case.rtol, atol=case.atol)
        torch.testing.assert_close(network.running_var, case.expected[f"{kind}_var"], rtol=case.rtol, atol=case.atol)


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv1d(4, 3, 3),
        nn.BatchNorm1d(3, affine=False),
    )


def batches(sizes=(8, 8, 8)):
    torch.manual_seed(2)
    return [(torch.randn(size, 2, 12) * (1 + i), torch.zeros(size).long()) for i, size in enumerate(sizes)]


def test_cumulative_is_what_torch_does_and_nothing_else_changes():
    ours, theirs = network(), network()
    theirs[3] = nn.Identity()  # update_bn runs dropout in training mode
    before = {name: value.clone() for name, value in ours.state_dict().items() if "running" not in name}
    modes = [module.training for module in ours.modules()]
    ours[1].eval()
    assert recalibrate_batch_norm(ours, batches(), statistics="cumulative") == 2
    update_bn(batches(), theirs)
    for i in (1, 5):
        torch.testing.assert_close(ours[i].running_mean, theirs[i].running_mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours[i].running_var, theirs[i].running_var, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())
    assert [module.training for module in ours.modules()] == [
        mode and m is not ours[1] for mode, m in zip(modes, ours.modules(), strict=True)
    ]
    assert not ours[1]._forward_pre_hooks


def test_pooled_statistics_are_those_of_all_values_together_also_of_unequal_batches():
    ours = network()
    data = batches((8, 3, 16))
    recalibrate_batch_norm(ours, data)
    with torch.no_grad():
        values = torch.cat([ours[0](x) for x, _ in data]).movedim(1, 0).flatten(1)
    torch.testing.assert_close(ours[1].running_mean, values.mean(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1].running_var, values.var(dim=1), rtol=1e-4, atol=1e-6)


def test_both_agree_where_the_batches_have_one_mean():
    moments = Moments()
    x = torch.randn(10_000, 3, dtype=torch.float64)
    for part in (x, -x):
        moments.add(part - part.mean(dim=0))
    pooled, cumulative = moments.statistics("pooled"), moments.statistics("cumulative")
    torch.testing.assert_close(pooled[0], cumulative[0])
    torch.testing.assert_close(pooled[1], cumulative[1], rtol=1e-3, atol=0)


def test_networks_without_statistics_are_refused_and_nothing_is_left_behind():
    with pytest.raises(ValueError, match="Linear has no batch normalization with running statistics"):
        recalibrate_batch_norm(nn.Linear(2, 2), batches())
    with pytest.raises(ValueError, match="no batch normalization"):
        recalibrate_batch_norm(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), batches())
    ours = network()
    with pytest.raises(ValueError, match="`batches` is empty"):
        recalibrate_batch_norm(ours, [])
    with pytest.raises(ValueError, match="`statistics` must be 'pooled' or 'cumulative', got 'mean'"):
        recalibrate_batch_norm(ours, batches(), statistics="mean")
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate_batch_norm(ours, [torch.randn(2, 7, 12)])
    assert ours[1].running_mean.tolist() == [0.0] * 4
    assert not ours[1]._forward_pre_hooks
    assert ours[1].num_batches_tracked.item() == 0
