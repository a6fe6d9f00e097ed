"""What the commands say where a class of the configuration does not accept its arguments."""

import traceback
from pathlib import Path

import jsonargparse
import pytest
import yaml
from torch import nn

from lightning_distill.cli import main
from lightning_distill.cli.building import ConfigurationError, build_plainly

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI with jsonargparse 4.53

NETWORK = {"class_path": "lightning_distill.networks.MLP", "init_args": {"sizes": [64, 16, 10]}}
ABSENT = {"class_path": "lightning_distill.teachers.load_network", "init_args": {"network": NETWORK, "path": "no.ckpt"}}
SENTENCE = "There are no weights at 'no.ckpt'. Train the network first, or fix `path`."
TRAINER = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "logger": False}


def raising(kind: str) -> nn.Module:
    """A network of the user's own that fails while it is built."""
    errors = (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError)
    errors += (KeyError, AttributeError, AssertionError, RuntimeError)
    raise {error.__name__: error for error in errors}[kind]("so it is")


def write(model, trainer=TRAINER, **more):
    module = {"class_path": "KD", "init_args": {"alpha": 0.5} | model}
    part = {"model": module, "data": {"class_path": "DigitsDataModule"}, "trainer": trainer}
    Path("c.yaml").write_text(yaml.safe_dump({"common": part, **more} if more else part))


def comparison(method):
    return {"folder": "f", "control": "a", "seeds": 1, "wandb": "off", "methods": {"a": method}}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        ["fit"],
        ["test"],
        ["export", "--ckpt", "no.ckpt", "--path", "s.onnx"],
        ["check", "--check.target=cortex-a78"],
        ["cost"],
        ["cache", "--cache.folder=cache"],
    ],
    ids=lambda command: command[0],
)
def test_the_sentence_of_a_constructor_is_all_that_is_said(command, capsys):
    write({"student": NETWORK, "teacher": ABSENT})
    with pytest.raises(SystemExit) as stopped:
        main([command[0], "-c", "c.yaml", *command[1:]])
    assert stopped.value.code == f"lightning-distill {command[0]}: error: `model.teacher`: {SENTENCE}"
    assert "Traceback" not in capsys.readouterr().err


def test_a_comparison_names_the_method_too():
    write({"student": NETWORK}, **comparison({"model": {"init_args": {"teacher": ABSENT}}}))
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "-c", "c.yaml"])
    assert stopped.value.code == f"lightning-distill compare: error: In 'a': `model.teacher`: {SENTENCE}"


@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "FileNotFoundError", "ModuleNotFoundError"])
def test_refusals_name_their_key(kind):
    write({"student": {"class_path": f"{__name__}.raising", "init_args": {"kind": kind}}})
    with pytest.raises(SystemExit, match=r"^lightning-distill fit: error: `model\.student`: so it is$"):
        main(["fit", "-c", "c.yaml"])


def test_a_traceback_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    write({"student": {"class_path": f"{__name__}.raising", "init_args": {"kind": "TypeError"}}})
    with pytest.raises(ConfigurationError, match="so it is") as raised:
        main(["fit", "-c", "c.yaml"])
    shown = "".join(traceback.format_exception(raised.value))
    assert "in raising" in shown
    assert "Union subtypes" not in shown


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize("kind", [KeyError, AttributeError, AssertionError, RuntimeError])
def test_mistakes_keep_their_traceback(kind, command):
    own = {"student": {"class_path": f"{__name__}.raising", "init_args": {"kind": kind.__name__}}}
    write(own, **(comparison({}) if command == "compare" else {}))
    with pytest.raises(kind, match="so it is") as raised:
        main([command, "-c", "c.yaml"])
    assert raised.traceback[-1].name == "raising"
    shown = "".join(traceback.format_exception(raised.value))
    assert "Union subtypes" not in shown  # what the parser has tried is left out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.alpha=1.5"], r"`model`: `alpha`, .* must be in \[0, 1\], got 1\.5"),
        (
            ["--trainer.callbacks=BlockSparsity", "--trainer.callbacks.sparsity=2"],
            r"`trainer\.callbacks`: `sparsity`, a share of",
        ),
        (["--data.batch_size=-1"], r"`data`: `batch_size` must be"),
        (["--trainer.accelerator=abacus"], "You selected an invalid accelerator name: `accelerator='abacus'`"),
        (["--trainer.min_epochs=2", "--trainer.overfit_batches=-1"], "You have passed invalid value -1"),
    ],
)
def test_each_part_of_a_configuration_is_named(options, message):
    write({"student": NETWORK, "teacher": NETWORK})
    with pytest.raises(SystemExit, match=f"^lightning-distill fit: error: {message}"):
        main(["fit", "-c", "c.yaml", *options])


def test_errors_of_a_training_are_not_taken_for_those_of_a_constructor():
    blocks = {"class_path": "BlockSparsity", "init_args": {"sparsity": 0.5, "layers": ["nowhere"]}}
    write({"student": NETWORK, "teacher": NETWORK}, TRAINER | {"callbacks": [blocks]})
    with pytest.raises(ValueError, match="nowhere"):
        main(["fit", "-c", "c.yaml"])


def test_what_is_built_comes_back_and_the_parsers_own_errors_stay():
    assert build_plainly(lambda: 3) == 3
    with pytest.raises(ConfigurationError, match=r"^so it is$"):
        build_plainly(lambda: raising("ValueError"))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=int | None)
    with pytest.raises(jsonargparse.ArgumentError, match="Does not validate against any of the Union subtypes"):
        build_plainly(lambda: parser.parse_args(["--number", "many"]))
