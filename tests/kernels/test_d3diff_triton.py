"""The loss in Triton, interpreted: through the public functions, against float64."""

import contextlib
import math

import pytest
import torch
from test_d3diff_loss import CODES, V, problem, truth

from unif2ace_kernels import d3diff
from unif2ace_kernels.d3diff import losses, ops
from unif2ace_kernels.d3diff.head import head_torch

pytest.importorskip("triton", reason="needs Triton")

from unif2ace_kernels.d3diff import configs, head_triton, logits_triton, noise_triton  # noqa: E402

# The interpreter multiplies bfloat16 wrongly, and rounds to it wrongly.
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]


def as_torch_op(forward, setup_context, backward):
    """An autograd function of an op's formulas, with the implementation given."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            out = tuple(forward(*inputs))
            setup_context(ctx, inputs, out)
            return out

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

    return Op.apply


@contextlib.contextmanager
def triton_ops():
    """The public functions run the Triton implementations."""
    head = as_torch_op(head_triton.head_triton, ops._head_setup_context, ops._head_backward)
    ready = as_torch_op(logits_triton.logits_triton, ops._logits_setup_context, ops._logits_backward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "head_op", head)
        patch.setattr(losses, "logits_op", ready)
        patch.setattr(losses, "noise_op", noise_triton.noise_triton)
        patch.setattr(ops, "head_backward_op", logits_triton.head_backward_triton)
        patch.setattr(ops, "logits_backward_op", logits_triton.logits_backward_triton)
        yield


@pytest.fixture(params=["pointers", pytest.param("descriptors", marks=pytest.mark.slow)])
def small_tiles(request, triton_interpreter, monkeypatch):
    """Interpreted kernels, with tiles and chunks so small that small problems fill several."""
    shrink(monkeypatch, request.param == "descriptors")


def shrink(monkeypatch, descriptors):
    tile = configs.Product(16, 16, 16, 4, 2, descriptors=descriptors, persistent=descriptors, group=2)
    monkeypatch.setattr(configs, "product", lambda arch, dtype, tf32, aligned: tile)
    monkeypatch.setattr(configs, "machine", lambda device: (90, 3))
    sizes = {"CHUNK_BYTES": 0, "MIN_CHUNK_ROWS": 16, "CHUNK_MULTIPLE": 16, "COMPACT_BLOCK": 16, "COPY_BLOCK": 16}
    sizes |= {"ROW_BLOCK": 16, "SUM_ROWS": 4, "SUM_COLUMNS": 16, "PLACE_BLOCK": 64}
    for name, value in sizes.items():
        monkeypatch.setattr(configs, name, value)


def doubled(tensors):
    return [
        each.detach().double().requires_grad_(each.requires_grad) if each.is_floating_point() else each
        for each in tensors
    ]


def assert_as_good(ours, theirs, true, what=""):
    """At most twice the error of theirs, of outputs scaled to order 1."""
    assert ours.shape == true.shape and ours.dtype == theirs.dtype, what
    scale = true.detach().double().abs().max().clamp(min=1e-30)
    ours, theirs = (((each.detach() - true.detach()) / scale).abs().max().item() for each in (ours, theirs))
    assert ours <= 2 * theirs + 1e-6, f"{what}: {ours:.2e} against {theirs:.2e}"


def plain_loss(inputs, **options):
    """The loss of the logits of one matrix product in the inputs' dtype."""
    return d3diff.loss_from_logits((inputs[0] @ inputs[1].t() + inputs[2]).float(), *inputs[3:], **options)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", d3diff.READINGS)
