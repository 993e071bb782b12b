"""What the model does, kept as it comes: faces painted from captions, questions answered, faces described."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from unif2ace.checkpoint import Checkpoint
from unif2ace.data.config import DataConfig
from unif2ace.evaluation.faces import Face
from unif2ace.generation.image import PaintSettings, paint
from unif2ace.generation.reading import FaceReader
from unif2ace.generation.text import MAX_QUESTION
from unif2ace.journal import Journal
from unif2ace.model.image_tokenizer import to_images, to_uint8
from unif2ace.pictures import read_png
from unif2ace.safety.saving import save

BATCH = 24  # of paintings and of answers
DESCRIBE = DataConfig().describe[0]
Record = dict[str, Any]
T = TypeVar("T")


class Work:
    """One model and the folder of its results: a journal of what was done a kind of result."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self._journals: dict[str, Journal] = {}
        self._open = ExitStack()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def journal(self, name: str) -> Journal:
        """The journal of that name, by key."""
        if name not in self._journals:
            self._journals[name] = self._open.enter_context(Journal(self.folder / f"{name}.jsonl"))
        return self._journals[name]

    def painting(self, record: Record) -> np.ndarray:
        """The picture of a record of `paint`.

        Raises:
            UserError: its file is gone or damaged.
        """
        return read_png(self.folder / record["file"])

    def paint(self, faces: Sequence[Face], settings: PaintSettings) -> Journal:
        """A painting from the first caption of each face, by its key: ``prompt`` and ``file``.

        Batches are the same whenever they are painted, and so are the paintings. A caption that the model has no room
        for is left out.
        """
        done = self.journal("paintings")
        room, text = self.checkpoint.model.config.text_slots - 3, self.checkpoint.text_tokenizer
        faces = [face for face in faces if len(text.encode(face.captions[0])) <= room]
        for number, batch in _batches(faces, "painting"):
            kept = [done.get(face.key) for face in batch]
            if all(record and (self.folder / record["file"]).is_file() for record in kept):
                continue
            prompts = [face.captions[0] for face in batch]
            images = paint(self.checkpoint, prompts, replace(settings, seed=settings.seed * 1_000_003 + number))
            for index, (face, prompt, image) in enumerate(zip(batch, prompts, images)):
                name = f"paintings/{number * BATCH + index:05d}.png"
                # Unmarked, as it is measured; the file says what it is.
                save(self.folder / name, image, {"prompt": prompt, "seed": str(settings.seed)}, marked=False)
                done.put(face.key, {"prompt": prompt, "file": name})
        return done

    def answer(self, faces: Sequence[Face], max_tokens: int) -> Journal:
        """An answer to every question, by key: ``face``, ``question``, ``references``, ``given``, ...

        A question that the model has no room for is left out.
        """
        done = self.journal("answers")
        text = self.checkpoint.text_tokenizer
        asked = [
            (face, number, each) for face in faces for number, each in enumerate(face.questions)
            if 0 < len(text.encode(each.text)) <= MAX_QUESTION
        ]  # fmt: skip
        self._say(
            done, "answering", max_tokens,
            [(f"{face.key}?{number}", face, question.text, {
                "face": face.key, "question": question.text, "references": list(question.references),
                "category": question.category, "kind": question.kind,
            }) for face, number, question in asked],
        )  # fmt: skip
        return done

    def describe(self, faces: Sequence[Face], max_tokens: int) -> Journal:
        """A caption of every face, by its key: ``references`` and ``given``."""
        done = self.journal("captions")
        prompt = self.checkpoint.processor.prompts.get("caption", DESCRIBE)
        self._say(
            done, "describing", max_tokens,
            [(face.key, face, prompt, {"face": face.key, "references": list(face.captions)}) for face in faces],
        )  # fmt: skip
        return done

    def _say(self, done: Journal, what: str, max_tokens: int, wanted: list[tuple[str, Face, str, Record]]) -> None:
        if all(key in done for key, *_ in wanted):
            return
        reader = FaceReader(self.checkpoint)
        for _, batch in _batches(wanted, what):
            if all(key in done for key, *_ in batch):
                continue
            read = reader.read(np.stack([face.image for _, face, _, _ in batch]))
            given = reader.answer(read, [question for _, _, question, _ in batch], max_tokens)
            for (key, _, _, record), said in zip(batch, given):
                done.put(key, {**record, "given": said})

    @torch.no_grad()
    def rebuilt(self, images: np.ndarray) -> np.ndarray:
        """Faces [B, side, side, 3] uint8 through the image tokenizer and back."""
        tokenizer, device = self.checkpoint.image_tokenizer, self.checkpoint.model.head.weight.device
        parts = []
        for start in range(0, len(images), BATCH):
            batch = to_images(torch.from_numpy(images[start : start + BATCH])).to(device)
            parts.append(to_uint8(tokenizer.decode(tokenizer.encode(batch)[0])).cpu().numpy())
        return np.concatenate(parts)


def _batches(items: Sequence[T], what: str) -> Iterator[tuple[int, Sequence[T]]]:
    with tqdm(total=len(items), desc=what, unit="each") as bar:
        for number in range(-(-len(items) // BATCH)):
            batch = items[number * BATCH : (number + 1) * BATCH]
            yield number, batch
            bar.update(len(batch))
