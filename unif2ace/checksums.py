"""Files held against SHA-256 sums: what the user gives, what a SHA256SUMS file beside them says, what is known."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from unif2ace.errors import UserError
from unif2ace.files import file_sha256
from unif2ace.parsing import reading

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def sha256(path: Path) -> str:
    """The sum of a file, in hex; one reading for as long as its size and time stay.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state = Path(path).stat()
        return _sha256(Path(path).resolve(), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int) -> str:
    return file_sha256(path)


def check(
    files: Iterable[Path], given: Mapping[str, str] | None = None, known: Mapping[str, str] | None = None
) -> list[str]:
    """Hold each file against the sum that there is for it.

    Args:
        files: their names are what `given` and `known` name.
        given: file name to sum, in hex: the user's word, which comes before a SHA256SUMS file beside the file, which
            comes before `known`.
        known: sums of published files.

    Returns:
        A line that says how many were held against a sum, and which had none.

    Raises:
        UserError: a sum is another one, is no sum, or is given for a file that is not there.
    """
    files = [Path(each) for each in files]
    given = parse(f"{name}={value}" for name, value in (given or {}).items())
    strange = sorted(given.keys() - {each.name for each in files})
    if strange:
        here = ", ".join(each.name for each in files)
        raise UserError(f"--sha256: there is no {', '.join(strange)} here, only {here}")
    unchecked = []
    for file in files:
        expected = {**(known or {}), **read_sums(file.parent / SUMS), **given}
        if file.name not in expected:
            unchecked.append(file.name)
        elif sha256(file) != expected[file.name]:
            raise UserError(
                f"{file} is not the file expected: its SHA-256 is {sha256(file)}, expected {expected[file.name]}; "
                f"copy it again, or, if it is the one you mean, put its sum into {SUMS} beside it"
            )
    told = [f"{len(files) - len(unchecked)} of {len(files)} files held against their SHA-256"]
    return [f"files: {'; '.join(told + [f'no sum known of {name}' for name in unchecked[:4]])}"]


def parse(pairs: Iterable[str]) -> dict[str, str]:
    """File names and sums of NAME=HEX.

    Raises:
        UserError: one is not of that form.
    """
    sums = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        if not name or not re.fullmatch("[0-9a-fA-F]{64}", value):
            raise UserError(f"--sha256: expected NAME=HEX with 64 hexadecimal digits, got {pair!r}")
        sums[name] = value.lower()
    return sums


def read_sums(path: Path) -> dict[str, str]:
    """File names and sums of a file as `sha256sum` writes it, {} where there is none.

    Raises:
        UserError: a line of it is not of that form.
    """
    if not Path(path).exists():
        return {}
    with reading(path, "list of sums"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    sums = {}
    for line in filter(str.strip, lines):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(f"{path} has a line that sha256sum did not write: {line.strip()[:80]!r}")
        sums[Path(match[2]).name] = match[1].lower()
    return sums
