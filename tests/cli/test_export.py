"""``lightning-distill export`` of a student that was trained from the same configuration."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_distill import QADModule
from lightning_distill.cli import main
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec, quantized_layers, read_packed, run_onnx

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # LightningCLI with jsonargparse 4.53
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the exporter of torch
]

CONFIGURATION = {
    "model": {
        "class_path": "QADModule",
        "init_args": {
            "student": {"class_path": "lightning_distill.networks.MLP", "init_args": {"sizes": [64, 32, 10]}},
            "spec": {
                "class_path": "lightning_distill.quantization.QuantSpec",
                "init_args": {"weights": 4, "activations": 8},
            },
            "alpha": 0.5,
        },
    },
    "data": {"class_path": "DigitsDataModule"},
    "trainer": {
        "max_steps": 5,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A configuration and the checkpoint of its training."""
    folder = tmp_path_factory.mktemp("export")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIGURATION))
    main(["fit", "-c", str(config), f"--trainer.default_root_dir={folder}"])
    (checkpoint,) = folder.rglob("*.ckpt")
    return str(config), str(checkpoint)


def student_of(checkpoint):
    """The fake-quantized student that a checkpoint holds."""
    module = QADModule(MLP((64, 32, 10)), spec=QuantSpec(weights=4, activations=8))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    module.student.load_state_dict({key[8:]: value for key, value in state.items() if key.startswith("student.")})
    return module.student.eval()


def images():
    data = DigitsDataModule()
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))[0]


def test_packed_weights_say_what_the_trained_student_says(trained, tmp_path, capsys):
    config, checkpoint = trained
    path = tmp_path / "student.safetensors"
    main(["export", "-c", config, "--ckpt", checkpoint, "--path", str(path)])
    printed = capsys.readouterr().out
    assert f"{path}: {path.stat().st_size:,} bytes" in printed
    assert "read again, outputs differ by" in printed
    network = read_packed(MLP((64, 32, 10)), path)
    assert {layer.weight_bits for layer in quantized_layers(network).values()} == {4}
    with torch.no_grad():
        assert torch.equal(network(images()), student_of(checkpoint)(images()))


def test_onnx_says_what_the_trained_student_says(trained, tmp_path, capsys):
    config, checkpoint = trained
    path = tmp_path / "student.onnx"
    main(["export", "-c", config, "--ckpt", checkpoint, "--path", str(path)])
    printed = capsys.readouterr().out
    assert "have the same maximum" in printed
    assert "ms for 64 inputs" in printed
    with torch.no_grad():
        expected = student_of(checkpoint)(images())
    torch.testing.assert_close(run_onnx(path, images()), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_a_model_of_tokens_takes_other_lengths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"Paragraph {i}: {i * i} and {i + 7}." * 3 for i in range(300)))
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    student = {
        "class_path": "lightning_distill.networks.from_config",
        "init_args": {"model_type": "llama", "head": "causal-lm", "config": sizes},
    }
    arguments = {"student": student, "spec": {"weights": 8, "activations": 8}, "task": {"class_path": "CausalLM"}}
    data = {"class_path": "TextDataModule", "init_args": {"files": ["text.txt"], "vocab_size": 300, "length": 12}}
    configuration = CONFIGURATION | {"model": {"class_path": "QADModule", "init_args": arguments}, "data": data}
    Path("text.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "-c", "text.yaml"])
    (checkpoint,) = Path().rglob("*.ckpt")
    main(["export", "-c", "text.yaml", "--ckpt", str(checkpoint), "--path", "student.onnx"])
    assert "ms for 64 inputs" in capsys.readouterr().out
    tokens = torch.randint(300, (2, 5))
    said = run_onnx("student.onnx", {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    assert said.shape == (2, 5, 300)
    torch.testing.assert_close(
        said[:, :3],
        run_onnx(
            "student.onnx",
            {  # later tokens do not count
                "input_ids": tokens[:, :3],
                "attention_mask": torch.ones_like(tokens[:, :3]),
            },
        ),
        rtol=1e-3,
        atol=1e-4,
    )


def test_nothing_is_replaced_by_chance(trained, tmp_path, capsys):
    config, checkpoint = trained
    path = tmp_path / "student.safetensors"
    path.write_text("mine")
    with pytest.raises(SystemExit, match=r"lightning-distill export: error: .* exists"):
        main(["export", "-c", config, "--ckpt", checkpoint, "--path", str(path)])
    assert path.read_text() == "mine"
    main(["export", "-c", config, "--ckpt", checkpoint, "--path", str(path), "--overwrite=true"])
    read_packed(MLP((64, 32, 10)), path)


def test_what_cannot_be_exported_is_refused(trained, tmp_path, capsys):
    config, checkpoint = trained
    with pytest.raises(SystemExit, match=r"must end in '\.onnx' or '\.safetensors'"):
        main(["export", "-c", config, "--ckpt", checkpoint, "--path", "student.bin"])
    with pytest.raises(SystemExit, match=r"there is no checkpoint at 'none\.ckpt'"):
        main(["export", "-c", config, "--ckpt", "none.ckpt", "--path", "student.onnx"])
    plain = yaml.safe_load(Path(config).read_text())
    plain["model"] = {
        "class_path": "KD",
        "init_args": {"alpha": 1.0, "student": CONFIGURATION["model"]["init_args"]["student"]},
    }
    other = tmp_path / "plain.yaml"
    other.write_text(yaml.safe_dump(plain))
    with pytest.raises(SystemExit, match="KD has no quantized student; use a QADModule"):
        main(["export", "-c", str(other), "--ckpt", checkpoint, "--path", "student.onnx"])
