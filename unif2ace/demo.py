"""The demo: from nothing to a report, in minutes on two CPU cores.

    faces      made at run time, attributes measured, identities embedded
    tokenizer  a lookup-free-quantised autoencoder, trained on them
    model      the tiny UniF²ace with every part of the paper on, both tasks in every step
    evaluation faces painted from random prompts, questions on faces never seen, both tested against chance
    report     what all of that looks like

Each stage leaves a file in the run's folder; a run that was stopped, or is started again, goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import UniF2aceConfig, VocabularyConfig
from unif2ace.data import captions, words
from unif2ace.data.dataset import FaceSet, build_faces
from unif2ace.evaluation import quality, report
from unif2ace.files import digest, read_json, write_json
from unif2ace.model import attention, balance, blocks, losses, modeling, sequence_moe, sequences, visibility
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace.safety import card
from unif2ace.training import loop, optimizers
from unif2ace.training import recipe as recipes
from unif2ace.training.loop import Schedule, fit
from unif2ace.training.recipe import EncodedFaces, Recipe, RecipeConfig, initialise_codes
from unif2ace.training.tokenizer import TokenizerRecipe, trained_image_tokenizer

THREADS = 2


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of a demo run.

    Attributes:
        faces, held_out: faces made, and how many of them are kept from training.
        tokenizer: how the image tokenizer is trained.
        model_steps: training steps.
        prompts: random prompts to paint.
    """

    faces: int
    held_out: int
    model_steps: int
    prompts: int
    tokenizer: TokenizerRecipe = TokenizerRecipe(steps=1500)
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    recipe: RecipeConfig = RecipeConfig()
    seed: int = 0


FULL = DemoSettings(faces=2700, held_out=300, model_steps=600, prompts=96)
SMALL = DemoSettings(faces=96, held_out=32, model_steps=12, prompts=12, tokenizer=TokenizerRecipe(steps=60))

_SETTINGS = (UniF2aceConfig, Schedule, RecipeConfig, optimizers.OptimizerConfig)


class Timer:
    """Seconds of each stage, kept beside the run so that a later one can tell what the stages took when they ran."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    def record(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(seconds, 1)
        write_json(self.path, self.seconds)


def run(settings: DemoSettings, folder: Path) -> None:
    """Run every stage that `folder` does not hold yet, then write the report and print what it shows."""
    began = time.monotonic()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    timer = Timer(folder / "seconds.json")
    if "UNIF2ACE_INSTALL_SECONDS" in os.environ:
        timer.record("install", float(os.environ["UNIF2ACE_INSTALL_SECONDS"]))

    def timed(stage: str, function, *arguments):
        start = time.monotonic()
        result, fresh = function(*arguments)
        if fresh:
            timer.record(stage, time.monotonic() - start)
        else:
            print(f"{stage}: taken from {folder}")
        return result

    faces = timed("faces", _faces, settings, folder)
    tokenizer = timed("tokenizer", _tokenizer, settings, folder, faces)
    encoded = EncodedFaces.of(faces, tokenizer)
    checkpoint = timed("model", _model, settings, folder, faces, tokenizer, encoded)
    start = time.monotonic()
    results = quality.evaluate(checkpoint, faces, encoded.at(faces.test), settings.prompts, settings.seed)
    timer.record("evaluation", time.monotonic() - start)
    start = time.monotonic()
    logs = {name: read_json(folder / f"{name}_log.json") for name in ("tokenizer", "model")}
    report.write(folder, results, logs, timer.seconds)
    timer.record("report", time.monotonic() - start)
    passed = dict(zip(("painted", "answered"), report.passed(results)))
    numbers = {"faces": len(faces), **results.numbers, "passed": passed, "seconds": timer.seconds}
    write_json(folder / "results.json", numbers)
    card.write(folder / "checkpoint", folder / "results.json")
    print(report.summary(results, timer.seconds, time.monotonic() - began))
    print(f"report: {folder / 'report.html'}")


def fingerprint(*settings: object, of: Sequence[bytes | ModuleType]) -> str:
    """Short name of settings, and of the data and the modules that shape a stage's result."""
    plain = [dataclasses.asdict(each) if isinstance(each, _SETTINGS) else each for each in settings]
    return digest(json.dumps(plain, sort_keys=True).encode(), *of)


def _faces(settings: DemoSettings, folder: Path) -> tuple[FaceSet, bool]:
    path = folder / "faces.npz"
    before = path.stat().st_mtime_ns if path.exists() else None
    faces = build_faces(settings.faces, settings.seed, folder, held_out=settings.held_out, threads=THREADS)
    return faces, path.stat().st_mtime_ns != before


def _tokenizer(settings: DemoSettings, folder: Path, faces: FaceSet) -> tuple[ImageTokenizer, bool]:
    return trained_image_tokenizer(
        lambda: faces.images[faces.train], ImageTokenizerConfig(), settings.tokenizer, folder,
        of=faces.settings, seed=settings.seed,
    )  # fmt: skip


def _model(
    settings: DemoSettings, folder: Path, faces: FaceSet, tokenizer: ImageTokenizer, encoded: EncodedFaces
) -> tuple[Checkpoint, bool]:
    text = TextTokenizer.train(captions.all_texts())
    config = UniF2aceConfig.tiny(
        VocabularyConfig(text=text.size, codes=tokenizer.config.codes), semantic_source="image_tokenizer"
    )
    schedule = Schedule(settings.model_steps)
    data = (encoded.codes, encoded.semantic, encoded.identity, torch.from_numpy(encoded.classes))
    modules = (
        attention, balance, blocks, losses, modeling, sequence_moe, sequences, visibility, loop, optimizers, recipes,
    )  # fmt: skip
    name = fingerprint(
        config, schedule, settings.optimizer, settings.recipe, settings.seed,
        of=[*(each.numpy().tobytes() for each in data), text.tokenizer.to_str().encode(), captions, words, *modules],
    )  # fmt: skip
    path = folder / "checkpoint"
    stamp = folder / "checkpoint.fingerprint.json"
    if path.exists() and stamp.exists() and read_json(stamp) == name:
        return Checkpoint.load(path), False
    torch.manual_seed(settings.seed)
    model = UniF2aceForConditionalGeneration(config)
    initialise_codes(model, tokenizer)
    recipe = Recipe(encoded.at(faces.train), text, config, settings.recipe)
    built, loss = optimizers.build(model, settings.optimizer), partial(recipe.loss, model)
    state = folder / "model_state.pt"
    log = fit(model, built, loss, schedule, state, name="model", fingerprint=name)
    write_json(folder / "model_log.json", log)
    checkpoint = Checkpoint.of(
        model.eval(), tokenizer, text,
        encoders={"identity": "sface", "semantic": "image_tokenizer"}, prompts={"caption": captions.CAPTION_PROMPTS[0]},
    )  # fmt: skip
    stamp.unlink(missing_ok=True)  # never beside a checkpoint that it is not of
    checkpoint.save(path)
    write_json(stamp, name)
    state.unlink()
    return checkpoint, True
