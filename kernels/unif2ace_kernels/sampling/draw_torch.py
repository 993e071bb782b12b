"""The draw and the re-mask in plain torch, vectorised; runs on any device.

Everything here is a function of a row's own values and of its global index alone: no result depends on which other
rows share the call, so compaction and batch splits leave every bit as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .._dtypes import accumulation_dtype
from .._ops import ops
from .._philox import REMASK_STREAM, TOKEN_STREAM, gumbel, random_words, words_at
from .arguments import Draw

Tensor = torch.Tensor


def _tile_rows(device: torch.device) -> int:
    """Rows that are computed at once: never a number that depends on how many there are.

    The rounding of a matrix product may depend on its shape, so a tile that is not full is padded. 128 rows are nearly
    as fast a row as more are on a CPU, their logits over 8192 codes stay in its outer cache until they are drawn from,
    and little is padded.
    """
    return 4096 if device.type == "cuda" else 128


def guide(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """(1 + w) cond - w uncond of logits [R, V]; -inf in either branch is -inf."""
    if uncond is None:
        return cond
    mixed = (1 + guidance) * cond - guidance * uncond
    return mixed.masked_fill_(cond.isneginf() | uncond.isneginf(), float("-inf"))


def _filter(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for the codes of `scaled` [R, V] that top-k, then top-p, leave out; ties at the border stay."""
    if 0 < top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered = scaled.sort(-1, descending=True).values
        mass = ordered.exp().double().cumsum(-1)
        mass_above = mass.roll(1, -1)
        mass_above[:, 0] = 0
        # The largest is always in; `in_nucleus` is a prefix, so its length less one points at the smallest kept value.
        in_nucleus = mass_above < top_p * mass[:, -1:]
        smallest = ordered.gather(-1, in_nucleus.sum(-1, keepdim=True).sub_(1).clamp_(min=0))
        scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
    return scaled


def _confidence(shifted: Tensor, code: Tensor, kind: str) -> Tensor:
    """Confidence [R] in the drawn `code` [R], from logits less their row's largest, `shifted` [R, V]."""
    weights = shifted.exp()
    total = weights.sum(-1)
    if kind == "log_prob":
        return shifted.gather(-1, code[:, None])[:, 0] - total.log()
    if kind == "neg_entropy":
        return (weights * shifted.masked_fill(shifted.isneginf(), 0)).sum(-1) / total - total.log()
    if shifted.shape[-1] == 1:
        return torch.ones_like(total)
    second = shifted.topk(2).values[:, 1]
    return (1 - second.exp()) / total


