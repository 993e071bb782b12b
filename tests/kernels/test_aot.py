"""The ahead-of-time compiler sees what a kernel needs, and passes launch options on."""

import pytest

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from aot import compile_ahead  # noqa: E402

from unif2ace_kernels.random import gumbel_triton  # noqa: E402

GUMBEL = (
    gumbel_triton.gumbel_kernel,
    {"p_seed": "*i64", "p_offset": "*i64", "p_out": "*fp32", "columns": "i32", "stream": "i32"},
    {"BLOCK": gumbel_triton.BLOCK},
)


@triton.jit
def too_much_kernel(p_x, p_out, N: tl.constexpr):
    """Holds an [N, N] tile in registers and wants it transposed: spills, and shared memory, for a large N."""
    i = tl.arange(0, N)
    x = tl.load(p_x + i[:, None] * N + i[None, :])
    tl.store(p_out + i[:, None] * N + i[None, :], tl.dot(x, tl.trans(x)) + x)


def test_gumbel_kernel_has_no_fused_multiply_add():
    ptx = compile_ahead(*GUMBEL, 90, num_warps=4, enable_fp_fusion=False).ptx
    assert "mul.rn.f32" in ptx and "add.rn.f32" in ptx and "fma." not in ptx
    assert "fma." in compile_ahead(*GUMBEL, 90, num_warps=4).ptx  # so the option is what keeps them out


def test_spills_and_shared_memory_are_seen():
    report = compile_ahead(too_much_kernel, {"p_x": "*fp32", "p_out": "*fp32"}, {"N": 128}, 80, num_warps=1)
    assert report.spill_bytes > 1000
    assert report.registers > 32
    assert report.shared_bytes > 1000


def test_equal_calls_compile_once():
    first = compile_ahead(*GUMBEL, 90, num_warps=4, enable_fp_fusion=False)
    assert compile_ahead(*GUMBEL, 90, num_warps=4, enable_fp_fusion=False) is first


def test_wrong_signature_is_refused():
    with pytest.raises(AssertionError, match="columns"):
        compile_ahead(GUMBEL[0], {k: v for k, v in GUMBEL[1].items() if k != "columns"}, GUMBEL[2], 90)
