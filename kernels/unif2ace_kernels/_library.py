"""The one torch.library.Library of the package: schema, implementations by device, fake and autograd of each op.

A room's ops.py calls `register` once an op. An op may have several implementations for a device (compiled C++,
CUDA C++, Triton, plain torch), given in order of preference; the first that can run here is the one installed, when
the package is imported, and `explain` says which it is and why the ones before it were passed over. One that takes
some floating dtypes only leaves calls with others to the next in the list. Nothing here looks for a device: whether
Triton or the compiled extension can be imported is all that is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from ._ops import add_op_namespace_prefix, ops

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
NATIVE_NAMESPACE = "unif2ace_native"  # where the compiled extension keeps its ops, under the same schemas
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_DISPATCH_KEY = {"cpu": "CPU", "cuda": "CUDA"}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what GPU kernels take; float64 stays with torch


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        name: what `explain` calls it: "torch", "c++", "triton" or "cuda c++".
        devices: device types it serves.
        function: the callable of the op's schema; may be None where `missing` gives a reason.
        missing: why it cannot run in this installation; None when it can.
        dtypes: of the floating-point tensors that it takes; None for all.
    """

    name: str
    devices: tuple[str, ...]
    function: Callable[..., Any] | None
    missing: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def refusal(self, tensors: Iterable[object]) -> str | None:
        """Why it does not take `tensors` (what is no tensor is passed over); None when it does."""
        if self.dtypes is None:
            return None
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                return f"takes {', '.join(map(_short, self.dtypes))}, not {_short(tensor.dtype)}"
        return None


@dataclass(frozen=True)
class Explanation:
    """Which implementation of an op runs for the given tensors, and why the preferred ones do not."""

    op: str
    device: str
    implementation: str
    passed_over: tuple[tuple[str, str], ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.implementation}"]
        lines += [f"  not {name}: {why}" for name, why in self.passed_over]
        return "\n".join(lines)


_IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {}
_OP_OF: dict[str, str] = {}  # by the public function that calls it: "moe.experts" -> "moe_experts"


def register(
    schema: str,
    *,
    implementations: Sequence[Implementation],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    serves: Sequence[str] = (),
) -> Callable[..., Any]:
    """Define an op, install its implementations, its fake and (with `backward`) its autograd formula.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``, without the namespace.
        implementations: in order of preference; for each device the first that is not `missing` is installed, and
            the ones after it where it takes some dtypes only.
        fake: shape and dtype propagation, as for `torch.library.register_fake`.
        setup_context, backward: as for `torch.library.register_autograd`.
        serves: the public functions that run it, ``"room.name"``; `explain` takes these names too.

    Returns:
        The op's default overload, ``torch.ops.unif2ace.<name>.default``; with `backward`, one that refuses tangents.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _IMPLEMENTATIONS[name] = tuple(implementations)
    _OP_OF.update(dict.fromkeys(serves, name))
    for device, key in _DISPATCH_KEY.items():
        usable = runnable(name, device)
        if usable:
            _LIBRARY.impl(name, usable[0].function if usable[0].dtypes is None else _by_dtype(name, usable), key)
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            add_op_namespace_prefix(name), backward, setup_context=setup_context, lib=_LIBRARY
        )
    op: Callable[..., Any] = getattr(ops, name).default
    return op if backward is None else _without_tangents(name, op)


def _without_tangents(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, but an error where torch.library would drop a forward-mode derivative, which then reads as 0."""

    def call(*arguments: Any) -> Any:
        # No level (-1) is entered outside of forward mode: one comparison a call.
        if forward_ad._current_level >= 0:
            for each in arguments:
                if isinstance(each, torch.Tensor) and forward_ad.unpack_dual(each).tangent is not None:
                    raise RuntimeError(f"unif2ace::{name} has no forward-mode derivative; use reverse mode")
        return op(*arguments)

    return call


def runnable(op: str, device: str) -> tuple[Implementation, ...]:
    """Implementations of `op` that can run on `device` in this installation, in order of preference."""
    return tuple(each for each in _IMPLEMENTATIONS[op] if device in each.devices and each.missing is None)


