"""The kernels of the room moe, for resources.py."""

from itertools import accumulate

from resources import AotCase

from unif2ace_kernels.moe import route_triton

CASES: list[AotCase] = []


def _route(kernel: str, E: tuple[int, ...], K: int, shared: int, T: int, dtype: str, biased: bool) -> AotCase:
    """A kernel of route for groups of E experts and T contiguous tokens, as `route_triton` launches it."""
    bounds, z, softmax = tuple(accumulate(E, initial=0)), True, not biased
    experts, tile = bounds[-1] + shared * len(E), route_triton.tiles(T, max(E))
    size = f"T {T}, E {' + '.join(map(str, E))}, K {K}, {dtype}{', sigmoid with bias' if biased else ''}"
    coefs = {"coefs": ("fp32",) * len(E), "z_scale": "fp32"}
    if kernel == "choose":
        tile = {"SHARED": shared, "NORMALIZE": True, "SOFTMAX": softmax, "Z": z, **tile}
        signature = {"p_logits": f"*{dtype}", "p_group": "*i64", "p_weight": "*fp32", "p_expert": "*i64"}
        signature |= {"p_count": "*i32", "p_partial": "*fp32", "tokens": "i32", "blocks": "i32", "stride_t": "i32"}
        fixed = {"stride_e": 1, "stride_g": 1, "stride_b": 1 if biased else 0, "BOUNDS": bounds, "K": K}
        if biased:
            signature["p_bias"] = "*fp32"
        else:
            fixed["p_bias"] = None
    elif kernel == "order":
        tile = {"S": K + shared, "A": experts, **route_triton.order_tiles(tile, experts)}
        signature = {"p_expert": "*i64", "p_before": "*i32", "p_counts": "*i64", "p_sums": "*fp32", "p_order": "*i64"}
        signature |= {
            "p_offsets": "*i64",
            **dict.fromkeys(("p_frequency", "p_probability", "p_balance", "p_z"), "*fp32"),
        }
        signature |= {**coefs, "tokens": "i32", "blocks": "i32"}
        fixed = {"BOUNDS": bounds, "K": K}
    else:
        tile = {"S": K + shared, "NORMALIZE": True, "SOFTMAX": softmax, **tile}
        signature = dict.fromkeys(("p_grad_weight", "p_grad_probability", "p_grad_balance", "p_grad_z"), "*fp32")
        signature |= {"p_logits": f"*{dtype}", "p_group": "*i64", "p_expert": "*i64", "p_counts": "*i64"}
        signature |= {"p_grad": f"*{dtype}", **coefs, "tokens": "i32", "stride_wt": "i32", "stride_t": "i32"}
        fixed = {"stride_ws": 1, "stride_p": 1, "stride_e": 1, "stride_g": 1, "BOUNDS": bounds, "K": K}
    options = {"num_warps": tile.pop("num_warps"), "aligned": tuple(k for k in signature if k.startswith("p_"))}
    function = getattr(route_triton, f"{kernel}_kernel")
    return AotCase(f"route {kernel}, {size}", function, signature, lambda arch: ({**fixed, **tile}, options))


CASES += [
    _route(kernel, *size)
    for size in [
        ((8, 8), 4, 3, 16384, "bf16", False),
        ((32, 32), 4, 1, 16384, "fp32", False),
        ((256,), 8, 1, 32768, "fp32", True),
        ((64, 64), 8, 1, 1 << 20, "fp32", False),
        ((384, 20, 7), 7, 0, 16384, "fp32", False),
    ]
    for kernel in ("choose", "order", "backward")
]
CASES += [
    AotCase(
        "route scan",
        route_triton.scan_kernel,
        {"p_count": "*i32", "p_partial": "*fp32", "p_counts": "*i64", "p_sums": "*fp32", "blocks": "i32"},
        lambda arch: ({"A": 66, "E": 64, "BLOCK": route_triton.SCAN_BLOCK}, {"num_warps": 8}),
    )
]
