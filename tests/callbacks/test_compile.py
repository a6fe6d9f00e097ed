"""Compiled students learn what others learn, and look the same from outside."""

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_distill import KD, FeatureKD, QADModule
from lightning_distill.callbacks import Compile
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec, quantized_layers

MODULES = {
    "kd": lambda: KD(MLP((64, 16, 10)), MLP((64, 32, 10))),
    "features": lambda: FeatureKD(MLP((64, 16, 10)), MLP((64, 32, 10)), pairs={"blocks.0": "blocks.0"}),
    "qad": lambda: QADModule(MLP((64, 16, 10)), spec=QuantSpec(4, 8), overrides={"head": [8, 3] * 5}, alpha=0.3),
    "dsq": lambda: QADModule(MLP((64, 16, 10)), spec=QuantSpec(2, gradient="dsq"), alpha=0.3),
}


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(name, make_trainer, callbacks=(), steps=6, ckpt_path=None):
    torch.manual_seed(0)
    module = MODULES[name]()
    trainer = make_trainer(max_steps=steps, callbacks=list(callbacks), limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=DigitsDataModule(seed=0), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_a_compiled_student_learns_the_same_under_the_same_names(name, make_trainer, tmp_path):
    _, expected = trained(name, make_trainer)
    calls = []
    backend = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph, inputs, **settings):
        calls.append(graph)
        return backend(graph, inputs, **settings)

    callback = Compile("aot_eager")
    callback.settings["backend"] = counting
    trainer, module = trained(name, make_trainer, [callback])
    assert calls
    for (own, value), other in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=own)
    assert list(module.state_dict()) == list(expected.state_dict())
    if name == "qad":
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        _, whole = trained(name, make_trainer, steps=9)
        _, resumed = trained(name, make_trainer, [Compile("aot_eager")], 9, tmp_path / "last.ckpt")
        assert quantized_layers(resumed.student)["head"].bits == (8, 3) * 5
        for value, other in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_teacher_is_compiled_too_unless_it_shall_not(make_trainer):
    for teacher, expected in ((True, 2), (False, 1)):
        torch._dynamo.reset()
        seen = set()

        def noting(graph, inputs, seen=seen):
            seen.add(sum(value.numel() for value in inputs if isinstance(value, torch.nn.Parameter)))
            return graph

        callback = Compile("eager", teacher=teacher)
        callback.settings["backend"] = noting
        trained("kd", make_trainer, [callback], steps=2)
        assert len(seen) == expected


def test_what_cannot_be_compiled_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"`backend` must be one of \[.*'inductor'.*\], got 'gcc'"):
        Compile("gcc")
    with pytest.raises(TypeError, match=r"but the module is a BoringModel\. Call `module\.compile\(\)` instead"):
        make_trainer(max_steps=1, callbacks=[Compile()]).fit(BoringModel())
