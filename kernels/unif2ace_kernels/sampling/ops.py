"""The sampling ops: schema, implementations, fakes, and the functions that people call.

None has a gradient: a draw is not differentiable, and sampling runs without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._checks import expect, expect_choice, expect_int, expect_pair, expect_tensor
from .._dtypes import accumulation_dtype
from .._library import KERNEL_DTYPES, Implementation, compiled, register
from .._triton import triton_implementation
from . import draw_torch
from .arguments import Draw

Tensor = torch.Tensor
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCH = ("cpu", "cuda")
CONFIDENCES = ("log_prob", "neg_entropy", "margin")
TIES = ("index", "showo")

_DRAW = (  # `Draw`
    "Tensor ids, Tensor unknown, Tensor rows, Tensor seed, Tensor offset, int first_code, int codes, float guidance, "
    "float temperature, int top_k, float top_p, str confidence, bool compact) -> (Tensor, Tensor)"
)


def _fake_sample_logits(cond: Tensor, uncond: Tensor | None, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids), torch.empty_like(ids, dtype=accumulation_dtype(cond.dtype))


def _fake_sample_hidden(
    h_cond: Tensor, h_uncond: Tensor | None, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids), torch.empty_like(ids, dtype=accumulation_dtype(weight.dtype))


def _fake_draw(cond: Tensor, uncond: Tensor | None, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), cond.new_empty(rows.shape, dtype=accumulation_dtype(cond.dtype))


# The inner op of the two samplers: a tile of rows, their code columns only.
_draw = register(
    "draw(Tensor cond, Tensor? uncond, Tensor rows, Tensor seed, Tensor offset, float guidance, float temperature, "
    "int top_k, float top_p, str confidence) -> (Tensor, Tensor)",
    implementations=[compiled("draw", "cpu"), Implementation("torch", _TORCH, draw_torch.draw)],
    fake=_fake_draw,
)
_sample_logits = register(
    f"sample_logits(Tensor cond, Tensor? uncond, {_DRAW}",
    implementations=[
        # Triton before CUDA C++ because it needs no build; the two were not yet measured against each other on a GPU.
        triton_implementation(f"{__package__}.draw_triton", "sample_logits"),
        compiled("sample_logits", "cuda", KERNEL_DTYPES),
        compiled("sample_logits", "cpu"),
        Implementation("torch", _TORCH, draw_torch.sample_logits),
    ],
    fake=_fake_sample_logits,
    serves=["sampling.sample_from_logits"],
)
_sample_hidden = register(
    f"sample_hidden(Tensor h_cond, Tensor? h_uncond, Tensor weight, Tensor? bias, {_DRAW}",
    implementations=[
        triton_implementation(f"{__package__}.head_triton", "sample_hidden"),
        compiled("sample_hidden", "cpu"),
        Implementation("torch", _TORCH, draw_torch.sample_hidden),
    ],
    fake=_fake_sample_hidden,
    serves=["sampling.sample_from_hidden"],
)
_remask = register(
    "remask(Tensor confidence, Tensor unknown, Tensor count, Tensor rows, Tensor seed, Tensor offset, "
    "Tensor temperature, str ties) -> Tensor",
    implementations=[
        triton_implementation(f"{__package__}.remask_triton", "remask"),  # before CUDA C++: as above
        compiled("remask", "cuda", KERNEL_DTYPES),
        compiled("remask", "cpu"),
        Implementation("torch", _TORCH, draw_torch.remask),
    ],
    fake=lambda confidence, unknown, *_: torch.empty_like(unknown),
    serves=["sampling.remask"],
)


def word(value: Tensor | int, argument: str, device: torch.device) -> Tensor:
    """`value` as an int64 tensor without dimensions; a tensor is not read, so that a graph can hold it."""
    if isinstance(value, Tensor):
        expect_tensor(value, argument, dtypes=[torch.int64])
        expect(value.numel() == 1, argument, "one element", f"shape {list(value.shape)}")
        expect(value.device == device, argument, f"device {device} (as ids)", value.device)
        return value.reshape(())
    expect_int(value, argument, 0, 2**63)
    return torch.full((), value, dtype=torch.int64, device=device)  # a fill: a copy would wait for a GPU


def _rows(rows: Tensor | None, like: Tensor, name: str) -> Tensor:
    """Global row indices [R]: 0, 1, 2, ... of the flattened positions unless given."""
    if rows is None:
        return torch.arange(like.numel(), device=like.device)
    expect_tensor(rows, "rows", shape=like.shape, dtypes=[torch.int64], device_of=(name, like))
    return rows.reshape(-1).contiguous()


def _draw_arguments(
    ids: Tensor, mask_id: int, unknown: Tensor | None, rows: Tensor | None, seed: Tensor | int, offset: Tensor | int,
    code_range: Sequence[int], guidance: float, temperature: float, top_k: int, top_p: float, confidence: str,
    width: int, has_uncond: bool, compact: bool,
) -> Draw:  # fmt: skip
    """Check what the two samplers share, and flatten it."""
    expect_tensor(ids, "ids", dtypes=[torch.int64])
    expect_pair(code_range, "code_range")
    first, stop = code_range
    expect(0 <= first < stop <= width, "code_range", f"0 <= first < stop <= {width} (the head's columns)", code_range)
    expect(has_uncond or guidance == 0, "guidance", "0 without an unconditional branch", guidance)
    expect(abs(guidance) < float("inf"), "guidance", "a finite number", guidance)
    in_range = temperature == 0 or 1e-6 <= temperature < float("inf")
    expect(in_range, "temperature", "0 or a finite number >= 1e-6", temperature)
    expect_int(top_k, "top_k", 0)
    expect(0 < top_p <= 1, "top_p", "a number in (0, 1] (1: no filter)", top_p)
    expect_choice(confidence, "confidence", CONFIDENCES)
    if unknown is None:
        unknown = ids == mask_id
    expect_tensor(unknown, "unknown", shape=ids.shape, dtypes=[torch.bool], device_of=("ids", ids))
    return Draw(
        ids.reshape(-1).contiguous(), unknown.reshape(-1).contiguous(), _rows(rows, ids, "ids"),
        word(seed, "seed", ids.device), word(offset, "offset", ids.device), first, stop - first, float(guidance),
        float(temperature), top_k, float(top_p), confidence, compact,
    )  # fmt: skip


def _same_leading(value: Tensor, argument: str, ids: Tensor, last: int | str) -> Tensor:
    expect_tensor(value, argument, shape=(*ids.shape, last), dtypes=_FLOATS, device_of=("ids", ids))
    value = value.reshape(ids.numel(), value.shape[-1])
    # Not .contiguous(), which leaves the strides of what has no element, or one column, as they are.
    return value if value.stride(-1) == 1 else value.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def sample_from_logits(
    cond: Tensor, uncond: Tensor | None, ids: Tensor, mask_id: int, *, code_range: Sequence[int] | None = None,
    guidance: float = 0.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: Tensor | int,
    offset: Tensor | int = 0, confidence: str = "log_prob", rows: Tensor | None = None,
    unknown: Tensor | None = None, compact: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw a code for every masked position from logits of two branches, by Gumbel-max.

    With z = ((1 + w) cond - w uncond)[code columns] and G the Gumbel numbers of (seed, offset, row, code)::

        code = argmax(filter((z - max z) / temperature) + G),    log p = (z - lse z)[code]

    Confidence is the model's own: log p of the code under the guided logits over the code columns, *before*
    temperature, top-k and top-p. At temperature 1 without filters, MaskGIT's and Show-o's case, the draw's law is
    the same; under a filter the draw's own log p would say nothing (top_k = 1 makes it 0 everywhere).

    Args:
        cond: [..., V] logits, float16, bfloat16, float32 or float64; computed in float32 (float64 for float64).
        uncond: like `cond`, or None. Not read when `guidance` is 0.
        ids: [...] int64 token ids; left as they are.
        mask_id: the id of a masked position.
        code_range: (first, stop): the columns of V that are image codes; all of them when None. A drawn id is a
            column of V; the Gumbel numbers count codes from `first`.
        guidance: w of classifier-free guidance; 0 is `cond` alone, bit for bit.
        temperature: of the draw; 0 takes the largest (the first among equals).
        top_k, top_p: filters, in that order, after guidance and temperature; 0 and 1 filter nothing. Codes that tie
            with the last one inside stay in.
        seed, offset: int, or int64 tensors of one element on the device (so that a captured graph may advance them).
            One offset a step: its low 32 bits count.
        confidence: "log_prob" of the code; "neg_entropy" of the guided law; or its "margin", the largest probability
            less the second.
        rows: [...] int64 global row indices in [0, 2**32), when `ids` is a part of something larger; 0, 1, 2, ...
            of the flattened positions when None.
        unknown: [...] bool, the positions to draw; ``ids == mask_id`` when None.
        compact: compute the positions to draw only. Changes no bit. In plain torch on CUDA all are computed, since
            finding them would wait for the device; kernels find them there.

    Returns:
        (ids, confidence), both of the shape of `ids`. Known positions keep their id and have confidence +inf. A
        position where no code is possible (the largest guided logit is -inf, NaN or +inf) keeps its id and has
        confidence -inf. A code that either branch gives -inf is never drawn.

    Raises:
        ValueError: names the argument.

    Source: MaskGIT (Chang et al. 2022) 3.2; Show-o (Xie et al. 2024) 3.3; Gumbel-max, Gumbel (1954).
    """
    expect_tensor(ids, "ids", dtypes=[torch.int64])
    flat_cond = _same_leading(cond, "cond", ids, "V")
    flat_uncond = None
    if uncond is not None:
        flat_uncond = _same_leading(uncond, "uncond", ids, cond.shape[-1])
        expect_tensor(uncond, "uncond", dtypes=[cond.dtype])
    code_range = (0, cond.shape[-1]) if code_range is None else code_range
    asked = _draw_arguments(
        ids, mask_id, unknown, rows, seed, offset, code_range, guidance, temperature, top_k, top_p, confidence,
        cond.shape[-1], uncond is not None, compact,
    )  # fmt: skip
    drawn, value = _sample_logits(flat_cond, flat_uncond, *asked)
    return drawn.view(ids.shape), value.view(ids.shape)


