"""What a student says, in words."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_distill import KD
from lightning_distill.callbacks import WriteSample
from lightning_distill.datamodules import TensorDataModule, TextDataModule
from lightning_distill.networks import MLP, from_config
from lightning_distill.tasks import CausalLM


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph number {i}: {i * i}, {i + 7} and more." for i in range(400)))
    return TextDataModule([path], vocab_size=300, length=16)


def module():
    torch.manual_seed(0)
    config = {"vocab_size": 300, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    network = from_config("gpt2", "causal-lm", config | {"bos_token_id": 0, "eos_token_id": 0})
    return KD(network, alpha=1.0, task=CausalLM())


def test_writes_the_continuation_of_the_prompt_after_a_test(make_trainer, data, tmp_path):
    logged = []

    class Logger(CSVLogger):
        def log_text(self, key, columns, data):
            logged.append((key, columns, data))

    trainer = make_trainer(callbacks=[WriteSample("Paragraph", 12)], logger=Logger(tmp_path), limit_test_batches=1)
    torch.manual_seed(7)
    trainer.test(module(), datamodule=data, verbose=False)
    drawn = torch.rand(1)
    text = (tmp_path / "sample.txt").read_text(encoding="utf-8").removesuffix("\n")
    assert text.startswith("Paragraph")
    assert 12 <= len(data.tokenizer(text)["input_ids"]) <= 40
    assert logged == [("sample", ["text"], [[text]])]
    make_trainer(callbacks=[WriteSample("Paragraph", 12, seed=1)], limit_test_batches=1).test(
        module(), datamodule=data, verbose=False
    )
    assert (tmp_path / "sample.txt").read_text(encoding="utf-8").removesuffix("\n") != text
    torch.manual_seed(7)
    make_trainer(limit_test_batches=1).test(module(), datamodule=data, verbose=False)
    assert torch.equal(torch.rand(1), drawn)  # nobody's random numbers were touched


def test_refuses_what_cannot_write(make_trainer):
    x = TensorDataModule((torch.zeros(4, 4), torch.zeros(4).long()), test=(torch.zeros(4, 4), torch.zeros(4).long()))
    with pytest.raises(TypeError, match=r"needs a data module with a `tokenizer`.*got TensorDataModule and MLP"):
        make_trainer(callbacks=[WriteSample()]).test(KD(MLP((4, 3)), alpha=1.0), datamodule=x, verbose=False)
    for arguments, message in {
        ("", 4, 1.0): "`prompt` is empty",
        ("a", 0, 1.0): "`max_new_tokens` must be at least 1, got 0",
        ("a", 4, 0.0): "`temperature` must be positive and finite, got 0.0",
    }.items():
        with pytest.raises(ValueError, match=message):
            WriteSample(*arguments)
