"""Every op against what a user would otherwise run, in one process and one run.

    python -m benchmarks.run [--op moe] [--against compile] [--device cuda] [--json OUT.jsonl] [--smoke] [--list] ...

A contender is timed only after its outputs met float64's; rounds are interleaved and their order rotates; a ratio
is taken round by round. One JSON line a (case, contender), also for one that is missing, wrong or broken. The exit
status is 1 if ours failed, or any contender gave wrong outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from .case import OURS, TRAINING, Baseline, Case, Run, Work
from .environment import describe, shortfalls, without_folders
from .measure import (
    MAX_ROUNDS,
    ContenderError,
    Spread,
    copy_rate,
    cuda_launches,
    floor_seconds,
    host_seconds,
    interleaved,
    matmul_rate,
    peak_and_saved_bytes,
    peak_bytes,
)
from .results import in_a_line
from .stages import CUT

Record = dict[str, Any]
LONG_CALL_S = 0.1  # a call that took so long when it was checked is not made again to learn how long it takes
NOBODY = "none"
OK, MISSING, WRONG, ERROR = "ok", "missing", "wrong", "error"


def run_case(
    case: Case,
    device: torch.device,
    *,
    seconds: float = 3.0,
    against: str = "",
    compiling: bool = True,
    timing: bool = True,
    max_rounds: int = MAX_ROUNDS,
) -> list[Record]:
    """Check and time the contenders of `case`; one record each, ours first, whatever happened to it.

    Args:
        seconds: time to spend on timing; at most `max_rounds` rounds.
        against: only baselines whose name contains this, in letters of either case; `NOBODY`: none of them.
        compiling: whether contenders that compile are run.
        timing: whether the contenders are timed, or only checked.
    """
    base: Record = {
        "op": case.op, "shape": case.shape, "sizes": dict(case.sizes), "source": case.source, "mode": case.mode,
        "dtype": str(case.dtype).removeprefix("torch."), "flops": case.flops, "bytes": case.bytes,
        **({"axis": case.axis, "at": case.at} if case.axis else {}),
    }  # fmt: skip
    try:
        torch.manual_seed(0)
        work = case.build(device)
    except Exception:
        return [{**base, "contender": OURS, "status": ERROR, "reason": traceback.format_exc()}]

    records: dict[str, Record] = {}
    ready: dict[str, Run] = {}
    known: dict[str, float] = {}
    wanted = against.lower()
    baselines = {name: each for name, each in work.baselines.items() if wanted != NOBODY and wanted in name.lower()}
    for name, contender in {OURS: Baseline(work.ours), **baselines}.items():
        verdict, took = _admit(contender, work, compiling, device)
        if took > LONG_CALL_S and not contender.compiles and device.type == "cpu":
            known[name] = took
        records[name] = {**base, "contender": name, **verdict}
        if verdict["status"] == OK and contender.run is not None:
            ready[name] = contender.run
    if timing and OURS in ready:
        try:
            _time(case, device, ready, records, seconds, max_rounds, known)
            records[OURS] |= work.notes(records[OURS]) if work.notes is not None else {}
        except Exception:
            records[OURS] |= {"status": ERROR, "reason": traceback.format_exc()}
    return list(records.values())


def _admit(contender: Baseline, work: Work, compiling: bool, device: torch.device) -> tuple[Record, float]:
    """Run a contender once and compare its outputs: may it be timed? And the seconds of that call."""
    if contender.run is None:
        return {"status": MISSING, "reason": contender.missing}, 0.0
    if contender.compiles and not compiling:
        return {"status": MISSING, "reason": "it compiles, which this run was told not to do"}, 0.0
    start = time.perf_counter()
    try:
        outputs = contender.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # where a kernel fails is the contender that launched it
    except Exception as error:  # a peer may fail in any way; the line says which
        return _raised(error, ours=contender.run is work.ours), 0.0
    took = time.perf_counter() - start
    if contender.rate_only:
        return {"status": OK, "compared": False}, took
    error = work.error(outputs)
    verdict: Record = {"status": OK, "compared": True, "error": _finite(error), "tolerance": work.tolerance}
    if not error <= work.tolerance:
        verdict |= {"status": WRONG, "reason": f"error {error:.2e} against float64 is above {work.tolerance:.0e}"}
    return verdict, took


def _raised(error: BaseException | None, *, ours: bool) -> Record:
    """The verdict on a contender that raised: ours is broken, another one is not to be had here."""
    return {"status": ERROR if ours else MISSING, "reason": without_folders(f"{type(error).__name__}: {error}")[:2000]}


def _time(
    case: Case,
    device: torch.device,
    ready: dict[str, Run],
    records: dict[str, Record],
    seconds: float,
    rounds: int,
    known: Mapping[str, float],
) -> None:
    """Add the measurements of the admitted contenders to their records; one that raises leaves, and says why."""
    floor = floor_seconds(case.flops, case.bytes, device, case.dtype)
    samples: dict[str, list[float]] = {}
    while OURS in ready and not samples:
        try:
            samples = interleaved(ready, device, seconds, rounds, known)
        except ContenderError as failed:
            del ready[failed.name]
            records[failed.name] |= _raised(failed.__cause__, ours=failed.name == OURS)
    if not samples:
        return
    for name, run in ready.items():
        took = Spread.of(samples[name])
        ratio = Spread.of([theirs / ours for theirs, ours in zip(samples[name], samples[OURS])])
        measured: Record = {
            "median_ms": took.median * 1e3,
            "quartiles_ms": [took.q1 * 1e3, took.q3 * 1e3],
            "rounds": len(samples[name]),
            "times_ours": ratio.median,
            "times_ours_quartiles": [ratio.q1, ratio.q3],
            "floor_ms": floor * 1e3,
            "share_of_floor": floor / took.median,
        }
        try:
            if case.mode == TRAINING:
                measured["peak_bytes"], measured["saved_bytes"] = peak_and_saved_bytes(run, device)
            else:
                measured["peak_bytes"] = peak_bytes(run, device)
            if device.type == "cuda":
                measured |= {"launches": cuda_launches(run), "host_ms": host_seconds(run) * 1e3}
        except Exception as error:
            measured = _raised(error, ours=name == OURS)
        records[name] |= measured


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def ceilings(device: torch.device) -> Record:
    """Copy bandwidth and matrix rates measured now, as a record of its own."""
    rates = {str(t).removeprefix("torch."): matmul_rate(device, t) for t in (torch.float32, torch.bfloat16)}
    return {
        "op": "ceilings",
        "contender": "torch",
        "status": OK,
        "copy_bytes_per_s": copy_rate(device),
        "matmul_flops_per_s": rates,
    }


def select(cases: Iterable[Case], *, op: str, shape: str, device: str, smoke: bool, dtype: str = "") -> list[Case]:
    """The cases asked for: those of `device`, of the tiny set or not, whose op, shape and dtype begin and match so."""
    return [
        case
        for case in cases
        if case.op.startswith(op)
        and shape in case.shape
        and case.smoke == smoke
        and device in case.devices
        and dtype in str(case.dtype)
    ]


def unmeasured(cases: Iterable[Case], path: Path | None) -> list[Case]:
    """The cases of which the results in `path` have neither a time of ours nor that it was wrong."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    ours = [each for each in map(json.loads, lines) if each["contender"] == OURS]
    settled = [each for each in ours if "median_ms" in each or each["status"] == WRONG]
    known = {(each["op"], each["shape"], each["dtype"], each["mode"]) for each in settled}
    return [each for each in cases if (each.op, each.shape, str(each.dtype)[len("torch.") :], each.mode) not in known]