def draw(
    cond: Tensor, uncond: Tensor | None, rows: Tensor, seed: Tensor, offset: Tensor, guidance: float,
    temperature: float, top_k: int, top_p: float, confidence: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op `draw`: (code [R] int64, confidence [R]) from logits [R, V]; float64 for float64, else float32.

    A row whose largest guided logit is not finite has no distribution: code -1, confidence -inf.
    """
    dtype = accumulation_dtype(cond.dtype)
    logits = guide(cond.to(dtype), None if uncond is None else uncond.to(dtype), guidance)
    peak = logits.amax(-1, keepdim=True)
    shifted = logits - peak
    score = shifted
    if temperature > 0:
        noise = gumbel(random_words(seed, offset, rows, logits.shape[-1], TOKEN_STREAM))
        # A product with the reciprocal, because a quotient by a number does not round alike on every device.
        score = _filter(shifted * (1 / temperature), top_k, top_p) + noise
    code = score.argmax(-1)
    impossible = ~peak[:, 0].isfinite()
    value = _confidence(shifted, code, confidence).masked_fill(impossible, float("-inf"))
    return code.masked_fill(impossible, -1), value


def _sample_rows(
    tiles_of: Callable[[Tensor], Iterable[tuple[Tensor, Tensor | None]]], asked: Draw
) -> tuple[Tensor, Tensor]:
    """Draw tile by tile; `tiles_of(index)` gives the logits of the code columns at the rows of `index`, in tiles."""
    ids = asked.ids
    if asked.compact and ids.device.type == "cpu":
        index = asked.unknown.nonzero()[:, 0]
    else:  # on a GPU finding them would wait for the device
        index = torch.arange(len(ids), device=ids.device)
    law = (asked.guidance, asked.temperature, asked.top_k, asked.top_p, asked.confidence)
    tiles = [
        ops.draw(*tile, row, asked.seed, asked.offset, *law)
        for tile, row in zip(tiles_of(index), asked.rows[index].split(_tile_rows(ids.device)), strict=True)
    ]
    code, value = (torch.cat(each) for each in zip(*tiles))
    drawn = asked.unknown[index]
    out_confidence = torch.full(ids.shape, float("inf"), dtype=value.dtype, device=ids.device)
    out_confidence.index_copy_(0, index, value.masked_fill(~drawn, float("inf")))
    kept = ids[index]
    return ids.index_copy(0, index, torch.where(drawn & (code >= 0), code + asked.first_code, kept)), out_confidence


def sample_logits(cond: Tensor, uncond: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The op `sample_logits`; see ops.py, and `Draw` for the other arguments."""
    asked = Draw(*arguments)
    other = asked.guided_by(uncond)

    def tiles_of(index: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        for tile in index.split(_tile_rows(index.device)):
            yield cond[tile, asked.window], None if other is None else other[tile, asked.window]

    return _sample_rows(tiles_of, asked)


def sample_hidden(
    h_cond: Tensor, h_uncond: Tensor | None, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The op `sample_hidden`; see ops.py, and `Draw` for the other arguments."""
    asked = Draw(*arguments)
    other, guidance, dtype = asked.guided_by(h_uncond), asked.guidance, accumulation_dtype(weight.dtype)
    weight = weight[asked.window]
    bias = None if bias is None else bias[asked.window].to(weight.dtype)
    tile_rows = _tile_rows(weight.device)

    def tiles_of(index: Tensor) -> Iterator[tuple[Tensor, None]]:
        hidden = h_cond[index].to(dtype)
        if other is not None:
            hidden = (1 + guidance) * hidden - guidance * other[index].to(dtype)
        hidden = torch.nn.functional.pad(hidden.to(weight.dtype), (0, 0, 0, -len(index) % tile_rows))
        for first in range(0, max(1, len(index)), tile_rows):
            tile = hidden[first : first + tile_rows]
            yield torch.nn.functional.linear(tile, weight, bias)[: len(index) - first], None

    return _sample_rows(tiles_of, asked._replace(guidance=0.0))  # it is in the hidden states


def remask(
    confidence: Tensor, unknown: Tensor, count: Tensor, rows: Tensor, seed: Tensor, offset: Tensor,
    temperature: Tensor, ties: str,
) -> Tensor:  # fmt: skip
    """The op `remask`; see ops.py."""
    if confidence.shape[-1] == 0:
        return torch.zeros_like(unknown)
    # A position without a distribution is forgotten first; a confidence of +inf still ranks below a known token's.
    largest = torch.finfo(confidence.dtype).max
    confidence = confidence.nan_to_num(nan=float("-inf"), posinf=largest, neginf=float("-inf"))
    noise = gumbel(words_at(seed, offset, rows, 0, REMASK_STREAM)).view(confidence.shape)
    confidence = confidence + temperature * noise
    confidence = confidence.clamp(max=largest).masked_fill(~unknown, float("inf"))
    if ties == "showo":
        cut = confidence.sort(-1).values.gather(-1, count.clamp(0, confidence.shape[-1] - 1)[:, None])
        return (confidence < cut) & unknown
    order = confidence.sort(dim=-1, stable=True).indices
    mask = torch.zeros_like(unknown)
    among_lowest = torch.arange(confidence.shape[-1], device=count.device) < count[:, None]
    return mask.scatter(-1, order, among_lowest) & unknown
