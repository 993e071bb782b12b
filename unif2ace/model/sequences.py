"""One token sequence for both tasks: how captions, faces, questions and answers are laid out, and who sees whom.

    t2i   pad .. pad <t2i> <end> caption <end> <soi> code_1 .. code_N <eoi>      caption side left-padded to text_slots
    mmu   <mmu> <soi> code_1 .. code_N <eoi> question answer <end> ... pad       right-padded

t2i: text is causal, the rows <soi> .. <eoi> see everything but padding. mmu: causal, and every row sees the whole
prefix through <eoi>. (Layout and masks are Show-o's; its mmu mask takes row 0's <eoi> for all rows, ours each row's.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from unif2ace.configs import MMU, T2I, ModelConfig
from unif2ace.errors import UserError

IGNORE = -100  # a label that is no target


@dataclass
class Batch:
    """Rows of both tasks, padded to one length.

    Attributes:
        tokens: [B, L] token ids.
        task: [B] `T2I` or `MMU`.
        valid: [B, L] False on padding.
        image_start: [B] position of the first image code.
        labels: [B, L] targets aligned with the row that predicts them: the code itself for a masked code (t2i), the
            next token for text (mmu); `IGNORE` elsewhere.
        mask_prob: [B] share of codes masked at this row's time; 1 for mmu rows, which do not use it.
        identity: [B, C_id] identity embeddings, zeros where a row has none.
        semantic: [B, S, C_sem] semantic features (the CLIP slot), zeros where a row has none.
    """

    tokens: torch.Tensor
    task: torch.Tensor
    valid: torch.Tensor
    image_start: torch.Tensor
    labels: torch.Tensor
    mask_prob: torch.Tensor
    identity: torch.Tensor
    semantic: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(*(getattr(self, each.name).to(device) for each in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Batch], pad: int) -> Batch:
        """One batch of all rows, padded on the right with the token id `pad` to a multiple of 8.

        Lengths that recur from step to step let the CPU's matrix library keep the kernels that it builds a shape.
        """
        length = -(-max(part.tokens.shape[1] for part in parts) // 8) * 8
        fills = {"tokens": pad, "valid": False, "labels": IGNORE}

        def stack(name: str) -> torch.Tensor:
            values = [getattr(part, name) for part in parts]
            if name in fills:
                values = [torch.nn.functional.pad(v, (0, length - v.shape[1]), value=fills[name]) for v in values]
            return torch.cat(values)

        return cls(*(stack(each.name) for each in fields(cls)))


def t2i_prompts(captions: Sequence[Sequence[int]], end: int, config: ModelConfig) -> torch.Tensor:
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
    config: ModelConfig,
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
        tokens=tokens,
        task=tokens.new_full((rows,), T2I),
        valid=tokens != vocabulary.pad,
        image_start=tokens.new_full((rows,), first),
        labels=labels,
        mask_prob=mask_prob,
        identity=torch.zeros(rows, config.identity, device=tokens.device),
        semantic=torch.zeros(rows, count, config.semantic, device=tokens.device),
    )


def mmu_batch(
    codes: torch.Tensor,
    texts: Sequence[Sequence[int]],
    identity: torch.Tensor,
    semantic: torch.Tensor,
    config: ModelConfig,
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
        tokens=tokens,
        task=tokens.new_full((rows,), MMU),
        valid=tokens != vocabulary.pad,
        image_start=tokens.new_full((rows,), 2),
        labels=labels,
        mask_prob=torch.ones(rows),
        identity=identity,
        semantic=semantic,
    )


def attention_mask(batch: Batch, image_tokens: int) -> torch.Tensor:
    """[B, 1, L, L] bool, True where the row (query) sees the column (key); a padding row sees itself."""
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    start = (batch.image_start - 1)[:, None]  # <soi>
    stop = (batch.image_start + image_tokens)[:, None]  # <eoi>
    in_image = (position >= start) & (position <= stop)
    in_prefix = (position <= stop) & (batch.task == MMU)[:, None]
    causal = position[:, None] >= position[None, :]
    generates = (batch.task == T2I)[:, None, None]
    seen = causal | in_prefix[:, None, :] | (in_image[:, :, None] & generates)
    seen = seen & batch.valid[:, None, :]
    return (seen | torch.eye(len(position), dtype=torch.bool, device=position.device))[:, None]
