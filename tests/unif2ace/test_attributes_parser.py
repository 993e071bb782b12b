"""The graph runs as TensorFlow has it, the parser takes published files alone, and rules read drawn faces as stated."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from unif2ace.attributes import parsed, parser
from unif2ace.attributes.graph import TfjsGraph
from unif2ace.attributes.parser import PART, SIDE, FaceParser, square
from unif2ace.errors import UserError


class Graph:
    """A TensorFlow.js graph model in the making."""

    def __init__(self) -> None:
        self.nodes = [{"name": "x", "op": "Placeholder", "attr": {"dtype": {"type": "DT_FLOAT"}}}]
        self.weights, self.content = [], b""

    def const(self, value) -> str:
        array = np.asarray(value)
        array = array.astype("<f4" if array.dtype.kind == "f" else "<i4")
        name = f"c{len(self.weights)}"
        kind = "float32" if array.dtype.kind == "f" else "int32"
        self.weights.append({"name": name, "shape": list(array.shape), "dtype": kind})
        self.content += array.tobytes()
        self.nodes.append({"name": name, "op": "Const", "attr": {}})
        return name

    def node(self, operation: str, *inputs: str, name: str | None = None, **attributes) -> str:
        name = name or f"n{len(self.nodes)}"
        self.nodes.append(
            {"name": name, "op": operation, "input": list(inputs), "attr": {k: held(v) for k, v in attributes.items()}}
        )
        return name

    @property
    def files(self) -> dict[str, bytes]:
        half = len(self.content) // 2
        model = {
            "modelTopology": {"node": self.nodes[::-1]},  # in no order
            "weightsManifest": [{"paths": ["a.bin", "b.bin"], "weights": self.weights}],
        }
        return {"model.json": json.dumps(model).encode(), "a.bin": self.content[:half], "b.bin": self.content[half:]}

    def run(self, x: np.ndarray) -> np.ndarray:
        files = self.files
        return TfjsGraph(files.pop("model.json"), files)(torch.from_numpy(x.astype(np.float32))).numpy()


def held(value) -> dict:
    if isinstance(value, list):
        kind = "s" if value and isinstance(value[0], str) else "i"
        return {"list": {kind: [base64.b64encode(v.encode()).decode() if kind == "s" else str(v) for v in value]}}
    if isinstance(value, str):
        return {"s": base64.b64encode(value.encode()).decode()}
    return {"b": value} if isinstance(value, bool) else {"i": str(value)}


def windows(x: np.ndarray, k: int, s: int):
    """Each output place with its window and which part of it lies inside: SAME padding, spelt out."""
    height, width = x.shape[1:3]
    for i in range(-(-height // s)):
        for j in range(-(-width // s)):
            starts = []
            for at, size in ((i, height), (j, width)):
                total = max((-(-size // s) - 1) * s + k - size, 0)
                starts.append(at * s - total // 2)
            rows, columns = ([v for v in range(start, start + k)] for start in starts)
            window = np.zeros((k, k, x.shape[3]))
            inside = np.zeros((k, k), bool)
            for a, row in enumerate(rows):
                for b, column in enumerate(columns):
                    if 0 <= row < height and 0 <= column < width:
                        window[a, b], inside[a, b] = x[0, row, column], True
            yield i, j, window, inside


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 7), (5, 8)])
def test_convolutions_and_pools(stride: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, *size, 3))
    full, bias = rng.standard_normal((3, 3, 3, 4)), rng.standard_normal(4)
    deep, deep_bias = rng.standard_normal((3, 3, 3, 2)), rng.standard_normal(6)
    around = {"strides": [1, stride, stride, 1], "padding": "SAME", "data_format": "NHWC"}
    size_k = {"ksize": [1, 3, 3, 1], **around}
    expected = {
        "conv": lambda w, m: np.maximum(np.einsum("abc,abcd->d", w, full) + bias, 0),
        "deep": lambda w, m: np.einsum("abc,abcm->cm", w, deep).ravel() + deep_bias,
        "max": lambda w, m: w[m].max(0),
        "mean": lambda w, m: w[m].mean(0),
    }
    for name, truth in expected.items():
        graph = Graph()
        if name == "conv":
            graph.node(
                "_FusedConv2D", "x", graph.const(full), graph.const(bias), fused_ops=["BiasAdd", "Relu"], **around
            )
        elif name == "deep":
            inputs = graph.const(deep), graph.const(deep_bias)
            graph.node("FusedDepthwiseConv2dNative", "x", *inputs, fused_ops=["BiasAdd"], **around)
        else:
            graph.node({"max": "MaxPool", "mean": "AvgPool"}[name], "x", **size_k)
        if name == "max":  # where all is negative, padding with zeros would show
            x = x - 9
        got = graph.run(x)
        for i, j, window, inside in windows(x, 3, stride):
            np.testing.assert_allclose(got[0, i, j], truth(window, inside), atol=1e-5)


def test_resizing_places_pixels_as_tensorflow_did() -> None:
    graph = Graph()
    graph.node("ResizeBilinear", "x", graph.const([4, 6]), align_corners=False, half_pixel_centers=False)
    x = np.arange(6.0).reshape(1, 2, 3, 1) ** 2
    got = graph.run(x)[0, :, :, 0]
    for i in range(4):
        for j in range(6):
            row, column = i * 2 / 4, j * 3 / 6
            low, left = int(row), int(column)
            below, right = min(low + 1, 1), min(left + 1, 2)
            v, h = row - low, column - left
            top = x[0, low, left, 0] * (1 - h) + x[0, low, right, 0] * h
            bottom = x[0, below, left, 0] * (1 - h) + x[0, below, right, 0] * h
            assert got[i, j] == pytest.approx(top * (1 - v) + bottom * v)


def test_a_graph_that_cannot_be_run_is_refused() -> None:
    graph = Graph()
    graph.node("Cumsum", "x")
    with pytest.raises(ValueError, match="not known here: Cumsum"):
        graph.run(np.zeros((1, 2, 2, 1)))
    graph = Graph()
    graph.node("Add", "x", graph.const([1.0]))
    files = graph.files
    for wrong, told in (
        ({**files, "a.bin": b""}, "end early"),
        ({**files, "b.bin": files["b.bin"] + b"...."}, "4 bytes more"),
        ({"model.json": files["model.json"], "a.bin": b""}, "missing: b.bin"),
        ({**files, "model.json": b"{}"}, "not the model.json"),
    ):
        with pytest.raises(ValueError, match=told):
            TfjsGraph(wrong.pop("model.json"), wrong)
    graph.node("AvgPool", "n2", ksize=[1, 3, 3, 1], strides=[1, 1, 1, 1], padding="VALID")
    with pytest.raises(ValueError, match="expected SAME padding"):
        graph.run(np.zeros((1, 2, 2, 1)))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A .tgz as npm makes it, whose network tells a pixel's part by its red: 16 n -> part n."""
    graph = Graph()
    plain = {"strides": [1, 1, 1, 1], "padding": "SAME", "data_format": "NHWC"}
    # -(red - 8 n)^2 without its square: 2 red 8 n - (8 n)^2
    steps = 8.0 * np.arange(len(PART))
    weight = np.zeros((1, 1, 3, len(PART)))
    weight[0, 0, 0] = 2 * steps * 127.5
    scores = graph.node("_FusedConv2D", "x", graph.const(weight), graph.const(2 * steps * 127.5 - steps**2),
                        fused_ops=["BiasAdd"], **plain)  # fmt: skip
    found = graph.node("ArgMax", graph.node("Softmax", scores), graph.const(3), name="BiseNetV2/prediction")
    graph.node("Squeeze", found, squeeze_dims=[0])
    names = {"model.json": "model.json", "a.bin": "a.bin", "b.bin": "b.bin"}
    files = {names[name]: content for name, content in graph.files.items()}
    monkeypatch.setattr(parser, "SUMS", {name: hashlib.sha256(each).hexdigest() for name, each in files.items()})
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{parser.FOLDER}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
            (tmp_path / "unpacked" / parser.FOLDER).mkdir(parents=True, exist_ok=True)
            (tmp_path / "unpacked" / parser.FOLDER / name).write_bytes(content)
    return path


