"""The unified transformer: one token sequence, full-and-causal attention, two levels of grouped experts, two losses.

x = tokens (+ image positions)
each block:   x += attention(norm(x))
              x += experts(norm(x))                       grouped token-level MoE, by the row's task
              x[image] = sequence experts(x[image])       grouped sequence-level MoE, by the row's task
head(norm(x)) over one vocabulary: text, specials, image codes, mask
loss = t2i * D3Diff(masked codes) + mmu * next token(answers) + balance losses of every router
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from unif2ace.configs import T2I, ModelConfig
from unif2ace.model.attention import Attention, repeated, rotary_table
from unif2ace.model.sequence_moe import Injection, SequenceMoE
from unif2ace.model.sequences import Batch, attention_mask
from unif2ace_kernels import d3diff, moe


@dataclass
class Output:
    """Hidden states [B, L, D] after the last norm, and each layer's routings (token level, sequence level)."""

    hidden: torch.Tensor
    token_routings: list[moe.Routing] = field(default_factory=list)
    sequence_routings: list[moe.Routing] = field(default_factory=list)


class Context(NamedTuple):
    """What every block of one forward pass shares.

    Attributes:
        mask: [B, 1, L or 1, keys], who sees whom. table: of the rotary embedding.
        task: [B]. injected: [B, 3, N, D] or None.
        image: [B, N] positions of the image tokens; one slice where they are the same in every row and no gradient is
            wanted; None where there are none.
        real: [T] positions in the flattened batch that are not padding, None when none is, and `real_task` [T] their
            tasks. Padding is nobody's token: routed, it would crowd an expert or two and count in the balance loss.
    """

    mask: torch.Tensor
    table: tuple[torch.Tensor, torch.Tensor]
    task: torch.Tensor
    image: torch.Tensor | slice | None
    injected: torch.Tensor | None
    real: torch.Tensor | None
    real_task: torch.Tensor


def at_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [B, L, D] at the positions `rows` [B, M]: [B, M, D]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))


