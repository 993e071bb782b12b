"""One token sequence for both tasks: how captions, faces, questions and answers are laid out, and who sees whom.

    t2i   pad .. pad <t2i> <end> caption <end> <soi> code_1 .. code_N <eoi>      caption side left-padded to text_slots
    mmu   <mmu> <soi> code_1 .. code_N <eoi> question answer <end> ... pad       right-padded

t2i: text is causal, the rows <soi> .. <eoi> see everything but padding. mmu: causal, and every row sees the whole
prefix through <eoi>. (Layout and masks are Show-o's; its mmu mask takes row 0's <eoi> for all rows, ours each row's.)

    lm    text ... pad                                                           plain text, causal, of task mmu
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol

import torch

from unif2ace.configs import MMU, T2I, VocabularyConfig
from unif2ace.errors import UserError

IGNORE = -100  # a label that is no target


class Layout(NamedTuple):
    """Where things are in a batch, as indices; found where the batch is made, so that no layer has to ask a device.

    Attributes:
        real: [T] positions in the flattened batch that are not padding; None when none is.
        images: [R] rows that have an image; None when all have.
        t2i, mmu: among those R rows, the ones of each task.
        plain: whether there are rows without an image.
    """

    real: torch.Tensor | None
    images: torch.Tensor | None
    t2i: torch.Tensor
    mmu: torch.Tensor
    plain: bool

    @classmethod
    def of(cls, attention_mask: torch.Tensor, task: torch.Tensor, image_start: torch.Tensor) -> Layout:
        """Read off a batch's tensors; on a GPU this waits for them."""
        has_image = image_start >= 0
        plain = not bool(has_image.all())
        with_image = task[has_image] if plain else task
        return cls(
            real=None if bool(attention_mask.all()) else attention_mask.flatten().nonzero()[:, 0],
            images=has_image.nonzero()[:, 0] if plain else None,
            t2i=(with_image == T2I).nonzero()[:, 0],
            mmu=(with_image == MMU).nonzero()[:, 0],
            plain=plain,
        )

    def to(self, device: torch.device | str) -> Layout:
        real, images = (each if each is None else each.to(device) for each in (self.real, self.images))
        return Layout(real, images, self.t2i.to(device), self.mmu.to(device), self.plain)


class Shares(NamedTuple):
    """What part of a training step a batch is, where a step is many batches: on other ranks, or one after another.

    A batch's losses are means over its own targets; times these, they add up to the means over the step's.

    Attributes:
        mask: of its masked codes. score: of its t2i rows. mmu, lm: of its targets on faces, in plain text.
        balance: of the batches of this rank.
    """

    mask: float
    score: float
    mmu: float
    lm: float
    balance: float


