"""Answer questions about a face: next-token prediction after the image, greedy, keys and values cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import TENSORS, mmu_batch, padded_left

MAX_QUESTION = 64  # tokens


@torch.no_grad()
def answer(
    model: UniF2aceForConditionalGeneration,
    codes: torch.Tensor,
    questions: Sequence[Sequence[int]],
    identity: torch.Tensor,
    semantic: torch.Tensor,
    end: int,
    max_tokens: int = 8,
    **options: Any,
) -> list[list[int]]:
    """Token ids of the answer to each question, without the end token.

    Args:
        codes: [B, N] codes of the image tokenizer, from 0.
        questions: token ids of each question.
        identity, semantic: [B, C_id] and [B, N, C_sem].
        max_tokens: longest answer.
        options: of transformers' `generate`.
    """
    config, device = model.config, model.head.weight.device
    codes = codes + config.vocabulary.code_range[0]
    batch = mmu_batch(codes, questions, identity, semantic, config)
    batch = padded_left(batch, config.vocabulary.pad).to(device)
    tensors = {name: getattr(batch, name) for name in TENSORS if name != "labels"}
    written = model.generate(
        **tensors, do_sample=False, max_new_tokens=max_tokens, eos_token_id=end, pad_token_id=config.vocabulary.pad,
        **options,
    )  # fmt: skip
    said = written[:, batch.input_ids.shape[1] :].tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in said]


def question_ids(checkpoint: Checkpoint, question: str) -> list[int]:
    """Token ids of a question.

    Raises:
        UserError: it is empty or too long.
    """
    ids = checkpoint.text_tokenizer.encode(question)
    if len(ids) > MAX_QUESTION:
        raise UserError(f"the question has {len(ids)} tokens, at most {MAX_QUESTION} are read: shorten it")
    return ids


def answer_codes(
    checkpoint: Checkpoint,
    codes: torch.Tensor,
    identity: torch.Tensor,
    semantic: torch.Tensor,
    questions: Sequence[str],
    max_tokens: int = 8,
) -> list[str]:
    """Answers in words to one question on each encoded face; arguments as in `answer`.

    Raises:
        UserError: an empty or over-long question.
    """
    text = checkpoint.text_tokenizer
    asked = [question_ids(checkpoint, question) for question in questions]
    given = answer(checkpoint.model, codes, asked, identity, semantic, text.end, max_tokens)
    return [text.decode(ids) for ids in given]
