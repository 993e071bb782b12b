"""What a model is evaluated on: faces of a set and of a demo run, their questions' subjects, what captions tell."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sets
from evaluations import Light

from unif2ace.attributes.measured import Measured
from unif2ace.attributes.sources import open_source
from unif2ace.data.config import SetConfig
from unif2ace.errors import UserError
from unif2ace.evaluation.faces import open_faces, subject, teller


def test_a_set_s_faces(tmp_path):
    path = sets.llava(tmp_path, 4)
    records = json.loads(path.read_text())
    extra = {"id": "more", "image": "0.png", "conversations": [
        {"from": "human", "value": "which face is this, 0?"}, {"from": "gpt", "value": "another answer"}]}  # fmt: skip
    path.write_text(json.dumps([*records, extra]))
    (tmp_path / "2.png").write_bytes(b"no picture")
    found = open_faces(SetConfig(str(path)), 16, "square", 10, 16, 0, None)
    assert [each.key for each in found.items] == ["face-0", "face-1", "face-3"]
    assert found.items[0].image.shape == (16, 16, 3) and found.items[0].captions == ("a face with dark hair 0",)
    assert found.items[0].questions[0].references == ("the face 0", "another answer")
    (where, reason), = found.left_out  # fmt: skip
    assert "2.png" in where and "not a picture" in reason
    assert len(open_faces(SetConfig(str(path)), 16, "square", 1, 16, 0, None).items) == 1
    assert len(open_faces(SetConfig(str(path)), 16, "square", 9, 1, 0, None).items[1].questions) == 1
    other = open_faces(SetConfig(str(path)), 16, "square", 1, 16, 0, None)
    assert other.fingerprint != found.fingerprint


def test_a_set_without_a_face_says_why(tmp_path, monkeypatch):
    path = sets.llava(tmp_path, 1)
    monkeypatch.setattr("unif2ace.data.identity.find_face", lambda image: None)
    with pytest.raises(UserError, match="no face in it that can be used: .*no face is found in it"):
        open_faces(SetConfig(str(path)), 16, "face", 10, 16, 0, None)


@pytest.mark.parametrize(
    "question,answer,expected",
    [
        ("What is the hair colour?", "black", ("hair colour", "appearance")),
        ("Does the person wear eyeglasses?", "yes", ("eyeglasses", "appearance")),
        ("What does the mouth do?", "a smile", ("smile", "action")),
        ("How does the person feel?", "a sad expression", ("emotion", "emotion")),
        ("How light is the hair?", "dark", ("hair", "appearance")),
        ("What time is it?", "noon", ("other", "other")),
    ],
)
def test_a_question_s_category(question, answer, expected):
    assert subject(question, answer) == expected


def test_a_caption_tells_its_attributes():
    told = teller({"hat": ("yes", "no"), "hair colour": ("black", "blond"), "whiskers": ("yes", "no")})
    assert told("A man with no hat and fair hair.") == {"hat": "no", "hair colour": "blond"}
    assert told("someone in a HAT, no whiskers") == {"hat": "yes", "whiskers": "no"}
    assert told("a chat on hats") == {}
    told = teller(Measured.categories)
    assert told("a person with big smile, facing left, soft light on the face, bright warm green background") == {
        "mouth": "smiling", "facing": "left", "lighting": "soft", "background": "bright", "tint": "warm",
        "greenery": "green",
    }  # fmt: skip
    assert told("dark hair, and then light hair") == {}, "neither of two is told"


def test_the_demo_s_held_out_faces(tmp_path):
    from unif2ace.data.attributes import ATTRIBUTES, NAMES, classify, fit_thresholds, measure
    from unif2ace.data.dataset import FaceSet

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    thresholds = fit_thresholds(measure(images))
    classes = classify(measure(images), thresholds)
    identity = rng.normal(size=(9, 4)).astype(np.float32)
    FaceSet(images, classes, thresholds, identity, 4, {"held_out": 4}).save(tmp_path / "faces.npz")
    found = open_faces(SetConfig(str(tmp_path / "faces.npz")), 64, "face", 3, 16, 0, None)
    assert [each.key for each in found.items] == ["face-5", "face-6", "face-7"]
    for face, row in zip(found.items, classes[5:]):
        words = {each.name: each.words[value] for each, value in zip(ATTRIBUTES, row)}
        assert found.told(face.captions[0]) == words
        assert {each.category: each.value for each in found.source([face.image])[0]} == words
        assert [each.references[0] for each in face.questions] == [words[name] for name in NAMES]
    assert found.source([]) == []
    assert open_source(f"measured:{tmp_path / 'faces.npz'}")(images[5:7]) == found.source(images[5:7])
    light = Light()  # another is taken where it is named
    assert open_faces(SetConfig(str(tmp_path / "faces.npz")), 64, "face", 3, 16, 0, light).source is light
    fewer = open_faces(SetConfig(str(tmp_path / "faces.npz")), 64, "face", 3, 2, 0, None)
    assert [each.questions for each in fewer.items] == [each.questions[:2] for each in found.items]
    assert fewer.fingerprint != found.fingerprint
    with pytest.raises(UserError, match="has pictures of 64 pixels, the model paints 32"):
        open_faces(SetConfig(str(tmp_path / "faces.npz")), 32, "face", 3, 16, 0, None)
