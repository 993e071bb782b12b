"""The room on a GPU: the Triton kernels against float64 and the CPU, without a wait, in graphs, to the bit."""

import math

import pytest
import torch

from unif2ace_kernels import d3diff
from unif2ace_kernels._library import explain
from unif2ace_kernels.d3diff import configs
from unif2ace_kernels.d3diff.noise_torch import noise_torch

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES, V = (301, 1325), 1403  # 1,024 codes from an odd column; the vocabulary is no block's multiple


def problem(B=6, N=64, D=256, dtype=torch.bfloat16, seed=0, device="cuda"):
    """hidden, weight, bias, targets, m on the GPU, made on the CPU; the last sample is all masked."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((B, N, D), (V, D), (V,)))
    m = torch.linspace(0.1, 1, B)
    m[-1] = 1
    masked = torch.rand(B, N, generator=rng) < m[:, None]
    targets = torch.where(masked, torch.randint(*CODES, (B, N), generator=rng), -100)
    floats = [each.to(device, dtype).requires_grad_() for each in (hidden, weight * 2 * D**-0.5, bias * 0.3)]
    return *floats, targets.to(device), m.to(device)


def doubled(tensors):
    return [
        each.detach().double().requires_grad_(each.requires_grad) if each.is_floating_point() else each
        for each in tensors
    ]


def gradients_of(value, inputs):
    return torch.autograd.grad(value, inputs[:3])


def relative(one, true):
    return ((one.double() - true).norm() / true.norm()).item()


def test_triton_is_what_runs():
    for op in ("d3diff_head", "d3diff_head_backward", "d3diff_logits", "d3diff_logits_backward", "d3diff_noise"):
        assert explain(op, torch.zeros(1, device="cuda")).implementation == "triton"
    assert explain("d3diff_head", torch.zeros(1, device="cuda", dtype=torch.float64)).implementation == "torch"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", d3diff.READINGS)
@pytest.mark.parametrize("normalizer", ["slice", "full"])
def test_error_is_that_of_torch_in_the_same_dtype(score, normalizer, dtype):
    inputs = problem(dtype=dtype)
    options = {"code_range": CODES, "score": score, "normalizer": normalizer}
    high = doubled(inputs)
    true, true_stats = d3diff.loss(*high, **options)
    value, stats = d3diff.loss(*inputs, **options)
    logits = (inputs[0] @ inputs[1].t() + inputs[2]).float()
    plain, _ = d3diff.loss_from_logits(logits, *inputs[3:], **options)
    # One scalar's error is luck where errors cancel in it: it gets the dtype's own precision as a floor.
    assert relative(value, true) <= 2 * relative(plain, true) + torch.finfo(dtype).eps / 8
    torch.testing.assert_close(stats.ce.double(), true_stats.ce, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)
    for ours, theirs, wanted in zip(
        gradients_of(value, inputs), gradients_of(plain, inputs), gradients_of(true, high), strict=True
    ):
        assert ours.dtype == dtype and relative(ours, wanted) <= 2 * relative(theirs, wanted) + 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 37, 72), (2, 129, 100), (40, 256, 2048)])
def test_sizes_that_no_block_divides_and_many_chunks(shape, monkeypatch):
    """D = 100 has rows of 16-bit numbers that no descriptor takes; the last has three chunks of rows."""
    monkeypatch.setattr(configs, "CHUNK_BYTES", 1)
    assert -(-40 * 256 // configs.chunk_rows(40 * 256, 1024, torch.float16)) == 3
    inputs = problem(*shape, dtype=torch.float16)
    high = doubled(inputs)
    (value, _), (true, _) = (d3diff.loss(*each, code_range=CODES, alpha=0.1) for each in (inputs, high))
    assert relative(value, true) < 1e-3
    for ours, wanted in zip(gradients_of(value, inputs), gradients_of(true, high), strict=True):
        assert relative(ours, wanted) < 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_loss(dtype):
    hidden, weight, bias, targets, m = problem(dtype=dtype)
    rows = hidden.detach().flatten(0, 1).requires_grad_()
    sample = torch.arange(len(rows), device="cuda") // hidden.shape[1]
    is_image = sample % 2 == 0
    targets = torch.where(is_image, targets.flatten(), torch.arange(len(rows), device="cuda") % V)
    inputs = (rows, weight, bias, targets, is_image, m, sample)
    high = doubled(inputs)
    (value, _), (true, _) = (d3diff.joint_loss(*each, code_range=CODES) for each in (inputs, high))
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for ours, wanted in zip(gradients_of(value, inputs), gradients_of(true, high), strict=True):
        assert relative(ours, wanted) < bound


def test_nothing_waits_for_the_device(no_wait):
    inputs = problem()
    is_image = torch.ones_like(inputs[3], dtype=torch.bool).flatten()
    sample = torch.arange(6, device="cuda").repeat_interleave(64)
    flat = inputs[0].detach().flatten(0, 1).requires_grad_()
    logits = torch.randn(6, 64, V, device="cuda", requires_grad=True)

    def everything():
        tokens, mask = d3diff.noise(inputs[3].clamp(min=0), inputs[4], V - 1, seed=3)
        image, _ = d3diff.loss(*inputs, code_range=CODES, score="unnormalized")
        joint, _ = d3diff.joint_loss(
            flat, *inputs[1:3], inputs[3].flatten(), is_image, inputs[4], sample, code_range=CODES
        )
        ready, _ = d3diff.loss_from_logits(logits, *inputs[3:], code_range=CODES)
        (image + joint + ready).backward()
        return tokens, mask

    everything()  # compiles
    with no_wait():
        everything()


def test_a_captured_step_follows_its_inputs():
    inputs = problem()
    other = problem(seed=1)

    def step():
        value, stats = d3diff.loss(*inputs, code_range=CODES, score="unnormalized")
        return value, stats.masked_count, *gradients_of(value, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for source in (other, problem(seed=2)):
        with torch.no_grad():
            for into, out_of in zip(inputs, source, strict=True):
                into.copy_(out_of)
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize("shape", [(6, 64, 256), (40, 256, 512)])
def test_runs_repeat_to_the_bit(shape):
    inputs = problem(*shape)
    runs = []
    for _ in range(3):
        value, _ = d3diff.loss(*inputs, code_range=CODES, score="unnormalized")
        runs.append((value, *gradients_of(value, inputs)))
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_compiles_as_one_graph():
    inputs = problem()

    def step(*tensors):
        return d3diff.loss(*tensors, code_range=CODES, score="full_vocab")[0]

    ours, eager = torch.compile(step, fullgraph=True)(*inputs), step(*inputs)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=0)
    for one, another in zip(gradients_of(ours, inputs), gradients_of(eager, inputs), strict=True):
        assert relative(one, another.double()) < 1e-2


def test_autocast_computes_in_its_dtype():
    inputs = problem(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        value, _ = d3diff.loss(*inputs, code_range=CODES)
    high = doubled(inputs)
    true, _ = d3diff.loss(*high, code_range=CODES)
    assert value.dtype == torch.float32 and relative(value, true) < 1e-2
    for ours, wanted in zip(gradients_of(value, inputs), gradients_of(true, high), strict=True):
        assert ours.dtype == torch.float32 and relative(ours, wanted) < 2e-2


def test_extremes():
    hidden, weight, bias, targets, m = problem()
    nothing, _ = d3diff.loss(hidden, weight, bias, torch.full_like(targets, -100), m, code_range=CODES)
    assert nothing == 0 and all((each == 0).all() for each in gradients_of(nothing, (hidden, weight, bias)))
    with torch.no_grad():
        bias[CODES[0] : CODES[0] + 600] = -math.inf  # whole tiles of columns
        bias[CODES[1] - 1] = 1e4
    targets = torch.where(targets >= 0, CODES[1] - 1, targets)
    value, _ = d3diff.loss(hidden, weight, bias, targets, m, code_range=CODES)
    assert value == 0 and all(each.isfinite().all() for each in gradients_of(value, (hidden, weight, bias)))
    with torch.no_grad():
        bias[CODES[0] : CODES[1]] = -math.inf
    assert d3diff.loss(hidden, weight, bias, targets, m, code_range=CODES)[0].isnan()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_noise_has_the_bits_of_the_cpu(exact, dtype):
    for rows, length in [(1, 1), (70_000, 3), (32, 257), (8, 1024), (3, 4096), (2, 5000)]:
        m = torch.rand(rows).clamp(min=0.01)
        m[: rows // 2] = ((m[: rows // 2] * length).floor() + 0.5) / length  # N m is nearly a half, or is one
        m = m.clamp(max=1).to(dtype)
        arguments = (torch.randint(900, (rows, length)), m, 2**40, exact, -7, 2**33 + 1, 2**32 - 70_001)
        on_gpu = (each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments)
        ours = torch.ops.unif2ace.d3diff_noise(*on_gpu)
        for one, other in zip(ours, noise_torch(*arguments), strict=True):
            assert torch.equal(one.cpu(), other)


def test_peak_memory_is_inputs_gradients_and_a_chunk():
    inputs = problem(16, 1024, 1024)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value, _ = d3diff.loss(*inputs, code_range=CODES)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    rows = 16 * 1024
    item, codes = 2, CODES[1] - CODES[0]
    gradients = (rows + codes) * 1024 * item
    chunk = rows * (codes + 1024) * item  # rows of a chunk are bounded by the batch here
    assert extra <= 1.1 * (gradients + chunk) + codes * 1024 * item + 40 * 8 * rows
