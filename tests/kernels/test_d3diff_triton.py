"""The loss in Triton, interpreted: through the public functions, against float64."""

import d3diff_cases
import pytest
import torch
from d3diff_cases import assert_as_good, assert_head, doubled, rows_of_two_groups, shrink, triton_ops
from test_d3diff_loss import CODES, V, problem, truth

from unif2ace_kernels import d3diff
from unif2ace_kernels.d3diff import configs, head_triton, logits_triton, ops

# The interpreter multiplies bfloat16 wrongly, and rounds to it wrongly.
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]

small_tiles = d3diff_cases.small_tiles  # fixture


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


def test_sums_over_many_steps_are_rounded_once(small_tiles):
    """Positive numbers, whose sum outgrows a step of it: rounded to 16 bits at each step it would stay behind."""

    def positive(*shape):
        return torch.rand(shape).half() + 0.5

    rows, count = torch.arange(128, dtype=torch.int32), torch.tensor([128], dtype=torch.int32)
    w, hidden = positive(16, 128), positive(128, 128)
    chunk = head_triton._Chunk.empty(16, w)
    chunk.make_logits(head_triton._Source(rows, count, 0, 16), hidden, None, torch.arange(128), 0)
    exact = (hidden[:16].double() * w.double()).sum(1)
    assert ((chunk.at_target - exact).abs() <= 2.0**-18 * exact).all()  # float32, of all steps

    w, x, g = positive(128, 16), positive(128, 16), positive(128, 128)
    chunk = head_triton._Chunk.empty(128, w)
    chunk.x.copy_(x), chunk.z.copy_(g)
    into = head_triton._Gradients.empty(x, w, 128, False, True, True, False)
    chunk.add_gradients(head_triton._Source(rows, count, 0, 128), into)
    for got, exact in ((into.hidden, g.double() @ w.double()), (into.weight, g.double().t() @ x.double())):
        assert ((got - exact).abs() <= (2.0**-11 + 2.0**-18) * exact).all()


def test_runs_repeat_to_the_bit_whatever_the_chunks(small_tiles, monkeypatch):
    arguments = rows_of_two_groups()
    first, second = (head_triton.head_triton(*arguments, torch.float32, True, True, True) for _ in range(2))
    monkeypatch.setattr(configs, "MIN_CHUNK_ROWS", 32)
    larger = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first[:-2], larger[:-2]))  # sums over rows are taken in another order


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


@pytest.mark.parametrize("vocabulary, first", [(7, 0), (11, 3), (12, 5)])
def test_gradients_are_scaled_and_placed(triton_interpreter, vocabulary, first):
    saved = torch.tensor(1.3), torch.randn(5, 9), torch.randn(7, 9).half(), torch.randn(7)
    for arguments in ((*saved, vocabulary, first), (*saved[:2], torch.empty(0), torch.empty(0), vocabulary, first)):
        ours = logits_triton.head_backward_triton(*arguments)
        for one, other in zip(ours, ops._head_backward_torch(*arguments), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize("rows, columns, wanted", [(4096, 8192, 4096), (65536, 8192, 8192), (65536, 58498, 4096)])
def test_chunks_bound_the_memory(rows, columns, wanted):
    assert configs.chunk_rows(rows, columns, torch.bfloat16) == wanted
    assert configs.chunk_rows(100, columns, torch.bfloat16) == 256
