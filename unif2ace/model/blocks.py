"""One layer of the transformer: attention, FFN and token-level experts, sequence-level experts."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from unif2ace.configs import UniF2aceConfig
from unif2ace.model.attention import Attention, repeated
from unif2ace.model.sequence_moe import SequenceMoE
from unif2ace.model.visibility import Visibility
from unif2ace_kernels import moe


class Context(NamedTuple):
    """What every block of one forward pass shares.

    Attributes:
        visibility: who sees whom. attention: the kernel's name. table: of the rotary embedding.
        real: [T] positions in the flattened batch that are not padding, None when none is, and `real_task` [T] their
            tasks. Padding is nobody's token: routed, it would crowd an expert or two and count in the balance loss.
        rows: [R] the rows that have an image, None when all have; `image_task` [R] their tasks.
        image: [R, N] positions of their image tokens; one slice where they are the same in every row and no gradient
            is wanted; None where there are none.
        injected: [R, 3, N, D] or None.
    """

    visibility: Visibility
    attention: str
    table: tuple[torch.Tensor, torch.Tensor]
    real: torch.Tensor | None
    real_task: torch.Tensor
    rows: torch.Tensor | None
    image_task: torch.Tensor
    image: torch.Tensor | slice | None
    injected: torch.Tensor | None


def at_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [B, L, D] at the positions `rows` [B, M]: [B, M, D]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))


class FeedForward(nn.Module):
    """The dense FFN, gelu(tanh) with biases."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(hidden, width)
        self.w_out = nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_out(F.gelu(self.w_in(x), approximate="tanh"))


class Block(GradientCheckpointingLayer):
    """Attention, FFN and token-level experts, sequence-level experts."""

    def __init__(self, config: UniF2aceConfig, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config.hidden_size, config.num_attention_heads, layer)
        self.ffn_norm = None if config.parallel_block else nn.LayerNorm(config.hidden_size)
        token = config.token_moe
        dense = token is None or token.dense
        self.ffn = FeedForward(config.hidden_size, config.intermediate_size) if dense else None
        self.experts: moe.GroupedMoE | None = None
        if token is not None:
            self.experts = moe.GroupedMoE(
                config.hidden_size,
                token.width,
                token.experts,
                top_k=token.top_k,
                shared_width=token.shared_width,
                activation="gelu_tanh",
                bias=True,
                balance_coef=token.balance,
            )
        self.sequence: SequenceMoE | None = SequenceMoE(config) if config.sequence_moe is not None else None

    @torch.no_grad()
    def start_from_dense(self) -> None:
        """Experts beside a trained FFN start with pieces of its hidden units, and answer zero: nothing changes yet.

        Their output weights see trained features and have a gradient, so they move first.
        """
        if self.ffn is None or self.experts is None:
            raise ValueError("token_moe: expected experts beside a dense FFN, `dense` = True")
        count, _, width = self.experts.experts_w_in.shape
        units = (torch.arange(count * width) % self.ffn.w_in.out_features).view(count, width)
        self.experts.experts_w_in.copy_(self.ffn.w_in.weight[units].transpose(1, 2))
        self.experts.experts_w_out.zero_()
        if self.experts.experts_b_in is not None and self.experts.experts_b_out is not None:
            self.experts.experts_b_in.copy_(self.ffn.w_in.bias[units])
            self.experts.experts_b_out.zero_()

    def feed_forward(self, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, moe.Routing | None]:
        """The dense FFN of x [B, L, D] plus its token experts, whichever there are, and the routing of the experts."""
        dense = self.ffn(x) if self.ffn is not None else None
        if self.experts is None:
            return cast(torch.Tensor, dense), None  # one of the two is always there
        tokens = x.flatten(0, 1)
        if context.real is None:
            y, routing = self.experts(tokens, context.real_task[: len(tokens)])
        else:
            y, routing = self.experts(tokens.index_select(0, context.real), context.real_task)
            y = torch.zeros_like(tokens, dtype=y.dtype).index_copy(0, context.real, y)
        y = y.view_as(x)
        return (y if dense is None else dense + y), routing

    def mix_images(
        self, sequence: SequenceMoE, x: torch.Tensor, image: torch.Tensor | slice, context: Context
    ) -> tuple[torch.Tensor, moe.Routing]:
        """x [B, L, D] with the tokens of its images mixed by the sequence experts, and their routing.

        `image` says where they stand: a slice where that is the same in all rows, else positions [R, N].
        """
        rows = context.rows
        part = x if rows is None else x.index_select(0, rows)
        tokens = part[:, image] if isinstance(image, slice) else at_rows(part, image)
        mixed, routing = sequence(tokens, context.image_task, context.injected)
        if isinstance(image, slice):
            part[:, image] = mixed
        else:
            part = part.scatter(1, image[:, :, None].expand(-1, -1, x.shape[-1]), mixed.to(x.dtype))
        return (part if rows is None else x.index_copy(0, rows, part)), routing

    def forward(
        self,
        x: torch.Tensor,
        context: Context,
        past_key_values: Cache | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, moe.Routing | None, moe.Routing | None]:
        """One layer.

        Args:
            x: [B, L, D].
            past_key_values: keys and values of the positions before x, to which those of x are added.
            prefix: see `Attention`; x comes back as [R, L, D] for its R sequences.
            rows: [R, M] positions of x to come back alone, [R, M, D]; without sequence-level experts, which read all
                of a sample.

        Returns:
            x, and the routings of the token level and of the sequence level, None where there are no experts.
        """
        normed = self.norm(x)
        attended = self.attention(
            normed, context.visibility, context.table, past_key_values, prefix, rows, context.attention
        )
        if prefix is not None:
            x, normed = (repeated(each, len(attended) // len(each)) for each in (x, normed))
        if rows is not None:
            x, normed = at_rows(x, rows), at_rows(normed, rows)
        if self.ffn_norm is None:
            y, token_routing = self.feed_forward(normed, context)
            x = x + attended + y
        else:
            x = x + attended
            y, token_routing = self.feed_forward(self.ffn_norm(x), context)
            x = x + y
        sequence_routing = None
        if self.sequence is not None and context.image is not None:
            x, sequence_routing = self.mix_images(self.sequence, x, context.image, context)
        return x, token_routing, sequence_routing
