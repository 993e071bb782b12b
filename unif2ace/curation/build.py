"""`unif2ace build-dataset`: pictures of faces to a set with captions and questions, stage after stage.

    OUT/config.yaml           what it was built with
    OUT/faces.json            the set (LLaVA's form)
    OUT/images/               pictures, where they were made
    OUT/shards/               codes and features, if asked for
    OUT/README.md             the card, with statistics.png
    OUT/report.json           counts of every stage, tokens, cost
    OUT/dropped.jsonl         every picture that fell out, with its stage and reason
    OUT/work/                 no part of the set: what the stages keep, so that a run goes on where the last one
                              stood: made faces with their identity vectors, face checks, attributes, and of each
                              endpoint its answers, quarantine and counts

A run is a function of the pictures, the config and what is in work: run it again and only what is missing is asked.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from unif2ace.attributes.base import Attribute, AttributeSource
from unif2ace.attributes.combine import Combined, combine
from unif2ace.attributes.lexicon import Lexicon
from unif2ace.attributes.measured import Measured
from unif2ace.attributes.sources import SOURCES, open_source
from unif2ace.curation import card, faces
from unif2ace.curation.config import BuildConfig
from unif2ace.curation.faces import Face
from unif2ace.curation.writing import Record, Writer
from unif2ace.data.config import SetConfig
from unif2ace.data.dataset import FaceSet
from unif2ace.data.precompute import PrecomputeConfig, precompute
from unif2ace.endpoint.client import opened
from unif2ace.errors import UserError
from unif2ace.files import digest, replacing, write_json
from unif2ace.journal import Journal

SIDE = 256  # pixels a side of a face that sources of attributes see
_BATCH = 64


def build(config: BuildConfig) -> dict[str, Any]:
    """Build the set, or go on with it, and return its report.

    Raises:
        UserError: the config is not possible, a field of the card is empty, an endpoint cannot be asked or its budget
            is spent. What is done is kept.
    """
    config.check()
    out, started = Path(config.out), time.perf_counter()
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    with replacing(out / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(dataclasses.asdict(_plain(config)), sort_keys=False))

    folder, synthetic = faces.picture_folder(config.images, out, work)
    found = faces.check_faces(folder, faces.picture_files(folder, config.images.limit), config.faces, work)
    records = [Record(each) for each in found if not each.reason]
    lexicon = _with_attributes(records, config, folder, synthetic, work)

    configs = {"captioner": config.captioner, "writer": config.writer or config.captioner}
    with opened(configs, work) as endpoints:
        writer = Writer(
            config, endpoints, lexicon, lambda face: faces.framed(folder, face, config.captioner.image_side)
        )
        writer.write_captions(records)
        writer.write_questions(records)
        asked = {name: endpoint.counts() for name, endpoint in endpoints.items()}
    if config.writer in (None, config.captioner):
        del asked["writer"]
    kept = [each for each in records if each.caption]
    base = out if folder.resolve().is_relative_to(out.resolve()) else folder  # a set with its pictures is whole
    _write_set(out, kept, folder.resolve().relative_to(base.resolve()))
    _write_dropped(out, found, records)
    shards = _write_shards(config, out, base) if config.encoding is not None and kept else None

    report = {
        "stages": [
            ["face checks", len(found), len(records)],
            ["captions", len(records), len(kept)],
            ["questions", len(kept), sum(bool(each.pairs) for each in kept)],
        ],
        "dropped": _reasons(found, records, writer.dropped),
        "pairs": sum(len(each.pairs) for each in kept),
        "endpoints": asked,
        "captioner": config.captioner.model,
        "vision": config.captioner.vision,
        "writer": configs["writer"].model,
        "sources": list(config.attributes.sources),
        "prompts": {each.name: each.version for each in writer.prompts},
        "shards": shards,
        "whole": base == out,
        "identity_in_shards": config.encoding is not None and config.encoding.identity is not None,
        "seconds_of_this_run": round(time.perf_counter() - started, 1),
    }
    figures = card.statistics(kept, lexicon)
    write_json(out / "report.json", {**report, "statistics": figures})
    card.write_card(out, config.card, figures, report)
    return report


def attribute_source(name: str, synthetic: FaceSet | None) -> AttributeSource:
    """The source of a name.

    `measured`, `measured:FACES.npz`, `classifier:FOLDER`, `face-parser:FILE`, or `MODULE:FUNCTION` that gives one.

    Raises:
        UserError: there is no such source.
    """
    kind, _, where = name.partition(":")
    if name == "measured":
        if synthetic is None:
            raise UserError("attributes.sources: measured: expected measured:FACES.npz, whose cut points it takes")
        return Measured(synthetic.thresholds)
    if kind in SOURCES:
        return open_source(name)
    try:
        made = getattr(importlib.import_module(kind), where)()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"attributes.sources: {name}: expected {', '.join(SOURCES)} or MODULE:FUNCTION ({error})"
        ) from error
    return made


def _with_attributes(
    records: Sequence[Record], config: BuildConfig, folder: Path, synthetic: FaceSet | None, work: Path
) -> Lexicon:
    """Give each record its attributes, from what is kept where they were read before."""
    sources = [attribute_source(each, synthetic) for each in config.attributes.sources]
    with Journal(work / "attributes.jsonl") as journal:
        said: list[list[list[Attribute]]] = []
        for source in sources:
            said.append(list(_read(source, records, folder, journal)))
        merged = ([each for source in of_face for each in source] for of_face in zip(*said))
        for record, of_face in zip(records, merged):
            record.attributes = tuple(combine(of_face, config.attributes.least))
    return Lexicon(Combined(sources).categories)


def _read(
    source: AttributeSource, records: Sequence[Record], folder: Path, journal: Journal
) -> Iterator[list[Attribute]]:
    """What one source says of each face."""
    name = digest(json.dumps([source.name, getattr(source, "fingerprint", ""), source.categories]).encode())
    with tqdm(total=len(records), desc=f"attributes: {source.name}", unit="face") as bar:
        for start in range(0, len(records), _BATCH):
            batch = [each.face for each in records[start : start + _BATCH]]
            missing = [each for each in batch if f"{name} {each.id}" not in journal]
            found = source([_framed(folder, each) for each in missing]) if missing else []
            for face, attributes in zip(missing, found):
                journal.put(f"{name} {face.id}", [list(each) for each in attributes])
            for face in batch:
                yield [Attribute(*each) for each in journal.get(f"{name} {face.id}")]
            bar.update(len(batch))


def _framed(folder: Path, face: Face) -> np.ndarray:
    return faces.framed(folder, face, SIDE)


def _write_set(out: Path, kept: Sequence[Record], folder: Path) -> None:
    """faces.json; `folder` of the pictures, as their names are to begin."""
    told = [
        {
            "id": each.face.id,
            "image": (folder / each.face.file).as_posix(),
            "caption": each.caption,
            "conversations": [
                {"from": who, "value": words}
                for pair in each.pairs
                for who, words in zip(("human", "gpt"), pair)
            ],
            "attributes": each.truth,
        }
        for each in kept
    ]  # fmt: skip
    write_json(out / "faces.json", told)


def _fallen(found: Sequence[Face], records: Sequence[Record]) -> Iterator[tuple[str, str, Face]]:
    for face in found:
        if face.reason:
            yield "face checks", face.reason, face
    for record in records:
        if record.lost:
            yield "captions" if not record.caption else "questions", record.lost, record.face


def _reasons(found: Sequence[Face], records: Sequence[Record], pairs: Counter[str]) -> list[tuple[str, str, int]]:
    """(stage, reason, number), the most frequent first; reasons without their particulars."""
    counts: Counter[tuple[str, str]] = Counter()
    for stage, reason, _ in _fallen(found, records):
        parts = reason.split(": ")
        counts[stage, ": ".join(parts[: 1 if stage == "face checks" else 2])[:80]] += 1
    counts.update({("pairs", reason): number for reason, number in pairs.items()})
    return [(stage, reason, number) for (stage, reason), number in counts.most_common()]


def _write_dropped(out: Path, found: Sequence[Face], records: Sequence[Record]) -> None:
    with replacing(out / "dropped.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for stage, reason, face in _fallen(found, records):
            told = {"file": face.file, "id": face.id, "stage": stage, "reason": reason, "measures": face.measures}
            file.write(json.dumps(told, ensure_ascii=False) + "\n")


def _write_shards(config: BuildConfig, out: Path, base: Path) -> dict[str, Any]:
    assert config.encoding is not None
    words = (out / "faces.json").read_bytes()
    where = out / "shards" / digest(words, json.dumps(dataclasses.asdict(config.encoding)).encode())
    told = SetConfig(str(out / "faces.json"), images=str(base))
    manifest = precompute(PrecomputeConfig(told, config.encoding, str(where)))
    return {"folder": where.relative_to(out).as_posix(), "samples": manifest["samples"], "skipped": manifest["skipped"]}


def _plain(config: BuildConfig) -> BuildConfig:
    """Tuples as lists: for YAML."""
    sources: Any = list(config.attributes.sources)
    return dataclasses.replace(config, attributes=dataclasses.replace(config.attributes, sources=sources))