def test_a_packages_file_or_folder_is_a_parser(package) -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    parts = np.arange(SIDE) % len(PART)
    image[:, :, 0] = 8 * parts
    for path in (package, package.parent / "unpacked", package.parent / "unpacked" / parser.FOLDER):
        maps = FaceParser(path)([image, image[:, ::-1]])
        np.testing.assert_array_equal(maps, np.stack([np.tile(parts, (SIDE, 1)), np.tile(parts[::-1], (SIDE, 1))]))


def test_other_files_than_published_are_refused(package) -> None:
    file = package.parent / "unpacked" / parser.FOLDER / "a.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="a.bin is not the file that was published"):
        FaceParser(package.parent / "unpacked")
    for path, content in (("none.tgz", None), ("empty.tgz", b""), ("text.tgz", b"text")):
        if content is not None:
            (package.parent / path).write_bytes(content)
        with pytest.raises(UserError, match="no face parser in .*npm pack"):
            FaceParser(package.parent / path)
    (package.parent / "empty").mkdir()
    with pytest.raises(UserError, match="no model.json"):
        FaceParser(package.parent / "empty")


def test_the_published_sums_are_of_the_four_files() -> None:
    assert len(parser.SUMS) == 4 and all(len(each) == 64 for each in parser.SUMS.values())


def test_a_picture_becomes_square_without_being_stretched() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 50:150] = 255
    image[40:60] = 0
    seen = square(image)
    assert seen.shape == (SIDE, SIDE, 3)
    assert seen[100, 70:190].min() == 255 and seen[100, :60].max() == 0 and seen[0, 128].min() == 255
    black = np.nonzero(seen[:, 128, 0] < 128)[0]
    assert len(black) == pytest.approx(20 / 200 * SIDE, abs=1) and black.mean() == pytest.approx(SIDE / 2, abs=1)


SKIN, HAIR = (200, 150, 130), (20, 18, 18)


