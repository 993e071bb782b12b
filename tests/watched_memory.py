"""What interpreted Triton kernels read and write: inside their tensors, and no program what another one wrote.

On a GPU the one is an illegal access, the other a result that hangs on the order of programs; the interpreter, which
runs them one after the other in one process's memory, shows neither by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

_Accesses = dict[int, list[tuple[int, np.ndarray]]]


class MemoryFault(RuntimeError):
    """An access outside of the launch's tensors, or to what another program of the launch writes."""


class Watch:
    """The accesses of the launch that is running: addresses of elements, by place (a tensor's memory) and program."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._kernel = ""
        self._read: _Accesses = {}
        self._written: _Accesses = {}

    def begin(self, kernel: str) -> None:
        self._kernel, self._read, self._written = kernel, defaultdict(list), defaultdict(list)

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Only the memory of `tensors` may be accessed until the next launch."""
        memory = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        self._places = sorted((start, start + size) for start, size in memory.items() if size)

    def access(self, addresses: np.ndarray, mask: np.ndarray, size: int, program: int, what: str) -> None:
        """`what`: "read" or "write"; or "other", which is done on purpose where others write."""
        taken = np.asarray(addresses)[np.asarray(mask).astype(bool)].ravel()
        if not taken.size:
            return
        lowest, highest = int(taken.min()), int(taken.max()) + size
        place = next((i for i, (start, end) in enumerate(self._places) if start <= lowest and highest <= end), None)
        if place is None:
            raise MemoryFault(f"{self._kernel}, program {program}: a {what} leaves its tensor")
        if what != "other":
            (self._read if what == "read" else self._written)[place].append((program, taken))

    def end(self) -> None:
        """The launch is over: was anything written by one program and accessed by another?"""
        for place, parts in self._written.items():
            written, owner = _by_address(parts)
            same = written[1:] == written[:-1]
            if (same & (owner[1:] != owner[:-1])).any():
                raise MemoryFault(f"{self._kernel}: two programs write to one place")
            for program, read in self._read[place]:
                at = np.minimum(np.searchsorted(written, read), len(written) - 1)
                if ((written[at] == read) & (owner[at] != program)).any():
                    raise MemoryFault(f"{self._kernel}: program {program} reads what another one writes")


def _by_address(parts: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The addresses, ascending, and the program of each."""
    addresses = np.concatenate([each for _, each in parts])
    owner = np.repeat([program for program, _ in parts], [len(each) for _, each in parts])
    order = np.lexsort((owner, addresses))
    return addresses[order], owner[order]


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every interpreted launch raises on a `MemoryFault`.

    A load with the cache modifier .cg is one that reads what other programs wrote, after an atomic that says they did.
    """
    from triton.runtime import interpreter

    builder, executor, watched = interpreter.InterpreterBuilder, interpreter.GridExecutor, Watch()

    def program() -> int:
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, height, depth = interpreter.interpreter_builder.grid_dim
        return int((x * height + y) * depth + z)

    def noted(name: str, what: str, pointers_at: int, mask_at: int) -> None:
        original = getattr(builder, name)

        def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
            pointers, mask = arguments[pointers_at], arguments[mask_at]
            is_cg = any(getattr(each, "name", None) == "CG" for each in (*arguments, *keywords.values()))
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            watched.access(pointers.data, mask.data, size, program(), "other" if is_cg else what)
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(builder, name, method)

    noted("create_masked_load", "read", 0, 1)
    noted("create_masked_store", "write", 0, 2)
    noted("create_atomic_rmw", "other", 1, 3)

    def tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
        for each in values:
            if isinstance(each, tuple):
                yield from tensors(each)
            elif hasattr(each, "base"):  # a descriptor, or Triton's view of a tensor as another dtype
                yield each.base
            elif isinstance(each, torch.Tensor):
                yield each

    init, call = executor._init_args_hst, executor.__call__

    def known(self: Any, *arguments: Any) -> Any:
        positional, keywords = init(self, *arguments)
        watched.know(tensors([*positional, *keywords.values()]))
        return positional, keywords

    def launch(self: Any, *arguments: Any, **keywords: Any) -> None:
        watched.begin(self.fn.__name__)
        call(self, *arguments, **keywords)
        watched.end()

    monkeypatch.setattr(executor, "_init_args_hst", known)
    monkeypatch.setattr(executor, "__call__", launch)
