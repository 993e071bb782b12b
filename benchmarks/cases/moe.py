"""The token-level mixture as a layer (router logits to outputs) and its router alone; and the sequence-level one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace_kernels import moe

from ..case import FORWARD, TOLERANCE, TRAINING, Baseline, Case, Outputs, Work, bind, compiled, error_against, truth_of
from ..peers import Peer, Restored, Task, peers, per_group
from . import moe_mix
from .moe_grid import cpu_points, gpu_points, name_of, name_of_router, router_points
from .moe_layer import COEF, Layer, activate, every_expert, loop, router, sorted_grouped, tensors

CPU, GPU = ("cpu",), ("cuda",)
LAYERS = [
    ("smoke", Layer(96, 32, 16, 4, 2, 1), "made up, tiny", CPU + GPU),
    ("smoke swiglu", Layer(96, 32, 16, 4, 2, 0, "swiglu", bias=False, load="zipf", first=0.9), "made up, tiny",
     CPU + GPU),
    ("demo", Layer(44 * 104, 192, 128, 4, 2, 1), "the demo's model, 44 rows of 104 a step", CPU + GPU),
    ("paper-1k", Layer(1024, 2048, 512, 8, 4, 3), "UniF2aceConfig.base(), 1,024 tokens", CPU + GPU),
    ("paper-16k", Layer(16384, 2048, 512, 8, 4, 3), "UniF2aceConfig.base(), 16,384 tokens", GPU),
    ("fine-16k", Layer(16384, 2048, 512, 16, 4, 0), "32 experts of width 512 in two groups", GPU),
    ("swiglu-24k", Layer(24576, 1536, 512, 32, 4, 0, "swiglu", bias=False),
     "the shape that public MoE kernels report (E 64, K 4, n 512, d 1536)", GPU),
]  # fmt: skip


def _layer_work(size: Layer, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    inputs, group = tensors(size, dtype, device)
    seeds = [torch.randn(size.T, size.D, device=device), torch.ones((), device=device)]
    sizes = (size.N,) * size.groups

    def ours(x, logits, w_in, w_out, b_in=None, b_out=None) -> Outputs:
        routing = moe.route(logits, group, sizes, size.K, shared=size.shared, balance_coef=COEF)
        y = moe.experts(x, routing, w_in, b_in, w_out, b_out, activation=size.activation)
        return y, routing.balance_loss

    def routed(through: Callable[..., Tensor]) -> Callable[..., Outputs]:
        def layer(x, logits, w_in, w_out, b_in=None, b_out=None) -> Outputs:
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

    baselines = {"loop over experts": baseline(routed(loop))}
    times = size.groups * size.N / size.K
    if size.flops(mode) * times > 30e9 and device.type == "cpu":
        reason = f"{times:.0f} times the arithmetic"
        baselines["every expert on every token"] = Baseline(None, missing=reason)
    else:
        baselines["every expert on every token"] = baseline(routed(every_expert))
    grouped = hasattr(F, "grouped_mm")
    absent = Baseline(None, missing=f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    baselines["sort + grouped_mm"] = baseline(routed(sorted_grouped)) if grouped else absent
    if size.compiles:
        unrolled = mode == TRAINING and device.type == "cpu"
        why = "its backward, unrolled over the experts, takes half a minute to a minute to compile"
        baselines["torch.compile, every expert"] = (
            Baseline(None, missing=why) if unrolled else baseline(compiled(routed(every_expert)), compiles=True)
        )
        baselines["torch.compile, sort + grouped_mm"] = (
            baseline(compiled(routed(sorted_grouped)), compiles=True) if grouped else absent
        )
    for peer in peers():
        if size.activation in peer.activations or peer.name not in baselines:
            baselines |= _peer_baselines(peer, size, inputs, routed, mode, seeds)
    baselines["dense FFN of equal FLOPs"] = Baseline(bind(dense, dense_inputs, mode, seeds[:1]), rate_only=True)
    return Work(
        ours=bind(ours, inputs, mode, seeds),
        baselines=baselines,
        error=error_against(truth_of(routed(loop), inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


def _peer_baselines(
    peer: Peer, size: Layer, inputs: Sequence[Tensor], routed: Callable, mode: str, seeds: Outputs
) -> dict[str, Baseline]:
    """A library in one call for all groups, and in a call for each."""
    x, _, w_in, w_out, *biases = inputs
    copies = float(size.T * size.slots * (w_in[0].nbytes + w_out[0].nbytes))
    reason = peer.refusal(Task(size.activation, size.bias, x.dtype, x.device, mode == TRAINING, copies))
    if peer.call is None or reason is not None:
        return {peer.name: Baseline(None, missing=reason)}
    layout = peer.layout
    stored = [*inputs[:2], layout.w_in(w_in), layout.w_out(w_out), *biases]
    groups, token = [], 0
    for g, count in enumerate(size.tokens_of_group):
        groups.append((slice(token, token + count), slice(g * size.N, (g + 1) * size.N)))
        token += count

    def baseline(call: Callable[..., Tensor]) -> Baseline:
        run = bind(routed(call), stored, mode, seeds)
        # In the outputs of a training step: y, the loss, and the gradients of x, the logits, w_in, w_out.
        back = {4: layout.w_in_back, 5: layout.w_out_back}
        return Baseline(run if mode == FORWARD else lambda: Restored(run(), back))

    found = {peer.name: baseline(peer.call)}
    # A shared expert's index comes after all routed ones. On a CPU the small points show what a call a group costs.
    if layout.by_expert and size.shared == 0 and size.groups > 1 and (x.is_cuda or size.T <= 512):
        found[f"{peer.name}, once a group"] = baseline(per_group(peer.call, groups))
    return found


def _route_work(size: Layer, mode: str, device: torch.device) -> Work:
    inputs, group = tensors(size, torch.float32, device)
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


def layer_case(shape: str, size: Layer, source: str, devices: tuple[str, ...], mode: str, dtype: torch.dtype) -> Case:
    return Case(
        "moe.layer", shape, asdict(size), source, mode, dtype, size.flops(mode), size.bytes(mode, dtype.itemsize),
        lambda device: _layer_work(size, dtype, mode, device), devices, shape.startswith("smoke"),
    )  # fmt: skip


def route_case(shape: str, size: Layer, source: str, devices: tuple[str, ...], mode: str) -> Case:
    moved = 4.0 * size.T * size.groups * size.N + 20.0 * size.T * size.slots  # logits; expert, order, weight
    return Case(
        "moe.route", shape, asdict(size), source, mode, torch.float32, 0, moved * (1 if mode == FORWARD else 2),
        lambda device: _route_work(size, mode, device), devices, shape.startswith("smoke"),
    )  # fmt: skip


def _cases() -> Iterator[Case]:
    source = "a point of the grid on which mixtures are compared"
    points = [(*named, (FORWARD, TRAINING), (torch.float32, torch.bfloat16)) for named in LAYERS]
    for prefix, size in cpu_points():
        dtypes = (torch.float32, torch.bfloat16) if size.T <= 2048 else (torch.bfloat16,)  # which takes half the time
        points.append((name_of(prefix, size), size, source, CPU, (TRAINING,), dtypes))
    for prefix, size in gpu_points():
        modes = (FORWARD, TRAINING) if prefix == "gpu-core" else (TRAINING,)
        points.append((name_of(prefix, size), size, source, GPU, modes, (torch.bfloat16,)))
    for shape, size, where, devices, modes, dtypes in points:
        for mode in modes:
            for dtype in dtypes[:1] if shape.startswith("smoke") else dtypes:
                yield layer_case(shape, size, where, devices, mode, dtype)


def _route_cases() -> Iterator[Case]:
    source = "routing alone, by tokens and experts"
    points = [(name_of_router(size), size, source, devices) for size, devices in router_points()]
    for shape, size, where, devices in [*LAYERS, *points]:
        for mode in (FORWARD, TRAINING):
            yield route_case(shape, size, where, devices, mode)


CASES = [*_cases(), *_route_cases(), *moe_mix.CASES]
