"""``lightning-distill export`` of a student that was trained from the same configuration."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_distill import QADModule
from lightning_distill.cli import main
from lightning_distill.cli.export.latency import REPEATS, time_torch
from lightning_distill.cli.export.trained import Trained
from lightning_distill.compression import read_block_sparse, sparsity_report
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec, quantized_layers, read_packed, run_onnx, to_torchao
from lightning_distill.tasks import Classification
from lightning_distill.teachers import load_network

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


STUDENT = CONFIGURATION["model"]["init_args"]["student"]
BLOCKS = {"class_path": "BlockSparsity", "init_args": {"sparsity": 0.5, "block": [8, 8], "skip": ["head"], "every": 1}}
FLOAT = CONFIGURATION | {"model": {"class_path": "KD", "init_args": {"student": STUDENT, "alpha": 1.0}}}
KINDS = {
    "quantized": CONFIGURATION,
    "sparse": FLOAT | {"trainer": FLOAT["trainer"] | {"callbacks": [BLOCKS]}},
    "sparse and quantized": CONFIGURATION | {"trainer": CONFIGURATION["trainer"] | {"callbacks": [BLOCKS]}},
    "float": FLOAT,
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A configuration and the checkpoint of its training, by the kind of its student."""
    made = {}

    def trained(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("export")
            config = folder / "config.yaml"
            config.write_text(yaml.safe_dump(KINDS[kind]))
            main(["fit", "-c", str(config), f"--trainer.default_root_dir={folder}"])
            (checkpoint,) = folder.rglob("*.ckpt")
            made[kind] = str(config), str(checkpoint)
        return made[kind]

    return trained


@pytest.fixture
def trained(train):
    """Those of a quantized student."""
    return train("quantized")


@pytest.fixture
def export(capsys):
    """Run the command; returns what it prints."""

    def run(trained, path, *options):
        config, checkpoint = trained
        capsys.readouterr()
        main(["export", "-c", config, "--ckpt", checkpoint, "--path", str(path), *options])
        return capsys.readouterr().out

    return run


@pytest.fixture
def without_compiler(monkeypatch):
    def fail(network):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)


def student_of(checkpoint):
    """The fake-quantized student that a checkpoint holds."""
    module = QADModule(MLP((64, 32, 10)), spec=QuantSpec(weights=4, activations=8))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    module.student.load_state_dict({key[8:]: value for key, value in state.items() if key.startswith("student.")})
    return module.student.eval()


def weights_of(checkpoint):
    """The student without quantization that a checkpoint holds."""
    network = MLP((64, 32, 10))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({key[8:]: value for key, value in state.items() if key.startswith("student.")})
    return network.eval()


def images():
    data = DigitsDataModule()
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))[0]


def test_packed_weights_say_what_the_trained_student_says(trained, tmp_path, export):
    path = tmp_path / "student.safetensors"
    printed = export(trained, path)
    assert f"{path}: {path.stat().st_size:,} bytes" in printed
    assert "read again, outputs differ by" in printed
    network = read_packed(MLP((64, 32, 10)), path)
    assert {layer.weight_bits for layer in quantized_layers(network).values()} == {4}
    with torch.no_grad():
        assert torch.equal(network(images()), student_of(trained[1])(images()))


