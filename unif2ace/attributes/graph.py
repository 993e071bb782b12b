"""A frozen TensorFlow.js graph of convolutions, run by torch: model.json names the operations, shards hold the weights.

Only what segmentation networks are made of is here; a graph with another operation is refused when it is read. Values
are [B, H, W, C] as the graph has them and [B, C, H, W] inside a convolution.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from unif2ace.parsing import parsing

Tensors = list[torch.Tensor]


class TfjsGraph:
    """A graph with one input and one output.

    Args:
        model: content of model.json.
        shards: content of the weight files by their names in it.

    Raises:
        ValueError: it is no graph model, a shard is missing or of another length, or it has an operation that there is
            none for here.
    """

    def __init__(self, model: bytes, shards: Mapping[str, bytes]) -> None:
        with parsing(lambda why: ValueError(f"not the model.json of a graph model ({why})")):
            described = json.loads(model)
        try:
            nodes = {each["name"]: each for each in described["modelTopology"]["node"]}
            manifest = described["weightsManifest"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the model.json of a graph model ({error!r})") from error
        unknown = sorted({each["op"] for each in nodes.values()} - OPERATIONS.keys() - {"Const", "Placeholder"})
        if unknown:
            raise ValueError(f"the graph has operations that are not known here: {', '.join(unknown)}")
        self._weights = _weights(manifest, shards)
        inputs = [name for name, each in nodes.items() if each["op"] == "Placeholder"]
        used = {_source(name) for each in nodes.values() for name in each.get("input", ())}
        outputs = [name for name in nodes if name not in used]
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(f"expected a graph of one input and one output, got {inputs} and {outputs}")
        self.input, self.output = inputs[0], outputs[0]
        self._nodes = [
            (each["name"], each["op"], [_source(name) for name in each.get("input", ())], _attributes(each))
            for each in _in_order(nodes, self.output)
            if each["op"] not in ("Const", "Placeholder")
        ]

    def to(self, device: torch.device | str) -> TfjsGraph:
        """The graph itself, with its weights on a device; whole numbers are sizes and axes, and stay."""
        self._weights = {k: v.to(device) if v.is_floating_point() else v for k, v in self._weights.items()}
        return self

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, output: str | None = None) -> torch.Tensor:
        """What the graph, or its node `output`, gives for `x` [B, H, W, C] float32."""
        values = {**self._weights, self.input: x}
        for name, operation, inputs, attributes in self._nodes:
            values[name] = OPERATIONS[operation]([values[each] for each in inputs], attributes)
            if name == output:
                break
        return values[output or self.output]


def _source(name: str) -> str:
    return name.partition(":")[0]


def _in_order(nodes: Mapping[str, dict], output: str) -> list[dict]:
    """The nodes that `output` hangs on, each after what it reads."""
    order: dict[str, dict] = {}
    waiting = [(output, False)]
    while waiting:
        name, ready = waiting.pop()
        if name in order:
            continue
        if ready:
            order[name] = nodes[name]
            continue
        waiting.append((name, True))
        waiting += [(_source(each), False) for each in nodes[name].get("input", ())]
    return list(order.values())


def _weights(manifest: list[dict], shards: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    tensors = {}
    for group in manifest:
        missing = [name for name in group["paths"] if name not in shards]
        if missing:
            raise ValueError(f"weights are missing: {', '.join(missing)}")
        content, offset = b"".join(shards[name] for name in group["paths"]), 0
        for each in group["weights"]:
            if each["dtype"] not in ("float32", "int32") or "quantization" in each:
                raise ValueError(f"{each['name']}: expected plain float32 or int32 weights, got {each['dtype']}")
            size = 4 * math.prod(each["shape"])
            part = content[offset : offset + size]
            if len(part) != size:
                raise ValueError(f"{each['name']}: the weight files end early")
            value = np.frombuffer(part, f"<{each['dtype'][0]}4").reshape(each["shape"])
            tensors[each["name"]] = torch.from_numpy(value.copy())
            offset += size
        if offset != len(content):
            raise ValueError(f"the weight files have {len(content) - offset} bytes more than model.json names")
    return tensors


def _attributes(node: dict) -> dict[str, Any]:
    """A node's attributes as plain values: {"strides": [1, 2, 2, 1], "padding": "SAME", ...}."""
    found: dict[str, Any] = {}
    for name, held in node.get("attr", {}).items():
        if "list" in held:
            kind, values = next(iter(held["list"].items()), ("i", []))
            found[name] = [_plain(kind, each) for each in values]
        else:
            kind, value = next(iter(held.items()))
            found[name] = _plain(kind, value)
    if found.get("data_format", "NHWC") != "NHWC" or any(each != 1 for each in found.get("dilations", ())):
        raise ValueError(f"{node['name']}: expected NHWC without dilation, got {found}")
    if found.get("padding", "SAME") != "SAME" or found.get("align_corners") or found.get("half_pixel_centers"):
        raise ValueError(f"{node['name']}: expected SAME padding, and plain corners when resizing, got {found}")
    return found


def _plain(kind: str, value: Any) -> Any:
    if kind == "s":
        return base64.b64decode(value).decode()
    return int(value) if kind == "i" else value


