"""`unif2ace init`: a set of pictures with words to a fresh checkpoint that `unif2ace train` begins from.

    OUT/init.json            what is being made, and of what; a folder is of one such job
    OUT/words.json           what was found in the words, with tokenizer.json beside it where it was learned from them
    OUT/tokenizer-*          the image tokenizer, its log, while it is trained its state
    OUT/checkpoint/          both tokenizers and a transformer of random weights
    OUT/report.json          the numbers of all that; there once the checkpoint is

Each stage leaves its files; a run that was stopped goes on from there. One seed gives the same bytes, on the same
machine with as many threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from tqdm import tqdm

from unif2ace.checkpoint import TEXT, Checkpoint
from unif2ace.configs import VocabularyConfig
from unif2ace.data.encode import check_device, face_frame, load_image_tokenizer, square_frame
from unif2ace.data.samples import Sample, SampleError
from unif2ace.data.sources import Source, open_source
from unif2ace.errors import UserError
from unif2ace.files import read_json, replacing, write_json
from unif2ace.importers.assemble import LATENTS, absolute, open_encoder
from unif2ace.importers.parts import DTYPES
from unif2ace.importers.texts import load_text_tokenizer
from unif2ace.model.image_tokenizer import ImageTokenizer
from unif2ace.model.magvit import Magvit
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace.parsing import parsing
from unif2ace.training.fresh_config import InitConfig, build_config
from unif2ace.training.recipe import initialise_codes
from unif2ace.training.tokenizer import reconstruction_psnr, trained_image_tokenizer

JOB, WORDS, PICTURES, REPORT = "init.json", "words.json", "pictures.safetensors", "report.json"
CHECKPOINT = "checkpoint"


def initialise(config: InitConfig) -> dict[str, Any]:
    """Make what `config.out` does not hold yet, and return the report.

    Raises:
        UserError: a key is wrong, a set or a part cannot be read, the folder is of something else or cannot be written.
    """
    config.check()
    check_device(config.device, "device")
    sources = [open_source(each, f"sets[{index}]") for index, each in enumerate(config.sets)]
    out = Path(config.out)
    _same_job(out, config, sources)
    if (out / REPORT).exists() and (out / CHECKPOINT).exists():
        return read_json(out / REPORT)
    channels = {
        name: open_encoder(name, chosen, name).channels
        for name, chosen in (("identity", config.identity), ("semantic", config.semantic))
        if chosen is not None and chosen != LATENTS
    }
    reading = _Reading(config, sources)
    text, words = _text(reading, out)
    images, told = _images(reading, out)
    if config.semantic == LATENTS:
        channels["semantic"] = images.config.bits
    model_config = build_config(
        config.model,
        VocabularyConfig(text.size, images.config.codes),
        image_tokens=images.config.grid**2,
        semantic_source="image_tokenizer" if config.semantic == LATENTS else "clip",
        **channels,
    )
    words |= _fit(words.pop("lengths"), words["captions"], model_config.text_slots - 3)  # <t2i>, begin and end
    torch.manual_seed(config.seed)
    model = UniF2aceForConditionalGeneration(model_config)
    initialise_codes(model, images)
    report = {
        "words": words,
        "pictures": told,
        "parameters": sum(each.numel() for each in model.parameters()),
        "passed_over": {"corrupt": len(reading.corrupt), "unusable": len(reading.unusable)},
    }
    encoders = {
        name: absolute(kind) for name in ("identity", "semantic") if (kind := getattr(config, name)) is not None
    }
    made = Checkpoint.of(model.eval(), images, text, encoders=encoders, prompts={"caption": config.describe})
    torch.nn.Module.to(made.model, DTYPES[config.dtype])
    made.save(out / CHECKPOINT)
    write_json(out / REPORT, report)
    (out / PICTURES).unlink(missing_ok=True)
    return report


def _fit(lengths: list[int], captions: int, room: int) -> dict[str, Any]:
    """Tokens of a caption: the median, the most, the places that there are, the share of captions that need more."""
    if not captions:
        return {"median": None, "longest": None, "room": room, "too_long": 0.0}
    median = int(np.searchsorted(np.cumsum(lengths), captions / 2))
    return {
        "median": median,
        "longest": len(lengths) - 1,
        "room": room,
        "too_long": sum(lengths[room + 1 :]) / captions,
    }


def _same_job(out: Path, config: InitConfig, sources: Sequence[Source]) -> None:
    """Write the job into a new folder, or hold it against what the folder is of."""
    values = dataclasses.asdict(config) | {"sources": [each.fingerprint for each in sources]}
    for key in ("out", "max_corrupt", "device"):  # they change nothing of the result
        del values[key]
    job = json.loads(json.dumps(values))
    if not (out / JOB).exists():
        if (out / CHECKPOINT).exists():
            raise UserError(f"{out} holds a checkpoint that was not made so: name another folder as out")
        write_json(out / JOB, job)
    before = read_json(out / JOB)
    for key, now in job.items():
        if before.get(key) != now:
            raise UserError(
                f"{out} is of another {key} ({before.get(key)} there, {now} now): name another folder as out, or "
                "remove it"
            )


class _Reading:
    """Samples of several sets, with account of those that are of no use."""

    def __init__(self, config: InitConfig, sources: Sequence[Source]) -> None:
        self.config, self.sources = config, sources
        self.corrupt = {where: reason for each in sources for where, reason in each.damaged}
        self.unusable: dict[str, str] = {}

    def refuse(self, error: SampleError) -> None:
        """Count it; UserError past the limit."""
        (self.corrupt if error.corrupt else self.unusable)[error.where] = error.reason
        if len(self.corrupt) > self.config.max_corrupt:
            where, reason = next(reversed(self.corrupt.items()))
            raise UserError(
                f"{len(self.corrupt)} samples could not be read, max_corrupt allows {self.config.max_corrupt}; the "
                f"last: {where}: {reason}"
            )

    def samples(self, what: str, chosen: np.ndarray, sources: Sequence[Source]) -> Iterator[tuple[int, Sample]]:
        """Those of `chosen`, indices over all `sources` one after the other, in the order in which they lie there."""
        ends = np.cumsum([len(each) for each in sources])
        for index in tqdm(np.sort(chosen).tolist(), desc=what, unit="sample", mininterval=1.0, dynamic_ncols=True):
            source = int(np.searchsorted(ends, index, side="right"))
            try:
                yield index, sources[source].read(index - (int(ends[source - 1]) if source else 0), features=False)
            except SampleError as error:
                self.refuse(error)

    def drawn(self, sources: Sequence[Source], count: int) -> np.ndarray:
        """`count` of all their samples at most, in an order drawn by the seed."""
        rng = np.random.default_rng(self.config.seed)
        return rng.permutation(sum(len(each) for each in sources))[:count]


def _text(reading: _Reading, out: Path) -> tuple[TextTokenizer, dict[str, Any]]:
    """The text tokenizer, and what was found in the words: of captions how many have so many tokens, from 0 on."""
    config = reading.config.text_tokenizer
    if (out / WORDS).exists():
        return load_text_tokenizer(Path(config.path or out)), read_json(out / WORDS)
    captions: list[str] = []
    texts, read = [reading.config.describe], 0
    for _, sample in reading.samples("words", reading.drawn(reading.sources, config.samples), reading.sources):
        read += 1
        captions += sample.captions
        texts += [said for turns in sample.conversations for turn in turns for said in turn]
        texts += [sample.text] if sample.text else []
    if config.path is None:
        text = TextTokenizer.train([*texts, *captions], config.size)
        with replacing(out / TEXT) as partial:
            text.save(partial)
    else:
        text = load_text_tokenizer(Path(config.path))
    lengths = np.bincount([len(text.encode(each)) for each in captions] or [0])
    found = {"samples": read, "tokens": text.size, "captions": len(captions), "lengths": lengths.tolist()}
    write_json(out / WORDS, found)
    return text, found


def _images(reading: _Reading, out: Path) -> tuple[ImageTokenizer | Magvit, dict[str, Any]]:
    """The image tokenizer, and what it was trained and measured on."""
    config, seed = reading.config.image_tokenizer, reading.config.seed
    tokenizer: ImageTokenizer | Magvit
    if config.path is not None:
        tokenizer = load_image_tokenizer(Path(config.path))[0]
        pictures = _pictures(reading, out, tokenizer.config.side)
    else:
        pictures = _pictures(reading, out, config.sizes.side)
        of = hashlib.sha256(pictures["training"].tobytes()).hexdigest()
        tokenizer, _ = trained_image_tokenizer(
            lambda: pictures["training"], config.sizes, config.training, out,
            of=of, seed=seed, device=reading.config.device,
        )  # fmt: skip
    return tokenizer, {
        "side": tokenizer.config.side,
        "image_tokens": tokenizer.config.grid**2,
        "codes": tokenizer.config.codes,
        "trained_on": len(pictures["training"]),
        "held_out": len(pictures["held_out"]),
        "psnr_db": round(reconstruction_psnr(tokenizer, pictures["held_out"]), 2),
    }


def _pictures(reading: _Reading, out: Path, side: int) -> dict[str, np.ndarray]:
    """[N, side, side, 3] uint8 in the frame, `training` (none for a tokenizer that is taken) and `held_out`."""
    path, config = out / PICTURES, reading.config.image_tokenizer
    if path.exists():
        with parsing(lambda why: UserError(f"{path} is damaged ({why}); delete it to read the pictures again")):
            return load_file(path)
    pairs = zip(reading.config.sets, reading.sources)
    sources = [source for each, source in pairs if {"t2i", "mmu"} & set(each.tasks)]
    most = max(1, min(config.held_out, sum(len(each) for each in sources) // 10))
    chosen = reading.drawn(sources, most + (config.pictures if config.path is None else 0))
    held_out = set(chosen[:most].tolist())
    found: dict[str, list[np.ndarray]] = {"training": [], "held_out": []}
    seen: set[bytes] = set()
    for index, sample in reading.samples("pictures", chosen, sources):
        try:
            content = sample.image_bytes()
            name = hashlib.sha256(content).digest()
            if name not in seen:  # a picture of several records is one: none is on both sides
                framed = _framed(sample.pixels(content), side, reading.config.frame)
                found["held_out" if index in held_out else "training"].append(framed)
                seen.add(name)
        except SampleError as error:
            reading.refuse(error)
        except ValueError as error:
            reading.refuse(SampleError(sample.where, str(error), corrupt=False))
    if not found["held_out"] or (config.path is None and not found["training"]):
        last = next(reversed([*reading.corrupt.values(), *reading.unusable.values()]), "they are all one picture")
        raise UserError(f"sets: of {len(chosen)} samples too few have a picture of use; the last: {last}")
    pictures = {
        name: np.stack(each) if each else np.empty((0, side, side, 3), np.uint8) for name, each in found.items()
    }
    with replacing(path) as partial:
        partial.write_bytes(save(pictures))
    return pictures


def _framed(picture: np.ndarray, side: int, frame: str) -> np.ndarray:
    """In the frame; a picture of the frame's size stands in it already. ValueError where there is nothing to frame."""
    square = frame == "square" or picture.shape[:2] == (side, side)
    return np.ascontiguousarray((square_frame if square else face_frame)(picture, side))
