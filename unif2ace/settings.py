"""Settings of a command: dataclasses from a YAML file and from `--a.b=c`, with the key named that is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from unif2ace.errors import UserError
from unif2ace.parsing import parsing, reading

T = TypeVar("T")


def read_settings(path: Path | None, given: Sequence[str]) -> dict[str, Any]:
    """Plain values of a YAML file (or none), with `--a.b=c` put over them, c read as YAML; `--a.0.b` is in a list.

    Raises:
        UserError: the file cannot be read, or one of `given` has another form or finds no place.
    """
    values: Any = {}
    if path is not None:
        with reading(path, "YAML", "mend it"):
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected keys and values, got {values!r:.80}")
    for each in given:
        name, equals, text = each.partition("=")
        if not name.startswith("--") or not equals or not name[2:]:
            raise UserError(f"{each}: expected --KEY=VALUE, or --KEY.KEY=VALUE for a key within")
        with parsing(lambda why, each=each: UserError(f"{each}: its value is no YAML ({why})")):  # type: ignore[misc]
            value = yaml.safe_load(text)
        try:
            _put(values, name[2:].split("."), value)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{each}: there is no place for it ({error})") from error
    return values


def _put(values: Any, names: list[str], value: Any) -> None:
    name = int(names[0]) if isinstance(values, list) else names[0]
    if len(names) == 1:
        values[name] = value
        return
    if isinstance(values, dict) and values.get(name) is None:
        values[name] = {}
    _put(values[name], names[1:], value)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with others put over them, key by key at every depth."""
    both = dict(below)
    for key, value in above.items():
        deeper = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if deeper else value
    return both


def need(config: object, right: bool, key: str, expected: str, where: str = "") -> None:
    """Refuse a config whose value at `key` (`a.b[0].c`) is not right.

    Args:
        where: what the message puts before the key; empty: nothing.

    Raises:
        UserError: the key, what was expected and what came.
    """
    if not right:
        value: Any = config
        for name in key.replace("]", "").replace("[", ".").split("."):
            value = value[int(name)] if name.isdigit() else getattr(value, name)
        raise UserError(f"{where}{'.' * bool(where)}{key}: expected {expected}, got {value!r}")


def parse(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from plain values as YAML or JSON gives them: nested dataclasses, tuples of them, optional values.

    Args:
        where: what messages put before a key; empty: nothing.

    Raises:
        UserError: a key that there is not, one that is missing, a value of another type; the message names the key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or 'settings'}: expected keys and values, got {values!r}")
    within = f"{where}." if where else ""
    known = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
            raise UserError(f"{within}{key}: there is no such key; {hint}")
    for name, each in known.items():
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING and name not in values:
            raise UserError(f"{within}{name}: it is missing")
    hints = typing.get_type_hints(kind)
    return kind(**{key: typed(hints[key], value, f"{within}{key}") for key, value in values.items()})


def typed(hint: Any, value: Any, where: str) -> Any:
    """A plain value as a type hint has it, see `parse`; a dict's own values are as they came."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(typed(item, each, f"{where}[{index}]") for index, each in enumerate(value))
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected keys and values, got {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 takes 1e-4 for a text
        with contextlib.suppress(ValueError):
            return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: expected {_NAMES.get(hint, hint)}, got {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
