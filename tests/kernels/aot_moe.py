"""The kernels of the room moe, for resources.py."""

from itertools import accumulate

import torch
import triton
from resources import AotCase

from unif2ace_kernels.moe import (
    arrange_triton,
    configs,
    grouped_triton,
    mix_triton,
    order_triton,
    route_triton,
    up_triton,
)

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
        tile = {"S": K + shared, "A": experts, **order_triton.order_tiles(tile, experts)}
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
    function = getattr(order_triton if kernel == "order" else route_triton, f"{kernel}_kernel")
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
        order_triton.scan_kernel,
        {"p_count": "*i32", "p_partial": "*fp32", "p_counts": "*i64", "p_sums": "*fp32", "blocks": "i32"},
        lambda arch: ({"A": 66, "E": 64, "BLOCK": order_triton.SCAN_BLOCK}, {"num_warps": 8}),
    )
]


def _arrange(kernel: str, A: int) -> AotCase:
    """A kernel of arrange for A experts, as `arrange_triton` launches it."""
    tile = arrange_triton.tiles(A)
    options = {"num_warps": tile.pop("num_warps")}
    if kernel == "count":
        function, fixed = arrange_triton.count_kernel, {"A": A, **tile}
        signature = {"p_expert": "*i64", "p_clamped": "*i32", "p_count": "*i32", "slots": "i32", "blocks": "i32"}
    elif kernel == "scan":
        function, options = order_triton.scan_kernel, {"num_warps": 8}
        signature = {"p_count": "*i32", "p_counts": "*i64", "blocks": "i32"}
        fixed = {"p_partial": None, "p_sums": None, "A": A, "E": 0, "BLOCK": order_triton.SCAN_BLOCK}
    else:
        function = order_triton.order_kernel
        signature = {"p_expert": "*i32", "p_before": "*i32", "p_counts": "*i64", "p_order": "*i64", "p_offsets": "*i64"}
        signature |= {"coefs": ("fp32",), "z_scale": "fp32", "tokens": "i32", "blocks": "i32"}
        fixed = dict.fromkeys(("p_sums", "p_frequency", "p_probability", "p_balance", "p_z"))
        fixed |= {"BOUNDS": (0, A), "K": 1, "S": 1, "A": A, "BALL": triton.next_power_of_2(A + 1), **tile}
    options["aligned"] = tuple(name for name in signature if name.startswith("p_"))
    return AotCase(f"arrange {kernel}, A {A}", function, signature, lambda arch: (fixed, options))


CASES += [_arrange(kernel, A) for A in (8, 256) for kernel in ("count", "scan", "order")]


_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
_POINTERS = {
    "up": ("p_x", "p_order", "p_offsets", "p_weight", "p_bias", "p_h", "p_a"),
    "up alone": ("p_x", "p_order", "p_offsets", "p_weight", "p_bias", "p_a"),  # no backward follows
    "up backward": ("p_grad_y", "p_h", "p_weight", "p_order", "p_offsets", "p_w_out", "p_grad_h", "p_scaled_a",
                    "p_grad_weight", "p_grad_bias"),
    "down": ("p_a", "p_order", "p_offsets", "p_weight", "p_bias", "p_out"),
    "down backward": ("p_a", "p_order", "p_offsets", "p_weight", "p_out"),
    "grad_w_in": ("p_a", "p_b", "p_order", "p_offsets", "p_experts", "p_out"),
    "grad_w_out": ("p_a", "p_b", "p_order", "p_offsets", "p_experts", "p_out"),
}  # fmt: skip

_OF_A_LAYER = ("up", "up alone", "up backward", "down")


