"""Masked-diffusion sampling without the model: the draw from logits and from hidden states, the re-mask, the step that
they make together, and a run of all steps on hidden states that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace_kernels import sampling
from unif2ace_kernels._library import runnable

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
    ("paper-1x256", Grid(1, 256, 166, **SHOWO), "Show-o's head, an image of 256 tokens", ("cpu",)),
    ("paper-2x256", Grid(2, 256, 166, **SHOWO), "Show-o's head, 2 images of 256 tokens", ("cpu", "cuda")),
    ("paper-16x256", Grid(16, 256, 166, **SHOWO), "Show-o's head, 16 images of 256 tokens", ("cuda",)),
    ("paper-64x256", Grid(64, 256, 166, **SHOWO), "Show-o's head, 64 images of 256 tokens", ("cuda",)),
    ("paper-16x1024", Grid(16, 1024, 665, **SHOWO), "Show-o's head, 16 images of 1024 tokens", ("cuda",)),
]  # masked / N is the mean share over a cosine run, about 0.65

RUNS = {"smoke": 3, "demo": 16, "paper-1x256": 4, "paper-16x256": 16}  # grid -> steps T


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

    def fold(index: Tensor, race: Callable[..., Outputs] = _race) -> Outputs:
        c, u = (h.flatten(0, 1)[index].float() for h in (h_cond, h_uncond))
        h = ((1 + GUIDANCE) * c - GUIDANCE * u).to(weight.dtype)
        return race(F.linear(h, weight[first:end], bias[first:end]), None, ids, index, first)

    def folded(through: Callable[[Tensor], Outputs] = fold) -> Outputs:
        return through((ids == mask_id).flatten().nonzero()[:, 0])

    h = (1 + GUIDANCE) * h_cond[unknown].double() - GUIDANCE * h_uncond[unknown].double()
    truth = F.linear(h, weight[first:end].double(), bias[first:end].double())
    flat = (h_cond.flatten(0, 1), h_uncond.flatten(0, 1), weight, bias, ids.flatten(), unknown.flatten())
    every = torch.arange(ids.numel(), device=device)
    options = (first, size.C, GUIDANCE, 1.0, 0, 1.0, "log_prob", True)
    return Work(
        ours=ours,
        baselines={
            "full logits, multinomial (Show-o)": Baseline(showo),
            "masked rows, sliced, two branches": Baseline(two_branches),
            "masked rows, sliced, folded": Baseline(folded),
            "torch.compile, folded": Baseline(partial(folded, compiled(fold)), compiles=True),
            "masked rows, folded, FlashInfer": _peer(partial(folded, partial(fold, race=_flashinfer)), device),
            **_others("sample_hidden", device, (*flat, every, seed, step, *options), ids.shape),
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


class Steps:
    """What a step does outside the model, by Show-o's procedure and by ours, on hidden states [B, N, D]."""

    def __init__(self, size: Grid, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.mask_id = size, size.V - 1
        self.h_cond, self.h_uncond = (torch.randn(size.B, size.N, size.D, device=device).to(dtype) for _ in range(2))
        self.weight = (torch.randn(size.V, size.D, device=device) * size.D**-0.5).to(dtype)
        self.bias = (torch.randn(size.V, device=device) * 0.1).to(dtype)

    def showo(self, ids: Tensor, mask_ratio: Tensor, temperature: float) -> Outputs:
        """Both branches' logits over the vocabulary, guidance, softmax, multinomial, noise, sort."""
        first, end = self.size.codes
        unknown = ids == self.mask_id
        logits = F.linear(torch.cat([self.h_cond, self.h_uncond]), self.weight, self.bias).float()
        cond, uncond = logits.chunk(2)
        p = ((1 + GUIDANCE) * cond - GUIDANCE * uncond)[..., first:end].softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1).view(ids.shape)
        sample = torch.where(unknown, drawn + first, ids)
        chosen = p.gather(-1, drawn[..., None])[..., 0].masked_fill(~unknown, torch.finfo(torch.float32).max)
        wanted = (mask_ratio * self.size.N).floor().long()
        count = torch.minimum(unknown.sum(-1, keepdim=True) - 1, wanted).clamp(min=1)
        noise = -torch.log(-torch.log(torch.rand_like(chosen).clamp(1e-20, 1 - 2**-24)))
        confidence = chosen.clamp(min=1e-20).log() + temperature * noise
        mask = confidence < confidence.sort(-1).values.gather(1, count)
        return sample, confidence, mask

    def ours(self, ids: Tensor, count: Tensor, temperature: float, seed: Tensor, step: Tensor) -> Outputs:
        sample, confidence = sampling.sample_from_hidden(
            self.h_cond, self.h_uncond, self.weight, self.bias, ids, self.mask_id, code_range=self.size.codes,
            guidance=GUIDANCE, seed=seed, offset=step,
        )  # fmt: skip
        mask = sampling.remask(confidence, ids == self.mask_id, count, temperature, seed=seed, offset=step)
        return sample, confidence, mask

    def log_p(self) -> Tensor:
        """[B, N, C] in float64."""
        window = slice(*self.size.codes)
        h = (1 + GUIDANCE) * self.h_cond.double() - GUIDANCE * self.h_uncond.double()
        return F.linear(h, self.weight[window].double(), self.bias[window].double()).log_softmax(-1)


