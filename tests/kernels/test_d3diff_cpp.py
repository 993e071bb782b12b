"""The compiled CPU path of the loss and the noise beside the torch one: same bits of noise, same errors of the loss."""

import math

import pytest
import torch

from unif2ace_kernels import _library, d3diff
from unif2ace_kernels._dtypes import accumulation_dtype
from unif2ace_kernels.d3diff import logits as logits_module
from unif2ace_kernels.d3diff import ops
from unif2ace_kernels.d3diff.head import head_torch
from unif2ace_kernels.d3diff.noise_torch import noise_torch
from unif2ace_kernels.d3diff.weights_torch import row_weights_torch, statistics_torch

pytestmark = pytest.mark.skipif(
    _library.EXTENSION_MISSING is not None, reason=f"extension not built: {_library.EXTENSION_MISSING}"
)
NATIVE = torch.ops.unif2ace_native
CODES = (6, 290)
T, START, END, V = 45, 3, 300, 310
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def weights(kind: str, dtype: torch.dtype, rng: torch.Generator):
    """A, B, shift and C of T rows; row 2 weighs nothing."""
    a, b = (torch.rand(T, generator=rng, dtype=torch.float64) for _ in range(2))
    a[2] = b[2] = 0
    penalty, shift = (b, b - 3) if kind == "penalty" else (None, None)
    mass = b if kind == "mass" else None
    return [None if each is None else each.to(accumulation_dtype(dtype)) for each in (a, penalty, shift, mass)]


def targets_of(rng: torch.Generator) -> torch.Tensor:
    targets = torch.randint(*CODES, (T,), generator=rng)
    targets[::4] = -100
    targets[1], targets[3] = CODES[0], CODES[1] - 1
    return targets


def run_head(function, inputs, targets, row_weights, spans=((START, END),), group=None, asked=True):
    starts, ends = zip(*spans)
    return function(
        *inputs, targets, group, *row_weights, starts, ends, CODES, -100, inputs[0].dtype, asked, asked, asked
    )


def head_inputs(rng: torch.Generator, dtype: torch.dtype, rows: int = T, vocabulary: int = V, features: int = 16):
    hidden = torch.randn(rows, features, generator=rng) * features**-0.5
    weight, bias = (torch.randn(*shape, generator=rng) for shape in ((vocabulary, features), (vocabulary,)))
    return [each.to(dtype) for each in (hidden, weight, bias)]


def wider(tensors):
    return [None if each is None else each.double() for each in tensors]


def check_head(inputs, targets, row_weights, *where):
    truth = run_head(head_torch, wider(inputs), targets, wider(row_weights), *where)
    theirs = run_head(head_torch, inputs, targets, row_weights, *where)
    ours = run_head(NATIVE.d3diff_head, inputs, targets, row_weights, *where)
    assert torch.equal(ours[4], theirs[4])
    for index in (0, 1, 2, 3, 5, 6, 7):
        assert ours[index].dtype == theirs[index].dtype and ours[index].shape == theirs[index].shape
        assert distance(ours[index], truth[index]) <= 2 * distance(theirs[index], truth[index]) + 1e-6
        if inputs[0].dtype == torch.float64:
            torch.testing.assert_close(ours[index], truth[index], rtol=1e-11, atol=1e-12)
    return ours


def distance(ours, truth):
    return (ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1)


