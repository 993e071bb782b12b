"""The model's ops as people write them today in plain PyTorch, put in the place of ours.

    experts   a loop over the experts, each on its tokens (transformers' eager experts), or slots sorted by expert and
              one grouped product (its grouped_mm experts): `EXPERTS`
    loss      logits of every position over the whole vocabulary and `F.cross_entropy` (Show-o), or of the labelled
              rows alone over the columns that they need (what a careful user writes): `LOSSES`
    routers   masked softmax, top-k; the sequence-level mixture a sum of products
    attention `F.scaled_dot_product_attention` under the bool mask, with the kernel that torch chooses; or left as it is

Everything else of the model is left as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace.model import attention as model_attention
from unif2ace_kernels import d3diff, moe

IGNORE = -100
LOOP, GROUPED = "loop over experts", "sort + grouped_mm"
EXPERTS = (LOOP, GROUPED)
FULL, LABELLED = "full logits", "labelled rows"
LOSSES = (FULL, LABELLED)


@contextlib.contextmanager
def plain_ops(experts: str = GROUPED, loss: str = FULL, attention: bool = True) -> Iterator[None]:
    """Inside, the model runs on the functions of this file; on its own attention unless `attention`."""
    chosen = {LOOP: loop_experts, GROUPED: grouped_experts}[experts]

    def layer(self: moe.GroupedMoE, x: Tensor, group_ids: Tensor) -> tuple[Tensor, moe.Routing]:
        tokens = x.reshape(-1, self.hidden)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            logits = F.linear(tokens.to(dtype), self.router_weight.to(dtype))
        routing = route(
            logits, group_ids.reshape(-1), self.group_sizes, self.top_k, shared=self.shared,
            balance_coef=self.balance_coef,
        )  # fmt: skip
        y = chosen(
            tokens, routing.expert, routing.weight, self.experts_w_in, self.experts_b_in, self.experts_w_out,
            self.experts_b_out,
        )  # fmt: skip
        return y.view(x.shape), routing

    head = full_logits_loss if loss == FULL else labelled_rows_loss
    with (
        mock.patch.object(moe.GroupedMoE, "forward", layer),
        mock.patch.object(moe, "route", route),
        mock.patch.object(moe, "mix", mix),
        mock.patch.object(d3diff, "joint_loss", head),
        mock.patch.object(model_attention, "_sdpa", torch_attention) if attention else contextlib.nullcontext(),
    ):
        yield


def route(
    logits: Tensor,
    group_ids: Tensor,
    group_sizes: Sequence[int],
    top_k: int,
    *,
    shared: int = 0,
    balance_coef: float | Sequence[float] = 0.0,
) -> moe.Routing:
    """`moe.route` by a masked softmax and top-k; the fields that only our experts read are empty."""
    groups, routed = len(group_sizes), sum(group_sizes)
    coefs = [balance_coef] * groups if isinstance(balance_coef, (int, float)) else balance_coef
    sizes = torch.tensor(group_sizes, device=logits.device)
    group_of = torch.arange(groups, device=logits.device).repeat_interleave(sizes, output_size=routed)
    own = group_ids[:, None] == group_of
    scores = logits.masked_fill(~own, float("-inf")).softmax(-1)
    weight, expert = scores.topk(top_k, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    members = own.sum(0).clamp(min=1)
    chosen = torch.zeros_like(scores).scatter_(1, expert, 1.0).sum(0)
    frequency, probability = chosen * sizes[group_of] / (top_k * members), scores.sum(0) / members
    coef = torch.tensor(coefs, device=logits.device, dtype=scores.dtype)[group_of]
    loss = (coef * frequency * probability).sum()
    if shared:
        first = routed + shared * group_ids.long()[:, None]
        expert = torch.cat([expert, first + torch.arange(shared, device=logits.device)], 1)
        weight = torch.cat([weight, weight.new_ones(len(group_ids), shared)], 1)
    empty = expert.new_empty(0)
    return moe.Routing(weight, expert, empty, empty, empty, frequency, probability, loss, loss.new_zeros(()))


def loop_experts(x, expert, weight, w_in, b_in, w_out, b_out):
    """A loop over the experts, each on its tokens, added back with index_add."""
    y = torch.zeros_like(x)
    mask = F.one_hot(expert, w_in.shape[0]).permute(2, 1, 0)
    for e in mask.sum((1, 2)).nonzero()[:, 0].tolist():
        slot, token = torch.where(mask[e])
        h = F.gelu(torch.addmm(b_in[e], x[token], w_in[e]), approximate="tanh")
        out = torch.addmm(b_out[e], h, w_out[e]) * weight[token, slot, None]
        y.index_add_(0, token, out.to(y.dtype))
    return y


def grouped_experts(x, expert, weight, w_in, b_in, w_out, b_out):
    """Slots sorted by expert, one grouped product for all experts, put back in order and summed."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, w_in, w_out, b_in, b_out = (each.to(dtype) for each in (x, w_in, w_out, b_in, b_out))
    slots = expert.shape[1]
    order = expert.flatten().argsort(stable=True)
    by_row = expert.flatten()[order]
    ends = torch.bincount(by_row, minlength=w_in.shape[0]).cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order // slots], w_in, offs=ends) + b_in[by_row]
    out = F.grouped_mm(F.gelu(h, approximate="tanh"), w_out, offs=ends) + b_out[by_row]
    out = out * weight.flatten()[order, None].to(dtype)
    return out[order.argsort()].view(-1, slots, x.shape[1]).sum(1)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as torch has it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def mix(x: Tensor, coef: Tensor, injected: Tensor) -> Tensor:
    """`moe.mix` as a sum of products."""
    coef = coef.to(x.dtype)[:, :, None, None]
    return coef[:, 0] * x + (coef[:, 1:] * injected.to(x.dtype)).sum(1)