def _product(product: str, F: int, A: int, activation: str, dtype: str, D: int = 2048, rows: int = 65536) -> AotCase:
    """A product of the experts with biases and contiguous weights, S 4, as `experts_triton` launches it."""
    gated = activation in ("swiglu", "geglu")
    H, suffix = 2 * F if gated else F, " gated" if gated else ""
    chosen, kernel, columns, depth = {
        "up": (f"up{suffix}", up_triton.up_kernel, F, D),
        "up alone": (f"up{suffix}", up_triton.up_kernel, F, D),
        "up backward": (f"up backward{suffix}", up_triton.up_backward_kernel, F, D),
        "down": ("rows", grouped_triton.rows_kernel, D, F),
        "down backward": ("rows", grouped_triton.rows_kernel, D, H),
        "grad_w_in": ("outer", grouped_triton.outer_kernel, H, D),
        "grad_w_out": ("outer", grouped_triton.outer_kernel, D, F),
    }[product]
    exact = "p_weight" if product == "up backward" else None
    kinds = {"p_order": "*i64", "p_offsets": "*i64", "p_experts": "*i32", exact: "*fp32"}
    kinds |= {"p_grad_weight": "*fp32", "p_grad_bias": "*fp32"}
    plain = f"*{dtype.replace('tf32', 'fp32')}"
    signature = {name: kinds.get(name, plain) for name in _POINTERS[product]}
    fixed = {"N": columns, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    if product.startswith("grad"):
        fixed |= {"GATHER_A": product == "grad_w_in", "SLOTS": 4, "M": depth}
    else:
        fixed["EXPERTS"] = A
        transposed = product.endswith("backward")
        signature |= {"stride_e": "i32", "stride_n" if transposed else "stride_k": "i32"}
        fixed |= {"stride_k" if transposed else "stride_n": 1, "K": depth}
    if product.startswith("up"):
        fixed |= {"ACTIVATION": activation, "PAIR": gated, "SLOTS": 4}
    if product == "up backward":
        fixed["PARTS"] = 20
    if product in ("up alone", "down backward"):
        fixed["p_h" if product == "up alone" else "p_bias"] = None

    def launch(arch: int) -> tuple[dict, dict]:
        chosen_launch = configs.of_arch(chosen, arch, _DTYPE[dtype], dtype == "tf32", rows, A, columns, depth)
        tile = chosen_launch._asdict()
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        piece = {"PIECE": chosen_launch.piece} if product.startswith("up") else {}
        return {**fixed, **tile, **piece}, {**options, "aligned": tuple(signature)}  # strides are divisible by 16

    named = f", {activation}" if product.startswith("up") or gated else ""
    return AotCase(f"experts {product}{named}, D {D}, F {F}, A {A}, R {rows}, {dtype}", kernel, signature, launch)


CASES += [
    *(_product(product, 512, 34, "gelu_tanh", "bf16") for product in _POINTERS),
    *(_product(product, 1024, 18, "swiglu", "bf16") for product in _POINTERS),
    *(_product(product, 2048, 32, "gelu", "fp16") for product in _OF_A_LAYER),
    *(_product(product, 512, 34, "geglu", "bf16", rows=512) for product in _OF_A_LAYER),
    *(_product(product, 512, 34, "gelu_tanh", "bf16", rows=1024) for product in _OF_A_LAYER),
    *(_product(product, 512, 34, "gelu_tanh", "fp32") for product in (*_OF_A_LAYER, "grad_w_in")),
    *(_product(product, 512, 34, "silu", "tf32") for product in (*_OF_A_LAYER, "grad_w_in")),
    _product("up backward", 512, 34, "relu", "bf16"),
    _product("up", 2048, 257, "swiglu", "bf16", D=7168, rows=1 << 18),  # DeepSeek-V3's 256 experts and a shared one
    AotCase(
        "experts bias, D 2048, A 34, bf16",
        up_triton.bias_kernel,
        {"p_grad_y": "*bf16", "p_weight": "*fp32", "p_order": "*i64", "p_offsets": "*i64", "p_bias": "*bf16",
         "p_grad_weight": "*fp32", "p_grad_bias": "*fp32"},
        lambda arch: ({"FIRST_PART": 4, "PARTS": 20, "SLOTS": 4, "EXPERTS": 34, "N": 2048,
                       "BLOCK_M": up_triton.BIAS_ROWS, "BLOCK_N": up_triton.BIAS_COLUMNS}, {"num_warps": 4}),
    ),
    AotCase(
        "experts by load, A 257",
        grouped_triton.by_load_kernel,
        {"p_offsets": "*i64", "p_experts": "*i32"},
        lambda arch: ({"EXPERTS": 257}, {"num_warps": 1}),
    ),
    AotCase(
        "experts sum of row tiles, A 34, N 2048, bf16",
        grouped_triton.sum_tiles_kernel,
        {"p_tiles": "*fp32", "p_offsets": "*i64", "p_out": "*bf16"},
        lambda arch: ({"EXPERTS": 34, "N": 2048, "TILE": 128, "BLOCK_T": 32, "BLOCK_N": 64}, {}),
    ),
    AotCase(
        "experts combine, D 2048, S 7, bf16",
        grouped_triton.combine_kernel,
        {"p_rows": "*bf16", "p_weight": "*fp32", "p_out": "*bf16"},
        lambda arch: ({"WEIGHTED": True, "SLOTS": 7, "N": 2048, "BLOCK_N": 1024}, {}),
    ),
    AotCase(
        "mix, M 2, bf16",
        mix_triton.mix_kernel,
        {**dict.fromkeys(("p_x", "p_injected", "p_y"), "*bf16"), "p_coef": "*fp32",
         **dict.fromkeys(("size", "stride_x", "stride_b", "stride_m"), "i32")},
        lambda arch: ({"M": 2, "BLOCK": mix_triton.BLOCK}, {}),
    ),
    AotCase(
        "mix backward, M 2, bf16",
        mix_triton.mix_backward_kernel,
        {**dict.fromkeys(("p_grad_y", "p_x", "p_injected", "p_grad_x", "p_grad_injected"), "*bf16"),
         "p_coef": "*fp32", "p_parts": "*fp32",
         **dict.fromkeys(("size", "stride_y", "stride_x", "stride_b", "stride_m"), "i32")},
        lambda arch: ({"M": 2, "BLOCK": mix_triton.BLOCK}, {}),
    ),
]  # fmt: skip