@pytest.mark.parametrize("span", [(START, END), (0, 290), (6, V)])
@pytest.mark.parametrize("kind", ["plain", "penalty", "mass"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_against_float64(dtype, kind, span):
    rng = torch.Generator().manual_seed(span[1])
    targets, row_weights, inputs = targets_of(rng), weights(kind, dtype, rng), head_inputs(rng, dtype)
    targets[targets == 40] = 41
    inputs[2][40] = -math.inf
    unlabelled = targets == -100
    for bias in (inputs[2], None):
        these = [*inputs[:2], bias]
        ours = check_head(these, targets, row_weights, [span])
        assert all(bool((each[unlabelled] == 0).all()) for each in (*ours[1:5], ours[5]))
        assert bool((ours[5][2] == 0).all()) and (bias is None or ours[7][40 - span[0]] == 0)
        forward = run_head(NATIVE.d3diff_head, these, targets, row_weights, [span], asked=False)
        assert all(map(torch.equal, forward[:5], ours[:5])) and [each.numel() for each in forward[5:]] == [0] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_of_two_groups_in_chunks(dtype):
    rng = torch.Generator().manual_seed(1)
    columns, spans = 2000, [(6, 1990), (0, 2000)]
    rows = int(2.5 * (8 << 20) / (columns * dtype.itemsize))
    inputs = head_inputs(rng, dtype, rows, columns, 4)
    targets = torch.randint(*CODES, (rows,), generator=rng)
    targets[::5] = -100
    a, b = torch.rand(2, rows, generator=rng).to(accumulation_dtype(dtype))
    group = (torch.rand(rows, generator=rng) < 0.9).to(torch.int64)
    check_head(inputs, targets, [a, b, b - 6, None], spans, group)
    check_head(inputs, targets.clamp(min=CODES[0]), [a, None, None, b], spans[1:])


def test_head_takes_what_autocast_mixes():
    rng = torch.Generator().manual_seed(2)
    targets, row_weights = targets_of(rng), weights("mass", torch.float32, rng)
    hidden, weight, bias = head_inputs(rng, torch.float32)
    arguments = (targets, None, *row_weights, (START,), (END,), CODES, -100, torch.bfloat16, True, True, True)
    hidden = hidden.t().contiguous().t()
    ours, theirs = (each(hidden, weight.half(), bias, *arguments) for each in (NATIVE.d3diff_head, head_torch))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)
        assert one.is_contiguous()


def test_head_has_the_same_bits_whatever_the_threads():
    rng = torch.Generator().manual_seed(3)
    targets, row_weights = targets_of(rng), weights("penalty", torch.float32, rng)
    inputs = head_inputs(rng, torch.float32, vocabulary=4097 * 2, features=1)  # products that nobody adds up
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        *most, _, _, bias = run_head(NATIVE.d3diff_head, inputs, targets, row_weights, [(0, 4097 * 2)])
        found.append([*most, bias])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("kind", ["plain", "penalty", "mass"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_and_their_backward(dtype, kind):
    rng = torch.Generator().manual_seed(7)
    targets, row_weights = targets_of(rng), weights(kind, dtype, rng)
    logits = (3 * torch.randn(T, V, generator=rng)).to(dtype)
    integers = (START, END, CODES, -100)
    seed = torch.tensor(0.7, dtype=accumulation_dtype(dtype))
    wide = [None if w is None else w.double() for w in row_weights]

    def run(forward, backward, logits, row_weights, seed):
        loss, ce, lse, mass, hit = forward(logits, targets, *row_weights, *integers)
        return loss, ce, lse, mass, hit, backward(seed, logits, targets, *row_weights, lse, mass, *integers)

    torch_path = (logits_module.logits_torch, logits_module.logits_backward_torch)
    truth = run(*torch_path, logits.double(), wide, seed.double())
    theirs = run(*torch_path, logits, row_weights, seed)
    ours = run(NATIVE.d3diff_logits, NATIVE.d3diff_logits_backward, logits, row_weights, seed)
    assert torch.equal(ours[4], theirs[4]) and bool((ours[5][targets == -100] == 0).all())
    assert bool((ours[5][:, END:] == 0).all()) and bool((ours[5][:, :START] == 0).all())
    for index in (0, 1, 2, 3, 5):
        assert ours[index].dtype == theirs[index].dtype
        assert distance(ours[index], truth[index]) <= 2 * distance(theirs[index], truth[index]) + 1e-6
    far = torch.empty(V, T, dtype=dtype).t().copy_(logits)  # strides the other way round
    assert torch.equal(NATIVE.d3diff_logits(far, targets, *row_weights, *integers)[0], ours[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["plain", "penalty", "mass"])
def test_a_row_of_weight_0_is_0_whatever_its_logits(kind, bad):
    rng = torch.Generator().manual_seed(7)
    targets, row_weights = targets_of(rng), weights(kind, torch.float64, rng)
    row, integers = int((targets != -100).nonzero()[1]), (START, END, CODES, -100)
    for each in (row_weights[0], row_weights[1], row_weights[3]):
        if each is not None:
            each[row] = 0
    clean = torch.randn(T, V, generator=rng, dtype=torch.float64)
    spoilt = clean.clone()
    spoilt[row] = bad
    for forward, backward in (
        (logits_module.logits_torch, logits_module.logits_backward_torch),
        (NATIVE.d3diff_logits, NATIVE.d3diff_logits_backward),
    ):
        results = []
        for logits in (clean, spoilt):
            loss, _, lse, mass, _ = forward(logits, targets, *row_weights, *integers)
            seed = torch.tensor(0.7, dtype=torch.float64)
            results.append((loss, backward(seed, logits, targets, *row_weights, lse, mass, *integers)))
        torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_scaled_and_placed(dtype):
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 8), (6, 8), (6,)))
    seed = torch.tensor(-0.3, dtype=accumulation_dtype(dtype))
    ours = NATIVE.d3diff_head_backward(seed, hidden, weight, bias, 20, 7)
    theirs = ops._head_backward_torch(seed, hidden, weight, bias, 20, 7)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype and torch.equal(one, other)
    nothing = NATIVE.d3diff_head_backward(seed, *(torch.empty(0, dtype=dtype) for _ in range(3)), 20, 7)
    assert [each.numel() for each in nothing] == [0, 0, 0]


def test_untouched_zeros_are_zeros_and_aligned():
    weight = torch.randn(3, 1 << 11)
    _, full, _ = NATIVE.d3diff_head_backward(torch.tensor(2.0), weight[:0], weight, weight[:0, 0], 1 << 13, 100)
    assert full.shape == (1 << 13, 1 << 11) and full.data_ptr() % 64 == 0 and full.is_contiguous()
    assert torch.equal(full[100:103], 2 * weight) and full.count_nonzero() == weight.count_nonzero()
    full.add_(1)  # it is memory like any other


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 5, 64, 257])
def test_noise_has_the_bits_of_torch(length, dtype, exact):
    m = torch.cat([torch.linspace(1e-6, 1, 60), torch.tensor([0.5, 1.5, 2.5]) / length]).clamp(max=1).to(dtype)
    tokens = torch.randint(0, 900, (len(m), length))
    for seed, offset, first in [(0, 0, 0), (-5, 2**33 + 3, 7), (2**63 - 1, 2**32 - 1, 2**32 - 70)]:
        ours = NATIVE.d3diff_noise(tokens, m, 999, exact, seed, offset, first)
        assert all(map(torch.equal, ours, noise_torch(tokens, m, 999, exact, seed, offset, first)))
    spread = torch.empty(length, len(m), dtype=torch.int64).t().copy_(tokens)
    assert all(map(torch.equal, NATIVE.d3diff_noise(spread, m, 999, exact, seed, offset, first), ours))


