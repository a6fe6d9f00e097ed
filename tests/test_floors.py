"""Rooms import from the floors below their own only: the order that docs/architecture.md shows."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_distill"
FLOORS = [
    {"compatibility", "curriculum", "difficulty", "files", "locks", "measuring", "modes", "networks", "packages",
     "pretrained", "sharding", "stochastic_depth", "top_k", "transformers_taps"},
    {"adapters", "deferred", "outputs", "taps"},
    {"layer_maps", "losses", "rules"},
    {"temperature", "weighting"},
    {"metrics", "sample_difficulty", "selection"},
    {"tasks"},
    {"diagnostics", "embedding", "evaluation", "export", "nbest", "quantization", "residual"},
    {"hardware", "recovery"},
    {"bit_search", "compression", "decoding", "teachers"},
    {"stages"},
    {"modules"},
    {"callbacks", "datamodules"},
    {"caching", "comparison"},
    {"pipeline", "search"},
    {"cli"},
]  # fmt: skip


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Rooms that a file imports when it is imported itself."""
    names = [
        node.module
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_distill.")
    ]
    return {name.split(".")[1] for name in names}


def test_every_room_has_a_floor():
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set().union(*FLOORS)


def test_rooms_import_from_below_only():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for other in imported(path)
        if room(path) != "__init__" and other != room(path) and floor[other] >= floor[room(path)]
    ]
    assert wrong == []