def test_each_reading(small_tiles, score, dtype):
    low = problem(dtype=dtype)
    high, options = doubled(low), {"score": score, "alpha": 0.3, "code_range": CODES}
    true, true_stats = d3diff.loss(*high, **options)
    torch.testing.assert_close(true + 0.3 * true_stats.score_constant, truth(*high, score=score, alpha=0.3))
    plain = plain_loss(low, **options)
    with triton_ops():
        value, stats = d3diff.loss(*low, **options)
        gradients = torch.autograd.grad(value, low[:3])
    assert_as_good(value, plain, true, "value")
    torch.testing.assert_close(tuple(map(float, stats)), tuple(map(float, true_stats)), rtol=1e-3, atol=1e-4)
    true, plain = torch.autograd.grad(true, high[:3]), torch.autograd.grad(plain, low[:3])
    for name, *each in zip(("hidden", "weight", "bias"), gradients, plain, true, strict=True):
        assert_as_good(*each, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", d3diff.READINGS)
@pytest.mark.parametrize("block", [16, 64])  # several of a row's columns at a time, and all
def test_each_reading_of_ready_logits(triton_interpreter, monkeypatch, score, dtype, block):
    monkeypatch.setattr(configs, "ROW_BLOCK", block)
    hidden, weight, bias, targets, m = problem(dtype=dtype)
    rows = (hidden @ weight.t() + bias).detach().requires_grad_()
    high, options = rows.detach().double().requires_grad_(), {"score": score, "alpha": 0.3, "code_range": CODES}
    true, true_stats = d3diff.loss_from_logits(high, targets, m, **options)
    plain, _ = d3diff.loss_from_logits(rows, targets, m, **options)
    with triton_ops():
        value, stats = d3diff.loss_from_logits(rows, targets, m, **options)
        (gradient,) = torch.autograd.grad(value, rows)
    assert_as_good(value, plain, true, "value")
    torch.testing.assert_close(tuple(map(float, stats)), tuple(map(float, true_stats)), rtol=1e-5, atol=1e-6)
    assert_as_good(gradient, torch.autograd.grad(plain, rows)[0], torch.autograd.grad(true, high)[0], "logits")


def rows_of_two_groups(T=37, D=24, dtype=torch.float32, label=lambda rng, T: torch.rand(T, generator=rng) < 0.6):
    """Arguments of the head but the last four: group 0 takes columns 6:20 of 70, group 1 all; no size is a block's."""
    rng = torch.Generator().manual_seed(3)
    draw = {"dtype": torch.float64, "generator": rng}
    hidden, weight, bias = torch.randn(T, D, **draw), torch.randn(70, D, **draw) * 0.4, torch.randn(70, **draw)
    targets = torch.where(label(rng, T), torch.randint(6, 20, (T,), generator=rng), -1)
    group, a, b = torch.randint(-1, 2, (T,), generator=rng), torch.rand(T, **draw), torch.rand(T, **draw)
    floats = [each.to(dtype) for each in (hidden, weight, bias)]
    a, b, shift = (each.float() for each in (a, 0.3 * b, torch.randn(T, **draw) - 3))
    return *floats, targets, group, a, b, shift, None, [6, 0], [20, 70], [6, 20], -1


def assert_head(arguments, dtype, asked=(True, True, True)):
    """The Triton head is as good as torch's, against float64."""
    true = head_torch(*doubled_or_kept(arguments), torch.float64, *asked)
    plain = head_torch(*arguments, dtype, *asked)
    ours = head_triton.head_triton(*arguments, dtype, *asked)
    for name in true._fields[:-3]:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(true, name).double(), rtol=2e-3, atol=2e-3)
    for name, *each in zip(true._fields, ours, plain, true, strict=True):
        if each[2].numel() and each[2].is_floating_point():
            assert_as_good(*each, name)
        else:
            assert torch.equal(each[0], each[1]), name
    return ours


def doubled_or_kept(arguments):
    floating = [isinstance(each, torch.Tensor) and each.is_floating_point() for each in arguments]
    return [each.double() if is_floating else each for each, is_floating in zip(arguments, floating, strict=True)]


