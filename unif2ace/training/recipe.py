"""What a training step sees: rows of both tasks, drawn from the faces by (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from unif2ace.configs import UniF2aceConfig
from unif2ace.data import captions
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.model.image_tokenizer import ImageTokenizer, to_images
from unif2ace.model.magvit import Magvit
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import IGNORE, Batch, mmu_batch, t2i_batch, t2i_prompts
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace_kernels import d3diff

if TYPE_CHECKING:  # a set is not read where faces come from shards
    from unif2ace.data.dataset import FaceSet

# What a random number is for, so that equal seeds and steps do not mean equal numbers.
TOKENIZER, RECIPE, EVALUATION = 1, 2, 3


@dataclass
class EncodedFaces:
    """Faces as the model sees them.

    Attributes:
        codes: [N, image tokens] codes of the image tokenizer, from 0.
        semantic: [N, image tokens, C] the image tokenizer's latents, which fill the CLIP slot.
        identity: [N, C_id].
        classes: [N, A] attribute classes, what captions, questions and answers are made from.
    """

    codes: torch.Tensor
    semantic: torch.Tensor
    identity: torch.Tensor = field(repr=False)  # who a person is: never said
    classes: np.ndarray

    @classmethod
    def of(cls, faces: FaceSet, tokenizer: ImageTokenizer | Magvit) -> EncodedFaces:
        """Every face of a set."""
        parts = [tokenizer.encode(to_images(torch.from_numpy(chunk))) for chunk in np.array_split(faces.images, 16)]
        codes, semantic = (torch.cat(each) for each in zip(*parts))
        return cls(codes, semantic, torch.from_numpy(faces.identity), faces.classes)

    def at(self, index: np.ndarray) -> EncodedFaces:
        """The faces at `index`."""
        rows = torch.from_numpy(index)
        return EncodedFaces(self.codes[rows], self.semantic[rows], self.identity[rows], self.classes[index])


@dataclass(frozen=True)
class RecipeConfig:
    """Attributes:
    t2i, mmu: rows of each task in a step.
    captions: of the mmu rows, those that ask for a caption; the others ask questions.
    questions: questions on one face, each with its answer, in one mmu row.
    guidance_dropout: share of t2i rows whose caption is left out, for classifier-free guidance.
    seed: of everything that is drawn.
    """

    t2i: int = 24
    mmu: int = 20
    captions: int = 2
    questions: int = 3
    guidance_dropout: float = 0.1
    seed: int = 0


class Recipe:
    """`batch(step)` gives the step's rows, `loss(model, step)` what a model makes of them."""

    def __init__(self, faces: EncodedFaces, text: TextTokenizer, model: UniF2aceConfig, config: RecipeConfig) -> None:
        self.faces, self.text, self.model, self.config = faces, text, model, config
        self.schedule = d3diff.schedule(model.loss.schedule)

    def batch(self, step: int) -> Batch:
        """Rows of both tasks for `step`."""
        rng = np.random.default_rng((self.config.seed, RECIPE, step))
        return Batch.join([self._t2i(step, rng), self._mmu(rng)], self.model.vocabulary.pad)

    def loss(self, model: UniF2aceForConditionalGeneration, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A CPU model's loss on the step's rows, computed in bfloat16, and its terms: what `loop.fit` asks for."""
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**vars(self.batch(step)))
        return output.loss, output.terms

    def _t2i(self, step: int, rng: np.random.Generator) -> Batch:
        rows = self.config.t2i
        chosen = rng.integers(len(self.faces.codes), size=rows)
        texts = [captions.caption(self.faces.classes[face], rng) for face in chosen]
        kept = rng.random(rows) >= self.config.guidance_dropout
        ids = [self.text.encode(text) if keep else [] for text, keep in zip(texts, kept)]
        # One time in each of `rows` equal parts of (0, 1): the same law, less spread between steps.
        time = torch.from_numpy((rng.permutation(rows) + rng.random(rows)) / rows)
        mask_prob = self.schedule.mask_prob(time, length=self.model.image_tokens)
        codes = self.faces.codes[chosen] + self.model.vocabulary.code_range[0]
        noised, masked = d3diff.noise(codes, mask_prob, self.model.vocabulary.mask, seed=self.config.seed, offset=step)
        prompts = t2i_prompts(ids, self.text.end, self.model)
        return t2i_batch(prompts, noised, self.model, codes.masked_fill(~masked, IGNORE), mask_prob.float())

    def _asked(self, classes: np.ndarray, caption: bool, rng: np.random.Generator) -> list[tuple[str, str]]:
        if caption:
            return [(captions.CAPTION_PROMPTS[0], captions.full_caption(classes))]
        attributes = rng.permutation(len(ATTRIBUTES))[: self.config.questions]
        return [captions.question_answer(classes, attribute, rng) for attribute in attributes]

    def _mmu(self, rng: np.random.Generator) -> Batch:
        rows = self.config.mmu
        chosen = rng.integers(len(self.faces.codes), size=rows)
        texts, answers = [], []
        for row, face in enumerate(chosen):
            ids: list[int] = []
            wanted: list[bool] = []
            for question, answer in self._asked(self.faces.classes[face], row < self.config.captions, rng):
                asked, said = self.text.encode(question), [*self.text.encode(answer), self.text.end]
                ids += asked + said
                wanted += [False] * len(asked) + [True] * len(said)
            texts.append(ids)
            answers.append(wanted)
        index, faces = torch.from_numpy(chosen), self.faces
        codes = faces.codes[index] + self.model.vocabulary.code_range[0]
        return mmu_batch(codes, texts, faces.identity[index], faces.semantic[index], self.model, answers)


@torch.no_grad()
def initialise_codes(model: UniF2aceForConditionalGeneration, tokenizer: ImageTokenizer | Magvit) -> None:
    """Give codes that share bits similar rows in the embedding and in the head, of the usual size.

    Codes that differ in one bit decode to similar patches; with rows that say so from the start, what is learned of
    one code helps its neighbours.
    """
    first, stop = model.config.vocabulary.code_range
    signs = tokenizer.code_signs(torch.arange(stop - first))
    for weight in (model.embedding.weight, model.head.weight):
        shared = signs @ torch.randn(signs.shape[1], weight.shape[1]) * (0.02 / signs.shape[1] ** 0.5)
        weight[first:stop] = 0.9 * shared + 0.43 * weight[first:stop]
