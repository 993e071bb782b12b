"""Other people's mixtures of experts behind one signature, each through its public interface and in its own layout.

A peer takes tokens and their choices and gives the layer's outputs:

    call(x [T, D], expert [T, S] int64, weight [T, S] float32, w_in, b_in, w_out, b_out, activation) -> y [T, D]

with its weights stored as it stores them (`layout`), so that no contender pays for a transposition: `stored` makes
them of ours, `restored` brings a gradient back as a view, which only the comparison before the timing looks at.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

OURS, OUT_IN = "in, out", "out, in"  # [E, D, F'] and [E, F, D]; or as nn.Linear has it, [E, F', D] and [E, D, F]


@dataclass(frozen=True)
class Peer:
    """A library's experts.

    Attributes:
        call: see above; None where `missing`.
        layout: of w_in and w_out.
        activations: those that it computes.
        bias: whether it takes biases.
        devices: device types.
        missing: why it cannot be imported here.
        dtypes: those that it takes; None for all.
    """

    name: str
    call: Callable[..., Tensor] | None
    layout: str = OUT_IN
    activations: tuple[str, ...] = ("swiglu",)
    bias: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    missing: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def refusal(self, activation: str, bias: bool, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot do this case; None when it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        if activation not in self.activations or (bias and not self.bias):
            return f"has no {activation} experts {'with' if bias else 'without'} biases"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"does not take {dtype}"
        return self.missing

    def stored(self, weight: Tensor) -> Tensor:
        """One of our weights [E, in, out] as it keeps it."""
        return weight if self.layout == OURS else weight.transpose(1, 2).contiguous()

    def restored(self, weight: Tensor) -> Tensor:
        return weight if self.layout == OURS else weight.transpose(1, 2)


class Restored(Sequence[Tensor]):
    """Outputs of which some are in a peer's layout, brought back when they are looked at."""

    def __init__(self, outputs: Sequence[Tensor], restore: dict[int, Callable[[Tensor], Tensor]]) -> None:
        self._outputs, self._restore = outputs, restore

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, index):
        return self._restore.get(index % len(self), lambda tensor: tensor)(self._outputs[index])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def per_group(call: Callable[..., Tensor], groups: Sequence[tuple[slice, slice]]) -> Callable[..., Tensor]:
    """`call` once a group, as a library without groups has to be used.

    Args:
        groups: the tokens and the experts of each, contiguous, so that taking them apart costs nothing but the calls.
    """

    def separate(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        parts = []
        for tokens, experts in groups:
            if tokens.start == tokens.stop:
                continue
            biases = (None if bias is None else bias[experts] for bias in (b_in, b_out))
            b_in_g, b_out_g = biases
            own = expert[tokens] - experts.start
            parts.append(
                call(x[tokens], own, weight[tokens], w_in[experts], b_in_g, w_out[experts], b_out_g, activation)
            )
        return torch.cat(parts)

    return separate


def _imported(module: str) -> tuple[object | None, str | None]:
    try:
        return importlib.import_module(module), None
    except Exception as error:  # a library built for another machine fails in its own ways; the reason is recorded
        return None, f"cannot import {module}: {type(error).__name__}: {error}"[:500]


def _module(experts: int, **attributes) -> SimpleNamespace:
    """What transformers' experts functions read of the module they are methods of."""
    flags = {"has_post_expert_norm": False, "is_transposed": False, "is_concatenated": True}
    return SimpleNamespace(num_experts=experts, _is_expert_parallel=False, **flags, **attributes)


def transformers_eager() -> Peer:
    name = "transformers, eager loop"
    found, missing = _imported("transformers.models.mixtral.modeling_mixtral")
    if found is None:
        return Peer(name, None, missing=missing)
    forward = found.MixtralExperts.forward.__wrapped__

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        module = _module(len(w_in), gate_up_proj=w_in, down_proj=w_out, act_fn=F.silu)
        return forward(module, x, expert, weight.to(x.dtype))

    return Peer(name, call)


def transformers_grouped() -> Peer:
    name = "transformers, grouped_mm"
    found, missing = _imported("transformers.integrations.moe")
    if found is None:
        return Peer(name, None, missing=missing)

    def gate(projected: Tensor) -> Tensor:
        gate, value = projected.chunk(2, -1)
        return F.silu(gate) * value

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        module = _module(len(w_in), gate_up_proj=w_in, down_proj=w_out, has_bias=False, has_gate=True, _apply_gate=gate)
        return found.grouped_mm_experts_forward(module, x, expert, weight.to(x.dtype))

    return Peer(name, call)


def liger() -> Peer:
    """Liger-Kernel's fused mixture (0.8): swiglu, no biases; its atomics make dS differ from run to run."""
    found, missing = _imported("liger_kernel.ops.fused_moe")
    if found is None:
        return Peer("Liger", None, devices=("cuda",), missing=missing)

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        return found.LigerFusedMoEFunction.apply(x, w_in, w_out, expert.to(torch.int32), weight)

    return Peer("Liger", call, devices=("cuda",))


def sonic() -> Peer:
    """sonic-moe (0.1): its general entry, which takes choices made outside; Hopper and newer, 16-bit."""
    found, missing = _imported("sonicmoe")
    half = (torch.bfloat16, torch.float16)
    if found is None:
        return Peer("sonic-moe", None, devices=("cuda",), missing=missing, dtypes=half)
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        tokens, slots = expert.shape
        token = torch.arange(tokens, device=x.device, dtype=torch.int32).repeat_interleave(
            slots, output_size=expert.numel()
        )
        return found.moe_general_routing_inputs(
            x, weight.flatten(), token, expert.flatten().to(torch.int32), w_in.permute(1, 2, 0), b_in,
            w_out.permute(1, 2, 0), b_out, len(w_in), torch.cuda.current_stream().cuda_stream, swiglu,
            not torch.is_grad_enabled(), concat_layout=True,
        )[0]  # fmt: skip

    return Peer("sonic-moe", call, devices=("cuda",), dtypes=half)


def scattermoe() -> Peer:
    """scattermoe: its parallel linear layers around an activation in torch, as in its own MLP."""
    found, missing = _imported("scattermoe.parallel_experts")
    if found is None:
        return Peer("scattermoe", None, devices=("cuda",), missing=missing)

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        choice = found.flatten_sort_count(expert, len(w_in))  # sorted experts, their slots, offsets
        h = found.parallel_linear(
            x, w_in.permute(0, 2, 1), expert.shape[1], *choice, expert_biases=b_in, grouped_out=True
        )
        if activation == "swiglu":
            gate, value = h.chunk(2, -1)
            a = F.silu(gate) * value
        else:
            a = F.gelu(h, approximate="tanh")
        return found.parallel_linear(
            a, w_out.permute(0, 2, 1), 1, *choice, expert_biases=b_out, gates=weight.to(x.dtype), grouped_in=True
        )

    return Peer("scattermoe", call, activations=("swiglu", "gelu_tanh"), bias=True, devices=("cuda",))


def megablocks() -> Peer:
    """MegaBlocks' dropless experts: widths that are multiples of 128, 16-bit."""
    half = (torch.bfloat16, torch.float16)
    found, missing = _imported("megablocks.layers.dmoe")
    if found is None:
        return Peer("MegaBlocks", None, devices=("cuda",), missing=missing, dtypes=half)
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        experts, width, hidden = len(w_in), w_in.shape[1] // 2, x.shape[1]
        options = arguments(
            hidden_size=hidden, ffn_hidden_size=width, bias=False, return_bias=False, activation_fn=F.silu,
            moe_num_experts=experts, moe_top_k=expert.shape[1], mlp_type="glu", mlp_impl="sparse",
            fp16=x.dtype == torch.float16, bf16=x.dtype == torch.bfloat16, device=torch.device("meta"),
            init_method=lambda weight: None, output_layer_init_method=lambda weight: None,
        )  # fmt: skip
        layer = found.ParallelDroplessMLP(options)
        gate, value = w_in.chunk(2, 1)
        for name, given in (("w1", gate), ("v1", value), ("w2", w_out.transpose(1, 2))):
            delattr(layer.mlp, name)
            setattr(layer.mlp, name, given.reshape(experts * width, hidden))
        y, _ = layer.forward_once(x.view(1, *x.shape), weight.to(x.dtype), expert)
        return y.view(x.shape)

    return Peer("MegaBlocks", call, devices=("cuda",), dtypes=half)


def peers() -> list[Peer]:
    """Every peer, whether it is here or not."""
    return [transformers_eager(), transformers_grouped(), sonic(), liger(), scattermoe(), megablocks()]