@dataclass
class Batch:
    """Rows of both tasks, padded to one length: `model(**vars(batch))`.

    Attributes:
        input_ids: [B, L] token ids.
        attention_mask: [B, L] bool, False on padding.
        task: [B] `T2I` or `MMU`.
        image_start: [B] position of the first image code, -1 in a row of plain text.
        labels: [B, L] targets aligned with the row that predicts them: the code itself for a masked code (t2i), the
            next token for text (mmu); `IGNORE` elsewhere.
        mask_prob: [B] share of codes masked at this row's time; 1 for mmu rows, which do not use it.
        identity: [B, C_id] identity embeddings, zeros where a row has none.
        semantic: [B, S, C_sem] semantic features (the CLIP slot), zeros where a row has none; S = 0 if no row has.
        layout: where things are; found by `to`, before the tensors leave the host.
        shares: what part of a training step this is; None: all of it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    task: torch.Tensor
    image_start: torch.Tensor
    labels: torch.Tensor
    mask_prob: torch.Tensor
    identity: torch.Tensor = field(repr=False)  # who a person is: never said
    semantic: torch.Tensor
    layout: Layout | None = None
    shares: Shares | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        layout = self.layout or Layout.of(self.attention_mask, self.task, self.image_start)
        tensors = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, layout=layout.to(device), **tensors)  # type: ignore[arg-type]

    @classmethod
    def join(cls, parts: Sequence[Batch], pad: int) -> Batch:
        """One batch of all rows, padded on the right with the token id `pad` to a multiple of 8.

        Lengths that recur from step to step let the CPU's matrix library keep the kernels that it builds a shape.
        """
        length = -(-max(part.input_ids.shape[1] for part in parts) // 8) * 8
        fills = {"input_ids": pad, "attention_mask": False, "labels": IGNORE}

        def stack(name: str) -> torch.Tensor:
            values = [getattr(part, name) for part in parts]
            if name in fills:
                values = [torch.nn.functional.pad(v, (0, length - v.shape[1]), value=fills[name]) for v in values]
            elif name == "semantic":  # parts without an encoder's features have none of its tokens
                most = max(v.shape[1] for v in values)
                values = [torch.nn.functional.pad(v, (0, 0, 0, most - v.shape[1])) for v in values]
            return torch.cat(values)

        return cls(*(stack(name) for name in TENSORS))  # type: ignore[arg-type]


TENSORS = tuple(each.name for each in fields(Batch) if each.name not in ("layout", "shares"))


class RowSizes(Protocol):
    """What a row is made by: a `UniF2aceConfig`, or a processor that knows as much."""

    vocabulary: VocabularyConfig
    image_tokens: int
    text_slots: int
    identity: int
    semantic: int


def t2i_prompts(captions: Sequence[Sequence[int]], end: int, config: RowSizes) -> torch.Tensor:
    """Left-padded caption side of t2i rows, [B, text_slots].

    Args:
        captions: token ids of each caption; an empty one is the unconditional prompt of classifier-free guidance.
        end: id of the text tokenizer's end-of-text token, which also begins a text.

    Raises:
        UserError: a caption that does not fit.
    """
    vocabulary, slots = config.vocabulary, config.text_slots
    rows = torch.full((len(captions), slots), vocabulary.pad)
    for row, caption in zip(rows, captions):
        ids = [vocabulary.t2i, end, *caption, end]
        if len(ids) > slots:
            raise UserError(f"the prompt has {len(caption)} tokens, this model reads at most {slots - 3}: shorten it")
        row[slots - len(ids) :] = torch.tensor(ids)
    return rows


def t2i_batch(
    prompts: torch.Tensor,
    codes: torch.Tensor,
    config: RowSizes,
    targets: torch.Tensor | None = None,
    mask_prob: torch.Tensor | None = None,
) -> Batch:
    """Text-to-image rows.

    Args:
        prompts: [B, text_slots] from `t2i_prompts`.
        codes: [B, N] vocabulary ids of the image tokens, mask ids included.
        targets: [B, N] vocabulary ids to predict, `IGNORE` where there is nothing to predict.
        mask_prob: [B] share masked; by default what `codes` shows.
    """
    vocabulary = config.vocabulary
    rows, count = codes.shape
    start = codes.new_full((rows, 1), vocabulary.start_of_image)
    end = codes.new_full((rows, 1), vocabulary.end_of_image)
    tokens = torch.cat([prompts, start, codes, end], dim=1)
    labels = torch.full_like(tokens, IGNORE)
    first = prompts.shape[1] + 1
    if targets is not None:
        labels[:, first : first + count] = targets
    if mask_prob is None:
        mask_prob = (codes == vocabulary.mask).float().mean(dim=1)
    return Batch(
        input_ids=tokens,
        attention_mask=tokens != vocabulary.pad,
        task=tokens.new_full((rows,), T2I),
        image_start=tokens.new_full((rows,), first),
        labels=labels,
        mask_prob=mask_prob,
        identity=torch.zeros(rows, config.identity, device=tokens.device),
        semantic=torch.zeros(rows, 0, config.semantic, device=tokens.device),
    )


def mmu_batch(
    codes: torch.Tensor,
    texts: Sequence[Sequence[int]],
    identity: torch.Tensor,
    semantic: torch.Tensor,
    config: RowSizes,
    answers: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """Understanding rows.

    Args:
        codes: [B, N] vocabulary ids of the image tokens.
        texts: token ids after <eoi>: questions, answers, ends.
        identity, semantic: [B, C_id] and [B, N, C_sem], see `Batch`.
        answers: for each text token whether it is to be predicted.
    """
    vocabulary = config.vocabulary
    rows, count = codes.shape
    head = torch.tensor([vocabulary.mmu, vocabulary.start_of_image]).expand(rows, 2)
    tail = torch.full((rows, 1), vocabulary.end_of_image)
    text = torch.full((rows, max(map(len, texts))), vocabulary.pad)
    wanted = torch.zeros_like(text, dtype=torch.bool)
    for row, ids in enumerate(texts):
        text[row, : len(ids)] = torch.tensor(ids)
        if answers is not None:
            wanted[row, : len(ids)] = torch.tensor(answers[row])
    tokens = torch.cat([head, codes, tail, text], dim=1)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, count + 2 : -1] = text.masked_fill(~wanted, IGNORE)  # the row before a token predicts it
    return Batch(
        input_ids=tokens,
        attention_mask=tokens != vocabulary.pad,
        task=tokens.new_full((rows,), MMU),
        image_start=tokens.new_full((rows,), 2),
        labels=labels,
        mask_prob=torch.ones(rows),
        identity=identity,
        semantic=semantic,
    )


def padded_left(batch: Batch, pad: int) -> Batch:
    """The same rows with their padding before them, so that all end together and text can go on from each."""
    length = batch.input_ids.shape[1]
    shift = length - batch.attention_mask.sum(1)
    source = torch.arange(length) - shift[:, None]

    def moved(values: torch.Tensor, fill: int | bool) -> torch.Tensor:
        return values.gather(1, source.clamp(min=0)).masked_fill(source < 0, fill)

    return replace(
        batch,
        input_ids=moved(batch.input_ids, pad),
        attention_mask=moved(batch.attention_mask, False),
        labels=moved(batch.labels, IGNORE),
        image_start=torch.where(batch.image_start < 0, batch.image_start, batch.image_start + shift),
        layout=None,
    )


def lm_batch(texts: Sequence[Sequence[int]], config: RowSizes) -> Batch:
    """Rows of plain text, each token of which is predicted from those before it; `texts` are token ids."""
    vocabulary, rows = config.vocabulary, len(texts)
    tokens = torch.full((rows, max(map(len, texts))), vocabulary.pad)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    real = tokens != vocabulary.pad
    labels = torch.full_like(tokens, IGNORE)
    labels[:, :-1] = tokens[:, 1:].masked_fill(~real[:, 1:], IGNORE)
    return Batch(
        input_ids=tokens,
        attention_mask=real,
        task=tokens.new_full((rows,), MMU),
        image_start=tokens.new_full((rows,), -1),
        labels=labels,
        mask_prob=torch.ones(rows),
        identity=torch.zeros(rows, config.identity),
        semantic=torch.zeros(rows, 0, config.semantic),
    )
