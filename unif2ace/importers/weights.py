"""Other projects' weights: safetensors or torch files, whole or in shards; names and shapes are known first."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from unif2ace import checksums
from unif2ace.errors import UserError
from unif2ace.files import read_json
from unif2ace.parsing import Whole, reading

SHOWN = 4  # names of one kind that an error lists


class Weights:
    """Named tensors of one model; each is read from its file when it is asked for.

    Attributes:
        path: what the user named.
        files: that hold the tensors.
        checked: a line that says which files were held against their SHA-256.
        shapes: of every tensor by its name.
    """

    def __init__(self, path: Path, allow_pickle: bool = False, sha256: Mapping[str, str] | None = None) -> None:
        """Open a file, a folder with one model in it, or the index of a sharded one.

        Args:
            allow_pickle: open torch's own files, which are pickles, too. Only tensors are taken from them, by torch's
                restricted reader; in a folder, safetensors come first.
            sha256: file name to sum; see `checksums.check`, which comes before a file is opened.

        Raises:
            UserError: there is nothing to read, a file is damaged or another than its sum says, a shard is missing or
                not the index's, or it is a pickle and those are not allowed.
        """
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, Callable[[], torch.Tensor]] = {}
        self.files, index = _files(self.path, allow_pickle)
        self.checked = checksums.check(self.files, sha256)
        holder: dict[str, Path] = {}
        for file in self.files:
            for name, (shape, read) in _open(file).items():
                if name in holder:
                    raise UserError(f"{self.path}: {name} is both in {holder[name].name} and in {file.name}")
                holder[name], self.shapes[name], self._read[name] = file, shape, read
        for name, file in index.items():
            if holder.get(name) != file:
                raise UserError(f"{file} does not hold {name} as the index says: copy index and shards again")

    @classmethod
    def of(cls, given: Path | Weights) -> Weights:
        """Weights that are open, or those at a path."""
        return given if isinstance(given, Weights) else cls(given)

    def __getitem__(self, name: str) -> torch.Tensor:
        with reading(f"{self.path}: {name}", "tensor"):
            return self._read[name]()

    def settings(self) -> dict:
        """The config.json beside the weights, {} where there is none.

        Raises:
            UserError: it is damaged.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        values = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        if not isinstance(values, dict):
            raise UserError(f"{folder / 'config.json'} is no model's config: copy it again")
        return values

    def whole(self, name: str, default: int) -> int:
        """A number of config.json, `default` where it says none.

        Raises:
            UserError: it says something else than a whole number from 1.
        """
        value = self.settings().get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path}: its config has {name} {value!r}, expected a whole number from 1")
        return value

    def licence(self, published: str) -> str:
        """What the model card beside the weights names, else `published`."""
        card = (self.path if self.path.is_dir() else self.path.parent) / "README.md"
        head = ""
        with contextlib.suppress(UserError), reading(card, "model card"):
            head = card.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---")[0]
        named = [line.partition(":")[2].strip() for line in head.splitlines() if line.startswith("license:")]
        return f"{named[0]} (its model card)" if named and named[0] else published

    def check(self, expected: Mapping[str, tuple[int, ...]], what: str, spare: Iterable[str] = ()) -> list[str]:
        """Hold names and shapes against `expected`, before a value is read.

        Args:
            what: the model that this should be, for the error.
            spare: beginnings and ends of the names that the model may have and that are not placed.

        Returns:
            The names that are there and not expected, all of them spare.

        Raises:
            UserError: what is missing, unexpected or of another shape.
        """
        edges = tuple(spare)
        extra = sorted(self.shapes.keys() - expected.keys())
        unplaced = [name for name in extra if name.startswith(edges) or name.endswith(edges)]
        faults = {
            "missing": sorted(expected.keys() - self.shapes.keys()),
            "unexpected": sorted(set(extra) - set(unplaced)),
            "of another shape": [
                f"{name} is {list(self.shapes[name])}, expected {list(shape)}"
                for name, shape in expected.items()
                if self.shapes.get(name, shape) != tuple(shape)
            ],
        }
        told = [
            f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for kind, names in faults.items()
            if names
        ]
        if told:
            raise UserError(f"{self.path} is not {what}: {'; '.join(told)}; nothing was written")
        return unplaced


def _files(path: Path, allow_pickle: bool) -> tuple[list[Path], dict[str, Path]]:
    """The files that hold the model at `path`, and for each name the file that an index names."""
    if path.is_dir():
        for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin"):
            found = sorted(path.glob(pattern))
            if len(found) > 1:
                raise UserError(f"{path} holds {', '.join(each.name for each in found[:SHOWN])}: name one of them")
            if found:
                return _files(found[0], allow_pickle)
        raise UserError(f"{path} holds no weights: expected a .safetensors or .bin file, or the index of shards")
    if not path.exists():
        raise UserError(f"there is nothing at {path}: name a file of weights, or the folder that it is in")
    if path.suffix != ".json":
        files, index = [path], {}
    else:
        content = read_json(path)
        placed = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(placed, dict) or not placed:
            raise UserError(f"{path} is no index of shards: it has no weight_map")
        index = {name: path.parent / Path(str(file)).name for name, file in placed.items()}
        files = sorted(set(index.values()))
    pickles = [each.name for each in files if each.suffix != ".safetensors"]
    if pickles and not allow_pickle:
        raise UserError(
            f"{path.parent / pickles[0]} is a pickle, which can hold more than numbers: give --allow-pickle if you "
            "trust it (only tensors are read), or a .safetensors file"
        )
    lost = [each.name for each in files if not os.path.isfile(each)]  # Path's raises for a name that is too long
    if lost:
        raise UserError(f"{path.parent} lacks {', '.join(lost[:SHOWN])}, which {path.name} names: copy all shards")
    return files, index


def _open(file: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Shape and reader of every tensor in one file."""
    if file.suffix == ".safetensors":
        with reading(file, "safetensors"):
            handle = safe_open(file, framework="pt")
            return {
                name: (tuple(handle.get_slice(name).get_shape()), lambda name=name: handle.get_tensor(name))  # type: ignore[misc]
                for name in handle.keys()
            }
    with reading(file, "file of tensors alone"):
        if zipfile.is_zipfile(file):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            with Whole(file) as old:
                content = torch.load(old, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(each, torch.Tensor) for each in content.values()):
        raise UserError(f"{file} holds no plain dictionary of tensors: save the model's state_dict()")
    return {name: (tuple(value.shape), lambda value=value: value) for name, value in content.items()}  # type: ignore[misc]
