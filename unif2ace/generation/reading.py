"""Faces as the model reads them: image codes, identity and semantic features by the encoders it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.data.identity import FRAME, face_encoder
from unif2ace.encoders import LATENTS, encoder
from unif2ace.errors import UserError
from unif2ace.generation.text import MAX_QUESTION, answer, answer_codes, question_ids
from unif2ace.model.image_tokenizer import to_images


class Faces(NamedTuple):
    """codes [B, N] from 0, identity [B, C_id], semantic [B, S, C_sem]."""

    codes: torch.Tensor
    identity: torch.Tensor
    semantic: torch.Tensor

    def at(self, rows: torch.Tensor) -> Faces:
        """The faces at `rows`; one may come several times."""
        return Faces(*(each[rows.to(each.device)] for each in self))

    def __repr__(self) -> str:  # who a person is is never said
        return f"Faces({len(self.codes)})"


class FaceReader:
    """A checkpoint with its frozen encoders, which are loaded once.

    Raises:
        UserError: an encoder's weights or package are missing, or it is not the one that the model was trained with.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        kinds = checkpoint.processor.encoders
        identity, semantic = kinds.get("identity", "sface"), kinds.get("semantic", LATENTS)
        self._identity = face_encoder() if identity == "sface" else encoder(identity, frame=FRAME)
        self._semantic = None if semantic == LATENTS else encoder(semantic)

    def read(self, faces: np.ndarray) -> Faces:
        """Faces [B, side, side, 3] uint8 in the frame, as the model reads them."""
        model = self.checkpoint.model
        device = model.head.weight.device
        codes, *latents = self.checkpoint.image_tokenizer.encode(to_images(torch.from_numpy(faces)).to(device))
        identity = self._identity(list(faces)).to(device)
        semantic = latents[0] if self._semantic is None else self._semantic(list(faces)).to(device)
        wanted = {"identity": model.config.identity, "semantic": model.config.semantic}
        for name, given in (("identity", identity), ("semantic", semantic)):
            if given.shape[-1] != wanted[name]:
                raise UserError(
                    f"the model reads {wanted[name]} channels of {name}, this encoder gives {given.shape[-1]}: "
                    "the checkpoint's processor_config.json has to name the encoder that it was trained with"
                )
        return Faces(codes, identity, semantic)

    def answer(self, faces: Faces, questions: Sequence[str], max_tokens: int = 8) -> list[str]:
        """The answer to one question on each face.

        Raises:
            UserError: an empty or over-long question.
        """
        return answer_codes(self.checkpoint, *faces, questions, max_tokens)

    def converse(
        self, face: Faces, history: Sequence[int], question: str, max_tokens: int = 8
    ) -> tuple[str, list[int]]:
        """An answer that may build on what was said before, and what was said by then.

        Args:
            face: of one picture.
            history: token ids of earlier questions and answers, from the last call; the oldest are forgotten.

        Raises:
            UserError: an empty or over-long question.
        """
        text = self.checkpoint.text_tokenizer
        turns = split_turns(history, text.end)
        asked = question_ids(self.checkpoint, question)
        while turns and sum(map(len, turns)) + len(asked) > MAX_QUESTION:
            turns.pop(0)
        ids = [each for turn in turns for each in turn] + asked
        (said,) = answer(self.checkpoint.model, face.codes, [ids], face.identity, face.semantic, text.end, max_tokens)
        return text.decode(said), [*ids, *said, text.end]


def split_turns(history: Sequence[int], end: int) -> list[list[int]]:
    """Questions with their answers, each up to and with its end token."""
    turns: list[list[int]] = [[]]
    for each in history:
        turns[-1].append(each)
        if each == end:
            turns.append([])
    return [turn for turn in turns if turn]
