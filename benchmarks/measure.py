"""Clocks and meters: interleaved timing, peak memory, kernel launches, and what the device can do at best."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .case import Outputs, Run

MIN_SAMPLE_S = 2e-3  # a CPU sample repeats its call until it is this long: the clock and the call's own noise
MIN_ROUNDS, MAX_ROUNDS = 7, 50
# A round, or a contender, that takes long is a steady clock by itself: seconds -> fewest samples.
FEWER_ROUNDS = {0.5: 5, 3.0: 3}
REFRESH_S = 60.0  # after so long the device's ceilings are looked at again
_FLUSH_BYTES = 256 << 20  # several times any L2
_AHEAD_CYCLES = 4_000_000  # about two milliseconds of a GPU's clock: a step of a layer is launched in less


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3)


class ContenderError(Exception):
    """A contender raised while it was timed; `name` is its own, the cause what it raised."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def balanced(names: Sequence[str], turn: int) -> list[str]:
    """The contenders in the order of round `turn`: over 2 n rounds each is as often in each place and after each other.

    What ran before leaves its memory and cache behind: after a twin of its own a contender finds pages that are mapped
    already, after a larger one it maps them anew: up to a third of a call of 5 ms. (Williams, 1949.)
    """
    zigzag = [(step + 1) // 2 * (-1) ** (step + 1) for step in range(len(names))]  # 0, 1, -1, 2, -2, ...
    order = [names[(turn + step) % len(names)] for step in zigzag]
    return order[::-1] if turn // len(names) % 2 else order


def interleaved(
    contenders: Mapping[str, Run],
    device: torch.device,
    seconds: float,
    max_rounds: int = MAX_ROUNDS,
    known: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call, one sample of every contender a round, so that a drift of the machine meets all alike.

    A contender that alone takes long takes part in the first rounds only.

    Args:
        contenders: name -> callable; each has run before (warm).
        seconds: time to spend on all rounds together; at least `MIN_ROUNDS` are made whatever they take (fewer of long
            ones, see `FEWER_ROUNDS`).
        known: seconds that a call of some takes, where that is known already.

    Raises:
        ContenderError: a contender raised.
    """
    sample = _CudaSample(device) if device.type == "cuda" else _cpu_sample

    def take(name: str, inner: int) -> float:
        try:
            return sample(contenders[name], inner)
        except Exception as error:
            raise ContenderError(name) from error

    known = known or {}
    once = {name: known[name] if name in known else take(name, 1) for name in contenders}
    inner = {
        name: 1 if device.type == "cuda" else max(1, min(1000, round(MIN_SAMPLE_S / max(took, 1e-6))))
        for name, took in once.items()
    }
    most = {
        name: min(max_rounds, MAX_ROUNDS if _least(took) == MIN_ROUNDS else _least(took)) for name, took in once.items()
    }
    round_s = sum(took * inner[name] for name, took in once.items() if most[name] >= MIN_ROUNDS)
    rounds = min(max(most.values()), max(_least(round_s), int(seconds / max(round_s, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        taking_part = [name for name in contenders if turn < most[name]]
        for name in balanced(taking_part, turn):
            samples[name].append(take(name, inner[name]))
    return samples


def _least(seconds: float) -> int:
    """Fewest samples of what takes so long."""
    return min([MIN_ROUNDS, *(rounds for limit, rounds in FEWER_ROUNDS.items() if seconds >= limit)])


def _cpu_sample(run: Run, inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - start) / inner


class _CudaSample:
    """Time between two events around a call, with the L2 cache flushed before.

    The GPU is kept busy meanwhile, so that the host is ahead of it: a call of many launches is timed by what they take
    there; what the host takes is measured on its own (`host_seconds`).
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, run: Run, inner: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        start.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / inner


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory that one call holds beyond what was there before; None where it cannot be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:  # Linux: give freed memory back, reset the high-water mark, read it after
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _proc_status("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return _proc_status("VmHWM") - before


def _proc_status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {key} in /proc/self/status")
    return int(found[1]) << 10


def saved_bytes(run: Run) -> int:
    """What a training step keeps from its forward for its backward, beside what was there before it.

    That is what autograd is given to save, each storage once; not what a function hides from it.
    """
    watched, total = _watched(run)
    watched()
    return total()


def peak_and_saved_bytes(run: Run, device: torch.device) -> tuple[int | None, int]:
    """`peak_bytes` and `saved_bytes` of one call."""
    watched, total = _watched(run)
    peak = peak_bytes(watched, device)
    if peak is None:  # then nothing was run
        watched()
    return peak, total()


def _watched(run: Run) -> tuple[Run, Callable[[], int]]:
    """`run`, and what autograd was given to keep in it so far."""
    before = {_storage(each) for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in before and not tensor.is_meta:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def watched() -> Outputs:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return run()

    return watched, lambda: sum(kept.values())


def _storage(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0 for one that has none (sparse, meta)."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_meta else 0


def counted(run: Run) -> dict[str, int]:
    """Work of one call on the CPU that needs no clock: `calls` of operators, and `allocated` bytes in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.events()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
    return {"calls": sum(event.name != "[memory]" for event in events), "allocated": allocated}


def cuda_launches(run: Run) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def host_seconds(run: Run) -> float:
    """Median time until the call returns, the GPU idle at its start and not waited for."""
    took = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


_BEST: dict[tuple[str, ...], tuple[float, float]] = {}  # what -> (best rate so far, when it was last looked at)


def _ceiling(what: tuple[str, ...], measure: Callable[[], float]) -> float:
    """The best rate that was seen, looked at again from time to time: no share of it should pass 1."""
    best, when = _BEST.get(what, (0.0, -REFRESH_S))
    if time.monotonic() - when >= REFRESH_S:
        best = max(best, measure())
        _BEST[what] = best, time.monotonic()
    return best


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read plus written, of a large device-to-device copy."""

    def measure() -> float:
        count = 1 << 26
        if device.type == "cuda":  # source and target together take half of what is free, 8 GiB at most
            count = min(1 << 30, torch.cuda.mem_get_info(device)[0] // (4 * torch.float32.itemsize))
        source = torch.rand(count, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / _best(lambda: target.copy_(source), device)

    return _ceiling(("copy", str(device)), measure)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of random matrices."""

    def measure() -> float:
        size = 8192 if device.type == "cuda" and dtype.itemsize < 4 else 4096 if device.type == "cuda" else 1536
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / _best(lambda: a @ b, device)

    return _ceiling(("product", str(device), str(dtype)), measure)


def _best(run: Run, device: torch.device) -> float:
    sample = _CudaSample(device) if device.type == "cuda" else _cpu_sample
    sample(run, 2)
    return min(sample(run, 1) for _ in range(9))


def floor_seconds(flops: float, moved: float, device: torch.device, dtype: torch.dtype) -> float:
    """The least time: the larger of arithmetic at the matrix rate and traffic at the copy rate, both measured here."""
    arithmetic = flops / matmul_rate(device, dtype) if flops else 0.0
    return max(arithmetic, moved / copy_rate(device))
