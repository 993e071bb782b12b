"""What stands between a user's texts and pictures and the model's tensors, in the conventions of transformers.

    processor(text="a person with light hair")                    -> a t2i batch, ready for `generate_image`
    processor(images=face, text="is the mouth open ?", ...)       -> an mmu batch, padded on the left, for `generate`
    processor(text="once upon a time", task="lm")                 -> plain text

A face's features come from frozen encoders: computed once, by whoever has them, and given here as tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from unif2ace.configs import UniF2aceConfig, VocabularyConfig
from unif2ace.errors import UserError
from unif2ace.model.image_tokenizer import to_images, to_uint8
from unif2ace.model.sequences import TENSORS, Batch, lm_batch, mmu_batch, padded_left, t2i_batch, t2i_prompts
from unif2ace.model.text_tokenizer import END, TextTokenizer


class UniF2aceProcessor(ProcessorMixin):
    """Texts and faces to the fields of `Batch`, and token ids back to text.

    Args:
        tokenizer: of the text; its end-of-text token begins and ends one.
        vocabulary, image_tokens, text_slots, identity, semantic: as in `UniF2aceConfig`.
        image_size: side of a face in pixels, None where faces come as codes only.
        encoders: kinds of the frozen encoders that give ``semantic`` and ``identity``, e.g.
            ``{"identity": "sface", "semantic": "image_tokenizer"}``.
        prompts: what the model was trained to be asked, e.g. ``{"caption": "describe the face ."}``.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocabulary: VocabularyConfig | dict[str, int] | None = None,
        image_tokens: int = 64,
        text_slots: int = 32,
        identity: int = 128,
        semantic: int = 10,
        image_size: int | None = None,
        encoders: dict[str, str] | None = None,
        prompts: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocabulary = (
            VocabularyConfig(**vocabulary) if isinstance(vocabulary, dict) else vocabulary or VocabularyConfig()
        )
        self.image_tokens, self.text_slots, self.image_size = image_tokens, text_slots, image_size
        self.identity, self.semantic = identity, semantic
        self.encoders, self.prompts = dict(encoders or {}), dict(prompts or {})
        super().__init__(tokenizer, **kwargs)
        self.text = TextTokenizer(tokenizer.backend_tokenizer)

    @classmethod
    def of(cls, config: UniF2aceConfig, text: TextTokenizer, **options: Any) -> UniF2aceProcessor:
        """The processor of a model of `config`; `options` are the constructor's."""
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=text.tokenizer, bos_token=END, eos_token=END)
        names = ("vocabulary", "image_tokens", "text_slots", "identity", "semantic")
        return cls(tokenizer, **{name: getattr(config, name) for name in names}, **options)

    def to_dict(self) -> dict[str, Any]:
        plain = super().to_dict()
        plain.pop("text", None)
        plain["vocabulary"] = dataclasses.asdict(self.vocabulary)
        return plain

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        task: str | None = None,
        identity: torch.Tensor | None = None,
        semantic: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Rows for the model.

        Args:
            images: faces to be asked about: PIL images, or uint8 arrays [H, W, 3], one or a list.
            text: prompts to paint, questions on the faces (one a face), or plain text to go on with.
            task: "t2i", "mmu" or "lm"; by default "mmu" where there are faces, else "t2i".
            identity, semantic: [B, C_id] and [B, S, C_sem] of the faces, from `encoders`; zeros without.
            codes: [B, N] image codes from 0 in place of `images`.

        Returns:
            The fields of `Batch` (without labels), and ``pixel_values`` [B, 3, side, side] in [-1, 1] with `images`.

        Raises:
            UserError: there is no text, it is too long, or there are not as many texts as faces.
            ValueError: a task that is none, or a face with a task that has none.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: expected 'pt', got {return_tensors!r}")
        faces = images is not None or codes is not None
        task = task or ("mmu" if faces else "t2i")
        if task not in ("t2i", "mmu", "lm"):
            raise ValueError(f"task: expected t2i, mmu or lm, got {task!r}")
        if faces != (task == "mmu"):
            raise ValueError(f"images: expected {'faces' if task == 'mmu' else 'none'} with the task {task}")
        texts = [text] if isinstance(text, str) else list(text or [])
        ids = [self.text.encode(each) for each in texts]
        if not ids:
            raise UserError("there is no text: write a few words")
        if task == "t2i":
            prompts = t2i_prompts(ids, self.text.end, self)
            masked = torch.full((len(ids), self.image_tokens), self.vocabulary.mask)
            batch = t2i_batch(prompts, masked, self)
        elif task == "lm":
            batch = padded_left(lm_batch(ids, self), self.vocabulary.pad)
        else:
            return self._asked(images, codes, ids, identity, semantic)
        return BatchFeature(_tensors(batch))

    def _asked(self, images, codes, ids, identity, semantic) -> BatchFeature:
        pixels = None if images is None else self.pixels(images)
        count = len(codes) if pixels is None else len(pixels)
        if len(ids) == 1:
            ids = ids * count
        if len(ids) != count:
            raise UserError(f"{len(ids)} questions on {count} faces: ask one, or one of each")
        if codes is None:
            codes = torch.full((count, self.image_tokens), self.vocabulary.mask)
        else:
            codes = codes + self.vocabulary.code_range[0]
        identity = torch.zeros(count, self.identity) if identity is None else identity
        semantic = torch.zeros(count, 0, self.semantic) if semantic is None else semantic
        batch = padded_left(mmu_batch(codes, ids, identity, semantic, self), self.vocabulary.pad)
        extra = {} if pixels is None else {"pixel_values": pixels}
        tensors = _tensors(batch) | extra
        if not semantic.shape[1]:
            del tensors["semantic"]  # the model then asks for it, or makes it from the pixels
        return BatchFeature(tensors)

    def pixels(self, images: Any) -> torch.Tensor:
        """[B, 3, side, side] in [-1, 1] of faces of any size and mode, as they are framed.

        Raises:
            UserError: this model takes no pictures, or one is no picture.
        """
        if self.image_size is None:
            raise UserError("this model has no image tokenizer: give codes, or import one")
        side = self.image_size
        made = []
        for image in images if isinstance(images, list | tuple) else [images]:
            if isinstance(image, np.ndarray):
                if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                    raise UserError(f"expected uint8 pictures [H, W, 3], got {image.dtype} {list(image.shape)}")
                image = Image.fromarray(image)
            elif not isinstance(image, Image.Image):
                raise UserError(f"expected a picture, got {type(image).__name__}")
            image = image.convert("RGB")
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.LANCZOS)
            made.append(np.asarray(image))
        return to_images(torch.from_numpy(np.stack(made)))

    def post_process_text(self, sequences: torch.Tensor, prompt: torch.Tensor) -> list[str]:
        """Texts that `generate` wrote after `prompt`, the batch's input_ids, each up to its end token."""
        return [self.text.decode(row) for row in sequences[:, prompt.shape[1] :].tolist()]

    def post_process_images(self, images: torch.Tensor) -> list[Image.Image]:
        """Pictures of `generate_image`'s [B, 3, side, side] in [-1, 1]."""
        return [Image.fromarray(each) for each in to_uint8(images).cpu().numpy()]


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in TENSORS if name != "labels"}
