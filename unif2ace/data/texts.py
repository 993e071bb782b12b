"""Plain text as one long row of token ids in a file, cut into windows: rows of lm, packed full, each readable at once.

Every text ends with the end token and the next one follows it in the same window. Windows overlap by one token, so
that each token but the very first is predicted once an epoch: nothing is lost at a window's edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unif2ace.data.base import Source, read_at
from unif2ace.data.samples import SampleError
from unif2ace.errors import UserError
from unif2ace.files import digest, read_json, replacing, write_json
from unif2ace.model.text_tokenizer import TextTokenizer

_WIDTH = 4  # bytes of an id


class TokenFile:
    """The ids of all texts of one set. A file made from these texts by this tokenizer is taken as it is.

    Args:
        folder: where the file is kept.
        length: tokens of a window.

    Attributes:
        damaged: (where, reason) of texts that could not be read.

    Raises:
        UserError: the folder cannot be written, or there is no text.
    """

    def __init__(self, source: Source, text: TextTokenizer, folder: Path, length: int, progress: bool = False) -> None:
        if length < 2:
            raise ValueError(f"length: expected at least 2, got {length}")
        self.length = length
        self.fingerprint = digest(source.fingerprint.encode(), text.tokenizer.to_str().encode())
        self.path = Path(folder) / f"{source.path.name}.{self.fingerprint}.tokens"
        about = self.path.with_name(self.path.name + ".json")
        if not about.exists():
            write_json(about, self._write(source, text, progress))
        found = read_json(about)
        self.tokens: int = found["tokens"]
        self.damaged = [(where, reason) for where, reason in found["damaged"]]
        if self.tokens < 2:
            raise UserError(f"{source.path} has no text to learn from")

    def _write(self, source: Source, text: TextTokenizer, progress: bool) -> dict:
        served = source.serving("lm")
        indices: Sequence[int] = range(len(source)) if served is None else served.tolist()
        count, damaged = 0, list(source.damaged)
        with replacing(self.path) as partial, partial.open("wb") as file:
            for index in tqdm(indices, desc=f"tokens of {source.path.name}", unit="text", disable=not progress):
                try:
                    said = source[index].text
                except SampleError as error:
                    damaged.append((error.where, error.reason))
                    continue
                if said and said.strip():
                    ids = np.array([*text.encode(said), text.end], f"<u{_WIDTH}")
                    file.write(ids.tobytes())
                    count += len(ids)
        return {"tokens": count, "damaged": damaged}

    def __len__(self) -> int:
        """Windows."""
        return -(-(self.tokens - 1) // (self.length - 1))

    def read(self, index: int, features: bool = False) -> list[int]:
        return self[index]

    def __getitem__(self, index: int) -> list[int]:
        """The ids of a window; the last one may be short.

        Raises:
            SampleError: the file cannot be read.
        """
        first = index * (self.length - 1)
        count = min(self.length, self.tokens - first)
        return np.frombuffer(read_at(self.path, first * _WIDTH, count * _WIDTH), f"<u{_WIDTH}").tolist()
