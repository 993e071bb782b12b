"""What a trained model can do, in numbers with a test against chance behind each.

Painting: prompts name classes drawn uniformly and independently of everything, so whatever a model paints that does
not read its prompt, an attribute with C classes matches with probability exactly 1 / C: a one-sided binomial test.

Answers: on faces never trained on, one question an attribute and face. The rival is the best constant answer, taken
with hindsight from the same faces; a one-sided exact McNemar test on the faces where only one of the two is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import TASKS
from unif2ace.data import captions
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.dataset import FaceSet
from unif2ace.data.identity import find_face
from unif2ace.generation.image import PaintSettings, paint
from unif2ace.generation.text import answer_codes
from unif2ace.model.image_tokenizer import to_uint8
from unif2ace.model.sequence_moe import EXPERTS
from unif2ace.training.recipe import EVALUATION, EncodedFaces, Recipe, RecipeConfig
from unif2ace.training.tokenizer import psnr
from unif2ace_kernels import moe

SHOWN = 48  # held-out faces whose caption is painted for the report


@dataclass
class Results:
    """Numbers that go to JSON, and what the report draws.

    Attributes:
        numbers: plain values only.
        held_out: [n, H, W, 3] held-out faces; `reconstructed` the same through the tokenizer; `repainted` painted from
            their captions; `painted` from the random prompts.
        answers: rows (face index, question, answer given, right answer) to show.
    """

    numbers: dict
    held_out: np.ndarray
    reconstructed: np.ndarray
    repainted: np.ndarray
    painted: np.ndarray
    prompts: list[str]
    answers: list[tuple[int, str, str, str]]


def evaluate(checkpoint: Checkpoint, faces: FaceSet, held_out: EncodedFaces, prompts: int, seed: int) -> Results:
    """Measure a checkpoint on the held-out faces of `faces`, which `held_out` encodes, and on random prompts."""
    images = faces.images[faces.test]
    reconstructed = to_uint8(checkpoint.image_tokenizer.decode(held_out.codes)).numpy()
    tokenizer = {
        "psnr_db": float(psnr(images, reconstructed).mean()),
        "codes_used": len(held_out.codes.unique()),
        "label_kept": _by_attribute((faces.classify(reconstructed) == held_out.classes).mean(0)),
        "face_found": _face_found(reconstructed),
        "face_found_before": _face_found(images),
    }
    rng = np.random.default_rng((seed, EVALUATION))
    settings = PaintSettings(seed=seed)
    wanted = captions.random_classes(prompts, rng)
    texts = [captions.caption(classes, rng, dropout=0.0) for classes in wanted]
    shown = [captions.full_caption(classes) for classes in held_out.classes[:SHOWN]]
    with tqdm(total=prompts + len(shown), desc="painting", unit="face") as bar:
        painted = paint(checkpoint, texts, settings)
        bar.update(prompts)
        repainted = paint(checkpoint, shown, settings)
        bar.update(len(shown))
    generation = {
        "prompts": prompts,
        "test": "binomial, one-sided, against 1 / classes",
        "face_found": _face_found(painted),
        "attributes": {
            each.name: _against_chance(faces.classify(painted)[:, index] == wanted[:, index], each.classes)
            for index, each in enumerate(ATTRIBUTES)
        },
    }
    understanding, answers = _answers(checkpoint, held_out, rng)
    numbers = {
        "tokenizer": tokenizer,
        "generation": generation,
        "understanding": understanding,
        "captioning": _captioning(checkpoint, held_out),
        "held_out_loss": _held_out_loss(checkpoint, held_out, seed),
        "experts": _expert_use(checkpoint, held_out, seed),
        "parameters": sum(p.numel() for p in checkpoint.model.parameters() if p.requires_grad),
    }
    count = min(SHOWN, len(images))
    return Results(numbers, images[:count], reconstructed[:count], repainted, painted, texts, answers)


def _answers(
    checkpoint: Checkpoint, faces: EncodedFaces, rng: np.random.Generator
) -> tuple[dict, list[tuple[int, str, str, str]]]:
    table, shown = {}, []
    for index, each in enumerate(tqdm(ATTRIBUTES, desc="answering", unit="attribute")):
        asked = [captions.question_answer(classes, index, rng) for classes in faces.classes]
        given = answer_codes(
            checkpoint, faces.codes, faces.identity, faces.semantic, [question for question, _ in asked]
        )
        right = np.array([answer == truth for answer, (_, truth) in zip(given, asked)])
        constant = max(each.words, key=lambda word: sum(truth == word for _, truth in asked))
        rival = np.array([truth == constant for _, truth in asked])
        won, lost = int((right & ~rival).sum()), int((rival & ~right).sum())
        table[each.name] = {
            "accuracy": float(right.mean()),
            "majority": float(rival.mean()),
            "p": float(binomtest(won, won + lost, 0.5, alternative="greater").pvalue) if won + lost else 1.0,
        }
        shown += [(face, asked[face][0], given[face], asked[face][1]) for face in range(min(4, len(asked)))]
    test = "McNemar, exact, one-sided, against the best constant answer"
    return {"faces": len(faces.classes), "test": test, "attributes": table}, shown


def _captioning(checkpoint: Checkpoint, faces: EncodedFaces) -> dict:
    """Share of faces of which a caption names an attribute's class rightly, against the best constant one."""
    asked = [captions.CAPTION_PROMPTS[0]] * len(faces.classes)
    given = answer_codes(checkpoint, faces.codes, faces.identity, faces.semantic, asked, max_tokens=40)
    right = np.stack([captions.told(text) for text in given]) == faces.classes
    return {
        "faces": len(faces.classes),
        "attributes": {
            each.name: {
                "accuracy": float(right[:, index].mean()),
                "majority": float(np.bincount(faces.classes[:, index]).max() / len(faces.classes)),
            }
            for index, each in enumerate(ATTRIBUTES)
        },
        "mean_accuracy": float(right.mean()),
    }