class FeedForward(nn.Module):
    """The dense FFN, gelu(tanh) with biases; where a config has no token-level experts."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(hidden, width)
        self.w_out = nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_out(F.gelu(self.w_in(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, token-level experts, sequence-level experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden)
        self.attention = Attention(config.hidden, config.heads)
        self.ffn_norm = None if config.parallel_block else nn.LayerNorm(config.hidden)
        token = config.token_moe
        self.ffn: FeedForward | moe.GroupedMoE
        if token is None:
            self.ffn = FeedForward(config.hidden, config.ffn)
        else:
            self.ffn = moe.GroupedMoE(
                config.hidden,
                token.width,
                token.experts,
                top_k=token.top_k,
                shared_width=token.shared_width,
                activation="gelu_tanh",
                bias=True,
                balance_coef=token.balance,
            )
        self.sequence = SequenceMoE(config) if config.sequence_moe is not None else None

    def feed_forward(self, x: torch.Tensor, context: Context, output: Output) -> torch.Tensor:
        if isinstance(self.ffn, FeedForward):
            return self.ffn(x)
        tokens = x.flatten(0, 1)
        if context.real is None:
            y, routing = self.ffn(tokens, context.real_task[: len(tokens)])
            output.token_routings.append(routing)
            return y.view_as(x)
        y, routing = self.ffn(tokens.index_select(0, context.real), context.real_task)
        output.token_routings.append(routing)
        return torch.zeros_like(tokens, dtype=y.dtype).index_copy(0, context.real, y).view_as(x)

    def forward(
        self,
        x: torch.Tensor,
        context: Context,
        output: Output,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, L, D] -> the same, [R, L, D] for the R sequences of `cache` (see `Attention`), or [R, M, D] at `rows`
        [R, M] alone (only without sequence-level experts, which read all of a sample)."""
        normed = self.norm(x)
        attended = self.attention(normed, context.mask, context.table, cache, rows)
        if cache is not None:
            x, normed = (repeated(each, len(attended) // len(each)) for each in (x, normed))
        if rows is not None:
            x, normed = at_rows(x, rows), at_rows(normed, rows)
        if self.ffn_norm is None:
            x = x + attended + self.feed_forward(normed, context, output)
        else:
            x = x + attended
            x = x + self.feed_forward(self.ffn_norm(x), context, output)
        if self.sequence is not None and context.image is not None:
            image = context.image
            tokens = x[:, image] if isinstance(image, slice) else at_rows(x, image)
            mixed, routing = self.sequence(tokens, context.task, context.injected)
            if isinstance(image, slice):
                x[:, image] = mixed
            else:
                x = x.scatter(1, image[:, :, None].expand(-1, -1, x.shape[-1]), mixed.to(x.dtype))
            output.sequence_routings.append(routing)
        return x


class UniF2ace(nn.Module):
    """The model of `config`, randomly initialised (normal, std 0.02; projections into the residual stream smaller)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.vocabulary.size
        self.embedding = nn.Embedding(size, config.hidden)
        self.image_position = (
            nn.Parameter(torch.zeros(config.image_tokens, config.hidden)) if (config.image_positions) else None
        )
        self.injection = Injection(config) if config.sequence_moe is not None else None
        blocks = [Block(config) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, size)
        self.rotary_channels = int(config.rotary * (config.hidden // config.heads)) // 2 * 2
        self.apply(self._initialise)
        for block in blocks:
            nn.init.normal_(block.attention.out.weight, std=0.02 / (2 * config.layers) ** 0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, batch: Batch) -> Output:
        config = self.config
        image = batch.image_start[:, None] + torch.arange(config.image_tokens, device=batch.tokens.device)
        x = self.embedding(batch.tokens)
        if self.image_position is not None:
            index = image[:, :, None].expand(-1, -1, config.hidden)
            x = x.scatter_add(1, index, self.image_position.expand(len(x), -1, -1).to(x.dtype))
        cos, sin = rotary_table(x.shape[1], self.rotary_channels)
        conditions = batch.task, batch.mask_prob, batch.identity, batch.semantic
        real = batch.valid.flatten().nonzero()[:, 0]
        context = Context(
            mask=attention_mask(batch, config.image_tokens),
            table=(cos.to(x.device), sin.to(x.device)),
            task=batch.task,
            image=image,
            injected=None if self.injection is None else self.injection(*conditions),
            real=real,
            real_task=batch.task[real // x.shape[1]],
        )
        output = Output(x)
        for block in self.blocks:
            x = block(x, context, output)
        output.hidden = self.norm(x)
        return output

    def image_hidden(self, output: Output, batch: Batch) -> torch.Tensor:
        """Hidden states at the image positions, [B, N, D]."""
        index = batch.image_start[:, None] + torch.arange(self.config.image_tokens, device=batch.tokens.device)
        return at_rows(output.hidden, index)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss of a batch with rows of both tasks (or one), and its terms (detached scalars).

        Terms: ``mask`` and ``score`` of D3Diff, ``mmu``, ``balance``; ``mask_accuracy`` and ``mmu_accuracy`` are the
        shares of targets that the model ranks first. One pass of the head serves both tasks.
        """
        config, switch = self.config, self.config.loss
        output = self(batch)
        length = batch.tokens.shape[1]
        generates = batch.task == T2I
        # D3Diff averages over its own samples: they are numbered among themselves, mmu rows count for nothing.
        sample = (generates.cumsum(0) - 1).clamp(min=0)
        mask_prob = batch.mask_prob[generates] if generates.any() else batch.mask_prob[:1]
        total, stats = d3diff.joint_loss(
            output.hidden.flatten(0, 1),
            self.head.weight,
            self.head.bias,
            batch.labels.flatten(),
            generates.repeat_interleave(length),
            mask_prob,
            sample.repeat_interleave(length),
            image_coef=switch.t2i,
            text_coef=switch.mmu,
            code_range=config.vocabulary.code_range,
            alpha=switch.alpha,
            ce_coef=switch.mask,
            score=switch.score,
            schedule=switch.schedule,
            max_weight=switch.max_weight,
        )
        terms = {
            "mask": stats.image.ce,
            "score": stats.image.score,
            "mmu": stats.text.ce,
            "mask_accuracy": stats.image.accuracy,
            "mmu_accuracy": stats.text.accuracy,
        }
        routings = output.token_routings + output.sequence_routings
        if routings:
            balance = torch.stack([routing.balance_loss for routing in routings]).sum()
            total = total + balance
            terms["balance"] = balance
        return total, {name: value.detach() for name, value in terms.items()}
