"""Commands that run one after the other within a budget of time, and what became of each.

Each runs in a process of its own with its own slice of the time that is left; one that fails, hangs or crashes does not
stop the next. The report is whole before, while and after a stage runs, and result files end with whole lines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .environment import ROOT

OK, FAILED, TIMEOUT, NOT_RUN = "ok", "failed", "timeout", "not run"
CUT = 124  # the exit status of a command that ended itself at a limit, as timeout(1) has it
MIN_SLICE_S = 3.0  # less is left: the stage is not begun
TAIL = 6000  # characters of a stage's output that the report keeps


@dataclass(frozen=True)
class Stage:
    """A command of the run.

    Attributes:
        name: ``"tests gpu"``; --stages matches its beginning.
        command: argument list, run in the repository's root.
        seconds: the most it may take.
        missing: why it cannot run here; None where it can.
        environment: variables set beside the machine's.
        empty_code: the exit status that means that there was nothing to do.
        instead: a stage that is run where this one failed or ran out of its time.
    """

    name: str
    command: Sequence[str]
    seconds: float
    missing: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    empty_code: int | None = None
    instead: Stage | None = None


def run_stage(stage: Stage, seconds: float, log: Path, path: Sequence[str] = ()) -> dict:
    """Run one stage for at most `seconds`; append its output to `log`; say what happened."""
    folders = [*path, str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, **stage.environment, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    environment["PYTHONUNBUFFERED"] = "1"
    start = time.monotonic()
    with log.open("a+b") as output:
        output.write(f"\n===== {stage.name}: {' '.join(stage.command)[:300]}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            status = {0: OK, stage.empty_code: NOT_RUN, CUT: TIMEOUT}.get(code, FAILED)
        except subprocess.TimeoutExpired:
            status, code = TIMEOUT, None
        finally:
            _end(process)
        output.seek(begin)
        tail = output.read().decode(errors="replace")[-TAIL:]
    return {"status": status, "exit_code": code, "seconds": round(time.monotonic() - start, 2), "tail": tail}


def _end(process: subprocess.Popen) -> None:
    """End the stage's process group, gently and then not; a group that is gone already is what is wanted."""
    for sign, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def write_report(report: Mapping, path: Path) -> None:
    """Replace `path` in one step, so that whoever reads it finds a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def keep_whole_lines(path: Path) -> None:
    """Drop a last line that a killed stage left unfinished."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n" * (b"\n" in path.read_bytes()))


def run_stages(
    stages: Sequence[Stage], out: Path, deadline: float, head: Mapping, path: Sequence[str] = (), name: str = "gpu.json"
) -> dict:
    """Run `stages` until `deadline` (monotonic seconds), rewriting the report `name` in `out` before and after each.

    SIGTERM ends the stage that runs, whose processes would go on by themselves, and then this one with status 143.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out.mkdir(parents=True, exist_ok=True)
    done: list[dict] = []
    report = {**head, "stages": done}
    left_to_do = list(stages)
    while left_to_do:
        stage = left_to_do.pop(0)
        record: dict = {"name": stage.name, "command": list(stage.command)}
        done.append(record)
        left = min(stage.seconds, deadline - time.monotonic())
        if stage.missing is not None:
            record |= {"status": NOT_RUN, "reason": stage.missing}
        elif left < MIN_SLICE_S:
            record |= {"status": NOT_RUN, "reason": "no time left"}
        else:
            record["status"] = "running"
            write_report(report, out / name)
            try:
                record |= run_stage(stage, left, out / "stages.log", path)
            except OSError as error:
                record |= {"status": FAILED, "reason": str(error)}
            for results in out.glob("*.jsonl"):
                keep_whole_lines(results)
        write_report(report, out / name)
        print(f"{record['status']:>8}  {record.get('seconds', 0):6.1f} s  {stage.name}  {record.get('reason', '')}")
        if record["status"] in (FAILED, TIMEOUT):
            print("\n".join("          | " + line for line in record.get("tail", "").splitlines()[-15:]))
            left_to_do[:0] = [] if stage.instead is None else [stage.instead]
        sys.stdout.flush()
    return report


def summary(report: Mapping) -> tuple[str, int]:
    """How many stages ended how, in words, and the exit status that a run of them deserves."""
    counts = Counter(record["status"] for record in report["stages"])
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    return words, 1 if counts[FAILED] or counts[TIMEOUT] else 0
