"""The statistics on cases worked out by hand, and the whole evaluation on an untrained model."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import TASKS, VocabularyConfig
from unif2ace.data.attributes import ATTRIBUTES, NAMES, classify, fit_thresholds, measure
from unif2ace.data.dataset import FaceSet
from unif2ace.evaluation import quality
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, to_images
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.training.recipe import EncodedFaces
from unif2ace.training.tokenizer import psnr


@pytest.mark.parametrize(
    "right,count,classes,p",
    [
        (10, 12, 2, (66 + 12 + 1) / 2**12),  # C(12, 10) + C(12, 11) + C(12, 12)
        (4, 4, 3, 1 / 3**4),
        (0, 5, 2, 1.0),
        (3, 4, 3, (4 * 2 + 1) / 3**4),
    ],
)
def test_painting_is_tested_against_drawing_classes_at_random(right, count, classes, p):
    result = quality._against_chance(np.arange(count) < right, classes)
    assert result["match"] == pytest.approx(right / count) and result["chance"] == pytest.approx(1 / classes)
    assert result["p"] == pytest.approx(p)


def answers_of(monkeypatch, classes, right):
    """`_answers` where attribute a of face f is answered right if right[a][f], and else with another of its words."""
    calls = iter(range(len(ATTRIBUTES)))

    def answer_codes(checkpoint, codes, identity, semantic, questions):
        attribute = next(calls)
        words = ATTRIBUTES[attribute].words
        assert len(codes) == len(identity) == len(semantic) == len(questions) == len(classes)
        return [words[value] if ok else words[value - 1] for value, ok in zip(classes[:, attribute], right[attribute])]

    monkeypatch.setattr(quality, "answer_codes", answer_codes)
    count = len(classes)
    faces = EncodedFaces(torch.zeros(count, 4), torch.zeros(count, 4, 5), torch.zeros(count, 6), classes)
    return quality._answers(None, faces, np.random.default_rng(0))


def test_answers_are_tested_against_the_best_constant_answer(monkeypatch):
    """12 faces, background dark 5 times, medium 4, bright 3; right on 2, 4 and 2 of them.

    The rival says dark. Only the model is right on 6 faces, only the rival on 3: P(X >= 6), X ~ B(9, 1/2).
    """
    classes = np.zeros((12, len(ATTRIBUTES)), int)
    classes[:, 0] = [0] * 5 + [1] * 4 + [2] * 3
    right = np.ones((len(ATTRIBUTES), 12), bool)
    right[0] = [1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
    right[1] = False
    table, shown = answers_of(monkeypatch, classes, right)
    assert table["faces"] == 12 and list(table["attributes"]) == list(NAMES)
    first, second, third = (table["attributes"][name] for name in NAMES[:3])
    assert (first["accuracy"], first["majority"]) == (pytest.approx(8 / 12), pytest.approx(5 / 12))
    assert first["p"] == pytest.approx((84 + 36 + 9 + 1) / 2**9)
    assert (second["accuracy"], second["majority"], second["p"]) == (0, 1, 1)  # lost on every face
    assert (third["accuracy"], third["majority"], third["p"]) == (1, 1, 1)  # right wherever the rival is: no evidence
    face, question, given, truth = shown[2]
    assert face == 2 and question.endswith("?") and (given, truth) == ("bright", "dark")
    assert len(shown) == 4 * len(ATTRIBUTES)


def test_a_perfect_model_beats_every_constant_answer(monkeypatch):
    rng = np.random.default_rng(0)
    classes = np.stack([rng.integers(each.classes, size=60) for each in ATTRIBUTES], axis=1)
    table, _ = answers_of(monkeypatch, classes, np.ones((len(ATTRIBUTES), 60), bool))
    for name in NAMES:
        row = table["attributes"][name]
        assert row["accuracy"] == 1 and row["majority"] < 0.75 and row["p"] < 1e-4
        assert row["p"] == pytest.approx(0.5 ** round(60 * (1 - row["majority"])))


def test_psnr_is_of_each_face():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    others = images.copy()
    others[0] += 1
    others[1] -= 10
    assert psnr(images, others) == pytest.approx([20 * np.log10(255), 20 * np.log10(25.5)])
    assert psnr(others, images) == pytest.approx(psnr(images, others)), "no level wraps around"


def test_a_face_is_counted_where_the_detector_finds_one(monkeypatch):
    monkeypatch.setattr(quality, "find_face", lambda image: image if image.any() else None)
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[1] = 1
    assert quality._face_found(images) == 0.25


@pytest.fixture(scope="module")
def case():
    """An untrained model, and pictures of noise for faces."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    text = tiny.text_tokenizer()
    tokenizer = ImageTokenizer(ImageTokenizerConfig(bits=4, fine=8, coarse=8, blocks=1)).eval()
    config = tiny.config(
        vocabulary=VocabularyConfig(text.size, 16), image_tokens=64, text_slots=48, identity=6, semantic=4
    )
    images = rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    values = measure(images)
    thresholds = fit_thresholds(values[:6])
    identity = rng.normal(size=(12, 6)).astype(np.float32)
    faces = FaceSet(images, classify(values, thresholds), thresholds, identity, 6, {})
    codes, semantic = tokenizer.encode(to_images(torch.from_numpy(images[6:])))
    encoded = EncodedFaces(codes, semantic, torch.from_numpy(identity[6:]), faces.classes[6:])
    return Checkpoint.of(UniF2aceForConditionalGeneration(config).eval(), tokenizer, text), faces, encoded


