"""The noise in Triton, interpreted: the bits of torch."""

import pytest
import torch

from unif2ace_kernels import _philox
from unif2ace_kernels.d3diff.noise_torch import noise_torch

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from aot import compile_ahead  # noqa: E402
from aot_d3diff import CASES  # noqa: E402

from unif2ace_kernels._triton import words_of_groups  # noqa: E402
from unif2ace_kernels.d3diff import configs, noise_triton  # noqa: E402


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("length", [1, 5, 64, 100])
def test_noise_has_the_bits_of_torch(triton_interpreter, length, exact):
    steps = torch.tensor([0.5, 1.5, 2.5, 0.51, 7.3])
    m = torch.cat([torch.linspace(1e-6, 1, 6), (steps / length).clamp(max=1)])
    tokens = torch.randint(900, (len(m), length))
    tokens = torch.stack([tokens, tokens + 1], 2)[..., 0]  # not contiguous
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        arguments = (tokens, m.to(dtype).clamp(min=1e-6), 2**40, exact, -5, 2**33 + 1, 2**31)
        for one, other in zip(noise_triton.noise_triton(*arguments), noise_torch(*arguments), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1])
def test_every_seed_has_the_bits_of_torch(triton_interpreter, seed):
    tokens, m = torch.arange(64).repeat(2, 1), torch.tensor([0.3, 0.7])
    for offset in (0, 2**31, 2**32 - 1):
        arguments = (tokens, m, 1234, False, seed, offset, 2**32 + 3)
        for one, other in zip(noise_triton.noise_triton(*arguments), noise_torch(*arguments), strict=True):
            assert torch.equal(one, other)


def test_the_count_is_of_the_product_as_it_was_rounded(monkeypatch):
    """Fused, x - floor(x) is of the exact product, and 50 * float32(0.05) is no half: a GPU would mask one more."""
    launched = []
    kernel = noise_triton.noise_kernel
    monkeypatch.setattr(noise_triton, "noise_kernel", {(2,): lambda *arguments, **options: launched.append(options)})
    noise_triton.noise_triton(torch.zeros(2, 50, dtype=torch.int64), torch.ones(2) / 20, 9, True, 4, 0, 0)
    (case,) = (case for case in CASES if case.kernel is kernel and case.name == "noise, exact count, N 256")
    fused = {fusion: compile_ahead(kernel, case.signature, {"EXACT": True, "BLOCK": 64}, 90, num_warps=1,
                                   enable_fp_fusion=fusion).ptx for fusion in (True, False)}  # fmt: skip
    assert "fma." in fused[True] and "fma." not in fused[launched[0].get("enable_fp_fusion", True)]


@triton.jit
def one_bit(seed, offset, row, group, stream):
    w0, w1, w2, w3 = words_of_groups(seed, offset, row, group, stream)
    one = tl.full((), 1, tl.uint32)
    return w0 & one, w1 & one, w2 & one, w3 & one


def test_noise_of_equal_words_takes_the_first_columns(triton_interpreter, monkeypatch):
    """Equal 32-bit words are rare (4,096 columns have one pair in 500 rows), so here words have one bit."""
    monkeypatch.setattr(noise_triton, "words_of_groups", one_bit)
    monkeypatch.setitem(
        noise_torch.__globals__, "random_words", lambda *arguments: _philox.random_words(*arguments) & 1
    )
    arguments = (torch.arange(120).reshape(6, 20), torch.linspace(0.1, 1, 6), 999, True, 4, 0, 0)
    for one, other in zip(noise_triton.noise_triton(*arguments), noise_torch(*arguments), strict=True):
        assert torch.equal(one, other)


def test_noise_beyond_a_program_s_registers_is_torch_s(triton_interpreter, monkeypatch):
    monkeypatch.setattr(configs, "NOISE_LENGTH", 8)
    monkeypatch.setattr(noise_triton, "noise_kernel", None)
    arguments = (torch.zeros(2, 9, dtype=torch.int64), torch.ones(2) / 2, 9, True, 4, 0, 0)
    assert torch.equal(noise_triton.noise_triton(*arguments)[1], noise_torch(*arguments)[1])
