"""Toy ONNX networks in AntelopeV2's shapes: pure red 8 x 8 cells are faces, a random matrix is the recogniser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BOX = (4.0, 3.0, 4.0, 5.0)  # distances to left, top, right, bottom, in strides of 8 pixels
BIAS = np.linspace(-8, 8, 512, dtype=np.float32)
POINTS = ((-1.5, -1.0), (1.5, -1.2), (0.1, 0.2), (-1.0, 1.4), (1.1, 1.5))


def write(folder: Path, seed: int = 0) -> Path:
    """A folder with scrfd_10g_bnkps.onnx and glintr100.onnx."""
    folder.mkdir(parents=True)
    onnx.save(detector(), folder / "scrfd_10g_bnkps.onnx")
    onnx.save(recogniser(seed), folder / "glintr100.onnx")
    return folder


def detector() -> onnx.ModelProto:
    """Scores half the difference of red and green averaged over a cell, at the finest of three strides."""
    redness = np.array([0.5, -0.5, 0], np.float32).reshape(1, 3, 1, 1)
    constants = {"redness": redness, "column": np.array([1, -1, 1]), "both": np.array([1, 2, 1, 1])}
    nodes, outputs = [helper.make_node("Conv", ["input.1", "redness"], ["red"])], {"score": [], "bbox": [], "kps": []}
    for stride in (8, 16, 32):
        # one anchor of each place scores, the other not; coarser strides find nothing
        constants[f"share{stride}"] = np.array([stride == 8, 0], np.float32).reshape(1, 2, 1, 1)
        nodes += [
            helper.make_node(
                "AveragePool", ["red"], [f"mean{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2
            ),
            helper.make_node("Mul", [f"mean{stride}", f"share{stride}"], [f"anchors{stride}"]),
            helper.make_node("Transpose", [f"anchors{stride}"], [f"last{stride}"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"last{stride}", "column"], [f"score_{stride}"]),
        ]
        outputs["score"].append((f"score_{stride}", 1))
        for kind, values in (("bbox", BOX), ("kps", sum(POINTS, ()))):
            constants[kind] = np.array(values, np.float32).reshape(1, 1, -1)
            constants["zero"] = np.zeros(1, np.float32)
            nodes += [
                helper.make_node("Mul", [f"score_{stride}", "zero"], [f"{kind}_zero_{stride}"]),
                helper.make_node("Add", [f"{kind}_zero_{stride}", kind], [f"{kind}_{stride}"]),
            ]
            outputs[kind].append((f"{kind}_{stride}", len(values)))
    every = [each for kind in outputs.values() for each in kind]
    return _model(
        nodes, constants, [1, 3, "H", "W"], [(name, [1, f"n_{name}", width]) for name, width in every]
    )  # fmt: skip


def recogniser(seed: int) -> onnx.ModelProto:
    matrix = np.random.RandomState(seed).standard_normal((3 * 49, 512)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input.1"], ["coarse"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["coarse"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["vector"]),  # else the scale of the input would not show
    ]
    return _model(nodes, {"matrix": matrix, "bias": BIAS}, ["N", 3, 112, 112], [("vector", ["N", 512])])


def _model(nodes, constants, shape, outputs) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def picture(*cells: tuple[int, int], size: tuple[int, int] = (640, 640), seed: int = 0) -> np.ndarray:
    """Noise [H, W, 3] without much red, and a face in each cell (row, column) of 8 pixels."""
    image = np.random.RandomState(seed).randint(0, 200, (*size, 3)).astype(np.uint8)
    image[..., 0] = image[..., 1] // 2
    for row, column in cells:
        image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = (255, 0, 0)
    return image
