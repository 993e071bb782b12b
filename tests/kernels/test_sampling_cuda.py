"""The CUDA C++ of the draw and the re-mask, run on the CPU: the ids of torch and C++, in any order of its threads."""

import pytest
import torch
from cuda_on_cpu import execute
from sampling_cases import CONFIDENCES, DRAWS, FIRST, OFFSET, SEED, confidences, logits, words

from unif2ace_kernels._library import EXTENSION_MISSING
from unif2ace_kernels.sampling import draw_torch, reference

NONE = torch.empty(0).numpy()


def on_fibers(case, codes, calls, seeds=(0, 1)):
    """`sample_logits` by the kernel of the dtype of cond, for each (guidance, (temperature, top_k, top_p), confidence).

    A result that hangs on the order of the threads is a fault.
    """
    cond, uncond, ids, unknown, rows = case
    name = f"draw_{str(cond.dtype).removeprefix('torch.')}"
    places = [each.numpy() for each in (ids, unknown, rows)]
    arguments = [
        (cond.float().numpy(), uncond.float().numpy() if guidance else NONE, *places, SEED, OFFSET, FIRST, codes,
         guidance, *draw, CONFIDENCES.index(confidence))
        for guidance, draw, confidence in calls
    ]  # fmt: skip
    results = execute("sampling.cpp", "each", name, arguments, seeds=seeds)
    return [tuple(map(torch.from_numpy, result)) for result in results]


def by_torch(case, codes, guidance, draw, confidence):
    cond, uncond, *places = case
    return cond, uncond if guidance else None, *places, *words(), FIRST, codes, guidance, *draw, confidence, True


# Columns, dtype, rows of the case, draws, orders of the threads: an order more costs as much as a row more.
GRID = [
    (1, "float32", slice(None), DRAWS[:2], (0,)),
    (5, "float16", slice(None), DRAWS, (0,)),
    (300, "bfloat16", slice(None), DRAWS, (1,)),
    (1030, "float32", slice(6, 9), [DRAWS[0], DRAWS[-1]], (0, 2)),
]


@pytest.mark.parametrize(("codes", "dtype", "part", "draws", "seeds"), GRID, ids=["1", "5", "300", "1030"])
def test_the_draw_on_fibers_is_that_of_torch(codes, dtype, part, draws, seeds):
    case = tuple(each[part] for each in logits(codes, getattr(torch, dtype)))
    calls = [((0.0, 1.25, 30.0)[i % 3], draw, CONFIDENCES[(i + i // 3) % 3]) for i, draw in enumerate(draws)]
    for call, ours in zip(calls, on_fibers(case, codes, calls, seeds), strict=True):
        arguments = by_torch(case, codes, *call)
        want = draw_torch.sample_logits(*arguments)
        assert torch.equal(ours[0], want[0]), call
        torch.testing.assert_close(ours[1], want[1], rtol=1e-5, atol=5e-6)
        if EXTENSION_MISSING is None:
            assert torch.equal(ours[0], torch.ops.unif2ace_native.sample_logits(*arguments)[0])


@pytest.mark.slow
def test_a_row_that_shared_memory_does_not_hold_is_drawn_alike():
    codes = 24 * 1024 + 7
    case = tuple(each[:2] for each in logits(codes))
    calls = [(1.5, (1.0, 0, 1.0), "margin"), (0.0, (1.3, 50, 0.8), "log_prob")]
    for call, ours in zip(calls, on_fibers(case, codes, calls, seeds=(0,)), strict=True):
        want = draw_torch.sample_logits(*by_torch(case, codes, *call))
        assert torch.equal(ours[0], want[0])
        torch.testing.assert_close(ours[1], want[1], rtol=1e-5, atol=5e-6)


def test_confidences_are_as_near_to_float64_as_those_of_torch():
    codes = 1000
    cond, uncond, *places = (each[[0, 6, 7, 8, 13]] for each in logits(codes))
    truth = reference.guide(cond[:, FIRST:-2], uncond[:, FIRST:-2], 1.5)
    [(ids, ours)] = on_fibers((cond, uncond, *places), codes, [(1.5, (1.0, 0, 1.0), "log_prob")], seeds=(0,))
    want = reference.log_confidence(truth, ids - FIRST)
    theirs = truth.float().log_softmax(-1).gather(-1, ids[:, None] - FIRST)[:, 0]
    assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max() + 2e-6


def test_the_remask_on_fibers_is_that_of_torch():
    sizes = [(1, 0.0, "showo"), (31, 0.7, "index"), (257, 0.0, "showo"), (257, 0.7, "index")]
    cases = [(confidences(length), *rest) for length, *rest in sizes]
    calls = [(*(x.numpy() for x in case), SEED, OFFSET, t, ties == "index") for case, t, ties in cases]
    results = execute("sampling.cpp", "each", "remask", calls, seeds=(2,))
    for (case, temperature, ties), ours in zip(cases, results, strict=True):
        want = draw_torch.remask(*case, *words(), torch.tensor(temperature), ties)
        assert torch.equal(torch.from_numpy(ours), want), (case[0].shape, temperature, ties)
