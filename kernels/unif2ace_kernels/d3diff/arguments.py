"""Arguments of the public functions: their two layouts made one, their checks, and when values may be looked at."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._checks import expect, expect_tensor
from .objective import Objective

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def objective_of(objective: Objective | None, options: dict[str, Any]) -> Objective:
    """The objective that was given, whole or as keywords of its fields."""
    if objective is None:
        return Objective(**options)
    expect(not options, "objective", "no keywords of its fields beside it", ", ".join(options))
    return objective


def flatten_labels(
    rows: torch.Tensor, name: str, targets: torch.Tensor, targets_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, *] and [T], from either layout."""
    expect_tensor(rows, name, dtypes=FLOATS)
    expect(rows.dim() in (2, 3), name, "shape [T, *] or [B, N, *]", f"shape {list(rows.shape)}")
    expect(rows.shape[-1] > 0, name, "at least one column", f"shape {list(rows.shape)}")
    expect_tensor(targets, targets_name, shape=rows.shape[:-1], dtypes=(torch.int64,), device_of=(name, rows))
    return rows.reshape(-1, rows.shape[-1]), targets.reshape(-1).contiguous()


def flatten(
    rows: torch.Tensor,
    name: str,
    targets: torch.Tensor,
    mask_prob: torch.Tensor,
    sample_id: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[T, *], [T] and the sample of each row, from either layout; None where sample b is row b of [B, N, *]."""
    flat = flatten_labels(rows, name, targets, "targets")
    batch = rows.shape[0] if rows.dim() == 3 and sample_id is None else "B"
    expect_tensor(mask_prob, "mask_prob", shape=(batch,), dtypes=FLOATS, device_of=(name, rows))
    if sample_id is None:
        expect(rows.dim() == 3, "sample_id", f"int64 [T] with {name} [T, *]", None)
        return *flat, None
    expect_tensor(sample_id, "sample_id", shape=rows.shape[:-1], dtypes=(torch.int64,), device_of=(name, rows))
    return *flat, sample_id.reshape(-1)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Whether weight [V, D] and bias [V] are those of a head of hidden [T, D]."""
    expect_tensor(weight, "weight", shape=("V", hidden.shape[-1]), dtypes=FLOATS, device_of=("hidden", hidden))
    if bias is not None:
        expect_tensor(bias, "bias", shape=(weight.shape[0],), dtypes=FLOATS, device_of=("hidden", hidden))


def may_look(tensor: torch.Tensor, check_values: bool | None) -> bool:
    """Whether to look at values: as asked, else where that costs no synchronisation and no graph break."""
    if check_values is None:
        return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return check_values


def expect_probabilities(mask_prob: torch.Tensor) -> None:
    """Each of mask_prob [B] in (0, 1]. Reads the device, as the next two do."""
    if mask_prob.numel() == 0:
        return
    low, high = (each.item() for each in mask_prob.aminmax())
    if not (low > 0 and high <= 1):  # a NaN is neither
        bad = mask_prob[~((mask_prob > 0) & (mask_prob <= 1))]
        expect(False, "mask_prob", "values in (0, 1]", bad[:4].tolist())


def expect_targets(targets: torch.Tensor, valid: torch.Tensor, allowed: tuple[int, int], name: str = "targets") -> None:
    """Each of targets [T] that is `valid` in [start, stop) = `allowed`."""
    if targets.numel() == 0:
        return
    low, high = (each.item() for each in torch.where(valid, targets, allowed[0]).aminmax())
    if low < allowed[0] or high >= allowed[1]:
        bad = targets[valid & ((targets < allowed[0]) | (targets >= allowed[1]))]
        wanted = f"tokens in [{allowed[0]}, {allowed[1]}) or ignore_index"
        expect(False, name, wanted, bad[:4].tolist())


def expect_samples(mask_prob: torch.Tensor, sample_id: torch.Tensor | None) -> None:
    """mask_prob [B] as above, and sample_id [T] in [0, B), not decreasing."""
    expect_probabilities(mask_prob)
    if sample_id is None or sample_id.numel() == 0:
        return
    bad = (sample_id < 0) | (sample_id >= mask_prob.shape[0])
    if bool(bad.any()):
        expect(False, "sample_id", f"values in [0, B = {mask_prob.shape[0]})", sample_id[bad][:4].tolist())
    if bool((sample_id[1:] < sample_id[:-1]).any()):
        expect(False, "sample_id", "rows of a sample together, in order", "a smaller id after a larger one")


def expect_logits(lse: torch.Tensor, *, strict: bool) -> None:
    """No labelled row of -inf alone; `strict`: nothing that is not finite either. Rows without a label have lse 0."""
    if lse.numel() == 0:
        return
    low, high = (each.item() for each in lse.aminmax())
    if low == -math.inf:
        rows = (lse == -torch.inf).nonzero()[:4, 0].tolist()
        expect(False, "logits", "a logit above -inf in every row", f"-inf alone in rows {rows}")
    if strict and not (low > -math.inf and high < math.inf):
        rows = (~lse.isfinite()).nonzero()[:4, 0].tolist()
        expect(False, "logits", "finite values in every labelled row", f"NaN or inf in rows {rows}")
