"""VQAScore and VLM-score by a vision-language model that the user holds: a transformers folder on this machine.

VQAScore (Lin et al., 2024): the probability of "yes" as the first token after "does this figure show ...?".
VLM-score: the number from 0 to 100 that the model gives for the match; the paper's own prompt is not published.
The prompts are files in `prompts/`; a local model and an endpoint are asked the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unif2ace.endpoint.prompts import Prompt, load_prompt
from unif2ace.errors import UserError
from unif2ace.parsing import parsing

_YES = ("Yes", "yes", " Yes", " yes")
_SCALE = re.compile(r"\b0\s*(?:to|and|-|–)\s*100\b")  # told again, it is no rating
_NUMBER = re.compile(r"(?<![\d.])(\d{1,3})(?:\.\d+)?(?!\d)")


def rating(text: str) -> float | None:
    """The first whole number from 0 to 100 in an answer, None where there is none."""
    for found in _NUMBER.finditer(_SCALE.sub("", text)):
        if int(found[1]) <= 100:
            return float(found[1])
    return None


class LocalModel:
    """A vision-language model in a folder, as transformers saves it with its processor.

    Nothing is fetched and no code of the folder is run.

    Raises:
        UserError: there is no such folder, or transformers cannot read it.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: name one that holds a vision-language model of transformers")
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with parsing(lambda why: UserError(f"{folder} is no vision-language model that transformers reads: {why}")):
            self._processor = AutoProcessor.from_pretrained(folder, **options)
            model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **options)
        self.device, self.name = torch.device(device), folder.name
        self._model = model.to(self.device).eval()  # type: ignore[arg-type]
        self._asks = {name: load_prompt(name, "unif2ace.evaluation") for name in ("vqascore", "vlm-score")}
        tokenizer = self._processor.tokenizer
        firsts = [tokenizer.encode(word, add_special_tokens=False)[:1] for word in _YES]
        self._yes = sorted({ids[0] for ids in firsts if ids and ids[0] != tokenizer.unk_token_id})
        if not self._yes:
            raise UserError(f"{folder}: its tokenizer has no word yes")

    def _inputs(self, image: np.ndarray, prompt: Prompt, caption: str) -> Any:
        text = prompt.messages({"caption": caption})[-1]["content"]
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        try:
            written = self._processor.apply_chat_template(said, add_generation_prompt=True)
        except ValueError as error:
            raise UserError(f"{self.name} has no chat template, which says how it is asked: {error}") from error
        return self._processor(images=Image.fromarray(image), text=written, return_tensors="pt").to(self.device)

    @torch.inference_mode()
    def vqascore(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        """Probability of yes for each picture [H, W, 3] uint8 RGB and its caption."""
        scores = []
        for image, caption in zip(images, captions):
            logits = self._model(**self._inputs(image, self._asks["vqascore"], caption)).logits[0, -1]
            scores.append(logits.double().softmax(0)[self._yes].sum().item())
        return scores

    @torch.inference_mode()
    def vlm_score(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[float | None]:
        """Rating of each picture and its caption, None where the model says no number."""
        scores = []
        for image, caption in zip(images, captions):
            inputs = self._inputs(image, self._asks["vlm-score"], caption)
            written = self._model.generate(**inputs, do_sample=False, max_new_tokens=8)
            said = self._processor.tokenizer.decode(
                written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            scores.append(rating(said))
        return scores