def face(
    hair: tuple[int, int, int] = HAIR, lens: tuple[int, int, int] | None = None, **more: tuple[int, int, int, int]
):
    """A map and its picture: skin, brows, lips and hair drawn as boxes (top, bottom, left, right), and `more` parts."""
    parts, image = np.zeros((SIDE, SIDE), np.uint8), np.full((SIDE, SIDE, 3), 90, np.uint8)
    boxes = {
        "hair": (10, 110, 60, 196),
        "skin": (60, 220, 70, 186),
        "left_brow": (110, 116, 80, 110),
        "right_brow": (110, 116, 146, 176),
        "upper_lip": (180, 186, 110, 146),
        "lower_lip": (190, 196, 110, 146),
    }
    for name, (top, bottom, left, right) in [*boxes.items(), *more.items()]:
        name = name.rstrip("_2")
        parts[top:bottom, left:right] = PART[name]
        colour = {"hair": hair, "glasses": lens or SKIN}.get(name, SKIN)
        image[top:bottom, left:right] = colour
    return parts, image


def said(parts: np.ndarray, image: np.ndarray) -> dict[str, str]:
    measured = parsed.measure(parts, image)
    assert measured is not None
    return parsed.read(measured)


def test_a_plain_face() -> None:
    assert said(*face()) == {
        "hat": "no", "long hair": "no", "hair colour": "black", "bald": "no", "bangs": "no", "mouth open": "no",
        "eyeglasses": "no", "sunglasses": "no",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "category", "value"),
    [
        ({"hat": (0, 70, 50, 206)}, "hat", "yes"),
        ({"hat": (0, 6, 50, 206)}, "hat", None),
        ({"glasses": (118, 140, 76, 180)}, "eyeglasses", "yes"),
        ({"glasses": (118, 140, 76, 180)}, "sunglasses", "no"),
        ({"glasses": (118, 140, 76, 180), "lens": (25, 25, 25)}, "sunglasses", "yes"),
        ({"glasses": (118, 140, 76, 180), "lens": (25, 25, 25)}, "eyeglasses", None),
        ({"glasses": (118, 120, 76, 180)}, "eyeglasses", None),
        ({"earring": (160, 166, 190, 196)}, "earrings", "yes"),
        ({"necklace": (230, 233, 100, 150)}, "necklace", "yes"),
        ({"hair_2": (110, 250, 188, 210)}, "long hair", "yes"),
        ({"hair_2": (110, 250, 240, 256)}, "long hair", "no"),  # too far from the face: of someone else
        ({"inner_mouth": (186, 190, 112, 144)}, "mouth open", "yes"),
        ({"hair_2": (60, 108, 70, 186)}, "bangs", "yes"),
        ({"hair_2": (60, 108, 70, 186), "hat": (0, 60, 50, 206)}, "bangs", None),
        ({"hair_2": (40, 60, 70, 186), "skin_2": (40, 110, 70, 186)}, "bangs", "no"),
        ({"hair": (120, 60, 40)}, "hair colour", "brown"),
        ({"hair": (205, 175, 120)}, "hair colour", "blond"),
        ({"hair": (150, 150, 155)}, "hair colour", "gray"),
        ({"hair": (60, 62, 60)}, "hair colour", None),
    ],
)
def test_each_rule(more, category, value) -> None:
    assert said(*face(**more)).get(category) == value


def test_a_face_without_detail_is_not_said_to_wear_no_glasses() -> None:
    parts, image = face()
    blurred = cv2.GaussianBlur(image, (0, 0), 4)
    assert said(parts, blurred).items() == {k: v for k, v in said(parts, image).items() if "glasses" not in k}.items()
    parts, image = face(glasses=(118, 140, 76, 180))
    assert said(parts, cv2.GaussianBlur(image, (0, 0), 4))["eyeglasses"] == "yes"


def test_a_bald_head() -> None:
    parts, image = face()
    parts[parts == PART["hair"]] = PART["background"]
    found = said(parts, image)
    assert found["bald"] == "yes" and "hair colour" not in found


def test_without_a_face_nothing_is_said() -> None:
    parts = np.zeros((SIDE, SIDE), np.uint8)
    parts[:30, :30] = PART["skin"]
    assert parsed.measure(parts, np.zeros((SIDE, SIDE, 3), np.uint8)) is None


def test_as_a_source(package) -> None:
    parts, _ = face(glasses=(118, 140, 76, 180))
    image = np.repeat((8 * parts)[:, :, None], 3, 2).astype(np.uint8)
    source = parsed.ParsedAttributes(package)
    answers, nothing = source([image, np.zeros((64, 64, 3), np.uint8)])
    assert nothing == [] and ("hat", "no") in [each[:2] for each in answers]
    for each in answers:
        assert each.value in source.categories[each.category] and 0.5 <= each.probability < 1
    # of every answer that the rules can give somebody has to have read how often it is right
    assert set(parsed.READ_BY_EYE) >= {("earrings", "yes"), ("necklace", "yes"), ("hair colour", "gray")}
    assert parsed._trust("earrings", "yes") == 6 / 8
