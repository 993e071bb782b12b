"""The draw of masked-diffusion sampling, from logits and from hidden states, and the re-mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace_kernels import sampling
from unif2ace_kernels._library import runnable

from ..case import TOLERANCE, Baseline, Outputs, Work, compiled, relative_error

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


def ids_of(size: Grid, device: torch.device) -> Tensor:
    """Codes at known positions, the mask id (the last of the vocabulary) at `masked` random ones of each row."""
    unknown = torch.rand(size.B, size.N).argsort(-1) < size.masked
    return torch.where(unknown, size.V - 1, torch.randint(*size.codes, (size.B, size.N))).to(device)


def error_of_draw(ids: Tensor, unknown: Tensor, log_p: Tensor, first: int) -> Callable[[Outputs], float]:
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


class Head:
    """Hidden states [B, N, D] of both branches, the head on them, and the law that the two make."""

    def __init__(self, size: Grid, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.mask_id = size, size.V - 1
        self.h_cond, self.h_uncond = (torch.randn(size.B, size.N, size.D, device=device).to(dtype) for _ in range(2))
        self.weight = (torch.randn(size.V, size.D, device=device) * size.D**-0.5).to(dtype)
        self.bias = (torch.randn(size.V, device=device) * 0.1).to(dtype)

    def draw(self, ids: Tensor, seed: Tensor, step: Tensor) -> Outputs:
        return sampling.sample_from_hidden(
            self.h_cond, self.h_uncond, self.weight, self.bias, ids, self.mask_id, code_range=self.size.codes,
            guidance=GUIDANCE, seed=seed, offset=step,
        )  # fmt: skip

    def guided(self) -> Tensor:
        """Logits of all codes [B, N, C] in float32, as Show-o makes them: both branches over the vocabulary."""
        logits = F.linear(torch.cat([self.h_cond, self.h_uncond]), self.weight, self.bias).float()
        cond, uncond = logits.chunk(2)
        return ((1 + GUIDANCE) * cond - GUIDANCE * uncond)[..., slice(*self.size.codes)]

    def log_p(self) -> Tensor:
        """[B, N, C] in float64."""
        window = slice(*self.size.codes)
        h = (1 + GUIDANCE) * self.h_cond.double() - GUIDANCE * self.h_uncond.double()
        return F.linear(h, self.weight[window].double(), self.bias[window].double()).log_softmax(-1)


def _showo(guided: Tensor, ids: Tensor, unknown: Tensor, first: int) -> Outputs:
    """Softmax and multinomial on every row, then keep what was known; guided logits [B, N, C]."""
    p = guided.softmax(-1)
    drawn = torch.multinomial(p.flatten(0, 1), 1).view(ids.shape)
    confidence = p.gather(-1, drawn[..., None])[..., 0].log()
    return torch.where(unknown, drawn + first, ids), confidence


def _race(cond: Tensor, uncond: Tensor | None, ids: Tensor, index: Tensor, first: int) -> Outputs:
    """Gumbel-max on the masked rows only; cond, uncond [masked, C], uncond None where guidance was folded in."""
    z = cond.float() if uncond is None else (1 + GUIDANCE) * cond.float() - GUIDANCE * uncond.float()
    return _placed(z, (z - torch.empty_like(z).exponential_().log()).argmax(-1), ids, index, first)


def _flashinfer(cond: Tensor, uncond: Tensor | None, ids: Tensor, index: Tensor, first: int) -> Outputs:
    """`_race` with FlashInfer's draw, which takes float32 logits and gives ids alone."""
    from flashinfer.sampling import sampling_from_logits

    z = cond.float() if uncond is None else (1 + GUIDANCE) * cond.float() - GUIDANCE * uncond.float()
    return _placed(z, sampling_from_logits(z.contiguous()).long(), ids, index, first)


def _placed(z: Tensor, drawn: Tensor, ids: Tensor, index: Tensor, first: int) -> Outputs:
    """Codes [masked] that were drawn from logits z [masked, C], and their confidence, where they belong."""
    confidence = z.gather(1, drawn[:, None])[:, 0] - z.logsumexp(-1)
    everywhere = torch.full(ids.shape, math.inf, device=ids.device).flatten().index_copy(0, index, confidence)
    return ids.flatten().index_copy(0, index, drawn + first).view(ids.shape), everywhere.view(ids.shape)


def _peer(run: Callable[[], Outputs], device: torch.device) -> Baseline:
    """A peer that is for CUDA alone; where it is not installed, the import says so."""
    return Baseline(run) if device.type == "cuda" else Baseline(None, missing="it runs on CUDA alone")


