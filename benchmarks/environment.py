"""What a result was measured on: commit, versions, device, threads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL_NEEDS = ("transformers", "PIL")  # what the model cannot be imported without


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, object]:
    """Commit and whether files beside the results differ from it; COMMIT in the environment where git is missing."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return {"commit": os.environ.get("COMMIT"), "dirty": None}
    return {"commit": head, "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results"))}


def versions() -> dict[str, str | None]:
    """Python's and the packages' versions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "unif2ace"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def not_found(packages: Iterable[str], folders: Iterable[str] = ()) -> list[str]:
    """Those of the packages that are neither installed nor in one of the folders."""
    inside = [Path(each) for each in folders]
    return [
        each
        for each in packages
        if not (importlib.util.find_spec(each) or any((folder / each).is_dir() for folder in inside))
    ]


def cpu_name() -> str:
    """The processor's model, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def implementations(device_type: str) -> dict[str, str]:
    """Which implementation of each of the package's ops runs on the device."""
    import torch

    from unif2ace_kernels import d3diff, moe, random, sampling  # noqa: F401  their import registers the ops
    from unif2ace_kernels._library import explain, registered_ops

    tensor = torch.empty(0, device=device_type)
    return {op: explain(op, tensor).implementation for op in registered_ops()}


def shortfalls(device_type: str) -> list[str]:
    """Which better implementations of the package's ops are missing in this installation: a line a reason."""
    import torch

    from unif2ace_kernels import d3diff, moe, random, sampling  # noqa: F401  their import registers the ops
    from unif2ace_kernels._library import explain, registered_ops

    tensor = torch.empty(0, device=device_type)
    found: dict[tuple[str, str], list[str]] = {}
    for op in registered_ops():
        for missing in explain(op, tensor).passed_over:
            found.setdefault(missing, []).append(op)
    return [f"ours without {name} in {len(ops)} ops: {why}" for (name, why), ops in found.items()]


def without_folders(text: str) -> str:
    """`text` without the folders of this machine: a file is named from the repository or its package on."""
    return re.sub(
        r"(?<![\w.])/(?:[^\s/\"']+/)*?(?:site-packages/|(?=[^\s/\"']+(?:[\s\"']|$)))", "", text.replace(f"{ROOT}/", "")
    )


def describe(device_type: str, module: str = "run") -> dict[str, object]:
    """The fields that every result line carries; `module` of this package is the command."""
    import torch

    name = torch.cuda.get_device_name() if device_type == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        **commit(),
        "versions": versions(),
        "implementations": implementations(device_type),
        "device": device_type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m benchmarks.{module}", *map(without_folders, sys.argv[1:])]),
    }
