"""Files from outside, damaged in every way: only a UserError comes out, at once, and without much memory."""

from __future__ import annotations

import functools
import io
import json
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

for needed in ("safetensors", "cv2", "transformers", "PIL"):
    pytest.importorskip(needed, reason=f"needs {needed}")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from damage import DIGITS, NESTED, bounded, damaged, strange_json  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "unif2ace"))  # the small models and sets of its tests

import tiny  # noqa: E402

from unif2ace import checksums, files  # noqa: E402
from unif2ace import settings as yaml_settings  # noqa: E402
from unif2ace.checkpoint import Checkpoint  # noqa: E402
from unif2ace.configs import VocabularyConfig  # noqa: E402
from unif2ace.data.dataset import FaceSet  # noqa: E402
from unif2ace.data.identity import read_image  # noqa: E402
from unif2ace.errors import UserError  # noqa: E402
from unif2ace.importers.weights import Weights  # noqa: E402
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig  # noqa: E402
from unif2ace.model.modeling import UniF2aceForConditionalGeneration  # noqa: E402
from unif2ace.training import loop  # noqa: E402

SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz"))


@pytest.fixture(scope="module", autouse=True)
def _scratch():
    SCRATCH.mkdir(exist_ok=True)
    yield
    shutil.rmtree(SCRATCH)


def survives(load, *arguments) -> None:
    """`load` returns, or says in one line what the user can do."""
    with bounded():
        try:
            load(*arguments)
        except UserError as error:
            assert str(error) and "\n" not in str(error)


def put(content: bytes, name: str) -> Path:
    path = SCRATCH / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------------- checkpoints


@functools.cache
def checkpoint() -> dict[str, bytes]:
    """Every file of a small checkpoint."""
    text = tiny.text_tokenizer()
    config = tiny.config(vocabulary=VocabularyConfig(text.size, 16), num_hidden_layers=1)
    images = ImageTokenizer(ImageTokenizerConfig(side=16, bits=4, fine=8, coarse=8, blocks=1))
    torch.manual_seed(0)
    folder = SCRATCH / "whole"
    Checkpoint.of(UniF2aceForConditionalGeneration(config), images, text).save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def survives_as_checkpoint(name: str, content: bytes) -> None:
    folder = SCRATCH / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for each, own in checkpoint().items():
        (folder / each).write_bytes(content if each == name else own)
    survives(Checkpoint.load, folder)


@settings(max_examples=settings.default.max_examples // 2)
@given(st.data())
def test_checkpoint_with_a_damaged_file(data):
    name = data.draw(st.sampled_from(sorted(checkpoint())))
    survives_as_checkpoint(name, data.draw(damaged(checkpoint()[name])))


@settings(max_examples=settings.default.max_examples // 2)
@given(st.data())
def test_checkpoint_with_strange_settings(data):
    name = data.draw(st.sampled_from(sorted(each for each in checkpoint() if each.endswith(".json"))))
    survives_as_checkpoint(name, data.draw(strange_json(json.loads(checkpoint()[name]))))


# -------------------------------------------------------------------------------------------- weights of importers


@functools.cache
def safetensors() -> bytes:
    path = SCRATCH / "plain.safetensors"
    save_file({"a.weight": torch.randn(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


@functools.cache
def torch_file(legacy: bool) -> bytes:
    file = io.BytesIO()
    state = {"a.weight": torch.randn(3, 4), "b": torch.zeros(2)}
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def read_weights(path: Path) -> None:
    weights = Weights(path, allow_pickle=True)
    weights.whole("hidden_size", 1)
    for name in weights.shapes:
        weights[name]


@given(st.data())
def test_weights_in_safetensors(data):
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
    if data.draw(st.booleans()):
        content = data.draw(damaged(safetensors()))
    else:
        text = data.draw(strange_json(header))
        content = struct.pack("<Q", data.draw(st.sampled_from([len(text), 2**60, 0]))) + text + bytes(24)
    survives(read_weights, put(content, "weights/model.safetensors"))


@given(st.data(), st.booleans())
def test_weights_in_torch_files(data, legacy):
    survives(read_weights, put(data.draw(damaged(torch_file(legacy))), "weights.bin"))


@given(st.data())
def test_index_of_shards(data):
    put(safetensors(), "sharded/one.safetensors")
    index = {"metadata": {"total_size": 52}, "weight_map": {"a.weight": "one.safetensors", "b": "one.safetensors"}}
    content = data.draw(strange_json(index) | damaged(json.dumps(index).encode()))
    survives(read_weights, put(content, "sharded/model.safetensors.index.json"))


# ---------------------------------------------------------------------------------------------------------- others


@functools.cache
def picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 31, 3), np.uint8)
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]))
def test_pictures(data, kind):
    survives(read_image, put(data.draw(damaged(picture(kind))), "picture"))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims that many pixels, and has few of them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packed = zlib.compress(bytes(10**6))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("sides", [(32000, 32000), (2**20, 2**11), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_pictures_that_claim_too_many_pixels_are_refused(sides):
    path = put(bomb(*sides), "bomb.png")
    with bounded(), pytest.raises(UserError, match="more than 64000000"):
        read_image(path)


@functools.cache
def faces() -> bytes:
    path = SCRATCH / "faces.npz"
    rng = np.random.default_rng(0)
    settings = {"held_out": 1, "version": 1}
    identity = rng.normal(size=(3, 4)).astype(np.float32)
    classes = rng.integers(0, 2, (3, 5))
    images = rng.integers(0, 255, (3, 8, 8, 3), np.uint8)
    FaceSet(images, classes, rng.normal(size=5), identity, 1, settings).save(path)
    return path.read_bytes()


@given(st.data())
def test_cached_faces(data):
    survives(FaceSet.load, put(data.draw(damaged(faces())), "damaged.npz"))


@functools.cache
def state() -> bytes:
    file = io.BytesIO()
    torch.save({"fingerprint": "x", "step": 3, "model": {"a": torch.randn(3, 4)}, "rng": torch.get_rng_state()}, file)
    return file.getvalue()


@given(st.data())
def test_state_of_training(data):
    survives(loop._read_state, put(data.draw(damaged(state())), "state.pt"))


@given(st.data())
def test_json(data):
    value = {"a": [1, {"b": "c"}], "d": None}
    survives(files.read_json, put(data.draw(strange_json(value) | damaged(json.dumps(value).encode())), "some.json"))


@pytest.mark.parametrize("content", [NESTED, DIGITS], ids=["nested", "digits"])
def test_json_that_python_refuses_otherwise(content):
    with pytest.raises(UserError, match="damaged"):
        files.read_json(put(content, "some.json"))


YAML = "data:\n  sets: [{path: faces.json, kind: auto}]\n  batch: 4\nlr: 1e-4\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(f'*{old}' for _ in range(9))}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@given(st.data())
def test_settings(data):
    content = data.draw(damaged(YAML.encode()) | st.sampled_from([LAUGHS.encode(), f"- {LAUGHS[3:]}".encode()]))

    def read(path):
        yaml_settings.parse(tiny.TokenMoEConfig, yaml_settings.read_settings(path, ["--a.b=c"]), "here")

    survives(read, put(content, "settings.yaml"))


@given(st.data())
def test_sums(data):
    line = f"{'0123456789abcdef' * 4}  model.safetensors\n".encode()
    survives(checksums.read_sums, put(data.draw(damaged(line)), "SHA256SUMS"))
