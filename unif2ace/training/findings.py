"""A run in a few numbers, and what about it is worth a look: its last steps against those before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unif2ace.training.history import Run
from unif2ace.training.load import CROWDED, EMPTY, Load

WAIT, SLOWER, HIGHER, LEAK, CLIPPED = 0.05, 0.1, 0.02, 0.05, 0.9


def window(run: Run) -> int:
    """Records at the end that stand for how the run is now: a twentieth of it, at least 50."""
    return max(50, len(run.steps) // 20)


def last_loads(run: Run) -> list[Load]:
    """Each group of experts of each layer over the window."""
    first = run.steps[-min(window(run), len(run.steps))]
    return [
        each.last(*key, window=max(1, sum(step >= first for step in each.steps)))
        for key, each in sorted(run.experts.items(), key=lambda item: (item[0][0] != "token", item[0]))
    ]


def headline(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and remark of each number at the top; what the log does not have is left out."""
    done, end = int(run.steps[-1]) + 1, window(run)
    rows = [("steps", f"{done:,}", (f"of {run.total:,}; " if run.total else "") + _state(run))]
    loss = _finite(run.column("loss"))
    if len(loss):
        lowest = run.steps[np.isfinite(run.column("loss"))][int(np.argmin(loss))]
        rows.append(("loss", f"{loss[-end:].mean():.4g}", f"lowest {loss.min():.4g} at step {lowest:,}"))
    for name, title in (("mask_accuracy", "codes ranked first"), ("mmu_accuracy", "answers ranked first")):
        share = _finite(run.column(f"terms.{name}"))[-end:]
        if len(share):
            rows.append((title, f"{share.mean():.0%}", "of the targets"))
    tokens = _finite(run.column("tokens"))
    if len(tokens):
        rows.append(("tokens", short(tokens.mean() * done), f"{short(tokens[-end:].mean())} a step"))
    speed = _finite(run.column("tokens_per_second"))
    if len(speed):
        rows.append(("tokens a second", short(float(np.median(speed[-end:]))), f"at best {short(_best(speed, end))}"))
    mfu = _finite(run.column("mfu"))
    if len(mfu):
        rows.append(("MFU", f"{np.median(mfu[-end:]):.0%}", "of the device's peak"))
    wait = _finite(run.column("data_wait"))
    if len(wait):
        rows.append(("waits for data", f"{wait[-end:].mean():.1%}", "of a step"))
    memory = _finite(run.column("memory_bytes"))
    if len(memory):
        rows.append(("memory", f"{memory.max() / 2**30:.1f} GiB", "most of rank 0"))
    skipped, corrupt = (_finite(run.column(name))[-1:] for name in ("skipped", "corrupt"))
    if len(skipped) and len(corrupt):
        rows.append(("passed over", f"{int(skipped[0]):,} steps", f"{int(corrupt[0]):,} unreadable samples"))
    seconds, took = _finite(run.column("seconds")), _finite(run.column("step_seconds"))[-end:]
    if len(seconds):
        left = (run.total - done) * float(took.mean()) if run.total and len(took) else 0
        rows.append(("time", duration(seconds[-1]), f"{duration(left)} to go" if left > 0 else "in training steps"))
    return rows


def _state(run: Run) -> str:
    ends = [each for each in run.events if each.get("event") in ("started", "resumed", "finished", "stopped")]
    last = ends[-1]["event"] if ends else ""
    count = len(run.resumed)
    times = f", resumed {'once' if count == 1 else f'{count} times'}" if count else ""
    return {"finished": "finished", "stopped": "stopped"}.get(last, "running, or killed") + times


def findings(run: Run) -> list[str]:
    """What is worth a look, a sentence each, the gravest first."""
    return [*_of_the_run(run), *_of_the_steps(run), *_of_the_experts(run)]


def _of_the_run(run: Run) -> Iterator[str]:
    reasons = [each for each in run.events if each.get("event") == "stopped" and each.get("reason")]
    if reasons and run.events[-1] is reasons[-1]:
        yield f"The run stopped at step {_at(reasons[-1])}: {reasons[-1]['reason']}."
    skipped = [each for each in run.events if each.get("event") == "skipped"]
    count = max([0, len(skipped), *(int(each) for each in _finite(run.column("skipped"))[-1:])])
    if count:
        where = ", ".join(_at(each) for each in skipped[-5:])
        yield f"{_steps(count)} passed over, without a finite gradient" + (f"; the last: {where}." if where else ".")
    corrupt = _finite(run.column("corrupt"))[-1:]
    if corrupt.any():
        yield f"{int(corrupt[0]):,} samples could not be read."
    for name, words in (
        ("state_failed", "states could not be written"),
        ("log_waited", "times the log could not be written and waited"),
        ("view_failed", "views of the log failed and were left out"),
    ):
        found = [each for each in run.events if each.get("event") == name]
        if found:
            yield f"{len(found)} {words}, the last at step {_at(found[-1])}."


