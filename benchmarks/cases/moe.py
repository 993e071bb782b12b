"""The token-level mixture as a layer (router logits to outputs), its router alone, and the sequence-level mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace_kernels import moe

from ..case import FORWARD, TOLERANCE, TRAINING, Baseline, Case, Outputs, Work, bind, compiled, error_against, truth_of

COEF = 0.01


@dataclass(frozen=True)
class Layer:
    """Sizes of a token-level mixture: T tokens, D hidden, F width, N experts a group, K routed and shared slots."""

    T: int
    D: int
    F: int
    N: int
    K: int
    shared: int
    activation: str = "gelu_tanh"
    groups: int = 2

    @property
    def slots(self) -> int:
        return self.K + self.shared

    @property
    def experts(self) -> int:
        return self.groups * (self.N + self.shared)

    @property
    def width_in(self) -> int:
        return self.F * (2 if self.activation == "swiglu" else 1)

    def flops(self, mode: str) -> float:
        forward = 2.0 * self.T * self.slots * self.D * (self.width_in + self.F)
        return forward if mode == FORWARD else 3 * forward

    def bytes(self, mode: str, itemsize: int) -> float:
        weights = self.experts * self.D * (self.width_in + self.F) * itemsize
        tokens = self.T * self.D * itemsize
        # forward: x, W in, y out; backward: x, W, dy in, dx, dW out
        return weights + 2 * tokens + (0 if mode == FORWARD else 2 * weights + 3 * tokens)


LAYERS = [
    ("smoke", Layer(96, 32, 16, 4, 2, 1), "made up, tiny", ("cpu", "cuda")),
    ("demo", Layer(44 * 104, 192, 128, 4, 2, 1), "the demo's model, 44 rows of 104 a step", ("cpu", "cuda")),
    ("paper-1k", Layer(1024, 2048, 512, 8, 4, 3), "ModelConfig.base(), 1,024 tokens", ("cpu", "cuda")),
    ("paper-16k", Layer(16384, 2048, 512, 8, 4, 3), "ModelConfig.base(), 16,384 tokens", ("cuda",)),
    ("fine-16k", Layer(16384, 2048, 512, 16, 4, 0), "32 experts of width 512 in two groups", ("cuda",)),
    ("swiglu-24k", Layer(24576, 1536, 512, 32, 4, 0, "swiglu"),
     "the shape that public MoE kernels report (E 64, K 4, n 512, d 1536)", ("cuda",)),
]  # fmt: skip


def activate(h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, value = h.chunk(2, -1)
        return F.silu(gate) * value
    return F.gelu(h, approximate="tanh")


def router(logits: Tensor, group: Tensor, size: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """What a user would write: other groups' logits at -inf, softmax, top-k; experts, weights [T, S] and the loss."""
    own = group[:, None] == torch.arange(size.groups, device=group.device).repeat_interleave(size.N)
    scores = logits.masked_fill(~own, float("-inf")).softmax(-1)
    weight, expert = scores.topk(size.K, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    members = own[:, :: size.N].sum(0).repeat_interleave(size.N).clamp(min=1)
    chosen = F.one_hot(expert, size.groups * size.N).sum((0, 1))
    loss = COEF * (chosen * size.N / (size.K * members) * scores.sum(0) / members).sum()
    if size.shared:
        first = size.groups * size.N + size.shared * group[:, None]
        expert = torch.cat([expert, first + torch.arange(size.shared, device=group.device)], 1)
        weight = torch.cat([weight, weight.new_ones(len(group), size.shared)], 1)
    return expert, weight, loss


def every_expert(x, expert, weight, w_in, b_in, w_out, b_out, activation):
    """All experts on all tokens, masked by their weights."""
    y = torch.zeros_like(x)
    for e in range(w_in.shape[0]):
        out = activate(x @ w_in[e] + b_in[e], activation) @ w_out[e] + b_out[e]
        y = y + out * ((expert == e) * weight).sum(-1, keepdim=True).to(x.dtype)
    return y


def loop(x, expert, weight, w_in, b_in, w_out, b_out, activation):
    """A loop over the experts, each on its tokens, added back with index_add: the usual eager code."""
    y = torch.zeros_like(x)
    mask = F.one_hot(expert, w_in.shape[0]).permute(2, 1, 0)
    for e in mask.sum((1, 2)).nonzero()[:, 0].tolist():
        slot, token = torch.where(mask[e])
        out = activate(x[token] @ w_in[e] + b_in[e], activation) @ w_out[e] + b_out[e]
        y.index_add_(0, token, out * weight[token, slot, None].to(x.dtype))
    return y


def sorted_grouped(x, expert, weight, w_in, b_in, w_out, b_out, activation):
    """Slots sorted by expert, one grouped product for all experts, scattered back.

    Biases are spread over the rows in float32: their gradient is a sum over rows, 4 % off when summed in bfloat16.
    """
    order = expert.flatten().argsort(stable=True)
    ends = torch.bincount(expert.flatten(), minlength=w_in.shape[0]).cumsum(0).to(torch.int32)
    by_row, token = expert.flatten()[order], order // expert.shape[1]
    b_in, b_out = (bias.to(torch.promote_types(bias.dtype, torch.float32)) for bias in (b_in, b_out))
    h = (F.grouped_mm(x[token], w_in, offs=ends) + b_in[by_row]).to(x.dtype)
    out = (F.grouped_mm(activate(h, activation), w_out, offs=ends) + b_out[by_row]).to(x.dtype)
    out = out * weight.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, out)