def full_logits_loss(hidden, weight, bias, targets, is_image, mask_prob, sample_id, **options):
    """`d3diff.joint_loss` from float32 logits of every row over the whole vocabulary, as Show-o's training has it."""
    logits = F.linear(hidden, weight, bias).float()
    start, end = options["code_range"]
    codes = torch.where(is_image & (targets != IGNORE), targets - start, IGNORE)
    image = F.cross_entropy(logits[:, start:end], codes, ignore_index=IGNORE, reduction="none")
    text = F.cross_entropy(logits, targets.masked_fill(is_image, IGNORE), ignore_index=IGNORE, reduction="none")
    is_text = ~is_image & (targets != IGNORE)
    return _total(image, codes != IGNORE, text, is_text, mask_prob, sample_id, options)


def labelled_rows_loss(hidden, weight, bias, targets, is_image, mask_prob, sample_id, **options):
    """`d3diff.joint_loss` from logits of the labelled rows, image rows over the codes alone."""
    start, end = options["code_range"]
    image_rows = ((targets != IGNORE) & is_image).nonzero()[:, 0]
    text_rows = ((targets != IGNORE) & ~is_image).nonzero()[:, 0]
    of_image = F.linear(hidden[image_rows], weight[start:end], bias[start:end]).float()
    of_text = F.linear(hidden[text_rows], weight, bias).float()
    image = F.cross_entropy(of_image, targets[image_rows] - start, reduction="none")
    text = F.cross_entropy(of_text, targets[text_rows], reduction="none")
    all_image, all_text = torch.ones_like(image_rows, dtype=torch.bool), torch.ones_like(text_rows, dtype=torch.bool)
    return _total(image, all_image, text, all_text, mask_prob, sample_id[image_rows], options)


def _total(
    image: Tensor,
    of_image: Tensor,
    text: Tensor,
    of_text: Tensor,
    mask_prob: Tensor,
    sample_id: Tensor,
    options: dict,
) -> tuple[Tensor, d3diff.JointStats]:
    """Means of cross entropies over their rows, and the score term in the reading "radd": weighted by the sample's."""
    if options["score"] != "radd":
        raise ValueError(f"score: expected 'radd', got {options['score']!r}")
    rate = d3diff.schedule(options["schedule"]).score_weight(mask_prob.double())
    if options["max_weight"] is not None:
        rate = rate.clamp(max=options["max_weight"])
    score = (rate.float()[sample_id] * image * of_image).sum() / len(mask_prob)
    mask_ce, text_ce = image.sum() / of_image.sum().clamp(min=1), text.sum() / of_text.sum().clamp(min=1)
    d3 = options["ce_coef"] * mask_ce + options["alpha"] * score
    loss = options["image_coef"] * d3 + options["text_coef"] * text_ce
    zero = loss.detach().new_zeros(())

    def stats(ce: Tensor, score: Tensor) -> d3diff.LossStats:
        return d3diff.LossStats(ce.detach(), score.detach(), zero, zero, zero, zero)

    return loss, d3diff.JointStats(stats(mask_ce, score), stats(text_ce, zero))
