"""Columns of text and labels out of files and data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Columns = dict[str, list[Any]]
FORMATS = (".txt", ".csv", ".tsv", ".jsonl")


def read_files(files: Sequence[Path], names: Sequence[str]) -> Columns:
    """Columns by name out of text, CSV and JSON-lines files, one file after the other.

    Args:
        files: ``.txt`` with one text per line (the first column, and no other; empty lines are left out), ``.csv`` or
            ``.tsv`` with a header, or ``.jsonl`` with an object per line. UTF-8.
        names: Of the columns.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is of another kind, a line is no object, or a column is missing.
    """
    columns: Columns = {name: [] for name in names}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {str(file)!r}, which `files` names.")
        if file.suffix not in FORMATS:
            raise ValueError(f"{str(file)!r} must end with one of {', '.join(FORMATS)}.")
        for number, row in enumerate(_rows(file, names), start=1):
            for name in names:
                if name not in row or row[name] is None:
                    raise ValueError(
                        f"Row {number} of {str(file)!r} has no column {name!r}; it has {', '.join(map(str, row))}."
                    )
                columns[name].append(row[name])
    return columns


def read_dataset(dataset: Any, names: Sequence[str]) -> Columns:
    """Columns by name out of one split of a Hugging Face data set, or of anything with ``dataset[name]``.

    Raises:
        ValueError: If a column is missing.
    """
    known = list(getattr(dataset, "column_names", None) or dataset)
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"The data set has no column {missing[0]!r}; its columns are {', '.join(known)}.")
    return {name: list(dataset[name]) for name in names}


def load_dataset(name: str) -> Any:
    """A data set by Hugging Face name, or from a folder that ``save_to_disk`` wrote.

    Raises:
        ModuleNotFoundError: If the ``datasets`` package is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Data sets are loaded by name with the datasets package: pip install "lightning-distill[datasets]"'
        ) from error
    load: Any = datasets.load_from_disk if Path(name).is_dir() else datasets.load_dataset
    return load(name)


def _rows(file: Path, names: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    with file.open(encoding="utf-8", newline="" if file.suffix in (".csv", ".tsv") else None) as lines:
        if file.suffix == ".txt":
            yield from ({names[0]: line.strip()} for line in lines if line.strip())
        elif file.suffix == ".jsonl":
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"Line {number} of {str(file)!r} is no JSON: {error}.") from error
                if not isinstance(row, dict):
                    raise ValueError(f"Line {number} of {str(file)!r} is no JSON object.")
                yield row
        else:
            yield from csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")


__all__ = ["load_dataset", "read_dataset", "read_files"]
