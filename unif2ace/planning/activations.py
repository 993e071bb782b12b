"""What a training step keeps for its backward, tensor by tensor, as the model and its ops save it.

Every tensor has a name, so that one that two ops save is counted once. Checked against the bytes that autograd saves
in `benchmarks.plan`. Tensors of a few bytes a token or less (indices that all layers share, the rotary table) are left
out, except those of the routing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from unif2ace.configs import UniF2aceConfig
from unif2ace.model.sequence_moe import NoiseLevel

FLOAT32, INT64 = 4, 8
MATH, FUSED = "math", "fused"


class Precision(NamedTuple):
    """Bytes an element.

    Attributes:
        residual: of x between the layers. compute: of what the matrix products read. norm: of a LayerNorm's output.
        weight: of the parameters that the model computes with; their gradients have it too.
        casts: the products read casts of x and of the weights, which autograd keeps (autocast).
    """

    residual: int
    compute: int
    norm: int
    weight: int
    casts: bool


PRECISIONS = {
    "float32": Precision(4, 4, 4, 4, False),
    "bf16": Precision(2, 2, 2, 2, False),
    "autocast": Precision(4, 2, 4, 4, True),
}


class Step(NamedTuple):
    """The rows of a step, all of one length.

    Attributes:
        t2i, mmu, lm: rows of each task; lm rows have no image.
        length: L, padding included.
        real: tokens that are not padding, None when none is.
    """

    t2i: int
    mmu: int
    lm: int
    length: int
    real: int | None = None

    @property
    def rows(self) -> int:
        return self.t2i + self.mmu + self.lm

    @property
    def with_image(self) -> int:
        return self.t2i + self.mmu

    @property
    def tokens(self) -> int:
        """T = B L, padding included."""
        return self.rows * self.length

    @property
    def routed(self) -> int:
        """Tokens that go through the experts."""
        return self.tokens if self.real is None else self.real


class _Saved:
    """Tensors by name, and the part of the model that each belongs to."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[str, int]] = {}

    def keep(self, part: str, name: str, size: int) -> None:
        self._tensors.setdefault(name, (part, size))

    def by_part(self) -> dict[str, int]:
        total: dict[str, int] = defaultdict(int)
        for part, size in self._tensors.values():
            total[part] += size
        return {part: size for part, size in total.items() if size}


def of_block(config: UniF2aceConfig, step: Step, precision: Precision, attention: str = FUSED) -> dict[str, int]:
    """Bytes that one layer keeps, by part."""
    saved, D, T = _Saved(), config.hidden_size, step.tokens
    _keep_attention(saved, config, step, precision, attention)
    norms = 1 if config.parallel_block else 2
    for norm in range(norms):
        saved.keep("norms", f"x {norm}", precision.residual * T * D)
        saved.keep("norms", f"statistics {norm}", 2 * FLOAT32 * T)
    normed = "normed" if config.parallel_block else "normed again"
    if config.token_moe is None or config.token_moe.dense:
        width = config.intermediate_size
        saved.keep("FFN", _read(normed, "FFN", precision), precision.compute * T * D)
        saved.keep("FFN", "pre-activation", precision.compute * T * width)
        saved.keep("FFN", "activation", precision.compute * T * width)
    if config.token_moe is not None:
        _keep_experts(saved, config, step, precision, normed)
    if config.sequence_moe is not None and step.with_image:
        _keep_sequence(saved, config, step, precision)
    return saved.by_part()


def _read(tensor: str, reader: str, precision: Precision) -> str:
    """The name of what a linear layer saves of its input: the tensor itself, or its own cast of it."""
    return f"{tensor} cast for {reader}" if precision.casts else tensor


def _keep_attention(saved: _Saved, config: UniF2aceConfig, step: Step, precision: Precision, attention: str) -> None:
    D, H, T, c = config.hidden_size, config.num_attention_heads, step.tokens, precision.compute
    saved.keep("attention", _read("normed", "qkv", precision), c * T * D)
    saved.keep("attention", "qkv", 3 * c * T * D)
    saved.keep("attention", "statistics of q and k", 4 * FLOAT32 * T * H)
    if attention == MATH:
        saved.keep("attention", "scaled q, turned k, v", 3 * c * T * D)
        saved.keep("attention", "probabilities", c * step.rows * H * step.length**2)
    else:
        saved.keep("attention", "turned q and k", 2 * c * T * D)
        saved.keep("attention", "log-sum-exps", FLOAT32 * T * H)
    saved.keep("attention", "attended", c * T * D)


