"""The truth: score entropy and masked cross entropy with every sum over the vocabulary written out, in float64.

Shapes: M masked rows, V columns of the softmax, B samples. One row's readings of p_theta / q, with p = softmax(z):

    reading        score s_v        target s*     softmax over
    radd           r p_v            r             the code range (or all columns)
    paper          p_v / m          r             "
    bayes          p_v / m          1 / m         "
    unnormalized   k e^{z_v}        r             "
    full_vocab     k p_v            r             all columns, the sum over v in the code range
"""

from __future__ import annotations

import torch


def score_entropy(score: torch.Tensor, target: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """SEDD's score entropy of a masked position, sum_v s_v - s* log s_x0 + s* (log s* - 1); [M] from score [M, V]."""
    s_x0 = score.gather(-1, token[:, None])[:, 0]
    constant = torch.where(target > 0, target * (torch.log(target) - 1), 0)
    return score.sum(-1) - torch.where(target > 0, target * torch.log(s_x0), 0) + constant


def score_terms(
    z: torch.Tensor,
    token: torch.Tensor,
    mask_prob: torch.Tensor,
    reading: str,
    *,
    code_range: tuple[int, int],
    full_normalizer: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score entropy of each masked row, [M], without SEDD's sigma'.

    Args:
        z: logits [M, V] over the whole vocabulary.
        token: x0 [M]; mask_prob: m of the row's sample [M].
        scale: k [M] of `unnormalized` and `full_vocab`; r / (number of codes) and r when None.
    """
    z, m = z.double(), mask_prob.double()
    start, end = code_range
    r = (1 - m) / m
    p = softmax(z, code_range, full_normalizer or reading == "full_vocab")
    if reading == "radd":
        score, target = r[:, None] * p, r
    elif reading == "paper":
        score, target = p / m[:, None], r
    elif reading == "bayes":
        score, target = p / m[:, None], 1 / m
    elif reading == "unnormalized":
        columns = z if full_normalizer else torch.where(in_codes(z, code_range), z, -torch.inf)
        k = r / (z.shape[1] if full_normalizer else end - start) if scale is None else scale
        score, target = k[:, None] * torch.exp(columns), r
    else:
        k = r if scale is None else scale
        score, target = torch.where(in_codes(z, code_range), k[:, None] * p, 0), r
    return score_entropy(score, target, token)


def in_codes(z: torch.Tensor, code_range: tuple[int, int]) -> torch.Tensor:
    """bool [V], of the columns of z [M, V]."""
    column = torch.arange(z.shape[-1])
    return (column >= code_range[0]) & (column < code_range[1])


def softmax(z: torch.Tensor, code_range: tuple[int, int], full: bool) -> torch.Tensor:
    """p [M, V]: over all columns, or over the code range and 0 elsewhere."""
    z = z if full else torch.where(in_codes(z, code_range), z, -torch.inf)
    e = torch.exp(z - z.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def cross_entropy(z: torch.Tensor, token: torch.Tensor, code_range: tuple[int, int], full: bool) -> torch.Tensor:
    """-log p_x0 [M]."""
    return -torch.log(softmax(z.double(), code_range, full).gather(-1, token[:, None])[:, 0])


def d3diff_loss(
    z: torch.Tensor,
    token: torch.Tensor,
    mask_prob: torch.Tensor,
    sample: torch.Tensor,
    *,
    sigma: torch.Tensor | None,
    reading: str,
    code_range: tuple[int, int],
    alpha: float = 0.01,
    ce_coef: float = 1.0,
    reduction: str = "sum_per_sample",
    full_normalizer: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """ce_coef * mean CE + alpha * (mean over samples, or over rows, of sigma' l), a scalar, constants of theta kept.

    Args:
        z, token: logits [M, V] and x0 [M] of masked rows only.
        mask_prob, sigma: m and sigma'(t) of each sample, [B]; sigma None is 1 (`bayes` without sigma').
        sample: which sample a row is of, [M].
    """
    full = full_normalizer or reading == "full_vocab"
    ce = cross_entropy(z, token, code_range, full)
    rate = torch.ones_like(mask_prob) if sigma is None else sigma
    row_scale = None if scale is None else scale[sample]
    terms = score_terms(
        z, token, mask_prob[sample], reading, code_range=code_range, full_normalizer=full_normalizer, scale=row_scale
    )
    score = rate[sample] * terms
    count = mask_prob.numel() if reduction == "sum_per_sample" else token.numel()
    return ce_coef * ce.mean() + alpha * score.sum() / count