def _by_dtype(op: str, usable: Sequence[Implementation]) -> Callable[..., Any]:
    """The first of `usable` that takes the call's dtypes."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        tensors = (*arguments, *keywords.values())
        for each in usable:
            if each.function is not None and each.refusal(tensors) is None:
                return each.function(*arguments, **keywords)
        raise ValueError(f"{op}: " + "; ".join(f"{each.name} {each.refusal(tensors)}" for each in usable))

    return call


def _choose(
    name: str, device: str, tensors: Sequence[torch.Tensor] = ()
) -> tuple[Implementation | None, tuple[tuple[str, str], ...]]:
    passed_over: list[tuple[str, str]] = []
    for candidate in _IMPLEMENTATIONS[name]:
        if device not in candidate.devices:
            continue
        why_not = candidate.missing or candidate.refusal(tensors)
        if why_not is None:
            return candidate, tuple(passed_over)
        passed_over.append((candidate.name, why_not))
    return None, tuple(passed_over)


def registered_ops() -> tuple[str, ...]:
    """Names of every op that the package registered, without the namespace, in order."""
    return tuple(sorted(_IMPLEMENTATIONS))


def explain(op: str, *tensors: torch.Tensor) -> Explanation:
    """Say which implementation of `op` runs for `tensors`, and why each preferred one does not.

    Args:
        op: a public function, ``"moe.experts"``, or an op's name, with or without the ``unif2ace::`` prefix (see
            `registered_ops`).
        tensors: the op's tensor arguments; their device and floating dtypes decide. Without any, the CPU is meant.

    Returns:
        An `Explanation`; ``print`` it for a sentence a line.

    Raises:
        ValueError: unknown `op`, tensors on several devices, or a device that no implementation serves.
    """
    name = _OP_OF.get(op, op.removeprefix(add_op_namespace_prefix("")))
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"op: expected one of {', '.join([*sorted(_OP_OF), *registered_ops()])}, got {op!r}")
    devices = sorted({tensor.device.type for tensor in tensors}) or ["cpu"]
    if len(devices) > 1:
        raise ValueError(f"tensors: expected all on one device, got {' and '.join(devices)}")
    chosen, passed_over = _choose(name, devices[0], tensors)
    if chosen is None:
        known = sorted({device for each in _IMPLEMENTATIONS[name] for device in each.devices})
        if devices[0] in known:
            raise ValueError(f"tensors: no implementation runs: {'; '.join(map(': '.join, passed_over))}")
        raise ValueError(f"tensors: expected a device of {', '.join(known)}, got {devices[0]}")
    return Explanation(name, devices[0], chosen.name, passed_over)


def _left_out(record: Path) -> dict[str, str]:
    """What the build left out and why, as it wrote down; the same reason for all where that cannot be read."""
    try:
        missing = json.loads(record.read_text())["missing"]
        return {part: reason for part, reason in missing.items() if reason is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = f"{record.name} cannot be read ({type(error).__name__}: {error}): build it again"
        return {"c++": damaged, "cuda c++": damaged}


def _load_extension(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Load the compiled ops; return why they are not there (None when they are) and what the build left out."""
    left_out = _left_out(folder / "_build.json")
    library = folder / "_C_ops.so"
    if not library.exists():
        never = "no build was run; `pip install --no-build-isolation .` in the source tree runs one"
        return f"not built: {left_out.get('c++', never)}", left_out
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"does not load: {error}", left_out
    return None, left_out


EXTENSION_MISSING, _LEFT_OUT = _load_extension(Path(__file__).parent)


def compiled(op: str, device: str, dtypes: tuple[torch.dtype, ...] | None = None) -> Implementation:
    """The compiled implementation of `op`: "c++" for ``"cpu"``, "cuda c++" for ``"cuda"``, or why it is missing.

    dtypes: the floating dtypes that it takes, None for all; see `Implementation`.
    """
    name = {"cpu": "c++", "cuda": "cuda c++"}[device]
    missing = EXTENSION_MISSING
    if missing is None and not _has_native_kernel(op, device):
        missing = f"the extension that was built has no {op} for {device}: build it again"
        if name in _LEFT_OUT:
            missing = f"built without it: {_LEFT_OUT[name]}"
    if missing is not None:
        return Implementation(name, (device,), None, missing, dtypes)
    return Implementation(name, (device,), getattr(getattr(torch.ops, NATIVE_NAMESPACE), op).default, None, dtypes)


def _has_native_kernel(op: str, device: str) -> bool:
    qualified = f"{NATIVE_NAMESPACE}::{op}"
    has_schema = torch._C._dispatch_has_kernel(qualified)
    return has_schema and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, _DISPATCH_KEY[device])


def build_information() -> dict[str, str]:
    """Compiler, nvcc, CUDA architectures and torch that the extension was built with.

    Raises:
        ImportError: the extension's Python module was not built.
    """
    from ._C import build_information as recorded

    information: dict[str, str] = recorded()
    return information