@pytest.mark.parametrize("descriptors, dtype", [(False, torch.float32), (True, torch.float16)])
def test_two_groups_of_rows(triton_interpreter, monkeypatch, descriptors, dtype):
    shrink(monkeypatch, descriptors)
    assert_head(rows_of_two_groups(dtype=dtype), dtype)


@pytest.mark.slow
def test_codes_in_one_group_of_two(small_tiles):
    arguments = list(rows_of_two_groups())
    arguments[6:9] = None, None, arguments[6]  # a mass of codes in place of the penalty
    assert_head(arguments, torch.float32)


@pytest.mark.parametrize("labelled", ["none", "one", "all"])
def test_how_many_rows_are_labelled(small_tiles, labelled):
    count = {"none": 0, "one": 1, "all": 37}[labelled]
    arguments = list(rows_of_two_groups(label=lambda rng, T: torch.arange(T) < count))
    assert_head(arguments, torch.float32)
    arguments[4], arguments[9:11] = None, ([6], [20])  # one group
    ours = assert_head(arguments, torch.float32)
    if count == 0:
        assert ours.loss == 0 and all((each == 0).all() for each in ours[-3:])


def test_one_chunk_reads_nothing_that_it_did_not_write(small_tiles, monkeypatch):
    monkeypatch.setattr(configs, "MIN_CHUNK_ROWS", 48)
    for labelled in (0, 20):
        arguments = list(rows_of_two_groups(label=lambda rng, T, labelled=labelled: torch.arange(T) < labelled))
        arguments[4], arguments[9:11] = None, ([6], [20])
        assert_head(arguments, torch.float32)


@pytest.mark.parametrize("asked", [(False, False, False), (True, False, False), (False, True, False)])
def test_gradients_that_are_not_asked_for(small_tiles, asked):
    arguments = list(rows_of_two_groups())
    arguments[2] = None  # no bias
    ours = assert_head(arguments, torch.float32, asked)
    assert [each.numel() > 0 for each in ours[-3:]] == [*asked]


def test_autocast_computes_in_its_dtype_and_keeps_the_gradients(small_tiles):
    arguments = rows_of_two_groups()
    ours = assert_head(arguments, torch.float16)
    assert ours.grad_hidden.dtype == ours.grad_weight.dtype == torch.float32


@pytest.mark.slow
def test_strided_hidden_and_weight(small_tiles):
    arguments = list(rows_of_two_groups())
    plain = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    hidden = arguments[0]
    arguments[1] = arguments[1].t().contiguous().t()
    arguments[3], arguments[5] = (torch.stack([each, each * 0], 1)[:, 0] for each in (arguments[3], arguments[5]))
    for strided in (torch.cat([hidden, hidden * 3], 1)[:, :24], hidden.t().contiguous().t()):
        arguments[0] = strided
        ours = head_triton.head_triton(*arguments, torch.float32, True, True, True)
        assert all(map(torch.equal, ours, plain))


def test_float16_keeps_the_statistics_of_float32_sums(small_tiles):
    """Logits are kept in 16 bits, but counted from their tile's largest: see `logits_kernel`."""
    arguments = list(rows_of_two_groups(dtype=torch.float16))
    arguments[2], arguments[6:8] = arguments[2] + 20, (None, None)  # torch's logits lose 2**-11 of 20
    true = head_torch(*doubled_or_kept(arguments), torch.float64, True, True, True)
    plain = head_torch(*arguments, torch.float16, True, True, True)
    ours = head_triton.head_triton(*arguments, torch.float16, True, True, True)
    for name in ("ce", "lse"):
        ours_off, theirs_off = ((getattr(each, name) - getattr(true, name)).norm() for each in (ours, plain))
        assert ours_off < theirs_off / 3, name


