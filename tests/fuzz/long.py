"""Fuzzes for as long as asked, round after round with another seed, and stops at the first failure.

    python tests/fuzz/long.py --seconds 600 [pytest's arguments, such as -k route or -n 4]

Hypothesis prints each failure with the smallest arguments that it found; they belong into a plain test of the room.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options, rest = parser.parse_known_args()
    start, rounds, status = time.monotonic(), 0, 0
    while status == 0 and (rounds == 0 or time.monotonic() - start < options.seconds):
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(FOLDER),
            "-x",
            f"--hypothesis-seed={options.seed + rounds}",
            *rest,
        ]
        status = subprocess.run(command, env={**os.environ, "UNIF2ACE_FUZZ": "long"}, cwd=FOLDER.parents[1]).returncode
        rounds += 1
    seconds = time.monotonic() - start
    print(f"{rounds} rounds in {seconds:.0f} s, seeds {options.seed} to {options.seed + rounds - 1}, status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