@torch.no_grad()
def sample_from_hidden(
    h_cond: Tensor, h_uncond: Tensor | None, weight: Tensor, bias: Tensor | None, ids: Tensor, mask_id: int, *,
    code_range: Sequence[int] | None = None, guidance: float = 0.0, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, seed: Tensor | int, offset: Tensor | int = 0, confidence: str = "log_prob",
    rows: Tensor | None = None, unknown: Tensor | None = None, compact: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sample_from_logits` of a linear head, without the logits: guidance is folded into the hidden state::

        z = W ((1 + w) h_cond - w h_uncond) + b,    code rows of W and masked positions only

    which is (1 + w) (W h_cond + b) - w (W h_uncond + b) exactly, at half the product. A bias of -inf bans a code.

    Args:
        h_cond, h_uncond: [..., D] hidden states before the head; `h_uncond` may be None.
        weight: [V, D]; the product runs in its dtype, scores and confidences in float32 (float64 for float64).
        bias: [V] or None.
        Everything else: as in `sample_from_logits`.

    Returns:
        (ids, confidence) as `sample_from_logits`.

    Raises:
        ValueError: names the argument.
    """
    expect_tensor(ids, "ids", dtypes=[torch.int64])
    expect_tensor(weight, "weight", shape=("V", "D"), dtypes=_FLOATS, device_of=("ids", ids))
    width, hidden = weight.shape
    flat_cond = _same_leading(h_cond, "h_cond", ids, hidden)
    flat_uncond = None
    if h_uncond is not None:
        flat_uncond = _same_leading(h_uncond, "h_uncond", ids, hidden)
        expect_tensor(h_uncond, "h_uncond", dtypes=[h_cond.dtype])
    if bias is not None:
        expect_tensor(bias, "bias", shape=(width,), dtypes=_FLOATS, device_of=("ids", ids))
    code_range = (0, width) if code_range is None else code_range
    asked = _draw_arguments(
        ids, mask_id, unknown, rows, seed, offset, code_range, guidance, temperature, top_k, top_p, confidence,
        width, h_uncond is not None, compact,
    )  # fmt: skip
    bias = None if bias is None else bias.contiguous()
    drawn, value = _sample_hidden(flat_cond, flat_uncond, weight.contiguous(), bias, *asked)
    return drawn.view(ids.shape), value.view(ids.shape)


def remask(
    confidence: Tensor, unknown: Tensor, count: Tensor | int, temperature: Tensor | float = 0.0, *,
    seed: Tensor | int, offset: Tensor | int = 0, ties: str = "index", rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The positions to mask again: in each sample, the `count` least confident of the unknown ones.

    They are ranked by confidence + temperature * G with Gumbel numbers G of (seed, offset, row), a stream of their
    own.

    Args:
        confidence: [B, N] float32 or float64; NaN ranks lowest.
        unknown: [B, N] bool: the positions that may be masked. The others never are.
        count: [B] int64 or an int: how many; a count above a sample's unknown positions takes them all, one below
            zero takes none.
        temperature: of the noise; 0 ranks by confidence alone. A number, or a float32 tensor of one element on the
            device, finite and >= 0, which is not read on the host (so that a captured graph may change it).
        seed, offset: as in `sample_from_logits`.
        ties: "index" masks exactly `count`, the lower index first among equals; "showo" masks what is strictly
            below the value of rank `count` (from 0) in its sample, so equals at the cut all stay unmasked.
        rows: [B, N] int64 global row indices, as in `sample_from_logits`.

    Returns:
        [B, N] bool.

    Raises:
        ValueError: names the argument.

    Source: MaskGIT (Chang et al. 2022), algorithm 1; the noise as in its public code.
    """
    expect_tensor(confidence, "confidence", shape=("B", "N"), dtypes=[torch.float32, torch.float64])
    device_of = ("confidence", confidence)
    expect_tensor(unknown, "unknown", shape=confidence.shape, dtypes=[torch.bool], device_of=device_of)
    if isinstance(temperature, Tensor):
        expect_tensor(temperature, "temperature", dtypes=[torch.float32], device_of=device_of)
        expect(temperature.numel() == 1, "temperature", "one element", f"shape {list(temperature.shape)}")
        temperature = temperature.reshape(())
    else:
        expect(0 <= temperature < float("inf"), "temperature", "a finite number >= 0", temperature)
        temperature = torch.full((), temperature, dtype=torch.float32, device=confidence.device)
    expect_choice(ties, "ties", TIES)
    if isinstance(count, int):
        count = torch.full(confidence.shape[:1], count, device=confidence.device)
    expect_tensor(count, "count", shape=confidence.shape[:1], dtypes=[torch.int64], device_of=device_of)
    rows = _rows(rows, confidence, "confidence").view(confidence.shape)
    seed, offset = word(seed, "seed", confidence.device), word(offset, "offset", confidence.device)
    masked: Tensor = _remask(
        confidence.contiguous(), unknown.contiguous(), count.contiguous(), rows, seed, offset, temperature, ties
    )
    return masked
