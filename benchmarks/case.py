"""What a benchmark is: a case (op, shape, work to be done) and the contenders that do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Outputs = Sequence[torch.Tensor]
Run = Callable[[], Outputs]

OURS = "ours"
_PART = 1 << 16  # numbers
FORWARD, TRAINING = "forward", "forward+backward"


@dataclass(frozen=True)
class Baseline:
    """Another way to get what the op gives.

    Attributes:
        run: does the work once and returns the outputs (and gradients) in the order of ours; None when `missing`.
        missing: why it cannot run here (a peer that is not installed, a torch that is too old, the wrong device).
        rate_only: other work of the same FLOPs, run as a yardstick of speed; its outputs are not compared.
        compiles: its first call compiles for seconds; --no-compile and --smoke leave it out.
    """

    run: Run | None
    missing: str | None = None
    rate_only: bool = False
    compiles: bool = False


@dataclass(frozen=True)
class Work:
    """A case's tensors and callables on one device.

    Attributes:
        ours, baselines: the contenders.
        error: distance of a contender's outputs from the float64 truth; see `error_against`.
        tolerance: the error above which a contender is refused and not timed.
        notes: from our record more for it, such as what another run finds; None for nothing.
    """

    ours: Run
    baselines: Mapping[str, Baseline]
    error: Callable[[Outputs], float]
    tolerance: float
    notes: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: dotted public name, ``"moe.experts"``.
        shape: the shape's short name, ``"demo"``; `sizes` spells it out.
        source: where the shape comes from.
        mode: `FORWARD` or `TRAINING`.
        flops, bytes: the least work: floating-point operations, and bytes with each input read and each output
            written once.
        build: makes the tensors and the contenders on a device.
        devices: where the case is run by default; a shape may be too large for a CPU.
        smoke: whether the case is of the tiny set that only shows that everything runs.
        axis: what grows from case to case, of which this one has `at`; in a series that shows how cost grows.
    """

    op: str
    shape: str
    sizes: Mapping[str, int | str]
    source: str
    mode: str
    dtype: torch.dtype
    flops: float
    bytes: float
    build: Callable[[torch.device], Work] = field(repr=False)
    devices: tuple[str, ...] = ("cpu", "cuda")
    smoke: bool = False
    axis: str = ""
    at: int = 0

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')} {self.mode}"


def relative_error(output: torch.Tensor, truth: torch.Tensor) -> float:
    """||output - truth|| / ||truth|| in float64; infinite where shapes differ or something is not finite."""
    if output.shape != truth.shape:
        return math.inf
    difference = size = torch.zeros((), dtype=torch.float64, device=truth.device)
    # In parts that stay in the cache: float64 copies of a head's gradients took longer than the head's loss.
    for part, true in zip(output.detach().reshape(-1).split(_PART), truth.reshape(-1).split(_PART)):
        wide = true.double()
        difference = difference + (part.double() - wide).square().sum()
        size = size + wide.square().sum()
    error = (difference / size if size > 0 else difference).sqrt().item()
    return error if math.isfinite(error) else math.inf


def error_against(truth: Outputs) -> Callable[[Outputs], float]:
    """The error of outputs as the largest `relative_error` over them; a missing output is infinitely wrong."""

    def error(outputs: Outputs) -> float:
        if len(outputs) != len(truth):
            return math.inf
        return max(relative_error(output, true) for output, true in zip(outputs, truth, strict=True))

    return error


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def bind(function: Callable[..., Outputs], inputs: Sequence[torch.Tensor], mode: str, gradients: Outputs = ()) -> Run:
    """`function` of the differentiable `inputs` as a contender.

    Args:
        function: takes `inputs`, returns outputs of which the first ``len(gradients)`` are differentiable.
        mode: `FORWARD` runs it without autograd; `TRAINING` also runs backward and appends the inputs' gradients.
        gradients: of the differentiable outputs, cast to their dtypes.
    """
    if mode == FORWARD:

        def forward() -> Outputs:
            with torch.no_grad():
                return function(*inputs)

        return forward

    leaves = [each.detach().requires_grad_() for each in inputs]

    def training() -> Outputs:
        outputs = function(*leaves)
        roots = outputs[: len(gradients)]
        seeds = [gradient.to(root.dtype) for gradient, root in zip(gradients, roots, strict=True)]
        return [*(output.detach() for output in outputs), *torch.autograd.grad(roots, leaves, seeds)]

    return training


def truth_of(
    function: Callable[..., Outputs], inputs: Sequence[torch.Tensor], mode: str, gradients: Outputs = ()
) -> Outputs:
    """Outputs (and gradients) of `function` with float64 inputs."""
    return bind(function, [each.double() for each in inputs], mode, gradients)()


def compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """`function` through torch.compile for these shapes, with a cache of its own."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
