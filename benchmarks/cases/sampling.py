"""One step of masked-diffusion sampling: the draw from logits, the draw from hidden states, and the re-mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace_kernels import sampling

from ..case import FORWARD, TOLERANCE, Baseline, Case, Outputs, Work, compiled, relative_error

GUIDANCE = 3.0


@dataclass(frozen=True)
class Grid:
    """Sizes: B images of N tokens, of which `masked` are unknown; D hidden, V vocabulary with C codes from `first`."""

    B: int
    N: int
    masked: int
    D: int
    V: int
    first: int
    C: int

    @property
    def codes(self) -> tuple[int, int]:
        return self.first, self.first + self.C


SHOWO = {"V": 58498, "first": 50305, "C": 8192, "D": 2048}
GRIDS = [
    ("smoke", Grid(4, 16, 10, 32, 97, 40, 56), "made up, tiny", ("cpu", "cuda")),
    ("demo", Grid(16, 64, 41, 192, 1439, 414, 1024), "the demo's model, 16 faces", ("cpu", "cuda")),
    ("paper-2x256", Grid(2, 256, 166, **SHOWO), "Show-o's head, 2 images of 256 tokens", ("cpu", "cuda")),
    ("paper-16x256", Grid(16, 256, 166, **SHOWO), "Show-o's head, 16 images of 256 tokens", ("cuda",)),
    ("paper-64x256", Grid(64, 256, 166, **SHOWO), "Show-o's head, 64 images of 256 tokens", ("cuda",)),
]  # masked / N is the mean share over a cosine run, about 0.65


def _ids(size: Grid, device: torch.device) -> Tensor:
    """Codes at known positions, the mask id (the last of the vocabulary) at `masked` random ones of each row."""
    unknown = torch.rand(size.B, size.N).argsort(-1) < size.masked
    return torch.where(unknown, size.V - 1, torch.randint(*size.codes, (size.B, size.N))).to(device)


def _error(ids: Tensor, unknown: Tensor, log_p: Tensor, first: int) -> Callable[[Outputs], float]:
    """How wrong a draw (ids, confidence) is, whatever its random numbers were.

    Known tokens must stand and drawn ones be codes. The confidence must be the code's log p under float64 logits
    [masked, C]; and the mean log p must be that of draws from this law, minus its entropy, within six deviations.
    """
    p = log_p.exp()
    entropy_term = (p * log_p).sum(-1)
    variance = ((p * log_p**2).sum(-1) - entropy_term**2).clamp(min=0)

    def error(outputs: Outputs) -> float:
        drawn, confidence = outputs
        code = drawn[unknown] - first
        if not torch.equal(drawn[~unknown], ids[~unknown]) or code.min() < 0 or code.max() >= log_p.shape[1]:
            return math.inf
        true = log_p.gather(1, code[:, None])[:, 0]
        deviations = ((true - entropy_term).sum() / variance.sum().sqrt()).abs().item()
        return math.inf if deviations > 6 else relative_error(confidence[unknown], true)

    return error


def _showo(guided: Tensor, ids: Tensor, unknown: Tensor, first: int) -> Outputs:
    """Softmax and multinomial on every row, then keep what was known; guided logits [B, N, C]."""
    p = guided.softmax(-1)
    drawn = torch.multinomial(p.flatten(0, 1), 1).view(ids.shape)
    confidence = p.gather(-1, drawn[..., None])[..., 0].log()
    return torch.where(unknown, drawn + first, ids), confidence


def _race(cond: Tensor, uncond: Tensor | None, ids: Tensor, index: Tensor, first: int) -> Outputs:
    """Gumbel-max on the masked rows only; cond, uncond [masked, C], uncond None where guidance was folded in."""
    z = cond.float() if uncond is None else (1 + GUIDANCE) * cond.float() - GUIDANCE * uncond.float()
    drawn = (z - torch.empty_like(z).exponential_().log()).argmax(-1)
    confidence = z.gather(1, drawn[:, None])[:, 0] - z.logsumexp(-1)
    everywhere = torch.full(ids.shape, math.inf, device=ids.device).flatten().index_copy(0, index, confidence)
    return ids.flatten().index_copy(0, index, drawn + first).view(ids.shape), everywhere.view(ids.shape)


def _logits_work(size: Grid, dtype: torch.dtype, device: torch.device) -> Work:
    ids = _ids(size, device)
    unknown, mask_id, (first, end) = ids == size.V - 1, size.V - 1, size.codes
    cond, uncond = (torch.randn(size.B, size.N, size.V, device=device).to(dtype) for _ in range(2))
    seed, step = torch.tensor(5, device=device), torch.tensor(0, device=device)

    def ours() -> Outputs:
        return sampling.sample_from_logits(
            cond, uncond, ids, mask_id, code_range=size.codes, guidance=GUIDANCE, seed=seed, offset=step
        )

    def showo() -> Outputs:
        guided = (1 + GUIDANCE) * cond.float() - GUIDANCE * uncond.float()
        return _showo(guided[..., first:end], ids, unknown, first)

    def rows(race: Callable[..., Outputs] = _race) -> Outputs:
        index = (ids == mask_id).flatten().nonzero()[:, 0]
        c, u = (branch.flatten(0, 1)[:, first:end][index] for branch in (cond, uncond))
        return race(c, u, ids, index, first)

    truth = ((1 + GUIDANCE) * cond[unknown].double() - GUIDANCE * uncond[unknown].double())[:, first:end]
    return Work(
        ours=ours,
        baselines={
            "softmax, multinomial (Show-o)": Baseline(showo),
            "masked rows, Gumbel-max": Baseline(rows),
            "torch.compile, masked rows": Baseline(partial(rows, compiled(_race)), compiles=True),
        },
        error=_error(ids, unknown, truth.log_softmax(-1), first),
        tolerance=TOLERANCE[torch.float32],
    )


def _hidden_work(size: Grid, dtype: torch.dtype, device: torch.device) -> Work:
    ids = _ids(size, device)
    unknown, mask_id, (first, end) = ids == size.V - 1, size.V - 1, size.codes
    h_cond, h_uncond = (torch.randn(size.B, size.N, size.D, device=device).to(dtype) for _ in range(2))
    weight = (torch.randn(size.V, size.D, device=device) * size.D**-0.5).to(dtype)
    bias = (torch.randn(size.V, device=device) * 0.1).to(dtype)
    seed, step = torch.tensor(5, device=device), torch.tensor(0, device=device)

    def ours() -> Outputs:
        return sampling.sample_from_hidden(
            h_cond, h_uncond, weight, bias, ids, mask_id, code_range=size.codes, guidance=GUIDANCE, seed=seed,
            offset=step,
        )  # fmt: skip

    def showo() -> Outputs:
        cond, uncond = F.linear(torch.cat([h_cond, h_uncond]), weight, bias).float().chunk(2)
        return _showo(((1 + GUIDANCE) * cond - GUIDANCE * uncond)[..., first:end], ids, unknown, first)

    def two_branches() -> Outputs:
        index = (ids == mask_id).flatten().nonzero()[:, 0]
        c, u = (F.linear(h.flatten(0, 1)[index], weight[first:end], bias[first:end]) for h in (h_cond, h_uncond))
        return _race(c, u, ids, index, first)

    def fold(index: Tensor) -> Outputs:
        c, u = (h.flatten(0, 1)[index].float() for h in (h_cond, h_uncond))
        h = ((1 + GUIDANCE) * c - GUIDANCE * u).to(weight.dtype)
        return _race(F.linear(h, weight[first:end], bias[first:end]), None, ids, index, first)

    def folded(through: Callable[[Tensor], Outputs] = fold) -> Outputs:
        return through((ids == mask_id).flatten().nonzero()[:, 0])

    h = (1 + GUIDANCE) * h_cond[unknown].double() - GUIDANCE * h_uncond[unknown].double()
    truth = F.linear(h, weight[first:end].double(), bias[first:end].double())
    return Work(
        ours=ours,
        baselines={
            "full logits, multinomial (Show-o)": Baseline(showo),
            "masked rows, sliced, two branches": Baseline(two_branches),
            "masked rows, sliced, folded": Baseline(folded),
            "torch.compile, folded": Baseline(partial(folded, compiled(fold)), compiles=True),
        },
        error=_error(ids, unknown, truth.log_softmax(-1), first),
        tolerance=TOLERANCE[dtype],
    )


def _remask_work(size: Grid, device: torch.device) -> Work:
    unknown = _ids(size, device) == size.V - 1
    confidence = torch.where(unknown, -9 * torch.rand(size.B, size.N, device=device), math.inf)
    count = torch.full((size.B,), size.masked // 2, device=device)
    seed, step = torch.tensor(5, device=device), torch.tensor(0, device=device)

    def ours() -> Outputs:
        return (sampling.remask(confidence, unknown, count, 1.0, seed=seed, offset=step),)

    def sort() -> Outputs:
        noisy = confidence - torch.empty_like(confidence).exponential_().log()
        return (noisy < noisy.sort(-1).values.gather(-1, count[:, None]),)

    def error(outputs: Outputs) -> float:
        """Other random numbers, the same law: `count` a row, only unknown ones."""
        (mask,) = outputs
        return 0.0 if (mask.sum(-1) == count).all() and not (mask & ~unknown).any() else math.inf

    return Work(ours=ours, baselines={"Gumbel noise, sort (Show-o)": Baseline(sort)}, error=error, tolerance=0.0)


def _cases() -> Iterator[Case]:
    for shape, size, source, devices in GRIDS:
        sizes = {"B": size.B, "N": size.N, "masked": size.masked, "D": size.D, "V": size.V, "codes": size.C}
        smoke, rows = shape == "smoke", size.B * size.masked
        for dtype in (torch.float32, torch.bfloat16):
            item = dtype.itemsize
            yield Case(
                "sampling.sample_from_logits", shape, sizes, source, FORWARD, dtype, 0, 2.0 * rows * size.C * item,
                lambda device, size=size, dtype=dtype: _logits_work(size, dtype, device), devices, smoke,
            )  # fmt: skip
            yield Case(
                "sampling.sample_from_hidden", shape, sizes, source, FORWARD, dtype, 2.0 * rows * size.C * size.D,
                float((2 * rows + size.C) * size.D * item),
                lambda device, size=size, dtype=dtype: _hidden_work(size, dtype, device), devices, smoke,
            )  # fmt: skip
        yield Case(
            "sampling.remask", shape, sizes, source, FORWARD, torch.float32, 0, 6.0 * size.B * size.N,
            lambda device, size=size: _remask_work(size, device), devices, smoke,
        )  # fmt: skip


CASES = list(_cases())