def test_sums_over_chunks_keep_what_16_bits_lose(small_tiles):
    """1 + 9 / 4096, of which float16 keeps nothing if it rounds after each chunk."""
    w = torch.zeros(16, 16, dtype=torch.float16)
    chunk = head_triton._Chunk.empty(16, w)
    chunk.x.zero_(), chunk.z.zero_()[0].fill_(1)
    into = head_triton._Gradients.empty(w, w, 16, True, False, True, False)
    rows, count = torch.arange(160, dtype=torch.int32), torch.tensor([160], dtype=torch.int32)
    for at in range(0, 160, 16):
        chunk.x[0] = 2.0**-12 if at else 1.0
        chunk.add_gradients(head_triton._Source(rows, count, at, 16), into.columns(0, 16))
    assert (into.weight == 1 + 2 * 2.0**-10).all() and (into.carry == 2.0**-12).all()


def test_runs_repeat_to_the_bit_whatever_the_chunks(small_tiles, monkeypatch):
    arguments = rows_of_two_groups()
    first, second = (head_triton.head_triton(*arguments, torch.float32, True, True, True) for _ in range(2))
    monkeypatch.setattr(configs, "MIN_CHUNK_ROWS", 32)
    larger = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first[:-2], larger[:-2]))  # sums over rows are taken in another order


def head_of(logits, targets, **weights):
    """The head whose logits are those given: hidden one-hot rows, the weight the logits' columns."""
    T, C = logits.shape
    names = ("ce", "penalty", "shift", "mass")
    coefficients = [weights.get(name, torch.ones(T) if name == "ce" else None) for name in names]
    features = max(16, T)  # descriptors want rows of whole 16 bytes
    weight = torch.nn.functional.pad(logits.t(), (0, features - T))
    arguments = torch.eye(T, features), weight, None, targets, None, *coefficients, [0], [C], [0, C], -100
    return head_triton.head_triton(*arguments, torch.float32, True, True, True)


def test_extreme_logits(small_tiles):
    logits = torch.zeros(5, V)
    logits[0, 1], logits[0, 2] = 1e4, -1e4
    logits[1] = -1e30
    logits[1, 10] = 3.0  # one logit above all others, the target's
    logits[3, 20], logits[4, :] = 1e4, -1e4
    out = head_of(logits, torch.tensor([2, 10, 13, 20, 4]))
    expected = torch.tensor([2e4, 0, math.log(V), 0, math.log(V)])
    torch.testing.assert_close(out.ce, expected)
    assert torch.equal(out.hit, torch.tensor([False, True, True, True, True]))
    assert out.grad_hidden.isfinite().all() and out.grad_weight.isfinite().all()


def test_minus_infinity(small_tiles):
    """From the bias, as a mask of columns; whole tiles of it; and a row of nothing else, which is NaN and says so."""
    arguments = list(rows_of_two_groups())
    arguments[2][torch.tensor([*range(7, 19), 21, *range(32, 70)])] = -math.inf
    arguments[3] = torch.where(arguments[3] >= 0, 6, -1)
    assert_head(arguments, torch.float32)
    arguments[2][6:20] = -math.inf
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    hopeless = (arguments[4] == 0) & (arguments[3] >= 0)
    assert hopeless.any() and (out.lse[hopeless] == -math.inf).all() and out.ce[hopeless].isnan().all()
    assert out.loss.isnan() and out.lse[~hopeless].isfinite().all() and out.grad_hidden[~hopeless].isfinite().all()


def test_a_row_of_weight_0_is_0_even_where_its_loss_is_infinite(small_tiles):
    arguments = list(rows_of_two_groups(label=lambda rng, T: torch.arange(T) < 2))
    arguments[2][6], arguments[3][:2], arguments[4] = -math.inf, torch.tensor([6, 7]), None
    arguments[5][0], arguments[6:8], arguments[9:11] = 0, (None, None), ([6], [20])
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert out.ce[0] == math.inf and out.loss.isfinite() and out.loss > 0 and (out.grad_hidden[0] == 0).all()


