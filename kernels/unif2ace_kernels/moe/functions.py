"""The public functions of the room, `route`, `arrange`, `experts`, `mix`, and the `Routing` that goes between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._checks import expect, expect_choice, expect_int, expect_tensor
from .activation_torch import ACTIVATIONS, GATED
from .ops import arrange_op, experts_op, mix_op, route_op

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Routing(NamedTuple):
    """Where each token goes, and the statistics of the routers.

    E routed experts over all groups, shared experts after them: of group g, expert indices
    E + shared * g ... E + shared * (g + 1) - 1. A token has S = K + shared slots, the K routed ones first; slot s of
    token t has the number t * S + s.

    Attributes:
        weight: [T, S] float32 (float64 for float64 logits), differentiable; 1 for a shared expert.
        expert: [T, S] int64, index of each slot's expert.
        counts: [E + shared * G] int64, slots of each expert.
        offsets: [E + shared * G + 1] int64, running sum of `counts` from 0.
        order: [T * S] int64, slot numbers sorted by expert, in token order within one:
            order[offsets[e] : offsets[e + 1]] are the slots of expert e.
        frequency: [E], f_i = N_g / (K T_g) * counts_i: 1 for every expert under balanced load, 0 in a group without
            tokens. Not differentiable.
        probability: [E], P_i, mean over the group's tokens of the (for sigmoid: normalised) score; differentiable.
        balance_loss: scalar, sum over groups of balance_coef_g * sum_i f_i P_i; differentiable.
        z_loss: scalar, z_coef * mean over all T tokens of logsumexp(logits of the token's group)^2; differentiable.
    """

    weight: Tensor
    expert: Tensor
    counts: Tensor
    offsets: Tensor
    order: Tensor
    frequency: Tensor
    probability: Tensor
    balance_loss: Tensor
    z_loss: Tensor


def route(
    logits: Tensor,
    group_ids: Tensor,
    group_sizes: Sequence[int],
    top_k: int,
    *,
    shared: int = 0,
    balance_coef: float | Sequence[float] = 0.0,
    normalize: bool = True,
    scoring: str = "softmax",
    selection_bias: Tensor | None = None,
    z_coef: float = 0.0,
) -> Routing:
    """Choose top_k experts for each token among its group's, and account for their load.

    Scores s are the softmax, or the sigmoid, of the token's group's logits, in float32. The K largest s +
    selection_bias are chosen, of equals those of lower index, and weighted by s, without the bias (DeepSeek-V3, arXiv
    2412.19437, eq. 12-16), divided by their sum if `normalize`. A NaN counts as the largest.

    balance_loss = sum_g balance_coef_g sum_{i in g} f_i P_i, with f and P scaled as in DeepSeekMoE (arXiv 2401.06066,
    eq. 12-14; DeepSeek-V3 eq. 17-20 for the sigmoid): under balanced load or uniform scores it is sum_g
    balance_coef_g over the groups that have tokens. z_loss is ST-MoE's (arXiv 2202.08906, eq. 5).

    Args:
        logits: [T, E], E = sum(group_sizes); group g owns the columns from sum(group_sizes[:g]). Columns of the other
            groups are not read. float64 is computed in float64, everything else in float32.
        group_ids: [T] int, 0 <= id < G. Checked on the CPU; on CUDA, where looking costs a synchronisation, one out of
            range is taken as the nearest that there is (plain torch, as for float64: undefined behaviour).
        group_sizes: routed experts of each group.
        top_k: K, at most the smallest group.
        shared: always-on experts of each group; they get weight 1 and the indices from E (see `Routing`).
        balance_coef: lambda, one for all groups or one each.
        normalize: whether the K weights of a token sum to 1.
        scoring: "softmax" or "sigmoid".
        selection_bias: [E] float, added for the choice only; no gradient.
        z_coef: coefficient of the z loss.

    Returns:
        `Routing` of the T tokens.

    Raises:
        ValueError: naming the argument.
    """
    expect(isinstance(group_sizes, Sequence), "group_sizes", "a size for each group", type(group_sizes))
    sizes = tuple(group_sizes)
    expect(len(sizes) > 0, "group_sizes", "a positive size for each group", sizes)
    for size in sizes:
        expect_int(size, "group_sizes", 1)
    expect_tensor(logits, "logits", shape=["T", sum(sizes)], dtypes=_FLOATS)
    expect_tensor(group_ids, "group_ids", shape=[logits.shape[0]], dtypes=_INTS, device_of=("logits", logits))
    expect_int(top_k, "top_k", 1)
    expect(top_k <= min(sizes), "top_k", f"1 <= top_k <= {min(sizes)}, the smallest group", top_k)
    expect_int(shared, "shared", 0)
    coefs = [float(balance_coef)] * len(sizes) if isinstance(balance_coef, (int, float)) else list(balance_coef)
    expect(len(coefs) == len(sizes), "balance_coef", f"one value or {len(sizes)}, one a group", coefs)
    expect_choice(scoring, "scoring", ("softmax", "sigmoid"))
    if selection_bias is not None:
        expect_tensor(
            selection_bias, "selection_bias", shape=[sum(sizes)], dtypes=_FLOATS, device_of=("logits", logits)
        )
        selection_bias = selection_bias.detach()
    return Routing(
        *route_op(logits, group_ids, sizes, top_k, shared, coefs, normalize, scoring, selection_bias, z_coef)
    )


def arrange(expert: Tensor, weight: Tensor, num_experts: int) -> Routing:
    """The `Routing` of a choice that another router made, as `experts` takes it.

    Nothing is read from the device. A token may have an expert twice, and weights need not sum to 1.

    Args:
        expert: [T, K] int, the experts of each token, 0 <= expert < num_experts. Checked on the CPU; on CUDA, where
            looking costs a synchronisation, one out of range is taken as the nearest that there is.
        weight: [T, K] float; gradients of `experts` flow back to it.
        num_experts: E.

    Returns:
        `Routing` with E experts and no shared ones. Its probability, balance_loss and z_loss are 0: the router that
        chose has its own.

    Raises:
        ValueError: naming the argument.
    """
    expect_tensor(expert, "expert", shape=["T", "K"], dtypes=_INTS)
    expect_tensor(weight, "weight", shape=list(expert.shape), dtypes=_FLOATS, device_of=("expert", expert))
    expect_int(num_experts, "num_experts", 1)
    expert = expert.long()
    counts, offsets, order = arrange_op(expert, num_experts)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    frequency = counts * (num_experts / max(expert.numel(), 1))
    zero = weight.new_zeros(())
    return Routing(
        weight, expert, counts, offsets, order, frequency.to(weight.dtype), zero.expand(num_experts), zero, zero
    )


def expect_routing(value: object) -> None:
    """Check that `value` is a `Routing`."""
    expect(isinstance(value, Routing), "routing", "a Routing, of route or arrange", type(value).__name__)


def fit_experts(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    held: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """x and the parameters of `held` experts, cast as autocast says, once each argument fits the others."""
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (b_in, b_out))
    expect_choice(activation, "activation", ACTIVATIONS)
    expect_tensor(x, "x", shape=["T", "D"], dtypes=_FLOATS)
    tokens, hidden = x.shape
    dtypes, device_of = (x.dtype,), ("x", x)
    expect_tensor(routing.weight, "routing.weight", shape=[tokens, "S"], dtypes=_FLOATS, device_of=device_of)
    for name in ("order", "offsets"):  # a kernel reads as many of them as there are slots and experts
        size = routing.weight.numel() if name == "order" else len(routing.counts) + 1
        index, argument = getattr(routing, name), f"routing.{name}"
        expect_tensor(index, argument, shape=[size], dtypes=(torch.int64,), device_of=device_of)
    expect_tensor(w_out, "w_out", shape=[held, "F", hidden], dtypes=dtypes, device_of=device_of)
    width = w_out.shape[1] * (2 if activation in GATED else 1)
    expect_tensor(w_in, "w_in", shape=[held, hidden, width], dtypes=dtypes, device_of=device_of)
    if b_in is not None:
        expect_tensor(b_in, "b_in", shape=[held, width], dtypes=dtypes, device_of=device_of)
    if b_out is not None:
        expect_tensor(b_out, "b_out", shape=[held, hidden], dtypes=dtypes, device_of=device_of)
    return x, w_in, b_in, w_out, b_out


def experts(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    """y_t = sum_s weight_ts (act(x_t w_in[e] + b_in[e]) w_out[e] + b_out[e]), e = expert_ts, without padding rows.

    Deterministic. Saves x, the pre-activations and the routing for the backward. An expert without tokens gets zero
    gradients. Under autocast x and the parameters are cast to its dtype and y has it; the weights stay in float32.
    For CUDA graphs note that the torch path reads `offsets` on the host.

    Args:
        x: [T, D] float.
        routing: of the T tokens, from `route` or `arrange`; its weight is differentiable here.
        w_in: [E, D, F], or [E, D, 2F] for "swiglu" and "geglu": the gate in the first F columns, the value after it.
            E counts routed and shared experts, len(routing.counts). Any strides: of weights [E, F, D] give the
            transposed view.
        b_in: [E, F or 2F] or None.
        w_out: [E, F, D].
        b_out: [E, D] or None.
        activation: "gelu_tanh", "gelu", "relu", "silu", "swiglu" (silu(gate) * value),
            "geglu" (gelu_tanh(gate) * value).

    Returns:
        y [T, D] of x's dtype.

    Raises:
        ValueError: naming the argument.
    """
    expect_routing(routing)
    x, *parameters = fit_experts(x, routing, w_in, b_in, w_out, b_out, activation, len(routing.counts))
    inputs = x, routing.weight, *parameters
    # The pre-activations are for a backward: without one they are neither written nor held.
    keep_h = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
    y: Tensor = experts_op(x, routing.weight, routing.order, routing.offsets, *parameters, activation, keep_h)[0]
    return y


def mix(x: Tensor, coef: Tensor, injected: Tensor) -> Tensor:
    """y_b = coef_b0 x_b + sum_m coef_b(1+m) injected_bm: the sequence-level mixture in one pass over x.

    Sums in float32 (float64 for float64) and rounds once. Under autocast `injected` is cast to x's dtype.

    Args:
        x: [B, L, D] float.
        coef: [B, 1 + M] float.
        injected: [B, M, L, D] of x's dtype; M may be 0.

    Returns:
        y [B, L, D] of x's dtype.

    Raises:
        ValueError: naming the argument.
    """
    expect_tensor(x, "x", shape=["B", "L", "D"], dtypes=_FLOATS)
    if autocast_dtype(x.device) is not None:
        injected = injected.to(x.dtype)
    batch, length, hidden = x.shape
    expect_tensor(injected, "injected", shape=[batch, "M", length, hidden], dtypes=(x.dtype,), device_of=("x", x))
    expect_tensor(coef, "coef", shape=[batch, 1 + injected.shape[1]], dtypes=_FLOATS, device_of=("x", x))
    y: Tensor = mix_op(x, coef, injected)
    return y