def _of_the_steps(run: Run) -> Iterator[str]:
    end, count = window(run), len(run.steps)
    stage = run.stages[-1][1] if run.stages else 0
    loss = run.column("loss")[run.steps >= stage]
    whole = len(loss) // end * end
    if whole >= 3 * end:
        with np.errstate(invalid="ignore"):
            means = np.array([_finite(each).mean() for each in loss[-whole:].reshape(-1, end) if len(_finite(each))])
        if len(means) > 2 and means[-1] > means.min() + HIGHER * abs(means.min()):
            rise = means[-1] / means.min() - 1
            yield f"The loss of the last {end} steps is {rise:.0%} above the lowest that this stage had."
    clip = clip_of(run)
    norm = _finite(run.column("grad_norm"))[-end:]
    if clip and len(norm) and (norm > clip).mean() > CLIPPED:
        yield f"{(norm > clip).mean():.0%} of the last {len(norm)} steps were clipped to a norm of {clip:g}."
    wait = _finite(run.column("data_wait"))
    if len(wait) and wait[-end:].mean() > WAIT:
        yield f"The last {end} steps waited for data {wait[-end:].mean():.0%} of their time."
    elif len(wait) and (before := _stretch(run, run.column("data_wait") > 2 * WAIT)):
        yield f"Data was waited for more than {2 * WAIT:.0%} of the time {before}."
    speed = _finite(run.column("tokens_per_second"))
    if count >= 3 * end and len(speed) and np.median(speed[-end:]) < (1 - SLOWER) * _best(speed, end):
        yield f"Tokens a second fell to {short(float(np.median(speed[-end:])))}, from {short(_best(speed, end))}."
    memory = _finite(run.column("memory_bytes")[run.steps >= stage])
    if len(memory) >= 3 * end and memory[-1] > (1 + LEAK) * memory[end]:
        yield f"Memory has grown by {memory[-1] / memory[end] - 1:.0%} within this stage."


def _of_the_experts(run: Run) -> Iterator[str]:
    for what, words in (("empty", f"under {EMPTY:.0%}"), ("crowded", f"over {CROWDED:.0%}")):
        found = [
            f"{each.group} {each.level} level, layer {each.layer + 1}, expert {_numbers(getattr(each, what))}"
            for each in last_loads(run)
            if getattr(each, what)
        ]
        if found:
            more = f" and {len(found) - 6} more groups" if len(found) > 6 else ""
            yield f"Experts with {words} of an even load: {'; '.join(found[:6])}{more}."


def _stretch(run: Run, high: np.ndarray) -> str:
    """Where something was so for long: `from step 10 to 50`; empty where it was not."""
    edges = np.flatnonzero(np.diff([0, *high.astype(int), 0]))
    starts, ends = edges[::2], edges[1::2]
    long = [(int(a), int(b)) for a, b in zip(starts, ends) if b - a >= max(20, len(run.steps) // 100)]
    return ", ".join(f"from step {run.steps[a]:,} to {run.steps[b - 1]:,}" for a, b in long[:4])


def _best(values: np.ndarray, size: int) -> float:
    """The highest median of `size` neighbours."""
    whole = max(1, len(values) // size)
    return max(float(np.median(part)) for part in np.array_split(values, whole))


def clip_of(run: Run) -> float | None:
    """What gradients are clipped to, where the config says it."""
    optimizer = run.config.get("optimizer")
    clip = optimizer.get("clip") if isinstance(optimizer, dict) else None
    return float(clip) if isinstance(clip, (int, float)) and clip > 0 else None


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _at(event: dict) -> str:
    step = event.get("step")
    return f"{step:,}" if isinstance(step, int) else "?"


def _steps(count: int) -> str:
    return "1 step was" if count == 1 else f"{count:,} steps were"


def _numbers(experts: list[int]) -> str:
    return ", ".join(str(each + 1) for each in experts)


def short(value: float) -> str:
    """12345 as 12.3 k."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in the two units that say most."""
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // below)} {small}"
    return f"{seconds:.0f} s"
