"""The sampling kernels on a GPU: the ids and masks of the CPU, and a step of few launches that waits for nothing."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from sampling_cases import (  # noqa: E402
    CONFIDENCES,
    DRAWS,
    FIRST,
    assert_same_draw,
    clear,
    confidences,
    head,
    logits,
    words,
)

from unif2ace_kernels import _library, sampling  # noqa: E402
from unif2ace_kernels.sampling import draw_torch, head_triton, reference  # noqa: E402

pytestmark = pytest.mark.gpu


def on_gpu(arguments):
    return [each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments]


def implementation(op, name):
    [found] = [each for each in _library._IMPLEMENTATIONS[op] if each.name == name and "cuda" in each.devices]
    if found.missing:
        pytest.skip(f"extension not built: {found.missing}")
    return found.function


@pytest.mark.parametrize("name", ["triton", "cuda c++", "torch"])
@pytest.mark.parametrize(
    ("codes", "dtype"),
    [(1, "float32"), (300, "bfloat16"), (8192, "float16"), (12288, "bfloat16"), (58498, "float32")],
)
def test_gpu_draws_the_ids_of_the_cpu(name, codes, dtype):
    draw_on_gpu = implementation("sample_logits", name)
    cond, uncond, *places = logits(codes, getattr(torch, dtype))
    for i, draw in enumerate(DRAWS):
        arguments = (cond, uncond, *places, *words(), FIRST, codes, 1.25, *draw, CONFIDENCES[i % 3], True)
        ours = draw_on_gpu(*on_gpu(arguments))
        assert_same_draw(ours, draw_torch.sample_logits(*arguments), 2e-5)
        again = draw_on_gpu(*on_gpu(arguments))
        assert all(torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in zip(ours, again))


@pytest.mark.parametrize("name", ["triton", "cuda c++", "torch"])
@pytest.mark.parametrize("length", [1, 31, 256, 1024, 4096])
def test_gpu_masks_what_the_cpu_masks(name, length):
    remask_on_gpu = implementation("remask", name)
    for ties in ("index", "showo"):
        for temperature in (0.0, 0.7):
            arguments = (*confidences(length), *words(), torch.tensor(temperature), ties)
            assert torch.equal(remask_on_gpu(*on_gpu(arguments)).cpu(), draw_torch.remask(*arguments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_head_draws_what_float64_draws(dtype):
    rows, codes, guidance = 700, 1000, 1.25
    h, weight, bias, ids, row = head(rows, 256, codes, getattr(torch, dtype))
    unknown = ids == -1
    shared = (*words(), FIRST, codes, guidance)
    draws = ((1.0, 0, "log_prob"), (0.0, 0, "margin"), (0.7, 0, "neg_entropy"), (1.0, 40, "margin"))
    for temperature, top_k, kind in draws:
        options = (*shared, temperature, top_k, 1.0, kind, True)
        arguments = on_gpu((*h, weight, bias, ids, unknown, row, *options))
        got, confidence = head_triton.sample_hidden(*arguments)
        is_clear, want, z = clear(h, weight, bias, row, codes, guidance, temperature)
        assert is_clear.double().mean() > 0.99 and torch.equal(got.cpu()[~unknown], ids[~unknown])
        chosen = is_clear & unknown
        if top_k == 0:
            assert torch.equal(got.cpu()[chosen], want[chosen] + FIRST)
        if kind == "log_prob":
            truth = reference.log_confidence(z[unknown], got.cpu()[unknown] - FIRST)
            assert (confidence.cpu()[unknown] - truth).abs().max() < 5e-5
        part = torch.randperm(rows)[:200].cuda()
        some = [each[part] for each in (*arguments[:2], *arguments[4:7])]
        alone = head_triton.sample_hidden(*some[:2], *arguments[2:4], *some[2:], *arguments[7:])
        assert torch.equal(alone[0], got[part]) and torch.equal(alone[1], confidence[part])


def a_step(guidance=1.5):
    """(from logits, from hidden states): each a whole step on the GPU by the public functions, and its offset."""
    B, N, codes = 4, 64, 512
    h, weight, bias, ids, row = head(B * N, 64, codes, torch.bfloat16)
    h, ids, row = h.view(2, B, N, 64).cuda(), ids.view(B, N).cuda(), row.view(B, N).cuda()
    weight, bias = weight.cuda(), bias.cuda()
    branches = torch.nn.functional.linear(h, weight, bias)
    seed, offset = (each.cuda() for each in words())
    count, temperature = torch.full((B,), 9).cuda(), torch.tensor(0.5).cuda()
    unknown = ids == -1
    options = {"code_range": (FIRST, FIRST + codes), "guidance": guidance, "seed": seed, "offset": offset, "rows": row}

    def then_remask(drawn, confidence):
        again = {"seed": seed, "offset": offset, "rows": row}
        return drawn, confidence, sampling.remask(confidence, unknown, count, temperature, **again)

    def from_logits():
        return then_remask(*sampling.sample_from_logits(*branches, ids, -1, unknown=unknown, **options))

    def from_hidden():
        return then_remask(*sampling.sample_from_hidden(*h, weight, bias, ids, -1, unknown=unknown, **options))

    return [(from_logits, 2), (from_hidden, 3)], offset


@pytest.mark.parametrize("i", range(2))
def test_gpu_step_is_a_few_launches_that_wait_for_nothing(monkeypatch, no_wait, i):
    steps, offset = a_step()
    step, launches = steps[i]
    monkeypatch.undo()  # filling unwritten memory takes launches of its own
    step()
    with no_wait():
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == launches <= 3, kernels


@pytest.mark.parametrize("i", range(2))
def test_gpu_graph_reads_the_offset_anew(i):
    steps, offset = a_step()
    step = steps[i][0]
    start = offset.clone()
    want = []
    for _ in range(3):
        want.append([each.clone() for each in step()])
        offset.add_(1)
    offset.copy_(start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
        offset.add_(1)
    offset.copy_(start)
    for expected in want:
        graph.replay()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected))
    assert not torch.equal(want[0][0], want[1][0])