@pytest.mark.parametrize("score", ["radd", "unnormalized", "full_vocab"])
def test_a_row_of_weight_0_is_0_whatever_its_logits(small_tiles, score):
    hidden, weight, bias, targets, m = problem(dtype=torch.float32)
    targets[0], m[0] = 7, 1  # at full noise the score term weighs nothing under cosine
    options = {"code_range": CODES, "score": score, "ce_coef": 0.0, "alpha": 1.0, "check_values": False}
    far, ready = hidden.detach().clone(), (hidden @ weight.t() + bias).detach()
    far[0, 2:] = 1e38  # logits of +-inf, and NaN
    spoilt = ready.clone()
    spoilt[0, 2], spoilt[0, 3], spoilt[0, 4] = math.nan, -math.inf, math.inf
    with triton_ops():
        for loss, *inputs in (
            (lambda each: d3diff.loss(each, weight, bias, targets, m, **options), hidden.detach().clone(), far),
            (lambda each: d3diff.loss_from_logits(each, targets, m, **options), ready, spoilt),
        ):
            results = []
            for each in inputs:
                value, stats = loss(each.requires_grad_())
                results.append((value.detach(), stats.score, *torch.autograd.grad(value, each)))
            torch.testing.assert_close(*results)
            assert results[0][0] > 0 and (results[1][2][0] == 0).all()


def test_nan_is_not_lost(small_tiles):
    arguments = list(rows_of_two_groups(label=lambda rng, T: (torch.arange(T) > 0) & (torch.arange(T) < 4)))
    arguments[0][0, 2], arguments[4] = math.nan, torch.ones(37, dtype=torch.int64)
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert all(each.isfinite().all() for each in out)  # row 0 has no label, and is what a chunk's padding might hold
    arguments[0][2, 2] = math.nan
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert out.loss.isnan() and out.ce[1:4].isnan().tolist() == out.lse[1:4].isnan().tolist() == [False, True, False]
    assert out.grad_hidden[2].isnan().all() and out.grad_hidden[[0, 1, *range(3, 37)]].isfinite().all()


def test_a_target_outside_its_range_is_nan(small_tiles):
    for token in (-1, V, 2**40):
        targets = torch.full((20,), 4)
        targets[17] = token  # in the second chunk, whose memory holds what the first one left
        out = head_of(torch.zeros(20, V), targets)
        assert out.ce.isnan().nonzero().tolist() == [[17]]
        with triton_ops():
            value, _ = d3diff.next_token_loss(
                torch.zeros(3, 16), torch.zeros(V, 16), None, torch.tensor([2, token, 4]), check_values=False
            )
        assert value.isnan()


@pytest.mark.parametrize("u", [-60.0, -0.6, -0.4, -1e-3, 0.0, 1e-6, 0.3, 2.0, 79.0, 88.5, 200.0])
def test_penalty_over_its_whole_range(small_tiles, u):
    logits, shift = torch.zeros(1, V), torch.tensor([u - math.log(V)])
    out = head_of(logits, torch.tensor([3]), ce=torch.full((1,), 1e-30), penalty=torch.ones(1), shift=shift)
    at = torch.tensor(u, dtype=torch.float64)
    low = at.clamp(max=80)
    penalty, slope = torch.expm1(low) + torch.exp(low) * (at - low) - at, torch.expm1(low)
    close = {"rtol": 2e-5, "atol": 2e-7}  # of float32 sums lse + shift of a few ulp
    torch.testing.assert_close(out.loss.double(), penalty, **close)
    torch.testing.assert_close(out.grad_weight[:, :1].double(), (slope / V).expand(V, 1), **close)