def test_onnx_says_what_the_trained_student_says(trained, tmp_path, export):
    path = tmp_path / "student.onnx"
    printed = export(trained, path)
    assert "have the same maximum" in printed
    assert "ms for 64 inputs" in printed
    with torch.no_grad():
        expected = student_of(trained[1])(images())
    torch.testing.assert_close(run_onnx(path, images()), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_a_student_that_is_not_quantized_goes_to_onnx_too(train, tmp_path, export):
    path = tmp_path / "student.onnx"
    printed = export(train("float"), path)
    assert "ms for 64 inputs (ONNX Runtime" in printed  # nothing to compare it with
    with torch.no_grad():
        expected = weights_of(train("float")[1])(images())
    torch.testing.assert_close(run_onnx(path, images()), expected, rtol=1e-4, atol=1e-5)


def test_a_file_for_torchao_says_what_the_trained_student_says(trained, tmp_path, export, without_compiler):
    pytest.importorskip("torchao")
    path = tmp_path / "new" / "student.pt"
    printed = export(trained, path)
    assert f"{path}: {path.stat().st_size:,} bytes, " in printed
    assert "read again, outputs differ by" in printed
    assert "torch.compile: not possible here: no compiler\n64 inputs, torch" in printed
    state = torch.load(path, weights_only=True)
    assert {type(state[name]).__name__ for name in ("blocks.0.0.weight", "head.weight")} == {"Int8Tensor"}
    network = MLP((64, 32, 10))
    network.load_state_dict(state, assign=True)
    with torch.no_grad():
        found, expected = network(images()), student_of(trained[1])(images())
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    assert [file.name for file in path.parent.iterdir()] == ["student.pt"]


@pytest.mark.slow
def test_a_file_for_torchao_is_compiled_and_needs_only_torchao(trained, tmp_path, export):
    pytest.importorskip("torchao")
    path = tmp_path / "student.pt"
    printed = export(trained, path).splitlines()
    assert [line.split(":")[0] for line in printed[1:3]] == ["eager", "torch.compile"]
    for line in printed[1:3]:
        own, ratio, before = (float(number) for number in re.findall(r"\d+\.\d+", line))
        assert own / before == pytest.approx(ratio, rel=0.05)  # of rounded numbers
    program = f"import torch, torchao; print(type(torch.load({str(path)!r})['head.weight']).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "Int8Tensor\n"


def plan_of(path):
    """The plan of blocks in the header of a file."""
    header = path.read_bytes()
    return json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"][PLAN])


PLAN = "lightning_distill_block_sparsity"


def test_blocks_of_zeros_are_left_out_as_the_training_cut_them(train, tmp_path, export):
    path = tmp_path / "student.safetensors"
    printed = export(train("sparse"), path)
    assert "without 16 of the 32 blocks of 8x8 in sparse layers; read again, outputs differ by 0.00e+00" in printed
    assert plan_of(path)["block"] == [8, 8]
    network, expected = read_block_sparse(MLP((64, 32, 10)), path), weights_of(train("sparse")[1])
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in network.state_dict().items())
    assert sparsity_report(network, (8, 8), skip=["head"]).block_sparsity == 0.5
    export(train("sparse"), tmp_path / "whole.safetensors", "--format=float")
    saved = (tmp_path / "whole.safetensors").stat().st_size - path.stat().st_size
    assert saved > 3 * 64 * 16  # 4 bytes for each of them, less what the plan takes


def test_blocks_of_zeros_of_a_quantized_student_have_few_bits_as_well(train, tmp_path, export):
    path = tmp_path / "student.safetensors"
    printed = export(train("sparse and quantized"), path)
    assert "of the same bits with all blocks; read again, outputs differ by 0.00e+00" in printed
    network = read_block_sparse(MLP((64, 32, 10)), path)
    assert {layer.weight_bits for layer in quantized_layers(network).values()} == {4}
    with torch.no_grad():
        assert torch.equal(network(images()), student_of(train("sparse and quantized")[1])(images()))
    packed = tmp_path / "packed.safetensors"
    export(train("sparse and quantized"), packed, "--format", "packed")
    read_packed(MLP((64, 32, 10)), packed)


