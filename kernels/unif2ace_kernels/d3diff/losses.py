"""Public functions of the room: the noise of training, the D3Diff loss and the next-token loss beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._autocast import autocast_dtype
from .._checks import expect, expect_int, expect_pair, expect_tensor
from .._dtypes import accumulation_dtype
from .arguments import (
    FLOATS,
    check_head,
    expect_logits,
    expect_probabilities,
    expect_samples,
    expect_targets,
    flatten,
    flatten_labels,
    may_look,
    objective_of,
)
from .objective import Coefficients, Objective
from .ops import head_op, logits_op, noise_op, statistics_op
from .weights import RowWeights, mean_rows, row_weights

# The loss, and ce, lse, mass, hit of each row.
HeadTerms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class LossStats(NamedTuple):
    """Detached scalars beside a loss; loss = ce_coef * ce + alpha * score.

    Attributes:
        ce: mean cross entropy of the labelled rows (nats); the mask term.
        score: the score term, reduced, without alpha and without its constant.
        score_constant: what the reading's score entropy holds beside `score` and no gradient sees. Infinite at m = 1
            for `paper` (it is not integrable in time), so it is reported and never added.
        lse: mean log-sum-exp of the labelled rows' logits.
        masked_count: number of labelled rows, int64.
        accuracy: share of labelled rows whose target has the largest logit.
    """

    ce: torch.Tensor
    score: torch.Tensor
    score_constant: torch.Tensor
    lse: torch.Tensor
    masked_count: torch.Tensor
    accuracy: torch.Tensor


class JointStats(NamedTuple):
    """Statistics of `joint_loss`: those of its image rows and those of its text rows."""

    image: LossStats
    text: LossStats


def noise(
    tokens: torch.Tensor,
    mask_prob: torch.Tensor,
    mask_id: int,
    *,
    exact_count: bool = True,
    seed: int,
    offset: int = 0,
    first_row: int = 0,
    check_values: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask tokens of each row: the forward process that the loss is trained under.

    A position's draw depends on (seed, offset, first_row + its row, its column) alone: the same call gives the same
    bits on every device, and a batch split over ranks the same as the whole when `first_row` says where a part begins.

    Args:
        tokens: int64 [B, N].
        mask_prob: floating [B], m in (0, 1]: `Schedule.mask_prob` of u ~ U(0, 1).
        mask_id: the mask token.
        exact_count: mask round(N m) positions (half to even, at least one), a uniformly random subset, as Show-o
            does; otherwise each position on its own with probability m.
        seed: in `[-2**63, 2**63)`.
        offset: the training step, in `[0, 2**32)`.
        first_row: index of row 0 in the batch.
        check_values: look at the contents of mask_prob. None: on CPU, unless compiling. On CUDA it synchronises.

    Returns:
        noised int64 [B, N] and mask bool [B, N], true where a token was replaced.

    Raises:
        ValueError: wrong shapes, dtypes or devices; with checks also m outside (0, 1].
    """
    expect_tensor(tokens, "tokens", shape=("B", "N"), dtypes=(torch.int64,))
    expect_tensor(mask_prob, "mask_prob", shape=(tokens.shape[0],), dtypes=FLOATS, device_of=("tokens", tokens))
    for name, value, low, stop in (
        ("mask_id", mask_id, -(2**63), 2**63), ("seed", seed, -(2**63), 2**63),
        ("offset", offset, 0, 2**32), ("first_row", first_row, 0, 2**63),
    ):  # fmt: skip
        expect_int(value, name, low, stop)
    if may_look(mask_prob, check_values):
        expect_probabilities(mask_prob)
    noised, mask = noise_op(tokens, mask_prob, mask_id, exact_count, seed, offset, first_row)
    return noised, mask


def loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    mask_prob: torch.Tensor,
    sample_id: torch.Tensor | None = None,
    *,
    objective: Objective | None = None,
    ignore_index: int = -100,
    check_values: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, LossStats]:
    """The D3Diff loss of the last hidden states, ce_coef * CE + alpha * score entropy, and its statistics.

    Logits are made for labelled rows only, for the needed columns only and for a chunk of rows at a time. Gradients
    for `hidden`, `weight` and `bias` are made in the forward; differentiating twice raises. Without a row, or without
    a label, the loss and its gradients are 0.

    Args:
        hidden: [T, D], or [B, N, D] with sample b in row b; half, float or double.
        weight: [V, D], the head's. bias: [V] or None. Under autocast the products run in its dtype.
        targets: int64 [T] or [B, N]: the clean token x0 at masked positions, `ignore_index` elsewhere.
        mask_prob: [B], m in (0, 1] of each sample.
        sample_id: int64 [T], the sample of each row, not decreasing; None with [B, N, D].
        objective: what to compute; or its fields as keywords: ``code_range=(start, end), alpha=0.01, score="radd"``.
        check_values: look at the contents of targets, mask_prob and sample_id, and for rows of -inf. None: on CPU,
            unless compiling. True: on any device, where it synchronises, and a row that is not finite raises too.

    Returns:
        (loss, stats): a float32 scalar (float64 for float64 inputs) and `LossStats`.

    Raises:
        ValueError: an argument's shape, dtype, device or value; with checks also m outside (0, 1], a target outside
            its range, a sample id outside [0, B) or out of order, a row whose logits are all -inf.

    Source: UniF2ace, L_D3Diff; Lou et al., SEDD (2024), score entropy; the readings are in the room's README.
    """
    objective = objective_of(objective, options)
    hidden, targets, sample_id = flatten(hidden, "hidden", targets, mask_prob, sample_id)
    check_head(hidden, weight, bias)
    vocabulary = weight.shape[0]
    columns = objective.columns(vocabulary)
    valid = targets != ignore_index
    look = may_look(hidden, check_values)
    if look:
        expect_targets(targets, valid, objective.target_range(vocabulary))
        expect_samples(mask_prob, sample_id)
    rows = row_weights(objective, valid, mask_prob, sample_id, columns[1] - columns[0])
    weights = rows.combined(objective.ce_coef, objective.alpha)
    value, *terms = _head(hidden, weight, bias, targets, None, weights, [columns], objective.code_range, ignore_index)
    if look:
        expect_logits(terms[1], strict=check_values is True)
    return value, _stats(rows, *terms)


def loss_from_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask_prob: torch.Tensor,
    sample_id: torch.Tensor | None = None,
    *,
    objective: Objective | None = None,
    ignore_index: int = -100,
    check_values: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, LossStats]:
    """`loss` for those who have the logits of the whole vocabulary, [T, V] or [B, N, V]; otherwise as `loss`."""
    objective = objective_of(objective, options)
    logits, targets, sample_id = flatten(logits, "logits", targets, mask_prob, sample_id)
    vocabulary = logits.shape[1]
    start, end = objective.columns(vocabulary)
    valid = targets != ignore_index
    look = may_look(logits, check_values)
    if look:
        expect_targets(targets, valid, objective.target_range(vocabulary))
        expect_samples(mask_prob, sample_id)
    rows = row_weights(objective, valid, mask_prob, sample_id, end - start)
    if logits.shape[0] == 0:
        value, *terms = _no_rows(logits.dtype, logits)
        return value, _stats(rows, *terms)
    weights, size = _normalised(rows.combined(objective.ce_coef, objective.alpha), logits.dtype)
    value, *terms = logits_op(logits, targets, *weights, start, end, objective.code_range, ignore_index)
    if look:
        expect_logits(terms[1], strict=check_values is True)
    return value if size is None else value * size, _stats(rows, *terms)


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    shift: bool = False,
    columns: tuple[int, int] | None = None,
    ignore_index: int = -100,
    check_values: bool | None = None,
) -> tuple[torch.Tensor, LossStats]:
    """Mean cross entropy of the understanding task, by the same op: alpha = 0, any columns.

    Args:
        hidden: [T, D] or [B, N, D]. weight: [V, D]. bias: [V] or None.
        labels: int64 [T] or [B, N], `ignore_index` where there is none.
        shift: False: labels[..., n] is what position n predicts. True: `labels` are the input's own tokens, [B, N],
            and position n predicts labels[:, n + 1].
        columns: [start, end) of the softmax; None is the vocabulary.
        ignore_index, check_values: as in `loss`.

    Returns:
        (loss, stats); the stats' score terms are 0.

    Raises:
        ValueError: as `loss`.
    """
    if shift:
        expect(labels.dim() == 2, "labels", "shape [B, N] with shift=True", list(labels.shape))
        labels = shift_labels(labels, ignore_index)
    hidden, labels = flatten_labels(hidden, "hidden", labels, "labels")
    check_head(hidden, weight, bias)
    columns = (0, weight.shape[0]) if columns is None else columns
    expect_pair(columns, "columns")
    start, end = columns
    expect(0 <= start < end <= weight.shape[0], "columns", f"0 <= start < end <= V = {weight.shape[0]}", columns)
    valid = labels != ignore_index
    look = may_look(hidden, check_values)
    if look:
        expect_targets(labels, valid, (start, end), "labels")
    rows = mean_rows(valid)
    value, *terms = _head(
        hidden, weight, bias, labels, None, rows.combined(1.0, 0.0), [(start, end)], (start, end), ignore_index
    )
    if look:
        expect_logits(terms[1], strict=check_values is True)
    return value, _stats(rows, *terms)