class InTime:
    """Cases one by one, as long as one more like the longest so far ends within `seconds`; `left` are the others."""

    def __init__(self, cases: Iterable[Case], seconds: float) -> None:
        self.left, self.seconds = list(cases), seconds

    def __iter__(self) -> Iterator[Case]:
        began = last = time.monotonic()
        longest = 0.0
        while self.left and last - began + longest <= self.seconds:
            yield self.left.pop(0)
            now = time.monotonic()
            longest, last = max(longest, now - last), now


def run_all(cases: Iterable[Case], device: torch.device, out: TextIO | None, **options: Any) -> list[Record]:
    """`run_case` on each; every record becomes a JSON line and a row on stdout as soon as its case is done."""
    environment = describe(device.type)
    print("".join(f"{line}\n" for line in shortfalls(device.type)), end="")
    done: list[Record] = []
    for case in cases:
        print(f"\n{case.name}  {dict(case.sizes)}")
        records = run_case(case, device, **options)
        for record in records:
            print(row(record), flush=True)
            if out is not None:
                out.write(json.dumps({**record, **environment}) + "\n")
                out.flush()
        done += records
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return done


def row(record: Record) -> str:
    """One line of the table."""
    head = f"  {record['contender']:<34}"
    if "median_ms" not in record:
        checked = f"error {record['error']:.1e}" if "error" in record else "not compared"
        return f"{head} {record['status']}: {in_a_line(record.get('reason', checked))}"
    low, high = record["quartiles_ms"]
    peak = record["peak_bytes"]
    text = f"{head}{record['median_ms']:10.3f} ms [{low:.3f}, {high:.3f}]  x{record['times_ours']:<6.2f}"
    text += f" floor {100 * record['share_of_floor']:5.1f} %"
    text += "" if peak is None else f"  {peak / 2**20:8.1f} MiB"
    text += f" ({record['saved_bytes'] / 2**20:.1f} saved)" if "saved_bytes" in record else ""
    return text + (f"  {record['launches']} launches" if "launches" in record else "")


