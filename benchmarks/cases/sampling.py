"""Masked-diffusion sampling without the model: its draws, the step that they make together, and a run of all steps on
hidden states that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from unif2ace_kernels import sampling

from ..case import FORWARD, TOLERANCE, Baseline, Case, Outputs, Work, compiled
from .sampling_draws import GUIDANCE, Grid, Head, error_of_draw, hidden_work, ids_of, logits_work, remask_work

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


class Steps(Head):
    """What a step does outside the model, by Show-o's procedure and by ours."""

    def showo(self, ids: Tensor, mask_ratio: Tensor, temperature: float) -> Outputs:
        """Both branches' logits over the vocabulary, guidance, softmax, multinomial, noise, sort."""
        first, unknown = self.size.first, ids == self.mask_id
        p = self.guided().softmax(-1)
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
        sample, confidence = self.draw(ids, seed, step)
        mask = sampling.remask(confidence, ids == self.mask_id, count, temperature, seed=seed, offset=step)
        return sample, confidence, mask


def _step_work(size: Grid, dtype: torch.dtype, device: torch.device) -> Work:
    steps, ids = Steps(size, dtype, device), ids_of(size, device)
    unknown, keep = ids == steps.mask_id, size.masked // 2
    count = torch.full((size.B,), keep, device=device)
    ratio = torch.tensor((keep + 0.5) / size.N, device=device)
    seed, step = torch.tensor(5, device=device), torch.tensor(0, device=device)
    drawn = error_of_draw(ids, unknown, steps.log_p()[unknown], size.first)

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
        "sample_from_logits": (0.0, 2.0 * rows * size.C * item, partial(logits_work, size, dtype)),
        "sample_from_hidden": (*product, partial(hidden_work, size, dtype)),
        "step": (*product, partial(_step_work, size, dtype)),
        "run": (*product, partial(_run_work, size, steps, dtype)),
        "remask": (0.0, 6.0 * size.B * size.N, partial(remask_work, size)),
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