def _padded(x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """`x` [B, C, H, W] with SAME padding: ceil(size / stride) windows, the odd row and column at the end."""
    sizes = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # torch pads the last axis first
        total = max((-(-size // s) - 1) * s + k - size, 0)
        sizes += [total // 2, total - total // 2]
    return F.pad(x, sizes, value=value)


def _convolve(inputs: Tensors, attributes: dict, groups: bool = False) -> torch.Tensor:
    """Kernels are [k, k, in, out], or [k, k, in, multiplier] where each channel has its own; then bias and ReLU."""
    x, weight = inputs[0].permute(0, 3, 1, 2), inputs[1]
    channels = weight.shape[2]
    if groups:
        weight = weight.flatten(2)[:, :, None]
    kernel = weight.permute(3, 2, 0, 1).contiguous()
    stride = tuple(attributes["strides"][1:3])
    x = _padded(x, kernel.shape[2:], stride)
    bias = inputs[2] if len(inputs) > 2 else None
    y = F.conv2d(x, kernel, bias, stride, groups=channels if groups else 1)
    fused = attributes.get("fused_ops", [])
    if fused not in ([], ["BiasAdd"], ["BiasAdd", "Relu"]):
        raise ValueError(f"expected a convolution fused with BiasAdd and Relu, got {fused}")
    return (F.relu(y) if "Relu" in fused else y).permute(0, 2, 3, 1)


def _pool(inputs: Tensors, attributes: dict, largest: bool) -> torch.Tensor:
    """The largest, or the mean of what lies inside the picture."""
    x = inputs[0].permute(0, 3, 1, 2)
    kernel, stride = tuple(attributes["ksize"][1:3]), tuple(attributes["strides"][1:3])
    if largest:
        return F.max_pool2d(_padded(x, kernel, stride, -math.inf), kernel, stride).permute(0, 2, 3, 1)
    inside = _padded(torch.ones_like(x[:1, :1]), kernel, stride)
    y = F.avg_pool2d(_padded(x, kernel, stride), kernel, stride) / F.avg_pool2d(inside, kernel, stride)
    return y.permute(0, 2, 3, 1)


def _resize(inputs: Tensors, attributes: dict) -> torch.Tensor:
    """Bilinear, pixel i of n at i * size / n: not at pixel centres, so not as `interpolate` does it."""
    x, sizes = inputs[0], inputs[1].tolist()
    rows, columns = (_between(size, wanted, x) for size, wanted in zip(x.shape[1:3], sizes))
    return torch.einsum("pi,qj,bijc->bpqc", rows, columns, x)


def _between(size: int, wanted: int, like: torch.Tensor) -> torch.Tensor:
    """[wanted, size] what each pixel before adds to each pixel after."""
    place = torch.arange(wanted, device=like.device) * (size / wanted)
    low = place.long().clamp(max=size - 1)
    share = (place - low).to(like.dtype)[:, None]
    first = F.one_hot(low, size).to(like.dtype)
    second = F.one_hot((low + 1).clamp(max=size - 1), size).to(like.dtype)
    return first * (1 - share) + second * share


def _slice(inputs: Tensors, attributes: dict) -> torch.Tensor:
    x, begin, end, stride = inputs[0], *(each.tolist() for each in inputs[1:])
    if len(begin) != 1 or stride != [1] or any(attributes.get(f"{mask}_mask") for mask in _MASKS):
        raise ValueError("expected a plain slice of a list")
    part = x[begin[0] : end[0]]
    return part[0] if attributes.get("shrink_axis_mask") else part


_MASKS = ("begin", "end", "ellipsis", "new_axis")

OPERATIONS: dict[str, Callable[[Tensors, dict], torch.Tensor]] = {
    "_FusedConv2D": _convolve,
    "Conv2D": _convolve,
    "FusedDepthwiseConv2dNative": lambda x, a: _convolve(x, a, groups=True),
    "DepthwiseConv2dNative": lambda x, a: _convolve(x, a, groups=True),
    "MaxPool": lambda x, a: _pool(x, a, largest=True),
    "AvgPool": lambda x, a: _pool(x, a, largest=False),
    "ResizeBilinear": _resize,
    "StridedSlice": _slice,
    "Shape": lambda x, a: torch.tensor(x[0].shape, dtype=torch.int32),
    "Pack": lambda x, a: torch.stack(x, a["axis"]),
    "ConcatV2": lambda x, a: torch.cat(x[:-1], int(x[-1])),
    "Mean": lambda x, a: x[0].mean(x[1].tolist(), keepdim=bool(a.get("keep_dims"))),
    "Squeeze": lambda x, a: x[0].squeeze(tuple(a["squeeze_dims"])),
    "Add": lambda x, a: x[0] + x[1],
    "AddV2": lambda x, a: x[0] + x[1],
    "Mul": lambda x, a: x[0] * x[1],
    "Relu": lambda x, a: F.relu(x[0]),
    "Sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "Softmax": lambda x, a: x[0].softmax(-1),
    "ArgMax": lambda x, a: x[0].argmax(int(x[1])),
}
