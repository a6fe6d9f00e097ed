"""Which techniques of the book chapter have a test, and where they are.

Reads the markers ``chapter("A13", api="lightning_distill.temperature.EntropyTemperature")`` and ``erratum("ERR-09")``
of all tests without running them. Prints the rows that have none and, last, how many have one.

    python scripts/chapter.py            # print
    python scripts/chapter.py --write    # also write docs/chapter.md
    python scripts/chapter.py --check    # fail if docs/chapter.md is not what --write would write
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Evidence:
    """Tests, and the places in the API that they name, of one row or one erratum."""

    tests: set[str] = field(default_factory=set)
    api: set[str] = field(default_factory=set)


class MarkerCollector:
    """pytest plugin that reads the markers of every collected test, also of those that are deselected later."""

    def __init__(self) -> None:
        self.rows: dict[str, Evidence] = {}
        self.errata: dict[str, Evidence] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        """Register the markers, so that a folder without settings of its own can be read."""
        config.addinivalue_line("markers", "chapter(*rows, api=None): rows of the chapter that the test covers")
        config.addinivalue_line("markers", "erratum(*numbers): errata of the chapter that the test shows")

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note the markers of one test."""
        test = item.nodeid.split("[")[0]  # one line for all parameters
        for name, found in (("chapter", self.rows), ("erratum", self.errata)):
            for marker in item.iter_markers(name):
                for number in marker.args:
                    evidence = found.setdefault(str(number), Evidence())
                    evidence.tests.add(test)
                    if api := marker.kwargs.get("api"):
                        evidence.api.add(api)


def collect(tests: Path, root: Path) -> MarkerCollector:
    """Markers of the tests under ``tests``; their names are relative to ``root``.

    Raises:
        RuntimeError: If a test file cannot be imported.
    """
    collector = MarkerCollector()
    output = io.StringIO()
    # Without the project's addopts, which may select tests or distribute them to other processes.
    arguments = ["--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--rootdir={root}", str(tests)]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(arguments, plugins=[collector])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"The tests under {tests} could not be collected:\n{output.getvalue()}")
    return collector


def mistakes(collector: MarkerCollector, rows: Iterable[str]) -> list[str]:
    """Markers that name no row of the chapter, or no erratum."""
    known = list(rows)
    found = []
    for row, evidence in collector.rows.items():
        if row not in known:
            near = difflib.get_close_matches(row, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            found.append(f"{min(evidence.tests)}: the chapter has no row {row!r}.{hint}")
    for number, evidence in collector.errata.items():
        if not re.fullmatch(r"ERR-\d\d", number):
            found.append(f"{min(evidence.tests)}: {number!r} is no erratum; they are named ERR-01, ERR-02 and so on.")
    return sorted(found)


def document(rows: list[Mapping[str, str]], collector: MarkerCollector) -> str:
    """The contents of docs/chapter.md."""
    lines = [
        "# The chapter, technique by technique",
        "",
        "Where each technique, formula, claim and exercise of the book chapter is, and which tests hold it. The",
        "verdict is on what the chapter prints; what is wrong there is done right here, see [errata](errata.md).",
        "Written by `python scripts/chapter.py --write` from the markers of the tests; do not edit.",
    ]
    section = None
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            lines += ["", f"## {section[0].upper()}{section[1:]}", ""]
            lines += ["| Row | Technique | Published as | Verdict | In the API | Tests |", "|---|---|---|---|---|---|"]
        evidence = collector.rows.get(row["id"], Evidence())
        cells = [row["id"], row["technique"], row["paper"], row["verdict"], _cell(evidence.api), _cell(evidence.tests)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## Errata that a test shows", "", "| Erratum | Tests |", "|---|---|"]
    lines += [f"| {number} | {_cell(evidence.tests)} |" for number, evidence in sorted(collector.errata.items())]
    lines += ["", f"{_covered(rows, collector)} of {len(rows)} rows have a test."]
    return "\n".join(lines) + "\n"


def _cell(names: Iterable[str]) -> str:
    return "<br>".join(f"`{name}`" for name in sorted(names))


def _covered(rows: list[Mapping[str, str]], collector: MarkerCollector) -> int:
    return sum(row["id"] in collector.rows for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write docs/chapter.md")
    action.add_argument("--check", action="store_true", help="fail if docs/chapter.md is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds tests/ and docs/")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    rows = json.loads((root / "docs" / "chapter_rows.json").read_text(encoding="utf-8"))
    try:
        collector = collect(root / "tests", root)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if wrong := mistakes(collector, [row["id"] for row in rows]):
        print("\n".join(wrong), file=sys.stderr)
        return 1

    page, text = root / "docs" / "chapter.md", document(rows, collector)
    if options.write:
        page.write_text(text, encoding="utf-8")
    for row in rows:
        if row["id"] not in collector.rows:
            print(f"{row['id']:5} {row['technique']}")
    print(f"{_covered(rows, collector)} of {len(rows)}")
    if options.check and (not page.exists() or page.read_text(encoding="utf-8") != text):
        print(f"{page} is stale; run `python scripts/chapter.py --write`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
