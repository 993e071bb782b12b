"""Shards: webdataset's tar files, with an index beside each, so that any sample is one read.

    shard-00000.tar     000000000.json codes.npy identity.npy semantic.npy, 000000001.json ...
    shard-00000.json    where each member lies, a checksum of each sample, what was passed over and why
    job.json            what the shards are made with
    manifest.json       written last: every shard with its samples, bytes and SHA-256

The tar files are plain: webdataset reads them, and tar files that it wrote are read here (indexed on opening, by a walk
over their headers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unif2ace.data.base import Source, read_at
from unif2ace.data.config import TASKS, FieldMap
from unif2ace.data.samples import Sample, SampleError, check_fields, record_of, sample_of
from unif2ace.errors import UserError
from unif2ace.files import digest, file_sha256, read_json, replacing, write_json
from unif2ace.parsing import Whole, array, parsing

FORMAT = 1
JOB, MANIFEST = "job.json", "manifest.json"
ARRAYS = ("codes", "identity", "semantic")
_MEMBERS = ("json", *(f"{name}.npy" for name in ARRAYS))  # in the order in which they stand
_FEATURES = ("identity.npy", "semantic.npy")
_LLAVA = FieldMap()
_PICTURES = ("jpg", "jpeg", "png", "webp")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def write_shard(folder: Path, number: int, samples: Iterable[Sample], first: int, skipped: list, job: str) -> dict:
    """Write one shard and then its index, each whole or not at all; a shard counts once its index is there.

    Args:
        samples: with codes; those of equal content give equal bytes, wherever and whenever they are written.
        first: index of the first sample in the whole set, which names the members.
        skipped: [where, reason, corrupt] of the samples that were passed over.
        job: fingerprint of what it is made with.

    Returns:
        The index.

    Raises:
        UserError: the file system refuses.
    """
    path = folder / f"{shard_name(number)}.tar"
    placed: list[dict[str, tuple[int, int, int]]] = []
    index: dict[str, Any] = {"format": FORMAT, "job": job, "file": path.name, "first": first, "keys": [], "serves": []}
    with replacing(path) as partial:
        with partial.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for place, sample in enumerate(samples):
                    members = {}
                    for extension, content in _members(sample):
                        info = tarfile.TarInfo(f"{first + place:09d}.{extension}")
                        info.size = len(content)
                        members[extension] = (tar.offset + tarfile.BLOCKSIZE, len(content), zlib.crc32(content))
                        tar.addfile(info, io.BytesIO(content))
                    placed.append(members)
                    index["keys"].append(sample.key)
                    index["serves"].append([int(sample.serves(task)) for task in TASKS])
            file.flush()
            os.fsync(file.fileno())
        index["bytes"], index["sha256"] = partial.stat().st_size, file_sha256(partial)
    met = {name for members in placed for name in members}
    index["members"] = [name for name in _MEMBERS if name in met]
    index["places"] = [[members.get(name, (0, -1, 0)) for name in index["members"]] for members in placed]
    index |= {"samples": len(placed), "skipped": skipped}
    write_json(index_path(path), index)
    return index


def index_path(shard: Path) -> Path:
    """The index that belongs to the tar file `shard`."""
    return shard.with_suffix(".json")


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    """(extension, content): words first, then arrays, features as half floats, codes as integers that hold them."""
    words = {"key": sample.key, "captions": sample.captions, "conversations": sample.conversations, "text": sample.text}
    if isinstance(sample.image, bytes):
        words["image_sha256"] = hashlib.sha256(sample.image).hexdigest()
    yield "json", json.dumps(words, ensure_ascii=False, sort_keys=True).encode()
    for name in ARRAYS:
        value = getattr(sample, name)
        if value is not None:
            file = io.BytesIO()
            kind = np.float16 if name != "codes" else np.uint16 if value.max(initial=0) < 2**16 else np.uint32
            np.lib.format.write_array(file, np.ascontiguousarray(value, kind), version=(1, 0), allow_pickle=False)
            yield f"{name}.npy", file.getvalue()


def ours(record: dict, where: str) -> dict:
    """The fields of `Sample` that the words of one of our shards hold."""
    try:
        return {
            "key": record["key"],
            "captions": tuple(record["captions"]),
            "conversations": tuple(tuple((asked, said) for asked, said in turns) for turns in record["conversations"]),
            "text": record["text"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SampleError(where, f"its words are not as they were written ({error!r})") from error


class ShardSource(Source):
    """A folder of shards, or one tar file.

    Raises:
        UserError: one is missing, unreadable, or not as long as its index says.
    """

    def __init__(self, path: Path, fields: FieldMap = _LLAVA, where: str = "data") -> None:
        self.path, self.fields, self.damaged = path, fields, []
        if (path / JOB).exists() and not (path / MANIFEST).exists():
            raise UserError(f"{where}.path: {path} is not finished; run `unif2ace precompute` again to go on")
        self.manifest = read_json(path / MANIFEST) if (path / MANIFEST).exists() else None
        try:
            self._index()
        except OSError as error:
            raise UserError(f"{where}.path: cannot read {error.filename}: {error.strerror}") from error
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{where}.path: an index in {path} is damaged ({error!r}): copy all of it again") from error
        if not len(self):
            raise UserError(f"{where}.path: {path} holds no samples")
        if self.manifest is None:
            try:
                record, _ = self._foreign(self._read(0, 0)[1], f"{where}: {path}")
            except SampleError as error:
                raise UserError(
                    f"{where}.path: the first sample of {path}, whose fields name all others', is damaged "
                    f"({error.reason}): copy it again"
                ) from error
            check_fields(record, fields, f"{where}: {path}")

    def _index(self) -> None:
        """Where everything lies, of all shards."""
        if self.manifest is not None:
            self.shards = [self.path / each["file"] for each in self.manifest["shards"]]
            self.fingerprint = digest(*(each["sha256"].encode() for each in self.manifest["shards"]))
        else:
            self.shards = sorted(self.path.glob("*.tar")) if self.path.is_dir() else [self.path]
            sizes = [f"{each.name} {each.stat().st_size}".encode() for each in self.shards]
            self.fingerprint = digest(*sizes)
        indices = [self._written(each) if self.manifest else self._walked(each) for each in self.shards]
        self._firsts = np.concatenate([[0], np.cumsum([len(each["places"]) for each in indices])]).astype(np.int64)
        self._members = [list(map(_checked_name, each["members"])) for each in indices]
        self._places = [_checked_places(each) for each in indices]
        self._serves = None
        if self.manifest is not None:
            flags = [np.array(each["serves"], bool).reshape(len(each["places"]), len(TASKS)) for each in indices]
            self._serves = np.concatenate(flags) if flags else np.zeros((0, len(TASKS)), bool)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def serving(self, task: str) -> np.ndarray | None:
        return None if self._serves is None else np.flatnonzero(self._serves[:, TASKS.index(task)])

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)

    def read(self, index: int, features: bool = True) -> Sample:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        where, members = self._read(shard, index - int(self._firsts[shard]), features)
        try:
            arrays: dict[str, Any] = {
                name: array(members[f"{name}.npy"]) for name in ARRAYS if f"{name}.npy" in members
            }
        except ValueError as error:
            raise SampleError(where, f"an array of it is damaged ({error})") from error
        if self.manifest is not None:
            if "json" not in members:
                raise SampleError(where, "its words are missing")
            return Sample(where=where, **ours(record_of(members["json"], where), where), **arrays)
        record, image = self._foreign(members, where)
        sample = sample_of(record, self.fields, where, f"{self.shards[shard].name}:{index}", None)
        image = image if image is not None else sample.image if isinstance(sample.image, bytes) else None
        return dataclasses.replace(sample, image=image, **arrays)

    def _read(self, shard: int, row: int, features: bool = True) -> tuple[str, dict[str, memoryview]]:
        """Where the sample lies, and its members by extension; one read, as they stand side by side."""
        path, places = self.shards[shard], self._places[shard][row]
        there = [
            (name, offset, size, check)
            for name, (offset, size, check) in zip(self._members[shard], places.tolist())
            if size >= 0 and (features or name not in _FEATURES)
        ]
        first = min(offset for _, offset, _, _ in there)
        content = memoryview(read_at(path, first, max(offset + size for _, offset, size, _ in there) - first))
        where = f"{path} at byte {first}"
        members = {}
        for name, offset, size, check in there:
            members[name] = content[offset - first : offset - first + size]
            if check not in (-1, zlib.crc32(members[name])):
                raise SampleError(where, "its bytes are not those that were written")
        return where, members

    @staticmethod
    def _written(path: Path) -> dict:
        """The index of a shard of ours."""
        index = read_json(index_path(path))
        size = path.stat().st_size
        if size != index["bytes"]:
            raise UserError(f"{path} has {size} bytes where its index says {index['bytes']}: copy it again")
        with path.open("rb"):  # say now that it cannot be read, not in the middle of an epoch
            return index

    def _walked(self, path: Path) -> dict:
        """An index of a shard of another's, by the headers of its members."""
        members: list[tarfile.TarInfo] = []
        end, whole = 0, False
        with Whole(path) as file, contextlib.suppress(EOFError):
            with parsing(EOFError), tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if tar.offset <= end:
                        raise tarfile.ReadError("a member of a negative size, which is met again and again")
                    members.append(info)
                    end = tar.offset
            file.seek(end)  # tarfile takes a header that it cannot read for the end
            whole = not file.read(tarfile.BLOCKSIZE).strip(b"\0")
        names: dict[str, int] = {}
        samples: dict[str, dict[str, tuple[int, int, int]]] = {}
        for info in members:
            folder, _, name = info.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if info.isfile() and extension:
                names.setdefault(extension.lower(), len(names))
                place = (info.offset_data, info.size, -1)
                samples.setdefault(f"{folder}/{stem}", {})[extension.lower()] = place
        if not whole:
            self.damaged.append((str(path), f"the tar file is damaged at byte {end}, after {len(samples)} samples"))
        places = [[each.get(name, (0, -1, -1)) for name in names] for each in samples.values()]
        return {"members": [*names], "places": places}

    @staticmethod
    def _foreign(members: dict[str, memoryview], where: str) -> tuple[dict, bytes | None]:
        """The record that a foreign sample's members make, and its picture: webdataset's .json, .txt and pictures."""
        record = record_of(members["json"], where) if "json" in members else {}
        texts = {name: str(members[name], "utf-8", "replace") for name in ("txt", "caption") if name in members}
        if texts:
            record.setdefault("caption", next(iter(texts.values())))
        return {**texts, **record}, next((bytes(members[name]) for name in _PICTURES if name in members), None)


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError(f"expected a member's name, got {name!r:.80}")
    return name


def _checked_places(index: dict) -> np.ndarray:
    """[samples, members, 3]: offset, bytes (-1: a sample has no such member), checksum (-1: none is known)."""
    places = np.array(index["places"], np.int64).reshape(len(index["places"]), len(index["members"]), 3)
    if not (places[..., 1] >= 0).any(1).all():
        raise ValueError("a sample has no members")
    return places
