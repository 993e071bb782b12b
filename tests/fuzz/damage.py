"""Damage to files, as it comes and as it is meant: cut, flipped, overwritten, and JSON with other values in it."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

MEMORY, SECONDS = 1 << 30, 60
# What stands where a number, a text or a list belongs.
STRANGE = [
    None, True, 0, -1, 1, 3, 2**31, 2**62, 10**30, 0.5, -1e308, float("inf"), float("nan"), "", "x", "9", "../../x",
    "\x00", "\ud800", [], [[]], [1, 2], {}, {"a": 1}, [None], "a" * 300,
]  # fmt: skip


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more than `MEMORY` bytes above what is there, else MemoryError; no more than `SECONDS`, else TimeoutError."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@st.composite
def damaged(draw: Callable, content: bytes) -> bytes:
    """`content` after one to three of: a cut, flipped bits, bytes put over, put in or taken out, nothing but noise."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        if draw(st.booleans()):  # headers are where most is decided
            place = min(place, draw(st.integers(0, 200)))
        kind = draw(st.sampled_from(["cut", "flip", "over", "in", "out", "size", "noise", "repeat"]))
        some = draw(st.binary(min_size=1, max_size=12))
        if kind == "cut":
            content = content[:place]
        elif kind == "flip" and content:
            flipped = content[place] ^ (1 << draw(st.integers(0, 7)))
            content = content[:place] + bytes([flipped]) + content[place + 1 :]
        elif kind == "over":
            content = content[:place] + some + content[place + len(some) :]
        elif kind == "in":
            content = content[:place] + some + content[place:]
        elif kind == "out":
            content = content[:place] + content[place + len(some) :]
        elif kind == "size":  # a length that is too large
            number = struct.pack("<Q", draw(st.sampled_from([2**60, 2**63, 2**64 - 1, 2**32, 2**31 - 1, 10**8, 0])))
            content = content[:place] + number + content[place + 8 :]
        elif kind == "noise":
            content = draw(st.binary(max_size=200))
        else:
            content = content[:place] + some * 2000 + content[place:]
    return content


@st.composite
def strange_json(draw: Callable, value: Any) -> bytes:
    """The JSON of `value` with one to three of its values, or keys, made strange."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while isinstance(holder, (dict, list)) and holder:
            key = draw(st.sampled_from(sorted(holder, key=str) if isinstance(holder, dict) else range(len(holder))))
            inner = holder[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
                holder = inner
                continue
            kind = draw(st.sampled_from(["value", "value", "value", "gone", "more"]))
            if kind == "value":
                holder[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))  # it may be made stranger
            elif kind == "gone" and isinstance(holder, dict):
                del holder[key]
            elif isinstance(holder, dict):
                holder[draw(st.sampled_from(["", "x", "__class__", str(key) + " "]))] = inner
            break
    text = json.dumps(value)
    kind = draw(st.sampled_from(["as it is"] * 12 + ["list", "not UTF-8"]))
    if kind == "list":
        text = f"[{text}]"
    return text.encode() + b"\xff" if kind == "not UTF-8" else text.encode()


# JSON that Python's reader refuses with other errors than its own.
NESTED, DIGITS = b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"
