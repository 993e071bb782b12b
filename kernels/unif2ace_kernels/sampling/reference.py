"""One step of masked-diffusion sampling in float64, written as it is published: the truth the room is held to.

Sources: Chang et al., "MaskGIT: masked generative image transformer" (2022), section 3.2; Xie et al., "Show-o" (2024),
section 3.3; guidance after Ho and Salimans (2022). All randomness is an argument, so that any generator can feed it.

Shapes: logits [N, V] over the whole vocabulary or its code columns, ids [N], noise as said.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def guide(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """(1 + w) cond - w uncond; a code that either branch gives probability zero has probability zero."""
    if uncond is None or guidance == 0:
        return cond.double()
    cond, uncond = cond.double(), uncond.double()
    mixed = (1 + guidance) * cond - guidance * uncond
    return mixed.masked_fill(cond.isneginf() | uncond.isneginf(), float("-inf"))


def draw_law(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The probabilities [N, V] that a token is drawn from: temperature, then top-k, then top-p, renormalised.

    temperature 0 is the first of the largest; top_k 0 and top_p 1 filter nothing. Ties at the border of top-k or
    top-p stay in: a code is out when k codes are larger, or when the larger codes already have p of the mass.
    """
    logits = logits.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    scaled = logits / temperature
    if 0 < top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[..., -1:], float("-inf"))
    if top_p < 1:
        probabilities = scaled.softmax(-1)
        rising = probabilities.sort(-1).values
        mass_from = torch.nn.functional.pad(rising.flip(-1).cumsum(-1).flip(-1), (0, 1))
        mass_above = mass_from.gather(-1, torch.searchsorted(rising, probabilities, right=True))
        scaled = scaled.masked_fill(mass_above >= top_p, float("-inf"))
    return scaled.softmax(-1)


def draw(law: Tensor, race: Tensor) -> Tensor:
    """One code a row [N] from probabilities [N, V]: the exponential race argmax p / E of `torch.multinomial`.

    race: standard exponentials E [N, V]; with E = exp(-G) this is the Gumbel-max draw argmax log p + G.
    """
    return (law / race.double()).argmax(-1)


def log_confidence(logits: Tensor, codes: Tensor) -> Tensor:
    """log p of the drawn codes [N] under the guided logits, before temperature, top-k and top-p."""
    return logits.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]


def lowest(confidence: Tensor, unknown: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] least confident of the unknown positions [B, N], the lower index first among ties, as a mask."""
    confidence = confidence.double().masked_fill(~unknown, float("inf"))
    mask = torch.zeros_like(unknown)
    for row, wanted in enumerate(count.tolist()):
        order = sorted(unknown[row].nonzero()[:, 0].tolist(), key=lambda n: (confidence[row, n].item(), n))
        mask[row, order[: max(0, wanted)]] = True
    return mask


def step(
    cond: Tensor, uncond: Tensor | None, ids: Tensor, *, mask_id: int, first_code: int, codes: int, guidance: float,
    temperature: float, count: Tensor, remask_temperature: float, race: Tensor, noise: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A whole step: (the ids [B, N] with a code at every position, the mask [B, N] of those to forget again).

    cond, uncond [B, N, vocabulary]; race [B, N, codes] exponentials; noise [B, N] Gumbel; count [B].
    """
    window = slice(first_code, first_code + codes)
    logits = guide(cond, uncond, guidance)[..., window]
    unknown = ids == mask_id
    drawn = draw(draw_law(logits, temperature), race)
    confidence = log_confidence(logits, drawn) + remask_temperature * noise.double()
    return torch.where(unknown, drawn + first_code, ids), lowest(confidence, unknown, count)
