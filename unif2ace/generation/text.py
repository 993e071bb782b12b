"""Answer questions about a face: next-token prediction after the image, greedy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.model.image_tokenizer import to_images
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import mmu_batch

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
) -> list[list[int]]:
    """Token ids of the answer to each question, without the end token.

    Args:
        codes: [B, N] codes of the image tokenizer, from 0.
        questions: token ids of each question.
        identity, semantic: [B, C_id] and [B, N, C_sem].
        max_tokens: longest answer.
    """
    config = model.config
    codes = codes + config.vocabulary.code_range[0]
    texts = [list(question) for question in questions]
    answers: list[list[int]] = [[] for _ in texts]
    unfinished = list(range(len(texts)))
    for _ in range(max_tokens):
        rows = torch.tensor(unfinished)
        batch = mmu_batch(codes[rows], [texts[row] for row in unfinished], identity[rows], semantic[rows], config)
        last = torch.tensor([config.image_tokens + 2 + len(texts[row]) for row in unfinished])
        hidden = model(**vars(batch)).last_hidden_state[torch.arange(len(rows)), last]
        said = model.head(hidden)[:, : config.vocabulary.text].argmax(dim=-1).tolist()
        for row, token in zip(unfinished, said):
            texts[row].append(token)
            if token != end:
                answers[row].append(token)
        unfinished = [row for row, token in zip(unfinished, said) if token != end]
        if not unfinished:
            break
    return answers


def answer_codes(
    checkpoint: Checkpoint,
    codes: torch.Tensor,
    identity: torch.Tensor,
    semantic: torch.Tensor,
    questions: Sequence[str],
) -> list[str]:
    """Answers in words to one question on each encoded face; arguments as in `answer`.

    Raises:
        UserError: an empty or over-long question.
    """
    text = checkpoint.text_tokenizer
    asked = [text.encode(question) for question in questions]
    longest = max(map(len, asked))
    if longest > MAX_QUESTION:
        raise UserError(f"the question has {longest} tokens, at most {MAX_QUESTION} are read: shorten it")
    return [text.decode(ids) for ids in answer(checkpoint.model, codes, asked, identity, semantic, text.end)]


def answer_faces(
    checkpoint: Checkpoint, images: np.ndarray, identity: torch.Tensor, questions: Sequence[str]
) -> list[str]:
    """Answers to one question on each face.

    Args:
        images: [B, side, side, 3] uint8, framed as `data.identity.face_from_file` does.
        identity: [B, C_id].
    """
    codes, semantic = checkpoint.image_tokenizer.encode(to_images(torch.from_numpy(images)))
    return answer_codes(checkpoint, codes, identity, semantic, questions)
