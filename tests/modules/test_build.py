"""Terms whose parameters wait for a first batch, in training, resume and export."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_distill import KD
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import FeatureMatching, LogitStandardization
from lightning_distill.modules.first_samples import first_samples


def network(width):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))


def data(**arguments):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataModule((x, torch.arange(20) % 3), (x, torch.arange(20) % 3), batch_size=5, **arguments)


def module(**arguments):
    torch.manual_seed(2)
    return KD(network(6), network(9), terms={"hint": FeatureMatching({"2": "2"})}, **arguments)


def test_fit_builds_from_the_data_module_and_trains_the_transform(make_trainer):
    distiller = module()
    make_trainer(max_epochs=1).fit(distiller, datamodule=data())
    linear = distiller.terms["hint"].transforms[0].linear
    assert linear.weight.shape == (9, 6)
    products = linear.weight @ linear.weight.T if linear.weight.shape[0] < 6 else linear.weight.T @ linear.weight
    assert not torch.allclose(products, torch.eye(6), atol=1e-5)  # it began orthogonal
    assert distiller.export().state_dict().keys() == network(6).state_dict().keys()


def test_building_leaves_student_and_loader_as_they_were():
    distiller, source = module(), data()
    before = {name: value.clone() for name, value in distiller.student.state_dict().items()}
    loader = source.train_dataloader()
    expected = [batch[2].tolist() for batch in source.train_dataloader()]
    distiller.build(first_samples(loader))
    assert all(torch.equal(value, before[name]) for name, value in distiller.student.state_dict().items())
    assert all(part.training for part in distiller.student.modules())
    assert all(parameter.grad is None for parameter in distiller.parameters())
    assert [batch[2].tolist() for batch in loader] == expected


def test_loaders_need_a_call_of_build(make_trainer):
    x = torch.randn(12, 4)
    loader = DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=4)
    with pytest.raises(
        ValueError, match=r"terms \['hint'\] work on are not known. Pass a data module to `fit`, or call"
    ):
        make_trainer(max_epochs=1).fit(module(), loader)
    distiller = module()
    distiller.build(next(iter(loader)))
    make_trainer(max_epochs=1).fit(distiller, loader)


def test_resumed_run_equals_uninterrupted_run(make_trainer, tmp_path):
    whole = module()
    make_trainer(max_epochs=2).fit(whole, datamodule=data())
    trainer, half = make_trainer(max_epochs=1), module()
    trainer.fit(half, datamodule=data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    make_trainer(max_epochs=2).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert (
            torch.equal(value, resumed.state_dict()[name])
            if isinstance(value, torch.Tensor)
            else value == resumed.state_dict()[name]
        )


def test_checkpoints_load_without_data_or_teacher(make_trainer, tmp_path):
    trainer, distiller = make_trainer(max_epochs=1), module()
    trainer.fit(distiller, datamodule=data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = KD.load_from_checkpoint(
        tmp_path / "a.ckpt", student=network(6), terms={"hint": FeatureMatching({"2": "2"})}, weights_only=True
    )
    weight = distiller.terms["hint"].transforms[0].linear.weight
    assert torch.equal(loaded.terms["hint"].transforms[0].linear.weight, weight)


def test_measuring_before_building_leaves_the_losses_out(make_trainer):
    x = torch.randn(12, 4)
    loader = DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=4)
    (measured,) = make_trainer().validate(module(), loader, verbose=False)
    assert "val/accuracy" in measured
    assert "val/loss" not in measured
    (measured,) = make_trainer().validate(module(), datamodule=data(), verbose=False)
    assert "val/hint" in measured


def test_a_wrapped_term_is_built_too():
    distiller = module()
    outer = LogitStandardization(FeatureMatching({"2": "2"}))
    outer.build(distiller.observe((torch.randn(4, 4), torch.zeros(4, dtype=torch.long))))
    assert outer.term.transforms[0].linear.weight.shape == (9, 6)


def test_first_samples_of_other_loaders():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(6.0))

    assert first_samples(DataLoader(Stream(), batch_size=4)).tolist() == [0, 1, 2, 3]
    assert first_samples([torch.ones(3)]).tolist() == [1, 1, 1]
    single = DataLoader(TensorDataset(torch.ones(1, 2)), batch_size=4)
    assert first_samples(single)[0].shape == (1, 2)


@pytest.mark.parametrize("devices", [1])
def test_a_hook_of_ones_own_still_builds(make_trainer, devices):
    class Mine(KD):
        def setup(self, stage):
            super().setup(stage)
            self.was_set_up = stage

    torch.manual_seed(2)
    mine = Mine(network(6), network(9), terms={"hint": FeatureMatching({"2": "2"})})
    assert isinstance(mine, L.LightningModule)
    make_trainer(max_epochs=1, devices=devices).fit(mine, datamodule=data())
    assert mine.was_set_up == "fit"