def test_expert_use_is_shares_of_choices(case):
    checkpoint, _, encoded = case
    use = quality._expert_use(checkpoint, encoded, seed=0)
    assert list(use) == [f"{level}_{task}" for level in ("token", "sequence") for task in TASKS]
    config = checkpoint.model.config
    for task, name in enumerate(TASKS):
        for level, experts in (("token", config.token_moe.experts[task]), ("sequence", 4)):
            shares = np.array(use[f"{level}_{name}"])
            assert shares.shape == (config.num_hidden_layers, experts)
            assert np.allclose(shares.sum(1), 1) and shares.max() <= 0.5 + 1e-9  # of two choices that differ


@pytest.mark.parametrize("missing, left", [("token", "sequence"), ("sequence", "token")])
def test_expert_use_leaves_out_a_level_that_the_model_does_not_have(case, missing, left):
    checkpoint, _, encoded = case
    config = dataclasses.replace(checkpoint.model.config, **{f"{missing}_moe": None})
    changed = dataclasses.replace(checkpoint, model=UniF2aceForConditionalGeneration(config).eval())
    assert list(quality._expert_use(changed, encoded, seed=0)) == [f"{left}_{task}" for task in TASKS]


def test_the_whole_evaluation(case, monkeypatch):
    checkpoint, faces, encoded = case
    monkeypatch.setattr(quality, "find_face", lambda image: None)
    results = quality.evaluate(checkpoint, faces, encoded, prompts=5, seed=0)
    numbers = json.loads(json.dumps(results.numbers))
    assert numbers == results.numbers, "plain values only"
    assert results.painted.shape == (5, 64, 64, 3) and len(results.prompts) == 5
    assert len(results.held_out) == len(results.reconstructed) == len(results.repainted) == 6
    assert np.array_equal(results.held_out, faces.images[6:])
    assert numbers["generation"]["prompts"] == 5 and numbers["generation"]["face_found"] == 0
    assert numbers["understanding"]["faces"] == 6
    trained = [p for p in checkpoint.model.parameters() if p.requires_grad]
    assert numbers["parameters"] == sum(p.numel() for p in trained)
    assert numbers["tokenizer"]["codes_used"] == len(encoded.codes.unique())
    for part in ("generation", "understanding"):
        assert list(numbers[part]["attributes"]) == list(NAMES)
        assert all(0 <= row["p"] <= 1 for row in numbers[part]["attributes"].values())
    assert numbers["held_out_loss"]["mask"] == pytest.approx(np.log(16), abs=0.3)