def _against_chance(match: np.ndarray, classes: int) -> dict:
    test = binomtest(int(match.sum()), len(match), 1 / classes, alternative="greater")
    return {"match": float(match.mean()), "chance": 1 / classes, "p": float(test.pvalue)}


def _face_found(images: np.ndarray) -> float:
    """Share of images in which the face detector finds a face."""
    return float(np.mean([find_face(image) is not None for image in images]))


def _by_attribute(values: np.ndarray) -> dict[str, float]:
    return {each.name: float(value) for each, value in zip(ATTRIBUTES, values)}


@torch.no_grad()
def _held_out_loss(checkpoint: Checkpoint, faces: EncodedFaces, seed: int) -> dict[str, float]:
    config = RecipeConfig(t2i=128, mmu=128, guidance_dropout=0.0, seed=seed)
    batch = Recipe(faces, checkpoint.text_tokenizer, checkpoint.model.config, config).batch(0)
    return {name: value.item() for name, value in checkpoint.model(**vars(batch)).terms.items()}


@torch.no_grad()
def _expert_use(checkpoint: Checkpoint, faces: EncodedFaces, seed: int) -> dict[str, list]:
    """How often each expert of each layer is chosen, as a share of its group's choices: [layer][expert] by task.

    A level that the model does not have is left out.
    """
    model = checkpoint.model
    config = RecipeConfig(t2i=64, mmu=64, guidance_dropout=0.0, seed=seed)
    output = model(**vars(Recipe(faces, checkpoint.text_tokenizer, model.config, config).batch(0)))
    levels: list[tuple[str, list[moe.Routing], Sequence[int]]] = []
    if model.config.token_moe is not None:
        levels.append(("token", output.token_routings, model.config.token_moe.experts))
    if model.config.sequence_moe is not None:
        levels.append(("sequence", output.sequence_routings, [len(group) for group in EXPERTS]))
    use: dict[str, list] = {}
    for level, routings, sizes in levels:
        for task, name in enumerate(TASKS):
            first = sum(sizes[:task])
            counts = [routing.counts[first : first + sizes[task]].double() for routing in routings]
            use[f"{level}_{name}"] = [(each / each.sum().clamp(min=1)).tolist() for each in counts]
    return use