def test_the_ending_and_the_student_imply_the_format(train, tmp_path, export):
    export(train("float"), tmp_path / "student.safetensors")
    network = load_network(MLP((64, 32, 10)), str(tmp_path / "student.safetensors"))
    expected = weights_of(train("float")[1]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    printed = export(train("float"), tmp_path / "blocks.safetensors", "--format", "block_sparse")
    assert "to leave out blocks of 16x16 would save nothing; read again" in printed
    read_block_sparse(MLP((64, 32, 10)), tmp_path / "blocks.safetensors")


@pytest.mark.parametrize(
    ("kind", "name", "reader"),
    [
        ("quantized", "packed", "read_packed"),
        ("sparse", "block_sparse", "read_block_sparse"),
        ("float", "float", "load_network"),
    ],
)
def test_a_file_that_reads_as_another_network_is_not_left(kind, name, reader, train, tmp_path, export, monkeypatch):
    monkeypatch.setattr(f"lightning_distill.cli.export.formats.{reader}", lambda network, file: network)
    with pytest.raises(SystemExit, match=r"error: read again, the outputs differ by nan of their size.* nothing was"):
        export(train(kind), tmp_path / "student.safetensors", "--format", name)
    assert list(tmp_path.iterdir()) == []


def test_an_inexact_file_for_torchao_is_not_left(trained, tmp_path, export, monkeypatch):
    pytest.importorskip("torchao")

    def wrong(network, inputs):
        with torch.no_grad():
            network.head.bias.mul_(1.5).add_(1.0)
        return to_torchao(network, inputs)

    monkeypatch.setattr("lightning_distill.cli.export.formats.to_torchao", lambda n, x: wrong(copy.deepcopy(n), x))
    with pytest.raises(SystemExit, match=r"the outputs differ by .* of their size, more than 0\.05; nothing"):
        export(trained, tmp_path / "student.pt")
    assert list(tmp_path.iterdir()) == []


def train_on_text(**arguments):
    """A configuration and the checkpoint of a quantized language model, in the folder one is in."""
    Path("text.txt").write_text("\n\n".join(f"Paragraph {i}: {i * i} and {i + 7}." * 3 for i in range(300)))
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    student = {
        "class_path": "lightning_distill.networks.from_config",
        "init_args": {"model_type": "llama", "head": "causal-lm", "config": sizes},
    }
    arguments |= {"student": student, "spec": {"weights": 8, "activations": 8}, "task": {"class_path": "CausalLM"}}
    data = {"class_path": "TextDataModule", "init_args": {"files": ["text.txt"], "vocab_size": 300, "length": 12}}
    configuration = CONFIGURATION | {"model": {"class_path": "QADModule", "init_args": arguments}, "data": data}
    Path("text.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "-c", "text.yaml"])
    (checkpoint,) = Path().rglob("*.ckpt")
    return "text.yaml", str(checkpoint)


def test_a_model_of_tokens_goes_to_torchao(tmp_path, monkeypatch, export, without_compiler):
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    printed = export(train_on_text(skip=["*embed_tokens"]), "student.pt")
    assert float(re.findall(r"differ by (\S+) of", printed)[0]) < 0.01


def test_a_model_of_tokens_takes_other_lengths(tmp_path, monkeypatch, export):
    monkeypatch.chdir(tmp_path)
    assert "ms for 64 inputs" in export(train_on_text(), "student.onnx")
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


def test_timed_is_what_is_compared(without_compiler):
    batch = torch.randn(64, 64), torch.zeros(64, dtype=torch.long)
    trained = Trained(MLP((64, 32, 10)), Classification(), batch)
    assert torch.equal(trained.inputs, batch[0])
    assert trained.samples == 64
    assert trained.float32_bytes == 4 * (64 * 32 + 32 + 32 * 10 + 10)
    seen, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    eager, compiled = time_torch([lambda x: seen.append((torch.get_num_threads(), x.shape))] * 2, trained.inputs)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert seen == [(1, (64, 64))] * 2 * (REPEATS + 3)
    assert len(eager) == 2
    assert all(0 < seconds < 1 for seconds in eager)
    assert compiled == "not possible here: no compiler"


@pytest.mark.parametrize("ending", [".onnx", ".pt", ".safetensors"])
def test_nothing_is_replaced_by_chance(ending, trained, tmp_path, export, without_compiler):
    path = tmp_path / f"student{ending}"
    path.write_text("mine")
    with pytest.raises(SystemExit, match=r"lightning-distill export: error: .* exists"):
        export(trained, path)
    assert path.read_text() == "mine"
    export(trained, path, "--overwrite=true")
    assert path.stat().st_size > 1000
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_exported_is_refused(train, trained, tmp_path, export, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (["student.bin"], r"must end in '\.onnx', '\.pt' or '\.safetensors', got 'student\.bin'"),
        (["student.onnx", "--format=packed"], r"must end in '\.safetensors' for the format 'packed', got 'student\.o"),
        (["student.safetensors", "--format=float"], "the student is quantized; use the format 'packed'"),
    ):
        with pytest.raises(SystemExit, match=message):
            export(trained, *options)
    with pytest.raises(SystemExit, match=r"there is no checkpoint at 'none\.ckpt'"):
        export((trained[0], "none.ckpt"), "student.onnx")
    for options in (["student.pt"], ["student.safetensors", "--format=packed"]):
        with pytest.raises(SystemExit, match="no quantized student; use a QADModule, or another format"):
            export(train("float"), *options)
    boring = yaml.safe_load(Path(trained[0]).read_text())
    boring["model"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
    Path("boring.yaml").write_text(yaml.safe_dump(boring))
    with pytest.raises(SystemExit, match="the configuration's BoringModel has no student"):
        export(("boring.yaml", trained[1]), "student.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["boring.yaml"]


def test_what_torchao_lacks_is_said(trained, tmp_path, export, monkeypatch):
    pytest.importorskip("torchao")
    images = yaml.safe_load(Path(trained[0]).read_text())
    student = {"class_path": "lightning_distill.networks.ConvNet2d", "init_args": {"widths": [8]}}
    images["model"]["init_args"]["student"] = student
    config = tmp_path / "images.yaml"
    config.write_text(yaml.safe_dump(images))
    main(["fit", "-c", str(config), f"--trainer.default_root_dir={tmp_path}"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    with pytest.raises(
        SystemExit, match=r"error: torchao has no kernel for 'blocks\.0\.0', a QuantizedConv2d: leave it"
    ):
        export((str(config), str(checkpoint)), tmp_path / "student.pt")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *args: None if name == "torchao" else find(name, *args)
    )
    with pytest.raises(
        SystemExit, match=r"error: Weights for torchao need it: `pip install lightning-distill\[torchao\]`"
    ):
        export(trained, tmp_path / "student.pt")
    assert not list(tmp_path.glob("*.pt"))