def _keep_experts(saved: _Saved, config: UniF2aceConfig, step: Step, precision: Precision, normed: str) -> None:
    moe = config.token_moe
    assert moe is not None
    D, n, c = config.hidden_size, step.routed, precision.compute
    slots, experts = moe.top_k + moe.shared_width // moe.width, sum(moe.experts)
    tokens = normed if step.real is None else "real tokens"
    for reader, size in (("router", FLOAT32), ("experts", c)):  # the router computes in float32
        name = tokens if size == precision.norm else f"{tokens} for {reader}"
        saved.keep("experts", name, size * n * D)
    saved.keep("experts", "hidden units", c * n * slots * moe.width)
    routing = FLOAT32 * n * experts + (FLOAT32 + 2 * INT64) * n * slots  # logits; weight, expert, order
    saved.keep("experts", "routing", routing)
    if step.real is not None:
        saved.keep("experts", "outputs", c * n * D)  # put back among the padding by index_copy, which saves them


def _keep_sequence(saved: _Saved, config: UniF2aceConfig, step: Step, precision: Precision) -> None:
    D, images = config.hidden_size, step.with_image * config.image_tokens
    saved.keep("sequence experts", "image tokens", precision.residual * images * D)
    saved.keep(
        "sequence experts", "x that they are gathered from", precision.residual * step.with_image * step.length * D
    )
    saved.keep("sequence experts", "means", 2 * FLOAT32 * step.with_image * D)
    if precision.residual != precision.compute:
        saved.keep("sequence experts", "cast injections", 3 * precision.residual * images * D)
    if step.lm:
        saved.keep("sequence experts", "rows with an image", precision.residual * step.with_image * step.length * D)


def outside(config: UniF2aceConfig, step: Step, precision: Precision, attention: str = FUSED) -> dict[str, int]:
    """Bytes kept outside the layers, by part; the head's are its gradients, which its forward makes."""
    saved, D, T, V = _Saved(), config.hidden_size, step.tokens, config.vocabulary.size
    saved.keep("norms", "last x", precision.residual * T * D)
    saved.keep("norms", "last statistics", 2 * FLOAT32 * T)
    for task in ["t2i and mmu"] * (step.with_image > 0) + ["lm"] * (step.lm > 0):
        saved.keep("head", f"gradient of the states, {task}", precision.norm * T * D)
        saved.keep("head", f"gradient of the weight, {task}", precision.weight * V * (D + 1))
    if config.sequence_moe is not None and step.with_image:
        _keep_injection(saved, config, step, precision, attention)
    return saved.by_part()


def resamplers(config: UniF2aceConfig, step: Step) -> list[tuple[str, int, int, int, int]]:
    """(name, rows, feature vectors of a row, their channels, key/value tokens that each becomes)."""
    moe = config.sequence_moe
    if moe is None:
        return []
    found = [("noise", step.t2i, 1, NoiseLevel().channels, moe.latents)]
    if moe.clip:
        found.append(("CLIP", step.mmu, config.image_tokens, config.semantic, 1))
    if moe.face:
        found.append(("face", step.mmu, 1, config.identity, moe.latents))
    return found


def _keep_injection(saved: _Saved, config: UniF2aceConfig, step: Step, precision: Precision, attention: str) -> None:
    D, H, N, c = config.hidden_size, config.num_attention_heads, config.image_tokens, precision.compute
    for name, rows, vectors, channels, latents in resamplers(config, step):
        tokens = rows * vectors * latents
        saved.keep("injection", f"{name} features", c * rows * vectors * channels)
        saved.keep("injection", f"{name} projected", (c * D + 2 * FLOAT32) * tokens)
        saved.keep("injection", f"{name} normed", c * tokens * D)
        if attention == MATH:
            saved.keep("injection", f"{name} scaled q", c * rows * N * D)
            saved.keep("injection", f"{name} k and v", 2 * c * tokens * D)
            saved.keep("injection", f"{name} probabilities", c * H * N * tokens)
        else:
            saved.keep("injection", f"{name} k and v", 2 * c * tokens * D)
            saved.keep("injection", f"{name} log-sum-exps", FLOAT32 * rows * H * N)
        saved.keep("injection", f"{name} attended", c * rows * N * D)
    if precision.residual == precision.compute:
        saved.keep("injection", "injections", 3 * c * step.with_image * N * D)


def weight_copies(config: UniF2aceConfig, precision: Precision) -> int:
    """Bytes of the casts of weights that autocast's products keep until their backward."""
    if not precision.casts:
        return 0
    D, moe = config.hidden_size, config.token_moe
    block = 4 * D * D
    if moe is None or moe.dense:
        block += 2 * D * config.intermediate_size
    if moe is not None:
        held = sum(moe.experts) + 2 * (moe.shared_width // moe.width)
        block += held * (2 * D * moe.width + D)  # w_in, w_out, b_out
    apart = sum(
        channels * latents * D + 3 * D * D
        for _, rows, _, channels, latents in resamplers(config, Step(1, 1, 0, 1)) if rows
    )  # fmt: skip
    return precision.compute * (config.num_hidden_layers * block + apart)
