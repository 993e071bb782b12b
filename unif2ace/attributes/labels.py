"""Labels of pictures from the files that data sets come with, as answers to categories; what is missing stays missing.

    celeba     list_attr_celeba.txt: a count, 40 names, then a name and forty times 1 or -1 a line
    celebv-hq  celebvhq_info.json: clips with appearance and action as 0 and 1, and emotions
    csv        a header, then a picture a line; columns are labels of those sets, categories, or any other
    jsonl      the same, one JSON object a line
    faces      faces.npz of this project's demo: pictures and measured classes in one file

A label that excludes others (four hair colours) becomes a value of one category: of none true the value is "other"
where the category has it, of several true it is missing, and counted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unif2ace.attributes.categories import (
    CATEGORIES,
    CELEBA,
    CELEBV_HQ_ACTION,
    CELEBV_HQ_APPEARANCE,
    LABELS,
    NO,
    OTHER,
    YES,
    plain,
)
from unif2ace.errors import UserError
from unif2ace.files import read_json
from unif2ace.parsing import parsing, read_arrays, reading

KINDS = ("auto", "celeba", "celebv-hq", "csv", "jsonl", "faces")
MISSING = -1
_TRUE, _FALSE, _UNKNOWN = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}, {"", "?", "nan", "none", "null"}
_NAMES = ("image", "image_id", "picture", "name", "file", "key", "id")
_LARGEST_CLASSES = 20  # of a column that is no known label: with more it is text, not a class


@dataclass(frozen=True)
class LabelsConfig:
    """Where labels are.

    Attributes:
        path: the file.
        kind: of KINDS; `auto` goes by what the file is.
        identities: a file of `picture who` a line (CelebA's identity_CelebA.txt); pictures of one person then never
            lie on both sides of a split.
        name: csv, jsonl: the column with the picture's name; by default the first of image, name, file, key, id.
        identity: csv, jsonl: the column that says who it is.
        minus_one: csv, jsonl: what -1 means, `no` (as in CelebA) or `missing`; needed where it occurs.
        picture: the picture's file of a name, {} standing for it: "{}.jpg".
        categories: take these alone; () takes all.
    """

    path: str
    kind: str = "auto"
    identities: str | None = None
    name: str | None = None
    identity: str | None = None
    minus_one: str | None = None
    picture: str = "{}"
    categories: tuple[str, ...] = ()


@dataclass
class Labels:
    """Answers of N pictures to C categories.

    Attributes:
        names: of the pictures.
        groups: who is on each, or the clip's video; its own name where nobody says. A group is never split.
        categories: each with its values.
        values: [N, C] int8, index of the value, MISSING where there is none.
        told: what was noticed while reading, in lines.
    """

    names: list[str]
    groups: list[str]
    categories: dict[str, tuple[str, ...]]
    values: np.ndarray
    told: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


def read_labels(config: LabelsConfig) -> Labels:
    """The file that `config` names.

    Raises:
        UserError: it is not there, not of its kind, or something in it is wrong; the message names the line.
    """
    path = Path(config.path)
    if config.kind not in KINDS:
        raise UserError(f"labels.kind: expected one of {', '.join(KINDS)}, got {config.kind!r}")
    if config.minus_one not in (None, "no", "missing"):
        raise UserError(f"labels.minus_one: expected no or missing, got {config.minus_one!r}")
    if config.picture.count("{}") != 1:
        raise UserError(f"labels.picture: expected a file name with one {{}} for the name, got {config.picture!r}")
    if not path.is_file():
        raise UserError(f"labels.path: {path} is not a file")
    kind = _kind(path) if config.kind == "auto" else config.kind
    try:
        labels = _READERS[kind](path, config)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no {kind} file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not len(labels):
        raise UserError(f"{path} has labels of no picture")
    if config.identities:
        known = dict(_identities(Path(config.identities)))
        without = [name for name in labels.names if name not in known]
        if without:
            raise UserError(f"{config.identities} does not say who is on {without[0]} ({len(without)} such)")
        labels.groups = [known[name] for name in labels.names]
    labels.names = [config.picture.replace("{}", name) for name in labels.names]
    return _only(labels, config.categories)


def _kind(path: Path) -> str:
    endings = {".npz": "faces", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "celebv-hq", ".txt": "celeba"}
    if path.suffix.lower() not in endings:
        raise UserError(f"labels.kind: cannot tell what {path} is; name one of {', '.join(KINDS[1:])}")
    return endings[path.suffix.lower()]


def _only(labels: Labels, wanted: Sequence[str]) -> Labels:
    unknown = [name for name in wanted if name not in labels.categories]
    if unknown:
        raise UserError(f"labels.categories: there is no {unknown[0]!r}; there are: {', '.join(labels.categories)}")
    if wanted:
        order = list(labels.categories)
        labels.values = labels.values[:, [order.index(name) for name in wanted]]
        labels.categories = {name: labels.categories[name] for name in wanted}
    return labels


def _celeba(path: Path, config: LabelsConfig) -> Labels:
    with path.open(encoding="utf-8") as file:
        count, header = file.readline().strip(), file.readline().split()
        names = [plain(each) for each in header]
        strange = [each for each in names if each not in CELEBA]
        if not count.isdigit() or not names or strange:
            what = f"the label {strange[0]!r}" if strange else f"{count!r} in the first line"
            raise UserError(
                f"{path} is no list_attr_celeba.txt: there is {what}, expected a count and then label names"
            )
        pictures, rows = [], []
        for number, line in enumerate(file, 3):
            name, *values = line.split() or [""]
            if len(values) != len(names) or not set(values) <= {"1", "-1"}:
                raise UserError(
                    f"{path}, line {number}: expected a name and {len(names)} times 1 or -1, got {line.strip()!r:.60}"
                )
            pictures.append(name)
            rows.append([value == "1" for value in values])
    if int(count) != len(pictures):
        raise UserError(f"{path} ends early: {len(pictures)} pictures, its first line says {count}")
    columns = np.array(rows, np.int8).reshape(len(rows), len(names))
    return _gather(pictures, pictures, dict(zip(names, columns.T)), path)


def _celebv_hq(path: Path, config: LabelsConfig) -> Labels:
    held = read_json(path)
    try:
        meta = held.get("meta_info", held.get("mete_info"))  # the first release misspelt it
        clips = dict(held["clips"].items())
        orders = {kind: [plain(each) for each in meta[f"{kind}_mapping"]] for kind in ("appearance", "action")}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no celebvhq_info.json: {error!r}") from error
    for kind, known in (("appearance", CELEBV_HQ_APPEARANCE), ("action", CELEBV_HQ_ACTION)):
        strange = [name for name in orders[kind] if name not in known]
        if strange:
            raise UserError(f"{path}: meta_info.{kind}_mapping has {strange[0]!r}, which CelebV-HQ does not have")
    names, groups, emotions, several = list(clips), [], [], 0
    columns = {name: np.empty(len(names), np.int8) for order in orders.values() for name in order}
    for row, name in enumerate(names):
        try:
            clip = clips[name]
            groups.append(str(clip["ytb_id"]))
            for kind, order in orders.items():
                given = clip["attributes"][kind]
                if len(given) != len(order) or not set(given) <= {0, 1}:
                    raise UserError(
                        f"{path}, clip {name}: {kind}: expected {len(order)} times 0 or 1, got {given!r:.60}"
                    )
                for label, value in zip(order, given):
                    columns[label][row] = value
            emotion = clip["attributes"]["emotion"]
            found = {each["emotion"] for each in emotion["labels"]} if emotion["sep_flag"] else {emotion["labels"]}
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}, clip {name}: expected ytb_id and attributes, missing is {error}") from error
        several += len(found) != 1
        emotions.append(found.pop() if len(found) == 1 else None)
    labels = _gather(names, groups, {**columns, "emotion": emotions}, path)
    if several:
        labels.told.append(f"emotion: {several} of {len(names)} clips show several one after another: missing")
    return labels


def _csv(path: Path, config: LabelsConfig) -> Labels:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        records = []
        for record in reader:
            if None in record or None in record.values():
                raise UserError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns")
            records.append(record)
    return _records(path, records, config)


def _jsonl(path: Path, config: LabelsConfig) -> Labels:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            with parsing(lambda why, number=number: UserError(f"{path}, line {number}: not JSON ({why})")):  # type: ignore[misc]
                record = json.loads(line) if line.strip() else None
            if record is not None and not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: expected an object with its labels, got {record!r:.60}")
            records += [record] if record is not None else []
    return _records(path, records, config)


def _records(path: Path, records: list[dict[str, Any]], config: LabelsConfig) -> Labels:
    if not records:
        raise UserError(f"{path} has labels of no picture")
    columns = list(dict.fromkeys(name for record in records for name in record))
    key = config.name or next((name for name in _NAMES if name in columns), None)
    for what, name in (("name", key), ("identity", config.identity)):
        if name is not None and name not in columns:
            raise UserError(f"labels.{what}: there is no column {name!r} in {path}; there are: {', '.join(columns)}")
    if key is None:
        raise UserError(f"labels.name: say which column of {path} has the picture's name: {', '.join(columns)}")
    names = [str(record.get(key, "")).strip() for record in records]
    if "" in names:
        raise UserError(f"{path}: record {names.index('') + 1} has no {key}")
    if len(set(names)) != len(names):
        twice = next(name for row, name in enumerate(names) if name in names[:row])
        raise UserError(f"{path}: there are two records of {twice}")
    groups = names if config.identity is None else [str(record.get(config.identity, "")) for record in records]
    read: dict[str, Any] = {}
    for column in columns:
        if column not in (key, config.identity):
            texts = ["" if record.get(column) is None else str(record[column]).strip() for record in records]
            read[column] = _column(texts, f"{path}, {column}", config)
    return _gather(names, groups, read, path)


def _column(texts: list[str], what: str, config: LabelsConfig) -> np.ndarray | list[str | None]:
    """A column as 1, 0 and MISSING, or as classes with None."""
    if any(text in ("-1", "-1.0") for text in texts):
        if config.minus_one is None:
            raise UserError(f"labels.minus_one: {what} has -1: say whether it means no or missing")
        texts = [{"no": "0", "missing": ""}[config.minus_one] if text in ("-1", "-1.0") else text for text in texts]
    lower = [text.lower() for text in texts]
    if all(text in _TRUE | _FALSE | _UNKNOWN for text in lower):
        return np.array([1 if text in _TRUE else 0 if text in _FALSE else MISSING for text in lower], np.int8)
    return [None if small in _UNKNOWN else text for text, small in zip(texts, lower)]


def _faces(path: Path, config: LabelsConfig) -> Labels:
    from unif2ace.data.attributes import ATTRIBUTES

    classes = read_arrays(path, "faces.npz of the demo").get("classes", np.empty(0))
    if classes.ndim != 2 or classes.shape[1] != len(ATTRIBUTES):
        raise UserError(f"{path}: classes: expected [N, {len(ATTRIBUTES)}], got {list(classes.shape)}")
    names = [str(row) for row in range(len(classes))]
    categories = {each.name: each.words for each in ATTRIBUTES}
    return Labels(names, list(names), categories, classes.astype(np.int8))


_READERS: dict[str, Callable[[Path, LabelsConfig], Labels]] = {
    "celeba": _celeba,
    "celebv-hq": _celebv_hq,
    "csv": _csv,
    "jsonl": _jsonl,
    "faces": _faces,
}


def _identities(path: Path) -> Iterator[tuple[str, str]]:
    with reading(path, "list of pictures"):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        name, *who = line.split() or [""]
        if len(who) != 1:
            raise UserError(f"{path}, line {number}: expected a picture and who is on it, got {line!r:.60}")
        yield name, who[0]


def _gather(names: list[str], groups: list[str], columns: Mapping[str, Any], path: Path) -> Labels:
    """Columns of labels, [N] of 1, 0, MISSING or a list of classes, as answers to categories."""
    told: list[str] = []
    answers: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    of_category: dict[str, dict[str, np.ndarray]] = {}
    for column, held in columns.items():
        category, value = LABELS.get(plain(column), (column.replace("_", " ").strip(), None))
        if isinstance(held, list):
            known = CATEGORIES.get(category)
            answers[category] = _classes(held, known.values if known else None, f"{path}, {column}")
        elif value is None or set(CATEGORIES[category].values) == {YES, NO}:
            flipped = 1 - held if value == NO else held
            answers[category] = (YES, NO), np.where(held == MISSING, MISSING, 1 - flipped).astype(np.int8)
        else:
            of_category.setdefault(category, {})[value] = held
    for category, given in of_category.items():
        if category not in answers:
            answers[category] = _exclusive(category, given, told)
    categories = {category: values for category, (values, _) in answers.items()}
    values = np.stack([found for _, found in answers.values()], 1) if answers else np.empty((len(names), 0), np.int8)
    if not categories:
        raise UserError(f"{path} has no column of labels")
    return Labels(list(names), list(groups), categories, values, told)


def _classes(held: list[str | None], known: tuple[str, ...] | None, what: str) -> tuple[tuple[str, ...], np.ndarray]:
    values = known or tuple(sorted({each for each in held if each is not None}))
    if len(values) > _LARGEST_CLASSES:
        raise UserError(
            f"{what}: {len(values)} different values: expected 0 and 1, or at most {_LARGEST_CLASSES} classes"
        )
    strange = [each for each in held if each is not None and each not in values]
    if strange:
        raise UserError(f"{what}: expected one of {', '.join(values)}, got {strange[0]!r}")
    return values, np.array([MISSING if each is None else values.index(each) for each in held], np.int8)


def _exclusive(category: str, given: Mapping[str, np.ndarray], told: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    values = tuple(value for value in CATEGORIES[category].values if value in given or value == OTHER)
    flags = np.stack([given[value] for value in values if value != OTHER], 1)
    true = (flags == 1).sum(1)
    found = np.where(true == 1, (flags == 1).argmax(1), MISSING)
    if OTHER in values:
        found = np.where((true == 0) & (flags == 0).all(1), values.index(OTHER), found)
    if (true > 1).any():
        told.append(f"{category}: {int((true > 1).sum())} of {len(true)} pictures have several at once: missing")
    return values, found.astype(np.int8)