def joint_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    is_image: torch.Tensor,
    mask_prob: torch.Tensor,
    sample_id: torch.Tensor,
    *,
    objective: Objective | None = None,
    image_coef: float = 1.0,
    text_coef: float = 1.0,
    ignore_index: int = -100,
    check_values: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, JointStats]:
    """Both tasks in one pass of the head: image_coef * `loss` of image rows + text_coef * `next_token_loss` of others.

    The head's weight gets one gradient; two calls would make two of [V, D] for autograd to add.

    Args:
        hidden: [T, D]; targets: int64 [T], x0 at masked image positions, the next token at text positions.
        is_image: bool [T], which task a row is of.
        mask_prob: [B] of the image samples; sample_id: int64 [T], not read in text rows.
        Otherwise as `loss`; text rows take the softmax over the vocabulary.

    Returns:
        (loss, `JointStats`).

    Raises:
        ValueError: as `loss`.
    """
    objective = objective_of(objective, options)
    expect_tensor(hidden, "hidden", shape=("T", "D"))
    hidden, targets, _ = flatten(hidden, "hidden", targets, mask_prob, sample_id)
    expect_tensor(is_image, "is_image", shape=targets.shape, dtypes=(torch.bool,), device_of=("hidden", hidden))
    check_head(hidden, weight, bias)
    vocabulary = weight.shape[0]
    columns = objective.columns(vocabulary)
    valid = targets != ignore_index
    image, text = valid & is_image, valid & ~is_image
    look = may_look(hidden, check_values)
    if look:
        expect_targets(targets, image, objective.target_range(vocabulary))
        expect_targets(targets, text, (0, vocabulary))
        expect_samples(mask_prob, sample_id[is_image])
    image_rows = row_weights(objective, image, mask_prob, torch.where(is_image, sample_id, 0), columns[1] - columns[0])
    text_rows = mean_rows(text)
    weights = image_rows.combined(image_coef * objective.ce_coef, image_coef * objective.alpha)
    of_text = text_rows.combined(text_coef, 0.0).ce
    weights = weights._replace(
        ce=torch.where(is_image, weights.ce, of_text),
        penalty=None if weights.penalty is None else torch.where(is_image, weights.penalty, 0),
        mass=None if weights.mass is None else torch.where(is_image, weights.mass, 0),
    )
    value, *terms = _head(
        hidden, weight, bias, targets, (~is_image).to(torch.int64), weights, [columns, (0, vocabulary)],
        objective.code_range, ignore_index,
    )  # fmt: skip
    if look:
        expect_logits(terms[1], strict=check_values is True)
    return value, JointStats(*(_stats(rows, *terms, one_of_two=True) for rows in (image_rows, text_rows)))


def shift_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """labels [B, N] -> what each position predicts: the next label, `ignore_index` at the last position."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore_index)], 1)


def _normalised(weights: Coefficients, dtype: torch.dtype) -> tuple[Coefficients, torch.Tensor | None]:
    """The weights in the dtype of accumulation; for float16 over the largest A, and that A, else None.

    Gradients kept in float16 then stay within its range; bfloat16 has float32's.
    """
    size = None
    if dtype == torch.float16:
        size = torch.where(weights.ce.isfinite(), weights.ce, 0).amax().clamp(min=torch.finfo(torch.float32).tiny)
        penalty, mass = (None if each is None else each / size for each in (weights.penalty, weights.mass))
        weights = Coefficients(weights.ce / size, penalty, weights.shift, mass)
        size = size.to(torch.float32)
    dtype = accumulation_dtype(dtype)
    return weights.map(lambda each: each.to(dtype).contiguous()), size


def _head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    group: torch.Tensor | None,
    weights: Coefficients,
    columns: Sequence[tuple[int, int]],
    codes: tuple[int, int],
    ignore_index: int,
) -> HeadTerms:
    """The head's op; or the zeros of none, where there are no rows."""
    compute_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if compute_dtype != torch.float64:
        compute_dtype = autocast_dtype(hidden.device) or compute_dtype
    if hidden.shape[0] == 0:
        return _no_rows(compute_dtype, hidden, weight, bias)
    weights, size = _normalised(weights, compute_dtype)
    asked = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in (hidden, weight, bias)]
    starts, ends = zip(*columns, strict=True)
    value, ce, lse, mass, hit, *_ = head_op(
        hidden, weight, bias, targets, group, *weights, starts, ends, codes, ignore_index, compute_dtype, *asked
    )
    return value if size is None else value * size, ce, lse, mass, hit


def _no_rows(dtype: torch.dtype, *inputs: torch.Tensor | None) -> HeadTerms:
    """The loss of no row, 0, and ce, lse, mass, hit of none. Every input has a gradient, of zeros, as DDP waits for."""
    # Sums of nothing: 0 also where a weight is infinite.
    nothing = [each[:0].reshape(-1).to(accumulation_dtype(dtype)) for each in inputs if each is not None]
    none = nothing[0].detach()
    return torch.cat(nothing).sum(), none, none, none, none.to(torch.bool)


def _stats(rows: RowWeights, *terms: torch.Tensor, one_of_two: bool = False) -> LossStats:
    """From ce, lse, mass and hit of all rows; `one_of_two`: rows of another task are among them."""
    weights = rows._asdict()
    number = weights.pop("number")
    ce, score, constant, lse, accuracy = statistics_op(*weights.values(), *terms, one_of_two).unbind()
    return LossStats(ce, score, constant, lse, number, accuracy)
