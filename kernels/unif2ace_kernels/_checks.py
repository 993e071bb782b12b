"""Argument checks: a ValueError names the argument, what was expected and what came.

Checks look at Python values and tensor metadata only, never at tensor contents, so that they cost no
device synchronisation and trace cleanly. Checks of contents are the callers' to ask for.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch

_INTS = (int, torch.SymInt)


def expect(condition: bool, argument: str, expected: str, received: object) -> None:
    """Raise ``ValueError("<argument>: expected <expected>, got <received>")`` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {received}")


def expect_tensor(
    value: object,
    argument: str,
    *,
    shape: Sequence[int | str | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device_of: tuple[str, torch.Tensor] | None = None,
) -> None:
    """Check that `value` is a tensor of the given shape, dtype and device.

    Args:
        shape: one entry a dimension: an int must match, a str names a free dimension (``"T"``), None is free.
        dtypes: the dtypes that are allowed.
        device_of: (name, tensor) of the argument whose device `value` must share.

    Raises:
        ValueError: names `argument`, what was expected and what came.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{argument}: expected a torch.Tensor, got {type(value).__name__}")
    # Words are put together for a failure only: sizes may be symbols, which torch.compile cannot spell.
    if shape is not None and not (
        value.dim() == len(shape)
        and all(not isinstance(want, _INTS) or want == have for want, have in zip(shape, value.shape))
    ):
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{argument}: expected shape [{wanted}], got shape {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{argument}: expected dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if device_of is not None and value.device != device_of[1].device:
        raise ValueError(f"{argument}: expected device {device_of[1].device} (as {device_of[0]}), got {value.device}")


def expect_int(value: Any, argument: str, low: int, stop: int | None = None) -> None:
    """Check that `value` is an int in [low, stop), or at least `low`."""
    # As above: the words only for a failure, since a symbol has no repr under torch.compile.
    # Python's own first: an abstract class is nothing that torch.compile looks into.
    is_int = isinstance(value, _INTS) or isinstance(value, numbers.Integral)
    if not (is_int and low <= value and (stop is None or value < stop)):
        wanted = f"an int >= {low}" if stop is None else f"an int in [{low}, {stop})"
        raise ValueError(f"{argument}: expected {wanted}, got {value!r}")


def expect_pair(value: object, argument: str) -> None:
    """Check that `value` is a sequence of two, where a range begins and where it ends."""
    if not (isinstance(value, Sequence) and len(value) == 2):
        raise ValueError(f"{argument}: expected (start, end), got {value!r}")


def expect_choice(value: object, argument: str, choices: Sequence[object]) -> None:
    """Check that `value` is one of `choices`."""
    expect(value in choices, argument, "one of " + ", ".join(map(repr, choices)), repr(value))
