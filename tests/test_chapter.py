import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    {"id": "A01", "section": "1.1", "technique": "First", "paper": "Somebody 2001", "verdict": "right"},
    {"id": "A02", "section": "1.1", "technique": "Second", "paper": "", "verdict": "wrong"},
    {"id": "B01", "section": "summary", "technique": "Third", "paper": "", "verdict": "claim"},
]
TESTS = """
import pytest

pytestmark = pytest.mark.chapter("B01")


@pytest.mark.chapter("A01", api="package.first")
@pytest.mark.erratum("ERR-07")
@pytest.mark.parametrize("x", [1, 2])
def test_first(x):
    raise AssertionError("collected, never run")


@pytest.mark.slow
def test_second():
    pass
"""


@pytest.fixture
def project(tmp_path):
    """A project of three rows, with settings for its own test runs that must not matter here."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "docs" / "chapter_rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers --no-such-option -m 'not slow'\nmarkers = slow\n"
    )
    return tmp_path


def chapter(project, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / "chapter.py"), "--root", str(project), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_prints_the_rows_without_a_test_and_counts_the_others(project):
    result = chapter(project)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["A02   Second", "2 of 3"]
    assert not (project / "docs" / "chapter.md").exists()


def test_writes_a_table_that_check_accepts_until_the_tests_change(project):
    page = project / "docs" / "chapter.md"
    assert "is stale" in chapter(project, "--check").stderr
    assert chapter(project, "--write").stdout.endswith("2 of 3\n")
    text = page.read_text()
    assert "| A01 | First | Somebody 2001 | right | `package.first` | `tests/test_it.py::test_first` |" in text
    assert "| A02 | Second |  | wrong |  |  |" in text
    assert "`tests/test_it.py::test_first`<br>`tests/test_it.py::test_second` |" in text  # B01, from the whole file
    assert "| ERR-07 | `tests/test_it.py::test_first` |" in text
    assert "2 of 3 rows have a test." in text
    assert chapter(project, "--check").returncode == 0

    tests = project / "tests" / "test_it.py"
    tests.write_text(tests.read_text().replace("test_second", "test_renamed"))
    result = chapter(project, "--check")
    assert result.returncode == 1
    assert "chapter.md is stale; run `python scripts/chapter.py --write`" in result.stderr
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"A01"', '"A1"', "tests/test_it.py::test_first: the chapter has no row 'A1'. Did you mean 'A01'?"),
        ('"ERR-07"', '"7"', "tests/test_it.py::test_first: '7' is no erratum; they are named ERR-01"),
        ("import pytest\n", "import pytest\nimport no_such_package\n", "No module named 'no_such_package'"),
    ],
)
def test_fails_for_mistakes_in_the_tests(project, old, new, message):
    tests = project / "tests" / "test_it.py"
    tests.write_text(tests.read_text().replace(old, new, 1))
    result = chapter(project, "--write")
    assert result.returncode == 1
    assert message in result.stderr
    assert not (project / "docs" / "chapter.md").exists()


def test_the_list_of_rows_is_complete():
    rows = json.loads((ROOT / "docs" / "chapter_rows.json").read_text(encoding="utf-8"))
    numbers = {"A": 78, "B": 37, "C": 39, "D": 50, "S": 1, "X": 8}
    expected = {
        f"{part}{i}" if part == "X" else f"{part}{i:02d}" for part, n in numbers.items() for i in range(1, n + 1)
    }
    assert {row["id"] for row in rows} == expected | {"A21m"}
    assert len(rows) == 214
    assert Counter(row["verdict"] for row in rows) == {"right": 130, "wrong": 44, "ambiguous": 34, "claim": 6}
    assert all(set(row) == {"id", "section", "technique", "paper", "verdict"} and row["technique"] for row in rows)


def test_the_written_page_has_every_row_and_names_what_can_be_imported():
    text = (ROOT / "docs" / "chapter.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-DSX]\d+m?) \|.*\| ([^|]*) \| ([^|]*) \|$", text, flags=re.MULTILINE)
    assert len(rows) == len({row for row, _, _ in rows}) == 214
    for _, api, _ in rows:
        for name in re.findall(r"`([^`]+)`", api):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_erratum_says_which_test_shows_it_and_that_test_exists():
    text = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (ERR-\d\d)", text, flags=re.MULTILINE)
    assert len(entries) == len(set(entries)) >= 14
    for entry, body in zip(entries, re.split(r"^## ERR-\d\d.*$", text, flags=re.MULTILINE)[1:], strict=True):
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", body)
        assert tests, f"{entry} names no test"
        for path, name in tests:
            assert re.search(rf"def {name}\(", (ROOT / path).read_text(encoding="utf-8")), f"{entry}: {path}::{name}"
