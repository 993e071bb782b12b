"""Inputs that every implementation of the sampling ops is held to, the edges and what surrounds them."""

from __future__ import annotations

import math

import torch

from unif2ace_kernels import _philox

SEED, OFFSET = 2**62 + 5, 2**32 + 77  # of the offset the low 32 bits count
# (temperature, top_k, top_p)
DRAWS = [(1.0, 0, 1.0), (0.0, 5, 0.5), (0.3, 0, 1.0), (1e-6, 0, 1.0), (1.7, 7, 1.0), (1.0, 0, 0.6), (2.0, 90, 0.5)]
CONFIDENCES = ("log_prob", "neg_entropy", "margin")
FIRST = 3  # column of the first code; the columns around the codes are NaN, so that reading one shows


def words() -> tuple[torch.Tensor, torch.Tensor]:
    """Seed and offset."""
    return torch.tensor(SEED), torch.tensor(OFFSET)


def logits(codes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(cond, uncond [14, codes + 5], ids, unknown, rows [14]): two branches with every edge, one known row."""
    rng = torch.Generator().manual_seed(codes)
    cond, uncond = (2 * torch.randn(14, codes, generator=rng) for _ in range(2))
    cond[1, codes // 2] = uncond[1, 0] = -math.inf
    cond[2] = -math.inf
    cond[3, codes // 3], cond[4, -1], uncond[5, 0] = math.nan, math.inf, math.nan
    cond[6], uncond[6] = cond[6].round(), uncond[6].round()
    cond[7], uncond[7] = 0, 0
    cond[8, codes // 2] += 60
    cond[9], uncond[9] = 30 * cond[9], 30 * uncond[9]
    cond[10, : codes // 2], uncond[10, : codes // 2] = -math.inf, -math.inf
    cond[11, 1:], uncond[11, 1:] = -math.inf, 0
    ids = torch.full((14,), -1)
    ids[12] = 4
    rows = torch.randint(2**32, (14,), generator=rng)
    cond, uncond = (torch.nn.functional.pad(each.to(dtype), (FIRST, 2), value=math.nan) for each in (cond, uncond))
    return cond, uncond, ids, ids == -1, rows


def confidences(length: int) -> tuple[torch.Tensor, ...]:
    """(confidence, unknown [12, length], count [12], rows): ties, no or one unknown, NaN and infinities."""
    rng = torch.Generator().manual_seed(length)
    confidence = torch.randn(12, length, generator=rng)
    confidence[::2] = confidence[::2].round(decimals=1)
    unknown = torch.rand(12, length, generator=rng) < 0.6
    unknown[3], unknown[4], unknown[5] = False, True, False
    unknown[5, length // 2] = True
    confidence[6], confidence[7, ::2], confidence[7, 1::3] = math.nan, -math.inf, math.inf
    confidence[8, ::3], confidence[9], confidence[10] = -0.0, torch.finfo(torch.float32).max, 0.0
    confidence[10, ::2] = -0.0  # ties with 0.0
    count = torch.tensor([0, 1, 5, 1, length // 2, 1, 3, length // 3, length, -3, length // 2, 10**12])
    return confidence, unknown, count, torch.randint(2**32, (12, length), generator=rng)


def head(rows, hidden, codes, dtype=torch.float32, seed=3):
    """(hidden states of both branches, weight, bias, ids, rows); one code is banned, some rows are known."""
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(2, rows, hidden, generator=rng).to(dtype)
    weight = (2 * torch.randn(codes + FIRST + 2, hidden, generator=rng) / hidden**0.5).to(dtype)
    bias = torch.randn(codes + FIRST + 2, generator=rng).to(dtype)
    bias[FIRST + codes // 2] = 0 if codes == 1 else -torch.inf
    ids = torch.where(torch.rand(rows, generator=rng) < 0.3, 4, -1)
    return h, weight, bias, ids, torch.randint(2**32, (rows,), generator=rng)


def clear(h, weight, bias, rows, codes, guidance, temperature):
    """Rows whose best score leads by more than any rounding of their float32 sums, and the best codes, in float64."""
    folded = ((1 + guidance) * h[0].float() - guidance * h[1].float()).to(weight.dtype).double()
    z = (folded @ weight.double().T + (0 if bias is None else bias.double()))[:, FIRST : FIRST + codes]
    score = z
    if temperature:
        noise = _philox.gumbel(_philox.random_words(*words(), rows, codes, _philox.TOKEN_STREAM))
        score = z / temperature + noise.double()
    best = score.topk(min(2, codes)).values
    return best[:, 0] - best[:, -1] > 1e-4 if codes > 1 else torch.ones(len(z), dtype=torch.bool), score.argmax(-1), z


def assert_same_draw(ours, want, atol=5e-6):
    """The same ids; confidences may round otherwise."""
    assert torch.equal(ours[0].cpu(), want[0])
    torch.testing.assert_close(ours[1].cpu(), want[1], rtol=1e-5, atol=atol)
