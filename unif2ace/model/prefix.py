"""The caption side of text-to-image rows, run once for all sampling steps.

Text attends to text alone, and its experts look at one token each, so a caption's keys and values are the same in
every step: they are computed once and kept. Only <soi> codes <eoi> run in a step. All of this is exact:

    caption                its keys and values are kept
    padding before it      left out, up to where the longest caption of the call begins
    first layer            rows that differ in their caption alone (the branches of guidance) give it the same input
    last layer             every row gives keys and values, but only rows that are to be drawn go on: the queries, the
                           FFN and the head. Not with sequence-level experts, whose router reads all of a sample.

What is known cannot be left out in the layers between: its hidden state moves with the masked tokens around it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch

from unif2ace.configs import T2I
from unif2ace.model.attention import rotary_table
from unif2ace.model.blocks import Block, Context, at_rows
from unif2ace.model.sequence_moe import NOISE
from unif2ace.model.visibility import Visibility

if TYPE_CHECKING:  # the model builds on this module
    from unif2ace.model.modeling import UniF2aceForConditionalGeneration


class TextPrefix:
    """Captions that a model has read, ready for any number of steps on their images.

    Args:
        model: holds the weights; its dtype is the cache's.
        prompts: [R, text_slots] token ids of `t2i_prompts`, on any device.
    """

    @torch.no_grad()
    def __init__(self, model: UniF2aceForConditionalGeneration, prompts: torch.Tensor) -> None:
        config, device = model.config, model.head.weight.device
        slots, length = prompts.shape[1], config.image_tokens + 2
        self.model = model
        seen = prompts != config.vocabulary.pad
        first = int(seen.any(0).int().argmax())  # the longest caption begins here
        prompts, seen = prompts[:, first:].to(device), seen[:, first:].to(device)
        place = torch.arange(slots + length, device=device)
        before, after = (
            rotary_table(each, model.rotary_channels, config.rope_theta) for each in (place[first:slots], place[slots:])
        )
        self._table = after
        self._cache = self._read(prompts, seen, before, length)
        self._seen = torch.nn.functional.pad(seen, (0, length), value=True)
        ends = [config.vocabulary.start_of_image, config.vocabulary.end_of_image]
        self._ends = torch.tensor(ends, device=device)
        self._prepare()

    def _prepare(self) -> None:
        """What the steps share besides the cache, for its number of rows."""
        config, weight, rows = self.model.config, self.model.head.weight, len(self._seen)
        task = torch.full((rows * (config.image_tokens + 2),), T2I, device=weight.device)
        injected = None
        if self.model.injection is not None:
            injected = weight.new_zeros(rows, 3, config.image_tokens, config.hidden_size)
        self._context = Context(
            visibility=Visibility.everything(self._seen), attention=config._attn_implementation or "sdpa",
            table=self._table, real=None, real_task=task, rows=None, image_task=task[:rows], image=slice(1, -1),
            injected=injected,
        )  # fmt: skip

    def at(self, rows: torch.Tensor) -> TextPrefix:
        """The captions at `rows`, in a cache of their own; one may come several times."""
        rows = rows.to(self._seen.device)
        other = copy.copy(self)
        other._cache, other._seen = [(k[rows], v[rows]) for k, v in self._cache], self._seen[rows]
        other._prepare()
        return other

    def _read(
        self, prompts: torch.Tensor, seen: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], room: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values [R, H, S + room, C] of prompts [R, S], `seen` where they are not padding."""
        model = self.model
        real = seen.flatten().nonzero()[:, 0]
        task = torch.full((len(real),), T2I, device=prompts.device)
        no_image = torch.full((len(prompts),), -1, device=prompts.device)
        visibility = Visibility(seen, torch.full_like(no_image, T2I), no_image, model.config.image_tokens)
        context = Context(
            visibility, model.config._attn_implementation or "sdpa", table, real, task, None, task[:0], None, None
        )
        x = model.embedding(prompts)
        cache = []
        for index, block in enumerate(cast(list[Block], model.blocks)):
            k, v = block.attention.key_value(block.norm(x), table)
            cache.append((torch.nn.functional.pad(k, (0, 0, 0, room)), torch.nn.functional.pad(v, (0, 0, 0, room))))
            if index + 1 < len(model.blocks):
                x, *_ = block(x, context)
        return cache

    @torch.no_grad()
    def image_hidden(self, ids: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states after the last norm at the image tokens.

        Args:
            ids: [B, N] vocabulary ids of the image tokens, mask ids included; R is a multiple of B, and caption r
                goes with image r % B.
            rows: [R, M] the image positions that are wanted, in [0, N); all when None.

        Returns:
            [R, N, D], or [R, M, D] at `rows`.
        """
        model, vocabulary = self.model, self.model.config.vocabulary
        ends = self._ends.expand(len(ids), -1)
        x = model.embedding(torch.cat([ends[:, :1], ids, ends[:, 1:]], dim=1))
        if model.image_position is not None:
            x[:, 1:-1] += model.image_position.to(x.dtype)
        injected = self._context.injected
        if model.injection is not None and injected is not None:
            mask_prob = (ids == vocabulary.mask).float().mean(dim=1)
            noise = model.injection.noise(model.injection.level(mask_prob))
            injected.unflatten(0, (-1, len(ids)))[:, :, NOISE] = noise
        narrow = None
        for index, (block, cache) in enumerate(zip(model.blocks, self._cache)):
            if rows is not None and index + 1 == len(model.blocks) and block.sequence is None:
                narrow = rows + 1
            x, *_ = block(x, self._context, prefix=cache, rows=narrow)
        if narrow is None:
            x = x[:, 1:-1] if rows is None else at_rows(x, rows + 1)
        return model.norm(x)
