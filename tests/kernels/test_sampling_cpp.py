"""The compiled CPU path of the sampling ops beside the torch one: the same ids, confidences as near to float64."""

import math

import pytest
import torch

from unif2ace_kernels._library import EXTENSION_MISSING
from unif2ace_kernels.sampling import draw_torch, reference

pytestmark = pytest.mark.skipif(EXTENSION_MISSING is not None, reason=f"extension not built: {EXTENSION_MISSING}")
NEG = float("-inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("codes", [1, 5, 255, 256, 257, 1024, 8192])
@pytest.mark.parametrize(
    "options", [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.3, 0, 1.0), (1.7, 7, 1.0), (1.0, 0, 0.6), (2.0, 90, 0.5)], ids=str
)
def test_the_compiled_draw_gives_the_ids_of_the_torch_draw(options, codes, dtype):
    rows = 65
    rng = torch.Generator().manual_seed(codes)
    cond, uncond = (2 * torch.randn(rows, codes, generator=rng, dtype=dtype) for _ in range(2))
    cond[1, codes // 2], cond[2], cond[3, 0], cond[4, -1] = NEG, NEG, float("nan"), float("inf")
    cond[5] = cond[5].round()
    uncond[6, codes // 3] = NEG
    row = torch.randint(2**32, (rows,), generator=rng)
    seed, offset = torch.tensor(2**62 + 5), torch.tensor(77)
    for guidance, second in ((0.0, None), (1.25, uncond)):
        for kind in ("log_prob", "neg_entropy", "margin"):
            arguments = (cond, second, row, seed, offset, guidance, *options, kind)
            native, plain = torch.ops.unif2ace_native.draw(*arguments), draw_torch.draw(*arguments)
            assert torch.equal(native[0], plain[0])
            torch.testing.assert_close(native[1], plain[1], rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width, first, codes", [(9, 0, 9), (1439, 414, 1024), (700, 3, 257)])
def test_the_compiled_samplers_are_the_torch_ones(width, first, codes, dtype):
    rows = 90
    rng = torch.Generator().manual_seed(codes)
    cond, uncond = (3 * torch.randn(rows, 2 * width, generator=rng)).to(dtype).split(width, 1)  # strided rows
    ids, seed, offset = torch.randint(codes, (rows,), generator=rng), torch.tensor(3), torch.tensor(4)
    unknown, row = torch.rand(rows, generator=rng) < 0.6, torch.randperm(rows, generator=rng)
    for temperature, top_k, top_p, kind in (
        (1.0, 0, 1.0, "log_prob"),
        (0.0, 0, 1.0, "log_prob"),
        (0.2, 0, 0.9, "margin"),
        (3.0, 5, 0.8, "neg_entropy"),
    ):
        for guidance, second in ((0.0, None), (0.0, uncond), (2.5, uncond)):
            shared = (ids, unknown, row, seed, offset, first, codes, guidance, temperature, top_k, top_p, kind, True)
            native = torch.ops.unif2ace_native.sample_logits(cond, second, *shared)
            plain = draw_torch.sample_logits(cond, second, *shared)
            assert torch.equal(native[0], plain[0]) and native[1].dtype == plain[1].dtype
            torch.testing.assert_close(native[1], plain[1], rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "hidden, vocabulary, first, codes", [(8, 9, 0, 9), (40, 1500, 14, 1025), (16, 5000, 900, 3000)]
)
def test_the_compiled_head_draws_as_nearly_as_the_torch_one(hidden, vocabulary, first, codes, dtype):
    """Products may round otherwise: confidences are held to float64's, and float32 and float64 draw the same ids."""
    rows = 300
    rng = torch.Generator().manual_seed(codes)
    h = (torch.randn(2, rows, hidden, generator=rng) / hidden**0.5).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=rng).to(dtype)
    bias = torch.randn(vocabulary, generator=rng).to(dtype)
    ids, seed, offset = torch.randint(codes, (rows,), generator=rng), torch.tensor(3), torch.tensor(4)
    row = torch.randperm(rows, generator=rng)
    for share in (0.0, 0.01, 0.7, 1.0):
        unknown = torch.rand(rows, generator=rng) < share
        for guidance, second, b in ((0.0, None, None), (2.5, h[1], bias), (0.0, h[1], bias.float())):
            words = (row, seed, offset, first, codes, guidance, 0.8, 0, 0.95, "log_prob", True)
            native = torch.ops.unif2ace_native.sample_hidden(h[0], second, weight, b, ids, unknown, *words)
            plain = draw_torch.sample_hidden(h[0], second, weight, b, ids, unknown, *words)
            assert torch.equal(native[0][~unknown], ids[~unknown]) and native[1].dtype == plain[1].dtype
            assert (native[1][~unknown] == math.inf).all()
            mixed = h[0].double() if guidance == 0 else (1 + guidance) * h[0].double() - guidance * h[1].double()
            logits = mixed @ weight[first : first + codes].double().T
            logits = (logits if b is None else logits + bias[first : first + codes].double())[unknown]
            errors = [
                (value[unknown].double() - reference.log_confidence(logits, got[unknown] - first)).abs()
                for got, value in (native, plain)
            ]
            if unknown.sum() > 100:  # few rows have other rounding errors, many have alike ones
                assert errors[0].max() <= 2 * errors[1].max() + 1e-5 and errors[0].mean() <= 2 * errors[1].mean() + 1e-6
            if dtype.itemsize >= 4:
                assert torch.equal(native[0], plain[0])


@pytest.mark.parametrize("spread", [0.0, 0.5, 6.0, 60.0])
def test_codes_that_cannot_win_are_passed_over_alone(spread):
    """The compiled draw computes a Gumbel number only where it may decide; every law's winners are those of all."""
    rows, codes = 250, 1111
    rng = torch.Generator().manual_seed(4)
    cond = spread * torch.randn(rows, codes, generator=rng)
    seed, offset, row = torch.tensor(8), torch.tensor(1), torch.arange(rows)
    for temperature in (1.0, 0.25, 4.0):
        arguments = (cond, None, row, seed, offset, 0.0, temperature, 0, 1.0, "log_prob")
        assert torch.equal(torch.ops.unif2ace_native.draw(*arguments)[0], draw_torch.draw(*arguments)[0])
