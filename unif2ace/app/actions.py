"""What the page's buttons do, without the page: paint step by step, ask, paint anew; every picture out is marked."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import cv2
import numpy as np

from unif2ace.checkpoint import Checkpoint
from unif2ace.data.framing import framed
from unif2ace.errors import UserError
from unif2ace.generation.image import OnPreview, PaintSettings, Preview, paint, repaint
from unif2ace.generation.reading import FaceReader
from unif2ace.pictures import sheet
from unif2ace.safety import saving
from unif2ace.safety.checker import SafetyChecker, allow, blank

LARGEST_COUNT = 8
EDITOR_SIDE = 384  # of the face that is drawn on: the model's own pictures may be small
COLUMNS = 4  # faces of a painting that stand side by side
STRIP = 8  # steps that the strip shows


class Shown(NamedTuple):
    """picture: file of the painting so far; strip: file with the first face at up to `STRIP` steps; status: a line."""

    picture: Path
    strip: Path
    status: str


@dataclass(frozen=True)
class Studio:
    """A checkpoint and how it is to be used.

    Attributes:
        checkpoint: what paints and answers.
        folder: pictures are written here.
        checker: the safety checker, or None.
        marked: whether pictures carry the watermark.
    """

    checkpoint: Checkpoint
    folder: Path
    checker: SafetyChecker | None = None
    marked: bool = True

    @functools.cached_property
    def _reader(self) -> FaceReader:
        return FaceReader(self.checkpoint)

    @property
    def side(self) -> int:
        """Of the model's pictures, in pixels."""
        return self.checkpoint.image_tokenizer.config.side

    def paint(self, prompt: str, count: int, steps: int, guidance: float, seed: int) -> Iterator[Shown]:
        """`count` faces from a prompt, after every step."""
        prompts, settings = [prompt] * count, PaintSettings(steps=steps, guidance=guidance, seed=seed)
        allow(self.checker, prompts)
        return self._shown(lambda show: paint(self.checkpoint, prompts, settings, show), prompts, seed, saving.PAINTED)

    def face(self, picture: np.ndarray) -> np.ndarray:
        """The face of a picture [H, W, 3] as the model sees it, [side, side, 3]."""
        return framed(_colour(picture), self.side).face

    def ask(self, picture: np.ndarray, question: str) -> tuple[np.ndarray, str]:
        """The face as the model sees it, and the answer to a question on it."""
        face = self.face(picture)
        allow(self.checker, [question], [face])
        return face, self._reader.answer(self._reader.read(face[None]), [question])[0]

    def repaint(
        self, face: np.ndarray, drawn: np.ndarray, prompt: str, steps: int, guidance: float, seed: int
    ) -> Iterator[Shown]:
        """A part of a face anew, after every step.

        Args:
            face: [side, side, 3] from `face`.
            drawn: [n * side, n * side] bool, drawn on an enlarged copy of it.
        """
        if not drawn.any():
            raise UserError("draw over the part that is to be painted anew, or give a box")
        scale = drawn.shape[0] // self.side
        mask: np.ndarray = np.any(drawn.reshape(self.side, scale, self.side, scale), axis=(1, 3))
        allow(self.checker, [prompt], [face])
        settings = PaintSettings(steps=steps, guidance=guidance, seed=seed)

        def work(show: OnPreview) -> np.ndarray:
            return repaint(self.checkpoint, face[None], mask[None], [prompt], settings, show)

        return self._shown(work, [prompt], seed, saving.REPAINTED)

    def _shown(
        self, work: Callable[[OnPreview], np.ndarray], prompts: Sequence[str], seed: int, kind: str
    ) -> Iterator[Shown]:
        texts = {"Prompt": prompts[0], "Seed": str(seed)}
        # A name that no other call has: a page may still show the pictures of one before
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        history: list[np.ndarray] = []
        for number, item in enumerate(_while_working(work)):
            if isinstance(item, Preview):
                images, status = item.images, f"step {item.index + 1} of {item.steps}"
            else:
                images, status = item, "done"
            images, reasons = blank(self.checker, prompts, images)
            if isinstance(item, Preview):
                history.append(images[0])
            refused = [reason for reason in reasons if reason is not None]
            if refused:
                status += f"; {len(refused)} blanked by the safety checker: {refused[0]}"
            paths = folder / f"{number}.png", folder / f"{number}-steps.png"
            for path, image in zip(paths, (sheet(images, min(len(images), COLUMNS)), _strip(history or [images[0]]))):
                saving.save(path, image, texts, self.marked, kind)
            yield Shown(*paths, status)


def enlarged(face: np.ndarray) -> np.ndarray:
    """A face large enough to draw on; its side is a multiple of the face's."""
    scale = max(1, EDITOR_SIDE // face.shape[0])
    return cv2.resize(face, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def _while_working(work: Callable[[OnPreview], np.ndarray]) -> Iterator[Preview | np.ndarray]:
    """What `work` shows, as it shows it, and last what it returns; its error, if it raises one."""
    queue: SimpleQueue[Preview | np.ndarray | BaseException] = SimpleQueue()

    def run() -> None:
        try:
            queue.put(work(queue.put))
        except BaseException as error:  # noqa: BLE001  raised again below, in the thread that asked
            queue.put(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        item = queue.get()
        if isinstance(item, BaseException):
            raise item
        yield item
        if isinstance(item, np.ndarray):
            return


def _colour(picture: np.ndarray) -> np.ndarray:
    if picture is None:
        raise UserError("give a picture first")
    return np.ascontiguousarray(picture[..., :3])


def _strip(history: list[np.ndarray]) -> np.ndarray:
    """Up to `STRIP` pictures of one face side by side, from the first step to the last so far."""
    chosen = [history[round(i)] for i in np.linspace(0, len(history) - 1, min(STRIP, len(history)))]
    chosen += [np.full_like(history[0], 255)] * (STRIP - len(chosen))
    return np.concatenate(chosen, axis=1)
