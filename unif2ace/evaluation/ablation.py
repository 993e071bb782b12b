"""The paper's ablations on the demo's faces at `tiny` scale: every variant trained with the same seeds, and measured.

A run trains one variant with one seed, for `Study.steps` steps of the demo's recipe on the codes of a demo run's
faces. Runs of one seed see the same faces, captions, questions and masks in the same order, so variants are compared
seed by seed. What is measured, on faces never trained on and the same for every run:

    masked_loss      nats of a masked code, masks drawn once
    score_bound      the score term (RADD's), nats of a face: what alpha weights
    answer_loss      nats of a token of an answer
    answered         share of questions, one an attribute and face, answered right
    painted          share of the attributes that a caption names which the painting from it has
    painted_distance squared distance of paintings and faces (KID's polynomial kernel on the tokenizer's latents)

A result is a file in the work folder, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import LossConfig, SequenceMoEConfig, UniF2aceConfig
from unif2ace.data import captions
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.dataset import FaceSet
from unif2ace.errors import UserError
from unif2ace.evaluation.distances import kid
from unif2ace.files import digest, read_json, write_json
from unif2ace.generation.image import PaintSettings, paint_codes
from unif2ace.generation.text import answer_codes
from unif2ace.model.image_tokenizer import to_images, to_uint8
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.planning.activations import Step
from unif2ace.planning.parameters import parameters
from unif2ace.planning.plan import Training, step_flops
from unif2ace.training import loop, optimizers
from unif2ace.training.loop import Schedule, fit
from unif2ace.training.recipe import EVALUATION, EncodedFaces, Recipe, RecipeConfig, initialise_codes


@dataclass(frozen=True)
class Study:
    """What all runs share.

    Attributes:
        steps: of training. recipe: rows of a step; its seed is the run's.
        faces: held-out faces that are asked about. prompts: held-out captions that are painted.
        batches: of 128 rows of each task, for the losses.
    """

    steps: int = 110
    recipe: RecipeConfig = RecipeConfig(t2i=12, mmu=10, captions=1)
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    faces: int = 80
    prompts: int = 72
    batches: int = 1
    paint: PaintSettings = PaintSettings(steps=12)


@dataclass(frozen=True)
class Variant:
    """A row of the tables: `name` as it is written there, `table` it stands in, `changes` of the config."""

    name: str
    table: str
    changes: dict[str, Any]


def variants(base: UniF2aceConfig) -> list[Variant]:
    """The paper's rows as changes of `base`, which is the first of them: alpha 0.01, both levels, K = 2."""
    token = base.token_moe
    if token is None or base.sequence_moe is None:
        raise UserError("the ablations need a model with both levels of experts to take parts from")
    # A dense FFN as wide as what a token uses of the experts: equal active parameters and FLOPs, routers aside.
    dense = {"token_moe": None, "intermediate_size": token.top_k * token.width + token.shared_width}

    def loss(**changes: Any) -> dict[str, Any]:
        return {"loss": replace(base.loss, **changes)}

    def sequence(**changes: Any) -> dict[str, Any]:
        return {"sequence_moe": replace(SequenceMoEConfig(), **changes)}

    return [
        Variant("full", "all", {"loss": LossConfig(), **sequence()}),
        Variant("mask only (alpha 0)", "loss", loss(alpha=0.0)),
        Variant("alpha 0.001", "loss", loss(alpha=0.001)),
        Variant("alpha 0.1", "loss", loss(alpha=0.1)),
        Variant("score only", "loss", loss(mask=0.0)),
        Variant("no experts", "experts", {**dense, "sequence_moe": None}),
        Variant("token level only", "experts", {"sequence_moe": None}),
        Variant("sequence level only", "experts", dense),
        Variant("sequence top-1", "top-K", sequence(top_k=1)),
        Variant("sequence top-3", "top-K", sequence(top_k=3)),
        Variant("without face", "features", sequence(face=False)),
        Variant("without CLIP slot", "features", sequence(clip=False)),
    ]


@dataclass
class Material:
    """What a demo run left: its faces as codes, and its tokenizers."""

    checkpoint: Checkpoint
    faces: FaceSet
    train: EncodedFaces
    test: EncodedFaces

    @classmethod
    def load(cls, demo: Path) -> Material:
        """Read the folder of a demo run.

        Raises:
            UserError: a file of it is missing or damaged.
        """
        checkpoint, faces = Checkpoint.load(demo / "checkpoint"), FaceSet.load(demo / "faces.npz")
        encoded = EncodedFaces.of(faces, checkpoint.image_tokenizer)
        return cls(checkpoint, faces, encoded.at(faces.train), encoded.at(faces.test))