def test_joint_loss_is_the_sum_of_its_tasks(small_tiles):
    rng = torch.Generator().manual_seed(8)
    hidden, weight, bias, targets, m = problem(dtype=torch.float32)
    image = hidden.detach().flatten(0, 1).clone().requires_grad_()
    targets, sample = targets.flatten(), torch.arange(len(image)) // hidden.shape[1]
    is_image = torch.rand(len(image), generator=rng) < 0.7
    targets = torch.where(is_image, targets, torch.randint(V, targets.shape, generator=rng))
    inputs = (image, weight, bias, targets, is_image, m, sample)
    high = doubled(inputs)
    true, _ = d3diff.joint_loss(*high, code_range=CODES)
    with triton_ops():
        value, _ = d3diff.joint_loss(*inputs, code_range=CODES)
        gradients = torch.autograd.grad(value, inputs[:3])
    plain, _ = d3diff.joint_loss(*inputs, code_range=CODES)
    assert_as_good(value, plain, true, "value")
    plain, true = torch.autograd.grad(plain, inputs[:3]), torch.autograd.grad(true, high[:3])
    for name, *each in zip(("hidden", "weight", "bias"), gradients, plain, true, strict=True):
        assert_as_good(*each, name)


def test_ready_logits_at_their_edges(triton_interpreter, monkeypatch):
    monkeypatch.setattr(configs, "ROW_BLOCK", 16)
    rows = torch.zeros(6, V)
    rows[0, 1], rows[0, 2], rows[1, :20], rows[1, 10] = 1e4, -1e4, -math.inf, 3.0
    rows[2], rows[3, 7] = -math.inf, math.nan
    targets = torch.tensor([2, 10, 4, 4, 25, -100])
    out = logits_triton.logits_triton(rows, targets, torch.ones(6), None, None, None, 0, 20, [0, 20], -100)
    assert out[1][:2].tolist() == [2e4, 0.0] and out[1][2:5].isnan().all() and out[1][5] == 0
    assert out[2][2] == -math.inf and out[0].isnan()
    gradient = logits_triton.logits_backward_triton(
        torch.tensor(2.0), rows, targets, torch.ones(6), None, None, None, *out[2:4], 0, 20, [0, 20], -100
    )
    assert gradient[0, :3].tolist() == [0.0, 2.0, -2.0] and (gradient[1] == 0).all()
    assert (gradient[[0, 1, 2, 4, 5], 20:] == 0).all() and (gradient[5] == 0).all()


@pytest.mark.parametrize("vocabulary, first", [(7, 0), (11, 3), (12, 5)])
def test_gradients_are_scaled_and_placed(triton_interpreter, vocabulary, first):
    saved = torch.tensor(1.3), torch.randn(5, 9), torch.randn(7, 9).half(), torch.randn(7)
    for arguments in ((*saved, vocabulary, first), (*saved[:2], torch.empty(0), torch.empty(0), vocabulary, first)):
        ours = logits_triton.head_backward_triton(*arguments)
        for one, other in zip(ours, ops._head_backward_torch(*arguments), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype


def test_empty_calls(small_tiles):
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert noise_triton.noise_triton(none, torch.ones(0), 9, True, 1, 0, 0)[0].shape == (0, 4)
    assert noise_triton.noise_triton(none.t(), torch.ones(4), 9, True, 1, 0, 0)[1].shape == (4, 0)
    arguments = rows_of_two_groups()
    arguments = [each[:0] if isinstance(each, torch.Tensor) and len(each) == 37 else each for each in arguments]
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert out.loss == 0 and (out.grad_weight == 0).all() and out.grad_weight.shape == (70, 24)
    assert (
        logits_triton.logits_triton(torch.zeros(0, V), none[:, 0], torch.ones(0), None, None, None, 0, V, [0, V], -1)[0]
        == 0
    )


@pytest.mark.parametrize("rows, columns, wanted", [(4096, 8192, 4096), (65536, 8192, 8192), (65536, 58498, 4096)])
def test_chunks_bound_the_memory(rows, columns, wanted):
    assert configs.chunk_rows(rows, columns, torch.bfloat16) == wanted
    assert configs.chunk_rows(100, columns, torch.bfloat16) == 256