def failures(records: Iterable[Record]) -> list[Record]:
    """Records that make the run a failure: errors, and contenders with wrong outputs."""
    return [record for record in records if record["status"] in (ERROR, WRONG)]


def at_least(low: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    """A type of argparse: a number of `kind`, no smaller than `low`."""

    def number(text: str) -> float:
        if not (value := kind(text)) >= low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {text}")
        return value

    return number


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    """Command line; `cases` replaces the registry (tests)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="", help="only ops whose name starts so, e.g. moe or d3diff.loss")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this, e.g. paper")
    parser.add_argument("--dtype", default="", help="only this dtype, e.g. bfloat16")
    parser.add_argument("--against", default="", help=f"only baselines whose name contains this; {NOBODY}: ours alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=at_least(0, float), default=3.0, help="time spent on timing each case")
    parser.add_argument("--rounds", type=at_least(1, int), default=MAX_ROUNDS, help="samples of each contender at most")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--no-compile", action="store_true", help="leave out the contenders that compile")
    parser.add_argument("--check", action="store_true", help="compare outputs with float64's and time nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, nothing compiled: does everything run?")
    parser.add_argument("--json", type=Path, help="append the results to this file, a line each")
    parser.add_argument("--unmeasured", action="store_true", help="leave out cases that --json's file has our time of")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    options = parser.parse_args(arguments)
    if cases is None:
        from .cases import cases_of

        cases = cases_of(options.op)
    asked = {"op": options.op, "shape": options.shape, "dtype": options.dtype}
    chosen = select(cases, **asked, device=options.device, smoke=options.smoke)
    if options.list:
        for case in chosen:
            print(f"{case.name:<60} {case.source}")
        return 0
    if not chosen:
        parser.error("no case matches; see --list" + (" --smoke: tiny cases have shapes of their own" * options.smoke))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    device = torch.device(options.device)
    if options.unmeasured:
        chosen = unmeasured(chosen, options.json)
    with contextlib.ExitStack() as stack:
        out = None
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(options.json.open("a"))
        timely = InTime(chosen, options.limit)
        records = run_all(
            timely, device, out, seconds=0.0 if options.smoke else options.seconds, against=options.against,
            compiling=not (options.no_compile or options.smoke), timing=not options.check,
            max_rounds=3 if options.smoke else options.rounds,
        )  # fmt: skip
        if out is not None and not (options.smoke or options.check):
            out.write(json.dumps({**ceilings(device), **describe(device.type)}) + "\n")
    failed = failures(records)
    alone = bool(records) and all(record["contender"] == OURS for record in records)
    if alone and not failed and options.against not in ("", NOBODY):
        parser.error(f"--against {options.against}: in no name of these cases' contenders; without it they are shown")
    for record in failed:
        print(f"\nFAILED {record['op']} {record['shape']} {record['contender']}: {record['reason']}", file=sys.stderr)
    if timely.left:
        print(f"\nCUT {len(timely.left)} of {len(chosen)} cases, from {timely.left[0].name} on", file=sys.stderr)
    return 1 if failed else CUT if timely.left else 0


if __name__ == "__main__":
    sys.exit(main())
