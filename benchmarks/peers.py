"""Other people's mixtures of experts behind one signature, each through its public interface and in its own layout.

A peer takes tokens and their choices and gives the layer's outputs:

    call(x [T, D], expert [T, S] int64, weight [T, S] float32, w_in, b_in, w_out, b_out, activation) -> y [T, D]

with its weights stored as it stores them (`Layout`), so that no contender pays for a transposition.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

COPIES_AT_MOST = 1 << 30  # bytes


def _same(weight: Tensor) -> Tensor:
    return weight


def _turned(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).contiguous()


def _turned_back(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2)


def _split(w_in: Tensor) -> Tensor:
    return _turned(w_in).unflatten(1, (2, -1)).transpose(0, 1).contiguous()


def _joined(split: Tensor) -> Tensor:
    return split.transpose(0, 1).flatten(1, 2).transpose(1, 2)


@dataclass(frozen=True)
class Layout:
    """How a library keeps our w_in [E, D, F'] and w_out [E, F, D].

    Attributes:
        w_in, w_out: to its layout, once.
        w_in_back, w_out_back: a gradient to ours, which only the comparison before the timing looks at.
        by_expert: whether the experts are the first dimension.
    """

    w_in: Callable[[Tensor], Tensor] = _same
    w_out: Callable[[Tensor], Tensor] = _same
    w_in_back: Callable[[Tensor], Tensor] = _same
    w_out_back: Callable[[Tensor], Tensor] = _same
    by_expert: bool = True


OURS = Layout()
OUT_IN = Layout(_turned, _turned, _turned_back, _turned_back)  # [E, F', D] and [E, D, F], as nn.Linear has it
SPLIT = Layout(_split, _same, _joined, _same, by_expert=False)  # [gate or value, E, F, D] and ours


@dataclass(frozen=True)
class Task:
    """What a peer is asked to do.

    Attributes:
        copies: bytes of the weights of one expert for every token and slot.
    """

    activation: str
    bias: bool
    dtype: torch.dtype
    device: torch.device
    training: bool
    copies: float


@dataclass(frozen=True)
class Peer:
    """A library's experts.

    Attributes:
        call: see above; None where `missing`.
        layout: of w_in and w_out.
        activations: those that it computes.
        bias: whether its experts have biases; None: with or without.
        devices: device types.
        missing: why it cannot be imported here.
        dtypes: those that it takes; None for all.
        unfit: further reasons why it cannot do a task.
    """

    name: str
    call: Callable[..., Tensor] | None
    layout: Layout = OUT_IN
    activations: tuple[str, ...] = ("swiglu",)
    bias: bool | None = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    missing: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    unfit: Callable[[Task], str | None] = lambda task: None

    def refusal(self, task: Task) -> str | None:
        """Why it cannot do this; None when it can."""
        if task.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {task.device.type}"
        if task.activation not in self.activations or self.bias not in (None, task.bias):
            return f"has no {task.activation} experts {'with' if task.bias else 'without'} biases"
        if self.dtypes is not None and task.dtype not in self.dtypes:
            return f"does not take {task.dtype}"
        return self.missing or self.unfit(task)


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


def imported(module: str) -> tuple[Any, str | None]:
    """The module, or None and why it cannot be imported."""
    try:
        return importlib.import_module(module), None
    except Exception as error:  # a library built for another machine fails in its own ways; the reason is recorded
        return None, f"cannot import {module}: {type(error).__name__}: {error}"[:500]


def _copies(task: Task) -> str | None:
    """For a peer that gathers an expert's weights for every token and slot."""
    gib = task.copies / 2**30
    return f"copies the weights of every slot's expert, {gib:.0f} GiB here" if task.copies > COPIES_AT_MOST else None


def _rounded_biases(task: Task) -> str | None:
    if task.bias and task.training and task.dtype != torch.float32 and task.device.type == "cpu":
        return f"sums the biases' gradients over rows in {task.dtype}: 4 % off"
    return None


def transformers(implementation: str) -> list[Peer]:
    """transformers' experts by one of its implementations: Mixtral's, and ungated ones that its decorator makes."""
    names = [f"transformers, {implementation}"] * 2
    found, missing = imported("transformers.integrations")
    mixtral, absent = imported("transformers.models.mixtral.modeling_mixtral")
    copies = _copies if implementation == "batched_mm" else lambda task: None
    gated = Peer(names[0], None, missing=missing or absent)
    ungated = Peer(names[1], None, OURS, ("gelu_tanh",), True, missing=missing or absent)
    if gated.missing is not None:
        return [gated, ungated]

    @cache
    def config(experts: int, hidden: int, width: int):
        return importlib.import_module("transformers").MixtralConfig(
            num_local_experts=experts, hidden_size=hidden, intermediate_size=width,
            experts_implementation=implementation,
        )  # fmt: skip

    @cache
    def mixtral_experts(*sizes: int) -> nn.Module:
        with torch.device("meta"):
            return mixtral.MixtralExperts(config(*sizes))

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        module = mixtral_experts(len(w_in), x.shape[1], w_out.shape[2])
        return functional_call(
            module, {"gate_up_proj": w_in, "down_proj": w_out}, (x, expert, weight.to(x.dtype))
        )  # fmt: skip

    gated = Peer(names[0], call, unfit=copies)
    if implementation == "eager":  # the implementation of whoever writes the module: a loop, which is another contender
        return [gated]

    @found.use_experts_implementation(is_transposed=True, has_bias=True, has_gate=False)
    class Ungated(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            E, D, F_ = config.num_local_experts, config.hidden_size, config.intermediate_size
            self.num_experts = E
            self.up_proj, self.up_proj_bias = (nn.Parameter(torch.empty(E, *shape)) for shape in ((D, F_), (F_,)))
            self.down_proj, self.down_proj_bias = (nn.Parameter(torch.empty(E, *shape)) for shape in ((F_, D), (D,)))
            self.act_fn = nn.GELU(approximate="tanh")

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    @cache
    def ungated_experts(*sizes: int) -> nn.Module:
        with torch.device("meta"):
            return Ungated(config(*sizes))

    def call_ungated(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        module = ungated_experts(len(w_in), x.shape[1], w_out.shape[1])
        given = {"up_proj": w_in, "up_proj_bias": b_in, "down_proj": w_out, "down_proj_bias": b_out}
        return functional_call(module, given, (x, expert, weight.to(x.dtype)))

    def unfit(task: Task) -> str | None:
        return copies(task) or _rounded_biases(task)

    return [gated, Peer(names[1], call_ungated, OURS, ("gelu_tanh",), True, unfit=unfit)]


def liger() -> Peer:
    """Liger-Kernel's fused mixture (0.8): swiglu, no biases; its atomics make dS differ from run to run."""
    found, missing = imported("liger_kernel.ops")
    if found is None:
        return Peer("Liger", None, devices=("cuda",), missing=missing)

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        return found.LigerFusedMoEFunction.apply(x, w_in, w_out, expert.to(torch.int32), weight)

    return Peer("Liger", call, devices=("cuda",))


def sonic() -> Peer:
    """sonic-moe (0.1): its general entry, which takes choices made outside; Hopper and newer, 16-bit."""
    found, missing = imported("sonicmoe")
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
    found, missing = imported("scattermoe.parallel_experts")
    activations = ("swiglu", "gelu_tanh")
    if found is None:
        return Peer("scattermoe", None, OUT_IN, activations, None, ("cuda",), missing)

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

    return Peer("scattermoe", call, OUT_IN, activations, None, ("cuda",))


def megablocks() -> Peer:
    """MegaBlocks' dropless experts by grouped products: those by sparse ones refuse Triton from 3.2 on."""
    found, missing = imported("megablocks.layers.dmoe")
    _, absent = imported("grouped_gemm")
    kinds: dict[str, Any] = {"devices": ("cuda",), "dtypes": (torch.bfloat16,)}
    if found is None or absent is not None:
        return Peer("MegaBlocks", None, SPLIT, missing=missing or absent, **kinds)
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments

    @cache
    def layer(experts: int, hidden: int, width: int, slots: int) -> nn.Module:
        options = arguments(
            hidden_size=hidden, ffn_hidden_size=width, bias=False, return_bias=False, activation_fn=F.silu,
            moe_num_experts=experts, moe_top_k=slots, moe_loss_weight=0.0, mlp_type="glu", mlp_impl="grouped",
            fp16=False, bf16=True, device=torch.device("meta"), init_method=lambda weight: None,
            output_layer_init_method=lambda weight: None,
        )  # fmt: skip
        return found.ParallelDroplessMLP(options)

    def call(x, expert, weight, w_in, b_in, w_out, b_out, activation) -> Tensor:
        experts, width, hidden = w_out.shape
        given = {"mlp.w1": w_in[0], "mlp.v1": w_in[1], "mlp.w2": w_out}
        given = {name: each.flatten(0, 1) for name, each in given.items()}
        module = layer(experts, hidden, width, expert.shape[1])
        y = functional_call(module, given, (x.view(1, *x.shape), None, weight.to(x.dtype), expert))
        return y.view(x.shape)

    return Peer("MegaBlocks", call, SPLIT, **kinds)


def peers() -> list[Peer]:
    """Every peer, whether it is here or not."""
    ours = [each for kind in ("eager", "grouped_mm", "batched_mm") for each in transformers(kind)]
    return [*ours, sonic(), liger(), scattermoe(), megablocks()]
