"""Rows of a batch from samples: what is asked and answered, what is cut, which codes are masked.

Everything that is drawn for a row comes from a generator of that row's own, so a row is the same whichever rank or
worker makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from unif2ace.configs import UniF2aceConfig
from unif2ace.data.config import DataConfig
from unif2ace.data.samples import Conversation, Sample, SampleError
from unif2ace.model.sequences import IGNORE, Batch, lm_batch, mmu_batch, t2i_batch, t2i_prompts
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace_kernels import d3diff


@dataclass(frozen=True)
class Lengths:
    """Tokens that there is room for: a caption's, the text after the image, an lm row's, the longest row's."""

    caption: int
    text: int
    lm: int
    row: int

    @classmethod
    def of(cls, data: DataConfig, model: UniF2aceConfig) -> Lengths:
        t2i = model.text_slots + model.image_tokens + 2
        text = data.text_length or model.text_slots - 1
        lm = data.lm_length or t2i
        return cls(model.text_slots - 3, text, lm, max(t2i, 3 + model.image_tokens + text, lm))


@dataclass
class T2IRow:
    """ids: of the caption. codes: [N] vocabulary ids. mask_prob: share to mask. place: the row's in the step."""

    ids: list[int]
    codes: torch.Tensor
    mask_prob: torch.Tensor
    place: int


@dataclass
class MmuRow:
    """ids: of questions and answers. answers: which of them are to be predicted. codes: [N] vocabulary ids."""

    ids: list[int]
    answers: list[bool]
    codes: torch.Tensor
    identity: torch.Tensor = field(repr=False)  # who a person is: never said
    semantic: torch.Tensor