def _tensors(size: Layer, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """[x, logits, w_in, b_in, w_out, b_out] of order 1 and group ids; every group has the same share of tokens."""
    random = torch.randn
    x = random(size.T, size.D, device=device).to(dtype)
    logits = random(size.T, size.groups * size.N, device=device)
    w_in = (random(size.experts, size.D, size.width_in, device=device) * size.D**-0.5).to(dtype)
    w_out = (random(size.experts, size.F, size.D, device=device) * size.F**-0.5).to(dtype)
    b_in = (random(size.experts, size.width_in, device=device) * 0.1).to(dtype)
    b_out = (random(size.experts, size.D, device=device) * 0.1).to(dtype)
    return [x, logits, w_in, b_in, w_out, b_out], torch.arange(size.T, device=device) * size.groups // size.T


def _layer_work(size: Layer, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    inputs, group = _tensors(size, dtype, device)
    seeds = [torch.randn(size.T, size.D, device=device), torch.ones((), device=device)]
    sizes = (size.N,) * size.groups

    def ours(x, logits, w_in, b_in, w_out, b_out) -> Outputs:
        routing = moe.route(logits, group, sizes, size.K, shared=size.shared, balance_coef=COEF)
        y = moe.experts(x, routing, w_in, b_in, w_out, b_out, activation=size.activation)
        return y, routing.balance_loss

    def routed(through: Callable[..., Tensor]) -> Callable[..., Outputs]:
        def layer(x, logits, w_in, b_in, w_out, b_out) -> Outputs:
            expert, weight, loss = router(logits, group, size)
            return through(x, expert, weight, w_in, b_in, w_out, b_out, size.activation), loss

        return layer

    wide = size.slots * size.F
    dense_in = torch.randn(size.D, size.slots * size.width_in, device=device) * size.D**-0.5
    dense_out = torch.randn(wide, size.D, device=device) * wide**-0.5

    dense_inputs = [inputs[0], dense_in.to(dtype), dense_out.to(dtype)]

    def dense(x, w_in, w_out) -> Outputs:
        return (activate(x @ w_in, size.activation) @ w_out,)

    def baseline(function: Callable[..., Outputs], **kind: bool) -> Baseline:
        return Baseline(bind(function, inputs, mode, seeds), **kind)

    grouped = hasattr(F, "grouped_mm")
    absent = Baseline(None, missing=f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    return Work(
        ours=bind(ours, inputs, mode, seeds),
        baselines={
            "loop over experts": baseline(routed(loop)),
            "every expert on every token": baseline(routed(every_expert)),
            "sort + grouped_mm": baseline(routed(sorted_grouped)) if grouped else absent,
            "torch.compile, every expert": baseline(compiled(routed(every_expert)), compiles=True),
            "torch.compile, sort + grouped_mm": (
                baseline(compiled(routed(sorted_grouped)), compiles=True) if grouped else absent
            ),
            "dense FFN of equal FLOPs": Baseline(bind(dense, dense_inputs, mode, seeds[:1]), rate_only=True),
        },
        error=error_against(truth_of(routed(loop), inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


def _route_work(size: Layer, mode: str, device: torch.device) -> Work:
    inputs, group = _tensors(size, torch.float32, device)
    logits, sizes = inputs[1:2], (size.N,) * size.groups
    seeds = [torch.randn(size.T, size.slots, device=device), torch.ones((), device=device)]
    total = size.experts

    def ours(logits: Tensor) -> Outputs:
        routing = moe.route(logits, group, sizes, size.K, shared=size.shared, balance_coef=COEF)
        return routing.weight, routing.balance_loss, routing.order, routing.offsets

    def plain(logits: Tensor) -> Outputs:
        expert, weight, loss = router(logits, group, size)
        order = expert.flatten().argsort(stable=True)
        offsets = F.pad(torch.bincount(expert.flatten(), minlength=total).cumsum(0), (1, 0))
        return weight, loss, order, offsets

    return Work(
        ours=bind(ours, logits, mode, seeds),
        baselines={
            "softmax, top-k, sort": Baseline(bind(plain, logits, mode, seeds)),
            "torch.compile": Baseline(bind(compiled(plain), logits, mode, seeds), compiles=True),
        },
        error=error_against(truth_of(plain, logits, mode, seeds)),
        tolerance=TOLERANCE[torch.float32],
    )


MIXES = [  # B, L, M, D
    ("smoke", (2, 4, 2, 16), "made up, tiny", ("cpu", "cuda")),
    ("demo", (44, 64, 3, 192), "the demo's model, 44 faces a step", ("cpu", "cuda")),
    ("paper-16", (16, 256, 2, 2048), "ModelConfig.base(), 16 images of 256 tokens", ("cpu", "cuda")),
    ("paper-16x1024", (16, 1024, 2, 2048), "ModelConfig.base(), 16 images of 1,024 tokens", ("cuda",)),
]


def _mix_work(size: tuple[int, int, int, int], dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    B, L, M, D = size
    x, injected = (torch.randn(shape, device=device).to(dtype) for shape in ((B, L, D), (B, M, L, D)))
    inputs = [x, torch.rand(B, 1 + M, device=device), injected]
    seeds = [torch.randn(B, L, D, device=device)]

    def ours(x, coef, injected) -> Outputs:
        return (moe.mix(x, coef, injected),)

    def plain(x, coef, injected) -> Outputs:
        coef = coef.to(x.dtype)[:, :, None, None]
        y = coef[:, 0] * x
        for m in range(M):
            y = y + coef[:, 1 + m] * injected[:, m]
        return (y,)

    def einsum(x, coef, injected) -> Outputs:
        return (torch.einsum("bm,bmld->bld", coef.to(x.dtype), torch.cat([x[:, None], injected], 1)),)

    return Work(
        ours=bind(ours, inputs, mode, seeds),
        baselines={
            "sum of products": Baseline(bind(plain, inputs, mode, seeds)),
            "concatenate, einsum": Baseline(bind(einsum, inputs, mode, seeds)),
            "torch.compile": Baseline(bind(compiled(plain), inputs, mode, seeds), compiles=True),
        },
        error=error_against(truth_of(plain, inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


def _cases() -> Iterator[Case]:
    for shape, size, source, devices in LAYERS:
        sizes = {"T": size.T, "D": size.D, "F": size.F, "groups": size.groups, "N": size.N, "K": size.K,
                 "shared": size.shared, "activation": size.activation}  # fmt: skip
        smoke = shape == "smoke"
        for mode in (FORWARD, TRAINING):
            for dtype in (torch.float32,) if smoke else (torch.float32, torch.bfloat16):
                yield Case(
                    "moe.layer", shape, sizes, source, mode, dtype, size.flops(mode), size.bytes(mode, dtype.itemsize),
                    lambda device, size=size, dtype=dtype, mode=mode: _layer_work(size, dtype, mode, device),
                    devices, smoke,
                )  # fmt: skip
            moved = 4.0 * size.T * size.groups * size.N + 20.0 * size.T * size.slots  # logits; expert, order, weight
            yield Case(
                "moe.route", shape, sizes, source, mode, torch.float32, 0, moved * (1 if mode == FORWARD else 2),
                lambda device, size=size, mode=mode: _route_work(size, mode, device), devices, smoke,
            )  # fmt: skip
    for shape, size, source, devices in MIXES:
        B, L, M, D = size
        for mode in (FORWARD, TRAINING):
            for dtype in (torch.float32, torch.bfloat16):
                moved = float(B * L * D * dtype.itemsize * (M + 2))
                # backward: dy, x and S in, dx and dS out
                moved *= 1 if mode == FORWARD else 1 + (2 * M + 3) / (M + 2)
                yield Case(
                    "moe.mix", shape, {"B": B, "L": L, "M": M, "D": D}, source, mode, dtype, 0, moved,
                    lambda device, size=size, dtype=dtype, mode=mode: _mix_work(size, dtype, mode, device),
                    devices, shape == "smoke",
                )  # fmt: skip


CASES = list(_cases())
