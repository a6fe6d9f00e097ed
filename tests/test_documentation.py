"""What README, docs and examples tell people to type works."""

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_distill.cli import main
from lightning_distill.comparison import Comparison

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def blocks(language):
    """Fenced code of all pages: (page, text)."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page, block) for page in PAGES for block in pattern.findall(page.read_text())]


def commands():
    """Every command line that is printed in a page or at the top of an example."""
    lines = [line for _, block in blocks("bash") for line in block.splitlines()]
    lines += [
        line[2:] for path in EXAMPLES for line in path.read_text().splitlines() if line.startswith("# lightning-")
    ]
    return sorted({line.strip() for line in lines if line.strip()})


def shortened(configuration):
    """The same configuration, but a few batches long."""
    shared = [configuration.get(key, {}) for key in ("common", "base")]
    parts = [configuration, *shared, *configuration.get("reference", {}).values()]
    for part in [*parts, *configuration.get("methods", {}).values(), *configuration.get("stages", {}).values()]:
        if "trainer" in part:
            part["trainer"].pop("max_steps", None)
            part["trainer"].update(max_epochs=1, limit_train_batches=2, limit_val_batches=1, limit_test_batches=1)
            part["trainer"].setdefault("enable_progress_bar", False)
    if "methods" in configuration:
        configuration["seeds"] = 2
    if "space" in configuration:
        configuration["base"]["trainer"]["check_val_every_n_epoch"] = 1
    return configuration


def printed(command):
    """The distinct printed lines of one of our commands."""
    lines = dict.fromkeys(line for line in commands() if line.startswith(f"lightning-distill {command} "))
    return [line.split()[1:] for line in lines]


def missing_package(line):
    """Whether an example's weights are in a package that is not installed here."""
    named = re.findall(r"package:(\w+)", (ROOT / line[2]).read_text()) if line[2].startswith("examples/") else []
    return any(importlib.util.find_spec(package) is None for package in named)


def with_little_text(value):
    """The same configuration, but language models read a small file."""
    if isinstance(value, list):
        return [with_little_text(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_little_text(item) for key, item in value.items()}
    if str(found.get("class_path")).endswith("TextDataModule"):
        found["init_args"] = found.get("init_args", {}) | {"files": ["text.txt"]}
        if "texts" in found["init_args"]:
            found["init_args"]["texts"] = 40
    return found


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder to work in, with shortened copies of the examples."""
    (tmp_path / "examples").mkdir()
    for path in EXAMPLES:
        configuration = with_little_text(shortened(yaml.safe_load(path.read_text())))
        text = yaml.safe_dump(configuration, sort_keys=False)
        (tmp_path / "examples" / path.name).write_text(text)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i}: {i * i} and {i + 7}." * 3 for i in range(900)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_print_commands_and_python():
    assert len(commands()) >= 6
    assert blocks("python")


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_make_targets_exist(command):
    done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_demo_is_the_comparison_and_make_test_runs_pytest():
    demo = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "lightning-distill compare -c examples/mnist1d.yaml --folder runs/mnist1d" in demo
    test = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "pytest" in test
    assert "ruff check" in test
    assert "mypy" in test


@pytest.mark.filterwarnings("ignore")  # the command line shows users whatever it has to warn of
def test_every_printed_command_of_ours_runs(examples):
    ours = [line.split()[1:] for line in commands() if line.startswith("lightning-distill ")]
    teachers = [line for line in ours if line[0] == "fit" and "teacher.yaml" in line[2]]
    costs = [line for line in ours if line[0] == "cost"]  # the first one calibrates for the others
    caches = [line for line in ours if line[0] == "cache"]
    students = [line for line in ours if line[0] == "fit" and line not in teachers]
    assert teachers
    assert caches
    assert len(students) >= 2
    for line in (*teachers, *caches, *students, *costs):
        main(line)
    assert (examples / "runs" / "teacher" / "teacher.ckpt").exists()
    assert (examples / "runs" / "kd" / "last.ckpt").exists()
    exports = [line for line in ours if line[0] == "export"]
    assert exports
    for line in exports:
        main(line)
        assert Path(line[line.index("--path") + 1]).stat().st_size > 0
    checks = [line for line in ours if line[0] == "check"]
    assert checks
    for line in checks:
        try:
            main(line)
        except SystemExit as stopped:
            assert stopped.code == 1  # noqa: PT017  # the student does not suit the machine, which is an answer
    known = {"fit", "compare", "cache", "search", "check", "export", "cost", "pipeline", "pipeline-async"}
    assert {line[0] for line in ours} == known


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", printed("search"), ids=" ".join)
def test_every_printed_search_runs(line, examples):
    main([*line, "--trials", "2"])
    folder = Path(yaml.safe_load(Path(line[2]).read_text())["folder"])
    assert len((folder / "results.csv").read_text().splitlines()) == 3
    assert (folder / "history.png").exists()
    for confirming in [line for line in printed("compare") if str(folder) in line[2]]:
        check_comparison(confirming)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", printed("pipeline"), ids=" ".join)
def test_every_printed_pipeline_runs(line, examples):  # tests/pipeline/test_asynchronous.py has those of processes
    main(line)
    configuration = yaml.safe_load(Path(line[2]).read_text())
    folder = Path(configuration["folder"])
    assert (folder / "report.png").stat().st_size > 0
    if "onnx_samples" in configuration:
        measured = json.loads((folder / "onnx" / "deployed.json").read_text())["networks"]
        assert [network["name"] for network in measured] == list(configuration["stages"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "line", [x for x in printed("compare") if x[2].startswith("examples/") and "synergy" not in x[2]], ids=" ".join
)
def test_every_printed_comparison_runs(line, examples):
    if missing_package(line):
        pytest.skip("the weights are in a package that is not installed")
    check_comparison(line)


def check_comparison(line):
    """Run it with two seeds, and look at what it has written."""
    main([*line, "--seeds", "2", "--wandb", "off"])
    folder = yaml.safe_load(Path(line[2]).read_text())["folder"]
    comparison = Comparison.load(folder)
    assert len(comparison.runs) == 2 * len(comparison.methods)
    assert {path.name for path in Path(folder).glob("*.png")} >= {"results.png", "gain.png"}


@pytest.mark.filterwarnings("ignore")
def test_the_printed_synergy_is_that_of_its_comparison(examples, monkeypatch, capsys):
    (line,) = [line for line in commands() if line.startswith("python scripts/synergy.py ")]
    words = shlex.split(line)[1:]
    check_comparison(["compare", "-c", "examples/synergy_mnist1d.yaml"])
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    base, first, second, joint = (
        Comparison.load(words[1]).values(words[words.index(name) + 1])
        for name in ("--base", "--first", "--second", "--joint")
    )
    expected = sum(joint[seed] - first[seed] - second[seed] + base[seed] for seed in (0, 1)) / 2
    assert f"joint - first - second + base: {expected:+.4f} [" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [text for _, text in blocks("python")], ids=lambda text: text.splitlines()[0][:40])
def test_every_python_block_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})
    if "module.export" in block:
        assert (tmp_path / "student.safetensors").exists()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