def _others(op: str, device: torch.device, arguments: tuple, shape: torch.Size) -> dict[str, Baseline]:
    """Our implementations of `op` that can run here beside the one that does."""

    def run(function: Callable) -> Outputs:
        out = function(*arguments)
        return [each.view(shape) for each in (out if isinstance(out, tuple) else (out,))]

    return {f"ours in {each.name}": Baseline(partial(run, each.function)) for each in runnable(op, device.type)[1:]}


def logits_work(size: Grid, dtype: torch.dtype, device: torch.device) -> Work:
    ids = ids_of(size, device)
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

    codes_of = cond[..., first:end][unknown].double(), uncond[..., first:end][unknown].double()
    truth = (1 + GUIDANCE) * codes_of[0] - GUIDANCE * codes_of[1]
    flat = (cond.flatten(0, 1), uncond.flatten(0, 1), ids.flatten(), unknown.flatten())
    every = torch.arange(ids.numel(), device=device)
    options = (first, size.C, GUIDANCE, 1.0, 0, 1.0, "log_prob", True)
    return Work(
        ours=ours,
        baselines={
            "softmax, multinomial (Show-o)": Baseline(showo),
            "masked rows, Gumbel-max": Baseline(rows),
            "torch.compile, masked rows": Baseline(partial(rows, compiled(_race)), compiles=True),
            "masked rows, FlashInfer": _peer(partial(rows, _flashinfer), device),
            **_others("sample_logits", device, (*flat, every, seed, step, *options), ids.shape),
        },
        error=error_of_draw(ids, unknown, truth.log_softmax(-1), first),
        tolerance=TOLERANCE[torch.float32],
    )


def hidden_work(size: Grid, dtype: torch.dtype, device: torch.device) -> Work:
    ids, head = ids_of(size, device), Head(size, dtype, device)
    unknown, (first, end) = ids == head.mask_id, size.codes
    h_cond, h_uncond, weight, bias = head.h_cond, head.h_uncond, head.weight, head.bias
    seed, step = torch.tensor(5, device=device), torch.tensor(0, device=device)

    def two_branches() -> Outputs:
        index = (ids == head.mask_id).flatten().nonzero()[:, 0]
        c, u = (F.linear(h.flatten(0, 1)[index], weight[first:end], bias[first:end]) for h in (h_cond, h_uncond))
        return _race(c, u, ids, index, first)

    def fold(index: Tensor, race: Callable[..., Outputs] = _race) -> Outputs:
        c, u = (h.flatten(0, 1)[index].float() for h in (h_cond, h_uncond))
        h = ((1 + GUIDANCE) * c - GUIDANCE * u).to(weight.dtype)
        return race(F.linear(h, weight[first:end], bias[first:end]), None, ids, index, first)

    def folded(through: Callable[[Tensor], Outputs] = fold) -> Outputs:
        return through((ids == head.mask_id).flatten().nonzero()[:, 0])

    flat = (h_cond.flatten(0, 1), h_uncond.flatten(0, 1), weight, bias, ids.flatten(), unknown.flatten())
    every = torch.arange(ids.numel(), device=device)
    options = (first, size.C, GUIDANCE, 1.0, 0, 1.0, "log_prob", True)
    return Work(
        ours=lambda: head.draw(ids, seed, step),
        baselines={
            "full logits, multinomial (Show-o)": Baseline(lambda: _showo(head.guided(), ids, unknown, first)),
            "masked rows, sliced, two branches": Baseline(two_branches),
            "masked rows, sliced, folded": Baseline(folded),
            "torch.compile, folded": Baseline(partial(folded, compiled(fold)), compiles=True),
            "masked rows, folded, FlashInfer": _peer(partial(folded, partial(fold, race=_flashinfer)), device),
            **_others("sample_hidden", device, (*flat, every, seed, step, *options), ids.shape),
        },
        error=error_of_draw(ids, unknown, head.log_p()[unknown], first),
        tolerance=TOLERANCE[dtype],
    )


def remask_work(size: Grid, device: torch.device) -> Work:
    unknown = ids_of(size, device) == size.V - 1
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

    every = torch.arange(unknown.numel(), device=device).view(unknown.shape)
    arguments = (confidence, unknown, count, every, seed, step, torch.ones((), device=device), "index")
    return Work(
        ours=ours,
        baselines={
            "Gumbel noise, sort (Show-o)": Baseline(sort),
            "torch.compile": Baseline(compiled(sort), compiles=True),
            **_others("remask", device, arguments, unknown.shape),
        },
        error=error,
        tolerance=0.0,
    )