def _step_work(size: Grid, dtype: torch.dtype, device: torch.device) -> Work:
    steps, ids = Steps(size, dtype, device), _ids(size, device)
    unknown, keep = ids == steps.mask_id, size.masked // 2
    count = torch.full((size.B,), keep, device=device)
    ratio = torch.tensor((keep + 0.5) / size.N, device=device)
    seed, step = torch.tensor(5, device=device), torch.tensor(0, device=device)
    drawn = _error(ids, unknown, steps.log_p()[unknown], size.first)

    def showo(function: Callable[..., Outputs] = steps.showo) -> Outputs:
        # Without noise, so that the confidence that is checked is the code's own.
        return function(ids, ratio, 0.0)

    def error(outputs: Outputs) -> float:
        sample, confidence, mask = outputs
        right = (mask.sum(-1) == count).all() and not (mask & ~unknown).any()
        return drawn((sample, confidence)) if right else math.inf

    return Work(
        ours=lambda: steps.ours(ids, count, 0.0, seed, step),
        baselines={
            "Show-o's procedure": Baseline(showo),
            "torch.compile of it": Baseline(partial(showo, compiled(steps.showo)), compiles=True),
        },
        error=error,
        tolerance=TOLERANCE[dtype],
    )


def _run_work(size: Grid, count: int, dtype: torch.dtype, device: torch.device) -> Work:
    """`count` steps from all masked; the masks are what the schedule leaves."""
    steps = Steps(size, dtype, device)
    start = torch.full((size.B, size.N), steps.mask_id, device=device)
    ratios = torch.cos(torch.arange(1, count + 1, device=device) / count * math.pi * 0.5)
    seed = torch.tensor(5, device=device)

    def sampler(**options: bool) -> sampling.MaskedDiffusionSampler:
        return sampling.MaskedDiffusionSampler(
            lambda ids, step: (steps.h_cond, steps.h_uncond), count, steps.mask_id, head=(steps.weight, steps.bias),
            code_range=size.codes, guidance=GUIDANCE, **options,
        )  # fmt: skip

    def showo(function: Callable[..., Outputs]) -> Outputs:
        ids, sample, temperature = start, start, 1.0
        for step in range(count):
            temperature *= 1 - (step + 1) / count
            sample, _, mask = function(ids, ratios[step], temperature)
            ids = torch.where(mask, steps.mask_id, sample)
        return (sample,)

    log_p = steps.log_p()
    likeliest = log_p.amax(-1).mean().item()
    entropy_term = (log_p.exp() * log_p).sum(-1).mean().item()

    def error(outputs: Outputs) -> float:
        """Codes everywhere, likelier than draws are on average (a step keeps the surest), not all the likeliest."""
        code = outputs[0] - size.first
        if code.min() < 0 or code.max() >= size.C:
            return math.inf
        mean = log_p.gather(-1, code[..., None]).mean().item()
        return 0.0 if entropy_term - 0.2 < mean < likeliest else math.inf

    baselines = {
        "Show-o's procedure": Baseline(partial(showo, steps.showo)),
        "torch.compile of it": Baseline(partial(showo, compiled(steps.showo)), compiles=True)
        if device.type == "cuda"
        else Baseline(None, missing="a run is its steps: see sampling.step"),
    }
    if device.type == "cuda":
        replayed = sampler(cuda_graph=True)
        baselines["ours, a CUDA graph a step"] = Baseline(lambda: (replayed(start, seed=seed),))
    plain = sampler()
    return Work(ours=lambda: (plain(start, seed=seed),), baselines=baselines, error=error, tolerance=0.0)


def _read(size: Grid, dtype: torch.dtype) -> float:
    """Bytes of the masked rows' hidden states, both branches, and of the codes' weights."""
    return float((2 * size.B * size.masked + size.C) * size.D * dtype.itemsize)


def sampling_case(
    op: str, shape: str, size: Grid, source: str, devices: tuple[str, ...], dtype: torch.dtype, steps: int = 0
) -> Case:
    """A case of the op ``"sampling." + op``; `steps` of a run."""
    rows, item = size.B * size.masked, dtype.itemsize
    sizes = {"B": size.B, "N": size.N, "masked": size.masked, "D": size.D, "V": size.V, "codes": size.C}
    product = 2.0 * rows * size.C * size.D, _read(size, dtype)
    if op == "run":
        sizes |= {"masked": size.N, "T": steps}
        share = sum(math.cos(math.pi * step / (2 * steps)) for step in range(steps)) * size.N / size.masked
        product = product[0] * share, product[1] * share
    flops, moved, work = {
        "sample_from_logits": (0.0, 2.0 * rows * size.C * item, partial(_logits_work, size, dtype)),
        "sample_from_hidden": (*product, partial(_hidden_work, size, dtype)),
        "step": (*product, partial(_step_work, size, dtype)),
        "run": (*product, partial(_run_work, size, steps, dtype)),
        "remask": (0.0, 6.0 * size.B * size.N, partial(_remask_work, size)),
    }[op]
    smoke = shape == "smoke"
    return Case(f"sampling.{op}", shape, sizes, source, FORWARD, dtype, flops, moved, work, devices, smoke)


def _cases() -> Iterator[Case]:
    for named in GRIDS:
        for ops in (("sample_from_logits", "sample_from_hidden"), ("step", "run")):
            for dtype in (torch.float32, torch.bfloat16):
                for op in ops:
                    if op != "run" or named[0] in RUNS:
                        yield sampling_case(op, *named, dtype, RUNS.get(named[0], 0))
        yield sampling_case("remask", *named, torch.float32)


CASES = list(_cases())
