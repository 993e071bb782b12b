"""The training loss: t2i * D3Diff of masked codes + mmu, lm * next token of answers and plain text + balance losses."""

from __future__ import annotations

import torch
from torch import nn

from unif2ace.configs import T2I, UniF2aceConfig
from unif2ace.model.sequences import IGNORE, Layout, Shares
from unif2ace_kernels import d3diff

WHOLE = Shares(1.0, 1.0, 1.0, 1.0, 1.0)


def training_loss(
    config: UniF2aceConfig,
    head: nn.Linear,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    task: torch.Tensor,
    image_start: torch.Tensor,
    layout: Layout,
    mask_prob: torch.Tensor,
    balance: torch.Tensor | None,
    shares: Shares | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and what it is made of, detached, by the names of `UniF2aceOutput.terms`.

    One pass of the head serves t2i and mmu, a second one plain text, where there is some.

    Args:
        head: of the logits, which are never made whole.
        hidden: [B, L, D] after the last norm.
        labels, ..., mask_prob, shares: as in `Batch`.
        balance: loss of the routers, None where there are none.
    """
    switch, share = config.loss, shares or WHOLE
    hidden, length = hidden.flatten(0, 1), labels.shape[1]
    generates = task == T2I
    plain = (image_start < 0)[:, None]
    # D3Diff averages over its own samples: they are numbered among themselves, mmu rows count for nothing.
    sample = (generates.cumsum(0) - 1).clamp(min=0)
    t2i = layout.t2i if layout.images is None else layout.images[layout.t2i]
    total, stats = d3diff.joint_loss(
        hidden,
        head.weight,
        head.bias,
        (labels.masked_fill(plain, IGNORE) if layout.plain else labels).flatten(),
        generates.repeat_interleave(length),
        mask_prob[t2i] if len(t2i) else mask_prob[:1],
        sample.repeat_interleave(length),
        image_coef=switch.t2i,
        text_coef=switch.mmu * share.mmu,
        code_range=config.vocabulary.code_range,
        alpha=switch.alpha * share.score,
        ce_coef=switch.mask * share.mask,
        score=switch.score,
        schedule=switch.schedule,
        max_weight=switch.max_weight,
    )
    terms = {
        "mask": share.mask * stats.image.ce,
        "score": share.score * stats.image.score,
        "mmu": share.mmu * stats.text.ce,
        "mask_accuracy": share.mask * stats.image.accuracy,
        "mmu_accuracy": share.mmu * stats.text.accuracy,
    }
    if layout.plain:
        loss, text = d3diff.next_token_loss(
            hidden, head.weight, head.bias, labels.masked_fill(~plain, IGNORE).flatten()
        )
        total = total + switch.lm * share.lm * loss
        terms["lm"] = share.lm * text.ce
    if balance is not None:
        terms["balance"] = share.balance * balance
        total = total + terms["balance"]
    return total, {name: value.detach() for name, value in terms.items()}
