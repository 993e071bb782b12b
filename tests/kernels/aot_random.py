"""The kernels of the room random, for resources.py."""

from resources import AotCase

from unif2ace_kernels.random import gumbel_triton

CASES = [
    AotCase(
        "Gumbel noise",
        gumbel_triton.gumbel_kernel,
        {"p_seed": "*i64", "p_offset": "*i64", "p_out": "*fp32", "columns": "i32", "stream": "i32"},
        lambda arch: ({"BLOCK": gumbel_triton.BLOCK}, {"num_warps": 4, "enable_fp_fusion": False}),
    )
]