class RowMaker:
    """Samples to rows and rows to batches, for one model and one text tokenizer."""

    def __init__(self, data: DataConfig, model: UniF2aceConfig, text: TextTokenizer) -> None:
        self.data, self.model, self.text = data, model, text
        self.vocabulary, self.image_tokens = model.vocabulary, model.image_tokens  # a config's fields are slow to read
        self.lengths = Lengths.of(data, model)
        self.schedule = d3diff.schedule(model.loss.schedule)

    def mask_prob(self, rng: np.random.Generator, rows: int) -> torch.Tensor:
        """[rows] shares to mask: one time in each of `rows` equal parts of (0, 1), the same law with less spread."""
        time = torch.from_numpy((rng.permutation(rows) + rng.random(rows)) / rows)
        return self.schedule.mask_prob(time, length=self.image_tokens)

    def t2i(
        self, sample: Sample, rng: np.random.Generator, mask_prob: torch.Tensor, place: int, told: Counter
    ) -> T2IRow:
        """A caption, or none for guidance's sake, and the codes to mask.

        Args:
            told: counts what was cut (`truncated`) or let go (`dropped`).

        Raises:
            SampleError: the sample has no caption, or no codes of this model's, or is to be dropped for its length.
        """
        codes = self._codes(sample)
        kept = rng.random() >= self.data.guidance_dropout
        if not sample.captions:
            raise SampleError(sample.where, "it has no caption", corrupt=False)
        ids = self._encode(sample.captions[rng.integers(len(sample.captions))], sample.where)
        ids = self._cut(ids, self.lengths.caption, sample.where, told) if kept else []
        return T2IRow(ids, codes, mask_prob, place)

    def mmu(self, sample: Sample, rng: np.random.Generator, told: Counter) -> MmuRow:
        """Questions on one face with their answers, in turn, as many as fit and as `questions` allows.

        Conversations come in random order, the turns of one in theirs. Only answers and their ends are targets.

        Raises:
            SampleError: as for `t2i`.
        """
        codes = self._codes(sample)
        ids, answers = self._talk(sample, rng, told)
        return MmuRow(ids, answers, codes, self._identity(sample), self._semantic(sample))

    def _talk(self, sample: Sample, rng: np.random.Generator, told: Counter) -> tuple[list[int], list[bool]]:
        conversations: list[Conversation] = list(sample.conversations)
        if self.data.describe and sample.captions:
            asked = self.data.describe[rng.integers(len(self.data.describe))]
            conversations.append(((asked, sample.captions[rng.integers(len(sample.captions))]),))
        ids: list[int] = []
        answers: list[bool] = []
        turns = 0
        for number in rng.permutation(len(conversations)):
            for asked, said in conversations[number]:
                if turns == self.data.questions:
                    return ids, answers
                question = self._encode(asked, sample.where)
                answer = [*self._encode(said, sample.where), self.text.end]
                room = self.lengths.text - len(ids) - len(question)
                if len(answer) > room:  # not cut where another row has room for it
                    if turns or self.data.over_long == "drop" or room < 1:
                        told["dropped"] += 1
                        break
                    answer = answer[:room]
                    told["truncated"] += 1
                ids += question + answer
                answers += [False] * len(question) + [True] * len(answer)
                turns += 1
        if not turns:
            raise SampleError(sample.where, "it has no question with an answer that fits", corrupt=False)
        return ids, answers

    def _encode(self, text: str, where: str) -> list[int]:
        if not text.strip():
            raise SampleError(where, "a text of it is empty", corrupt=False)
        return self.text.encode(text)

    def _cut(self, ids: list[int], room: int, where: str, told: Counter) -> list[int]:
        if len(ids) <= room:
            return ids
        if self.data.over_long == "drop":
            told["dropped"] += 1
            raise SampleError(where, f"its caption has {len(ids)} tokens where {room} fit", corrupt=False)
        told["truncated"] += 1
        return ids[:room]

    def _codes(self, sample: Sample) -> torch.Tensor:
        if sample.codes is None:
            raise SampleError(sample.where, "it has no codes of an image tokenizer", corrupt=False)
        codes, most = sample.codes, self.vocabulary.codes
        if codes.shape != (self.image_tokens,) or codes.min() < 0 or codes.max() >= most:
            wanted = f"[{self.image_tokens}] below {most}"
            raise SampleError(
                sample.where, f"its codes are {list(codes.shape)} up to {codes.max()}, this model's are {wanted}"
            )
        return torch.from_numpy(codes.astype(np.int64) + self.vocabulary.code_range[0])

    def _identity(self, sample: Sample) -> torch.Tensor:
        if sample.identity is None:
            return torch.zeros(self.model.identity)
        return _feature(sample.identity, (self.model.identity,), "identity", sample.where)

    def _semantic(self, sample: Sample) -> torch.Tensor:
        if sample.semantic is None:
            return torch.zeros(0, self.model.semantic)
        shape = (len(sample.semantic), self.model.semantic)
        return _feature(sample.semantic, shape, "semantic", sample.where)

    def collate(self, t2i: Sequence[T2IRow], mmu: Sequence[MmuRow], lm: Sequence[list[int]], step: int) -> Batch:
        """One batch of the rows of all tasks; `step` and a row's place decide which of its codes are masked."""
        pad, parts = self.vocabulary.pad, []
        if t2i:
            codes, mask_prob = torch.stack([row.codes for row in t2i]), torch.stack([row.mask_prob for row in t2i])
            noised, masked = zip(*(self._noise(row, step) for row in t2i))
            prompts = t2i_prompts([row.ids for row in t2i], self.text.end, self.model)
            targets = codes.masked_fill(~torch.stack(masked), IGNORE)
            parts.append(t2i_batch(prompts, torch.stack(noised), self.model, targets, mask_prob.float()))
        if mmu:
            tokens = max(len(row.semantic) for row in mmu)
            semantic = torch.zeros(len(mmu), tokens, self.model.semantic)
            for into, row in zip(semantic, mmu):
                into[: len(row.semantic)] = row.semantic
            codes, identity = torch.stack([row.codes for row in mmu]), torch.stack([row.identity for row in mmu])
            texts, answers = [row.ids for row in mmu], [row.answers for row in mmu]
            parts.append(mmu_batch(codes, texts, identity, semantic, self.model, answers))
        if lm:
            parts.append(lm_batch(lm, self.model))
        batch = Batch.join(parts, pad)
        room = -(-self.lengths.row // 8) * 8 - batch.input_ids.shape[1]
        if self.data.fixed_length and room > 0:
            batch.input_ids = F.pad(batch.input_ids, (0, room), value=pad)
            batch.attention_mask = F.pad(batch.attention_mask, (0, room), value=False)
            batch.labels = F.pad(batch.labels, (0, room), value=IGNORE)
        return batch

    def _noise(self, row: T2IRow, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The row's codes with some masked, and which; by the row's place in the whole step."""
        noised, masked = d3diff.noise(
            row.codes[None], row.mask_prob[None], self.vocabulary.mask,
            seed=self.data.seed, offset=step, first_row=row.place,
        )  # fmt: skip
        return noised[0], masked[0]


def _feature(value: np.ndarray, shape: tuple[int, ...], name: str, where: str) -> torch.Tensor:
    if value.shape != shape:
        raise SampleError(where, f"its {name} features are {list(value.shape)}, this model's {list(shape)}")
    features = torch.from_numpy(value.astype(np.float32))
    if not features.sum().isfinite():  # one pass, and no mask of a million booleans
        raise SampleError(where, f"its {name} features are not finite")
    return features