def test_what_memory_safety_hangs_on_is_checked():
    tokens, m = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2)
    with pytest.raises(RuntimeError, match=r"mask_prob: expected \[B\]"):
        NATIVE.d3diff_noise(tokens, m[:1], 9, True, 0, 0, 0)
    with pytest.raises(RuntimeError, match="mask_prob: expected a floating dtype"):
        NATIVE.d3diff_noise(tokens, m.long(), 9, True, 0, 0, 0)
    hidden, weight = torch.randn(2, 4, 8), torch.randn(V, 8)
    with pytest.raises(RuntimeError, match="targets: expected tokens in"):
        d3diff.loss(hidden, weight, None, torch.full((2, 4), V), m, code_range=CODES, check_values=False)
    rng = torch.Generator().manual_seed(0)
    targets, row_weights, inputs = targets_of(rng), weights("mass", torch.float32, rng), head_inputs(rng, torch.float32)
    for change, message in (
        ({"targets": targets[1:]}, r"targets: expected \[T\]"),
        ({"inputs": [*inputs[:2], inputs[2][1:]]}, r"bias: expected \[V\]"),
        ({"inputs": [inputs[0][:, 1:], *inputs[1:]]}, "hidden, weight: expected"),
        ({"spans": [(START, V + 1)]}, "starts, ends: expected columns"),
        ({"spans": [(START, END), (0, V)]}, "starts, ends: expected one of each"),
        ({"spans": [(7, END)]}, "codes: expected columns of the softmax"),
        ({"group": torch.zeros(T)}, r"group: expected int64 \[T\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_head(NATIVE.d3diff_head, **{"inputs": inputs, "targets": targets, "row_weights": row_weights, **change})
    valid, share, terms = torch.ones(T, dtype=torch.bool), torch.ones(()).double(), torch.zeros(3, T)
    for weight, ids, message in (
        (3, torch.full((T,), 3), r"sample_id: expected values in \[0, 3\), got 3"),
        (3, torch.full((T,), -1), "sample_id: expected values"),
        (3, torch.zeros(T - 1).long(), r"sample_id: expected int64 \[T\]"),
        (T + 1, None, "weight: expected one for each of T / B rows"),
        (0, None, "weight: expected one for each of T / B rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            NATIVE.d3diff_row_weights(valid, torch.ones(weight).double(), ids, False)
    for change, message in (
        ({"hit": valid[1:]}, r"hit: expected bool \[T\]"),
        ({"ce": terms[0][1:]}, "ce: expected a contiguous vector"),
        ({"lse": terms[0].double()}, "lse: expected a contiguous vector"),
        ({"mass": terms[0][1:]}, "mass: expected a contiguous vector"),
        ({"score": terms[0]}, "score: expected a contiguous vector"),
    ):
        weights_none = dict.fromkeys(("score", "penalty_weight", "shift", "mass_weight", "constant"))
        rows = dict(zip(("ce", "lse", "mass", "hit"), (*terms, valid), strict=True))
        with pytest.raises(RuntimeError, match=message):
            NATIVE.d3diff_statistics(
                **{"valid": valid, "share": share, **weights_none, **rows, "one_of_two": False, **change}
            )
    logits = torch.randn(2, 4, V)
    with pytest.raises(RuntimeError, match="targets: expected tokens in"):
        d3diff.loss_from_logits(logits, torch.full((2, 4), -1), m, code_range=CODES, check_values=False)


@pytest.mark.parametrize("token_mean", [True, False])
def test_row_weights(token_mean):
    weight, ids = torch.tensor([0.5, torch.inf, 0.0, 3.0]).double(), torch.arange(12) // 3
    valid = torch.arange(12) % 5 > 1
    for arguments in (
        (valid, weight, None),
        (valid, weight.repeat_interleave(2)[::2], ids.repeat_interleave(2)[::2]),
        (valid, weight, torch.where(valid, ids.flip(0), 99)),  # what a row without a label has is not read
        (valid & False, weight, None),
        (valid, None, None),
        (valid[:0], weight[:0], None),
        (valid[:0], weight, ids[:0]),
    ):
        of_torch = arguments if arguments[2] is None else (*arguments[:2], torch.where(arguments[0], arguments[2], 0))
        ours, theirs = NATIVE.d3diff_row_weights(*arguments, token_mean), row_weights_torch(*of_torch, token_mean)
        assert all(map(torch.equal, ours, theirs))
        assert [each.dtype for each in ours] == [each.dtype for each in theirs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("one_of_two", [False, True])
@pytest.mark.parametrize("kind", ["", "ce", "penalty", "unshifted", "mass"])
def test_statistics(kind, one_of_two, dtype):
    rng = torch.Generator().manual_seed(0)
    valid = torch.rand(T, generator=rng) < 0.6
    number, share, score = row_weights_torch(valid, torch.rand(T, generator=rng, dtype=torch.float64), None, False)
    ce, lse, mass = 5 * torch.rand(3, T, generator=rng).to(dtype)
    hit = torch.rand(T, generator=rng) < 0.3
    if not one_of_two:
        ce, lse, mass, hit = (torch.where(valid, each, 0) for each in (ce, lse, mass, hit))
    first = int(valid.nonzero()[0])
    if kind:  # a row of weight 0 has no part in the score term, whatever its terms are
        score[first], ce[first], lse[first], mass[first] = 0, torch.inf, torch.inf, torch.inf
    weights = [
        score if kind else None,
        score * 0.3 if kind in ("penalty", "unshifted") else None,
        torch.full_like(score, -2.5) if kind == "penalty" else None,
        score * 0.7 if kind == "mass" else None,
        score.sum() if kind == "mass" else None,
    ]
    terms = (ce, lse, mass, hit.bool())
    ours = NATIVE.d3diff_statistics(valid, share, *weights, *terms, one_of_two)
    theirs = statistics_torch(valid, share, *weights, *terms, one_of_two)
    torch.testing.assert_close(ours, theirs, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0)
    assert ours[4] == (hit & valid).sum() * share.to(dtype) and (not kind or ours[1].isfinite())
    torch.library.opcheck(ops.statistics_op, (valid, share, *weights, *terms, one_of_two))
    torch.library.opcheck(ops.row_weights_op, (valid, torch.rand(T).double(), None, False))


@pytest.mark.parametrize(
    "op",
    [
        "d3diff_head", "d3diff_logits", "d3diff_logits_backward", "d3diff_head_backward", "d3diff_row_weights",
        "d3diff_statistics",
    ],
)  # fmt: skip
def test_explain_names_the_compiled_path(op):
    assert _library.explain(op, torch.empty(1)).implementation == "c++"
