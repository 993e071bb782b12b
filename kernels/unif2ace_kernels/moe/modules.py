"""GroupedMoE: the routers' and experts' parameters, and their initialisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import without_autocast
from .._checks import expect, expect_choice, expect_int, expect_tensor
from .activation_torch import ACTIVATIONS, GATED
from .functions import Routing, experts, route
from .parallel import parallel_experts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GroupedMoE(nn.Module):
    """A mixture of experts in place of a feed-forward layer, whose tokens come in groups (tasks).

    A token of group g chooses `top_k` of its group's `experts_per_group` routed experts and always uses its group's
    shared expert (UniF2ace, token-level MoE; DeepSeekMoE, arXiv 2401.06066, for the shared expert). A shared expert
    of width `shared_width` is kept as shared_width / expert_width slots of the routed experts' width, which is the
    same function: a feed-forward layer is the sum of the pieces its hidden units are cut into.

    Args:
        hidden: D.
        expert_width: F, hidden units of a routed expert (of each half, for "swiglu" and "geglu").
        experts_per_group: N, routed experts of each group; one number or one per group.
        groups: G.
        top_k: K, routed experts a token uses.
        shared_width: hidden units of each group's shared expert, a multiple of `expert_width`; 0 for none.
        activation: see `experts`.
        bias: whether experts have biases.
        balance_coef: lambda, one for all groups or one each.
        z_coef, normalize, scoring: see `route`. "sigmoid" comes with a `selection_bias` buffer, moved by
            `balance_selection` as in DeepSeek-V3.
        routed_scale: factor of the routed experts' weights (DeepSeek-V3's routed_scaling_factor).

    Attributes:
        group: None, or the process group whose ranks share the experts: the parameters experts_* then hold this rank's
            slice along their first dimension, as tensors or as DTensors Shard(0); see `parallel_experts`.

    Shapes of the parameters, E = all routed experts, A = E + G * shared_width / F, F' = 2F for gated activations:
        router_weight [E, D], experts_w_in [A, D, F'], experts_b_in [A, F'], experts_w_out [A, F, D],
        experts_b_out [A, D]; the shared slots of group g start at E + g * shared_width / F.

    Raises:
        ValueError: naming the argument.
    """

    selection_bias: Tensor | None
    group: ProcessGroup | None = None

    def __init__(
        self,
        hidden: int,
        expert_width: int,
        experts_per_group: int | Sequence[int],
        *,
        groups: int = 2,
        top_k: int = 4,
        shared_width: int = 0,
        activation: str = "gelu_tanh",
        bias: bool = True,
        balance_coef: float | Sequence[float] = 0.01,
        z_coef: float = 0.0,
        normalize: bool = True,
        scoring: str = "softmax",
        routed_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_choice(activation, "activation", ACTIVATIONS)
        expect_choice(scoring, "scoring", ("softmax", "sigmoid"))
        for name, value in (("hidden", hidden), ("expert_width", expert_width), ("groups", groups), ("top_k", top_k)):
            expect_int(value, name, 1)
        sizes = (experts_per_group,) * groups if isinstance(experts_per_group, int) else tuple(experts_per_group)
        expect(len(sizes) == groups, "experts_per_group", f"one number or {groups}, one a group", sizes)
        for size in sizes:
            expect_int(size, "experts_per_group", 1)
        expect(top_k <= min(sizes), "top_k", f"1 <= top_k <= {min(sizes)}, the smallest group", top_k)
        expect_int(shared_width, "shared_width", 0)
        expect(
            shared_width % expert_width == 0, "shared_width", f"a multiple of expert_width {expert_width}", shared_width
        )
        self.hidden, self.expert_width, self.group_sizes, self.top_k = hidden, expert_width, sizes, top_k
        self.shared = shared_width // expert_width
        self.activation, self.scoring, self.normalize = activation, scoring, normalize
        self.balance_coef, self.z_coef, self.routed_scale = balance_coef, z_coef, routed_scale

        total = sum(sizes) + groups * self.shared
        in_width = expert_width * (2 if activation in GATED else 1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.router_weight = parameter(sum(sizes), hidden)
        self.experts_w_in = parameter(total, hidden, in_width)
        self.experts_w_out = parameter(total, expert_width, hidden)
        self.experts_b_in = parameter(total, in_width) if bias else None
        self.experts_b_out = parameter(total, hidden) if bias else None
        needs_bias = scoring == "sigmoid"
        self.register_buffer("selection_bias", torch.zeros(sum(sizes), device=device) if needs_bias else None)
        self.reset_parameters()

    def extra_repr(self) -> str:
        sizes = "+".join(map(str, self.group_sizes))
        shared = f", shared_width={self.shared * self.expert_width}" if self.shared else ""
        return (
            f"hidden={self.hidden}, expert_width={self.expert_width}, experts={sizes}, top_k={self.top_k}{shared}, "
            f"activation={self.activation}, bias={self.experts_b_in is not None}, scoring={self.scoring}"
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As nn.Linear's: uniform in +-1 / sqrt(inputs); biases zero; router weights normal, 0.02."""
        nn.init.normal_(self.router_weight, std=0.02)
        for weight in (self.experts_w_in, self.experts_w_out):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        for bias in (self.experts_b_in, self.experts_b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, group_ids: Tensor) -> tuple[Tensor, Routing]:
        """x [..., D], group_ids [...] int -> y [..., D] and the `Routing` of the flattened tokens.

        The router computes in float32 whatever autocast says. Add routing.balance_loss + routing.z_loss to the loss.
        """
        expect_tensor(x, "x", shape=[*[None] * (x.dim() - 1), self.hidden])
        expect_tensor(group_ids, "group_ids", shape=list(x.shape[:-1]))
        tokens = x.reshape(-1, self.hidden)
        with without_autocast(x.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            logits = F.linear(tokens.to(dtype), self.router_weight.to(dtype))
        routing = route(
            logits, group_ids.reshape(-1), self.group_sizes, self.top_k, shared=self.shared,
            balance_coef=self.balance_coef, normalize=self.normalize, scoring=self.scoring,
            selection_bias=self.selection_bias, z_coef=self.z_coef,
        )  # fmt: skip
        if self.routed_scale != 1:
            routed, always = routing.weight.split([self.top_k, self.shared], 1)
            routing = routing._replace(weight=torch.cat([self.routed_scale * routed, always], 1))
        w_in, b_in, w_out, b_out = self.experts_w_in, self.experts_b_in, self.experts_w_out, self.experts_b_out
        if self.group is None:
            y = experts(tokens, routing, w_in, b_in, w_out, b_out, activation=self.activation)
        else:
            # Masters in float32 beside others that FSDP hands out in bfloat16: experts that are spread are not FSDP's.
            w_in, w_out = (_local(each).to(tokens.dtype) for each in (w_in, w_out))
            b_in, b_out = (None if each is None else _local(each).to(tokens.dtype) for each in (b_in, b_out))
            y = parallel_experts(
                tokens, routing, w_in, b_in, w_out, b_out, activation=self.activation, group=self.group
            )
        # No view for autograd, as matmul's: FSDP2 loses its hook where a module's output is a view that is added to.
        y = torch.ops.aten._unsafe_view(y, x.shape)
        return y, routing

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupedMoE:
        """The copy has the same group: a group is of processes and has no copy."""
        memo[id(self.group)] = self.group
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @torch.no_grad()
    def balance_selection(self, routing: Routing, rate: float = 0.001) -> None:
        """DeepSeek-V3's balancing without a loss: raise the bias of underloaded experts, lower it of overloaded ones.

        selection_bias += rate * sign(1 - f), once a training step (arXiv 2412.19437, section 2.1.2).
        """
        if self.selection_bias is None:
            raise ValueError(f"scoring: expected 'sigmoid', which has a selection_bias, got {self.scoring!r}")
        self.selection_bias += rate * (1 - routing.frequency).sign()

    @classmethod
    def from_dense(
        cls,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        *,
        expert_width: int,
        experts_per_group: int | Sequence[int],
        **options: Any,
    ) -> GroupedMoE:
        """A mixture that computes exactly the function of a dense feed-forward layer, to train on from there.

        See `load_dense`; `options` are the constructor's.

        Args:
            in_weight: [F_dense, D] as nn.Linear keeps it; [2 F_dense, D], gate first, for a gated activation.
            in_bias: [F_dense or 2 F_dense] or None.
            out_weight: [D, F_dense].
            out_bias: [D] or None.
            expert_width: a divisor of F_dense.

        Raises:
            ValueError: naming the argument.
        """
        expect_tensor(out_weight, "out_weight", shape=["D", "F"])
        moe = cls(
            out_weight.shape[0], expert_width, experts_per_group, shared_width=out_weight.shape[1],
            bias=in_bias is not None or out_bias is not None, device=in_weight.device, dtype=in_weight.dtype, **options,
        )  # fmt: skip
        moe.load_dense(in_weight, in_bias, out_weight, out_bias)
        return moe

    @torch.no_grad()
    def load_dense(
        self, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None
    ) -> None:
        """Become the dense layer: each group's shared expert is a copy of it and the routed experts answer zero.

        Routed expert i reads the dense layer's i-th piece of `expert_width` hidden units (around again when there are
        more experts than pieces), and its w_out and b_out are zero: the function is the dense layer's whatever the
        router says, and w_out, which sees trained features and has a gradient, moves first. Arguments as for
        `from_dense`; needs shared_width = F_dense.
        """
        pieces, width = self.shared, self.expert_width
        halves = 2 if self.activation in GATED else 1
        expect(pieces > 0, "shared_width", "the dense layer's width", 0)
        expect_tensor(in_weight, "in_weight", shape=[halves * pieces * width, self.hidden])
        expect_tensor(out_weight, "out_weight", shape=[self.hidden, pieces * width])
        routed = sum(self.group_sizes)
        # [halves, pieces, F, D] -> [pieces, D, halves * F]: each piece takes its units from both halves.
        w_in = in_weight.view(halves, pieces, width, self.hidden).permute(1, 3, 0, 2).reshape(pieces, self.hidden, -1)
        piece = torch.cat([torch.cat([torch.arange(n) for n in self.group_sizes]) % pieces,
                           torch.arange(pieces).repeat(len(self.group_sizes))]).to(w_in.device)  # fmt: skip
        self.experts_w_in.copy_(w_in[piece])
        self.experts_w_out.copy_(out_weight.t().reshape(pieces, width, self.hidden)[piece])
        self.experts_w_out[:routed] = 0
        if self.experts_b_in is None or self.experts_b_out is None:
            expect(in_bias is None and out_bias is None, "in_bias, out_bias", "None, as bias=False", "a tensor")
            return
        self.experts_b_in.zero_()
        self.experts_b_out.zero_()
        if in_bias is not None:
            expect_tensor(in_bias, "in_bias", shape=[in_weight.shape[0]])
            self.experts_b_in.copy_(in_bias.view(halves, pieces, width).transpose(0, 1).reshape(pieces, -1)[piece])
        if out_bias is not None:
            expect_tensor(out_bias, "out_bias", shape=[self.hidden])
            self.experts_b_out[routed::pieces] = out_bias


def _local(parameter: Any) -> Any:
    """This rank's part of a DTensor, a class that is not imported for those who have none; else what it is."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