def run(material: Material, variant: Variant, seed: int, study: Study, work: Path) -> dict[str, Any]:
    """The result of one variant with one seed: taken from `work` when it is there, else trained and measured."""
    config = material.checkpoint.model.config.replace(image_tokenizer=None, **variant.changes)
    name = f"{re.sub(r'[^a-z0-9.]+', '-', variant.name.lower()).strip('-')}-{seed}"
    modules = (loop, optimizers)
    plain = json.dumps([config.to_dict(), asdict(study), seed], sort_keys=True)
    fingerprint = digest(plain.encode(), material.train.codes.numpy().tobytes(), *modules)
    path = work / f"{name}.json"
    if path.exists():
        found = read_json(path)
        if found["fingerprint"] == fingerprint:
            return found
    torch.manual_seed(seed)
    model = UniF2aceForConditionalGeneration(config)
    initialise_codes(model, material.checkpoint.image_tokenizer)
    text = material.checkpoint.text_tokenizer
    recipe = Recipe(material.train, text, config, replace(study.recipe, seed=seed))

    state = work / f"{name}.pt"
    schedule = Schedule(study.steps, warmup=max(1, min(50, study.steps // 4)))
    built, loss = optimizers.build(model, study.optimizer), partial(recipe.loss, model)
    log = fit(model, built, loss, schedule, state, name=name, fingerprint=fingerprint)
    measured = measure(material, model.eval(), study)
    result = {
        "fingerprint": fingerprint, "variant": variant.name, "table": variant.table, "seed": seed,
        "changes": {key: value if value is None or isinstance(value, int) else asdict(value)
                    for key, value in variant.changes.items()},
        "study": asdict(study), "size": size(config, study.recipe, recipe), "seconds": log[-1]["seconds"],
        "train": {key: statistics.fmean(row[key] for row in log[-5:]) for key in ("mask", "score", "mmu")},
        "measures": measured,
    }  # fmt: skip
    write_json(path, result)
    state.unlink()
    return result


@torch.no_grad()
def measure(material: Material, model: UniF2aceForConditionalGeneration, study: Study) -> dict[str, Any]:
    """The measures by name; what they are made of by attribute, and the codes that were painted, beside them."""
    checkpoint, test = material.checkpoint, material.test
    text = checkpoint.text_tokenizer
    # Rows, masks and questions are those of seed 0 and of no variant.
    fixed = Recipe(test, text, model.config, RecipeConfig(t2i=128, mmu=128, guidance_dropout=0.0))
    terms = [model(**vars(fixed.batch(step))).terms for step in range(study.batches)]
    mean = {key: statistics.fmean(each[key].item() for each in terms) for key in ("mask", "score", "mmu")}

    asked, rng = test.at(np.arange(study.faces)), np.random.default_rng((0, EVALUATION))
    untrained = Checkpoint(model, checkpoint.processor)
    answered = {}
    for index, attribute in enumerate(ATTRIBUTES):
        pairs = [captions.question_answer(classes, index, rng) for classes in asked.classes]
        said = answer_codes(untrained, asked.codes, asked.identity, asked.semantic, [question for question, _ in pairs])
        answered[attribute.name] = statistics.fmean(given == truth for given, (_, truth) in zip(said, pairs))

    wanted = test.classes[: study.prompts]
    prompts = [text.encode(captions.full_caption(classes)) for classes in wanted]
    codes = paint_codes(model, prompts, text.end, study.paint)
    paintings = checkpoint.image_tokenizer.decode(codes)
    right = material.faces.classify(to_uint8(paintings).numpy()) == wanted
    rebuilt = checkpoint.image_tokenizer.decode(test.codes)  # what a perfect model of the codes would paint
    distance = kid(*(_looks(material, each) for each in (rebuilt, paintings)))
    return {
        "masked_loss": mean["mask"], "score_bound": mean["score"], "answer_loss": mean["mmu"],
        "answered": statistics.fmean(answered.values()), "painted": float(right.mean()), "painted_distance": distance,
        "answered_by_attribute": answered,
        "painted_by_attribute": {each.name: float(share) for each, share in zip(ATTRIBUTES, right.mean(0))},
        "codes": codes.tolist(),
    }  # fmt: skip


def _looks(material: Material, images: torch.Tensor) -> np.ndarray:
    """[N, 2 C] mean and spread over the image of the tokenizer's latents."""
    _, latents = material.checkpoint.image_tokenizer.encode(to_images(to_uint8(images)))
    return torch.cat([latents.mean(1), latents.std(1)], 1).double().numpy()


def size(config: UniF2aceConfig, rows: RecipeConfig, recipe: Recipe) -> dict[str, Any]:
    """Parameters in all and used by a token of each task, and FLOPs of a training step, by the plan."""
    parts = parameters(config)
    batch = recipe.batch(0)
    real = int(batch.attention_mask.sum())
    step = Step(rows.t2i, rows.mmu, 0, batch.input_ids.shape[1], real)
    return {
        "parameters": sum(part.total for part in parts),
        "active_t2i": sum(part.used[0] for part in parts), "active_mmu": sum(part.used[1] for part in parts),
        "step_flops": step_flops(Training(config, step, "autocast", sharding="ddp", device="cpu"))[0],
    }  # fmt: skip


def about(study: Study) -> str:
    """What was done, for the page."""
    rows = study.recipe
    return (
        f"The paper's ablations at the demo's `tiny` scale: {study.steps} training steps of {rows.t2i} t2i and "
        f"{rows.mmu} mmu rows on synthetic 64 px faces (`unif2ace ablate`), {study.faces} held-out faces asked, "
        f"{study.prompts} held-out captions painted. Runs of one seed see the same faces, texts and masks in the same "
        "order. Few steps of a small model: what shows here is how fast each variant learns, not where it ends, and it "
        "says little of the 1.8B shape."
    )


def study_runs(
    material: Material, seeds: Sequence[int], study: Study, work: Path, only: str = ""
) -> list[dict[str, Any]]:
    """Every variant whose name begins with `only`, seed by seed: a study that is stopped has whole seeds first."""
    found = []
    for seed in seeds:
        for variant in variants(material.checkpoint.model.config):
            if variant.name.startswith(only):
                found.append(run(material, variant, seed, study, work))
    return found
