"""The kernels of the room d3diff, for resources.py: Show-o's head, D = 2048, 8192 image codes of V = 58498 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from aot import CompiledReport, compile_ahead, triton
from resources import AotCase

from unif2ace_kernels.d3diff import configs, logits_triton, noise_triton, products_triton, rows_triton

D, CODES, VOCABULARY = 2048, 8192, 58498
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
CHUNK = {"p_count": "*i32", "first_row": "i32", "rows": "i32"}


@dataclass(frozen=True)
class ProductCase(AotCase):
    """A matrix product: whether its operands are descriptors, with their tiles, or pointers hangs on the GPU.

    operands: which sides of its tile an operand's has, "mk" for [BLOCK_M, BLOCK_K].
    """

    operands: Mapping[str, str] = None
    aligned: tuple[str, ...] = ()

    def compile(self, arch: int) -> CompiledReport:
        constexprs, options = self.launch(arch)
        signature = dict(self.signature)
        for name, (rows, columns) in self.operands.items() if constexprs["DESCRIPTORS"] else ():
            tile = [constexprs[f"BLOCK_{side.upper()}"] for side in (rows, columns)]
            signature[name] = f"tensordesc<{signature[name][1:]}{tile}>".replace(" ", "")
        aligned = tuple(name for name, kind in signature.items() if kind.startswith("*")) + self.aligned
        return compile_ahead(self.kernel, signature, constexprs, arch, aligned=aligned, **options)


def _product(which: str, columns: int, dtype: str) -> ProductCase:
    """logits, hidden or weight, as `head_triton` launches it with a bias and several chunks."""
    name, item = f"*{'fp32' if dtype == 'tf32' else dtype}", DTYPES[dtype].itemsize
    integers = dict.fromkeys(("columns", "features"), "i32")
    aligned = ("first_row", "rows", "features") + (("columns",) if columns % 16 == 0 else ())
    if which == "logits":
        operands, strides = {"x": "mk", "w": "nk"}, ("x_stride", "w_stride", "z_stride")
        signature = {"x": name, "w": name, "p_bias": name, "p_target": "*i32", "p_z": name, "p_top": "*fp32"}
        signature |= {"p_at_target": "*fp32", **CHUNK, **integers, **dict.fromkeys((*strides, "top_stride"), "i32")}
    elif which == "hidden":
        operands, strides = {"g": "mk", "w": "kn"}, ("g_stride", "w_stride")
        signature = {"g": name, "w": name, "p_rows": "*i32", "p_out": name, **CHUNK, **integers}
        signature |= dict.fromkeys(strides, "i32")
    else:
        operands, strides = {"g": "km", "x": "kn"}, ("g_stride", "x_stride")
        signature = {"g": name, "x": name, "p_out": name, **CHUNK, **integers, **dict.fromkeys(strides, "i32")}
        if item == 2:
            signature["p_carry"] = name

    def launch(arch: int) -> tuple[dict, dict]:
        tile = configs.product(arch, DTYPES[dtype], dtype == "tf32", aligned=True)
        constexprs = dict(tile.constexprs)
        if which == "logits":
            constexprs |= {"MASK_K": D % tile.block_k != 0, "HAS_BIAS": True}
        elif which == "hidden":
            constexprs |= {"MASK_K": columns % tile.block_k != 0, "MASK_N": D % tile.block_n != 0}
        else:
            constexprs |= {"MASK_M": columns % tile.block_m != 0, "MASK_N": D % tile.block_n != 0}
            constexprs |= {"ACCUMULATE": True, "CARRY": item == 2, **({} if item == 2 else {"p_carry": None})}
        return constexprs, tile.options

    return ProductCase(
        f"head, {which} product, D {D}, C {columns}, {dtype}",
        getattr(products_triton, {"logits": "logits_kernel"}.get(which, f"{which}_gradient_kernel")),
        signature, launch, operands=operands, aligned=aligned + strides,
    )  # fmt: skip


TERMS = {"p_loss": "*fp32", "p_ce": "*fp32", "p_lse": "*fp32", "p_mass": "*fp32", "p_hit": "*u8"}


def _weights(penalty: bool, mass: bool) -> tuple[dict, dict]:
    """Signature and constexprs of the rows' coefficients."""
    there = {"p_ce_weight": True, "p_penalty_weight": penalty, "p_shift": penalty, "p_mass_weight": mass}
    signature = {name: "*fp32" for name, given in there.items() if given}
    absent = {name: None for name, given in there.items() if not given}
    return signature, {**absent, "HAS_PENALTY": penalty, "HAS_SHIFT": penalty, "HAS_MASS": mass}


def _row_terms(columns: int, dtype: str, penalty: bool, mass: bool) -> AotCase:
    signature, constexprs = _weights(penalty, mass)
    signature |= {"p_z": f"*{dtype}", "p_top": "*fp32", "p_target": "*i32", "p_at_target": "*fp32", "p_rows": "*i32"}
    signature |= {**TERMS, **CHUNK}
    signature |= dict.fromkeys(("columns", "code_start", "code_end", "z_stride", "top_stride"), "i32")

    def launch(arch: int) -> tuple[dict, dict]:
        segment = configs.product(arch, DTYPES[dtype], False, aligned=True).block_n
        tops = triton.next_power_of_2(triton.cdiv(columns, segment))
        held = min(tops, configs.ROW_BLOCK // segment)
        tile = {"SEGMENTS": held, "SEGMENT": segment, "TOPS": tops, "AT_ONCE": columns <= held * segment}
        options = {"num_warps": configs.ROW_WARPS, "aligned": (*_pointers(signature), "first_row", "rows", "z_stride")}
        return {**constexprs, **tile, "GRADIENT": True}, options

    terms = " with penalty" * penalty + " with mass" * mass
    return AotCase(f"head, row terms{terms}, C {columns}, {dtype}", rows_triton.row_terms_kernel, signature, launch)


def _pointers(signature: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name, kind in signature.items() if kind.startswith("*"))


def _list(which: str) -> AotCase:
    signature = {"p_targets": "*i64", "p_group": "*i64", "p_block_counts": "*i32", "ignore_index": "i32"}
    signature |= {"rows": "i32", "blocks": "i32"}
    if which == "list":
        signature |= {"p_rows": "*i32", "p_counts": "*i32", **TERMS}
    constexprs = {"GROUPS": 2, "HAS_GROUP": True, "BLOCK": configs.COMPACT_BLOCK}
    return AotCase(
        f"head, {which} of labelled rows, 2 groups", getattr(rows_triton, f"{which}_kernel"), signature,
        lambda arch: (constexprs, {}),
    )  # fmt: skip


def _ready_logits(which: str, columns: int, dtype: str, penalty: bool, mass: bool) -> AotCase:
    signature, constexprs = _weights(penalty, mass)
    signature |= {"p_z": f"*{dtype}", "p_targets": "*i64"}
    signature |= dict.fromkeys(("start", "code_start", "code_end", "ignore_index", "z_stride"), "i32")
    if which == "forward":
        kernel, block = logits_triton.logits_kernel, configs.row_block(columns)
        signature |= {**TERMS, "columns": "i32"}
    else:
        kernel, block = logits_triton.logits_backward_kernel, configs.row_block(VOCABULARY)
        signature |= {"p_grad_loss": "*fp32", "p_lse": "*fp32", "p_mass": "*fp32", "p_out": f"*{dtype}"}
        signature |= {"width": "i32", "end": "i32"}
    terms = " with penalty" * penalty + " with mass" * mass
    return AotCase(
        f"ready logits{terms}, {which}, V {VOCABULARY}, C {columns}, {dtype}", kernel, signature,
        lambda arch: ({**constexprs, "BLOCK": block}, {"num_warps": configs.ROW_WARPS}),
    )  # fmt: skip


def _noise(length: int, exact: bool) -> AotCase:
    signature = {"p_tokens": "*i64", "p_mask_prob": "*fp32", "p_noised": "*i64", "p_mask": "*u8", "length": "i32"}
    signature |= {"mask_id": "i32", "seed": "i64", "offset": "i32", "first_row": "i32", "stream": "i32"}
    block = triton.next_power_of_2(length)
    return AotCase(
        f"noise, {'exact count' if exact else 'Bernoulli'}, N {length}", noise_triton.noise_kernel, signature,
        lambda arch: ({"EXACT": exact, "BLOCK": block},
                      {"num_warps": configs.noise_warps(block), "enable_fp_fusion": False}),
    )  # fmt: skip


CASES = [
    _product(which, columns, dtype)
    for columns, dtype in [
        (CODES, "bf16"), (CODES, "fp16"), (VOCABULARY, "bf16"), (CODES, "fp32"), (VOCABULARY, "fp32"), (CODES, "tf32"),
    ]
    for which in ("logits", "hidden", "weight")
]  # fmt: skip
CASES += [
    _row_terms(CODES, "bf16", False, False),
    _row_terms(CODES, "bf16", True, False),
    _row_terms(CODES, "fp32", True, False),
    _row_terms(VOCABULARY, "bf16", False, True),
    _row_terms(VOCABULARY, "fp32", False, True),
    _list("count"),
    _list("list"),
    AotCase(
        "head, gather of rows, D 2048, bf16", rows_triton.gather_kernel,
        {"p_hidden": "*bf16", "p_targets": "*i64", "p_rows": "*i32", "p_x": "*bf16", "p_target": "*i32", **CHUNK,
         **dict.fromkeys(("columns", "features", "start", "hidden_stride", "x_stride"), "i32")},
        lambda arch: ({"BLOCK": configs.COPY_BLOCK}, {}),
    ),
    AotCase(
        "head, zeros in other rows, D 2048, bf16", rows_triton.clear_kernel,
        {"p_targets": "*i64", "p_group": "*i64", "p_out": "*bf16", **dict.fromkeys(("rows", "features"), "i32"),
         "ignore_index": "i32"},
        lambda arch: ({"GROUPS": 2, "HAS_GROUP": True, "BLOCK": configs.COPY_BLOCK}, {}),
    ),
    AotCase(
        "head, gradient of the bias, bf16", rows_triton.bias_gradient_kernel,
        {"p_g": "*bf16", "p_out": "*fp32", **CHUNK, **dict.fromkeys(("columns", "g_stride"), "i32")},
        lambda arch: ({"BLOCK_R": configs.SUM_ROWS, "BLOCK_C": configs.SUM_COLUMNS}, {}),
    ),
    AotCase(
        "head, gradient placed, bf16", logits_triton.place_kernel,
        {"p_grad_loss": "*fp32", "p_gradient": "*bf16", "p_out": "*bf16",
         **dict.fromkeys(("size", "begin", "end"), "i32")},
        lambda arch: ({"BLOCK": configs.PLACE_BLOCK}, {"num_warps": configs.ROW_WARPS}),
    ),
    _ready_logits("forward", CODES, "bf16", True, False),
    _ready_logits("backward", CODES, "bf16", True, False),
    _ready_logits("forward", VOCABULARY, "fp32", False, True),
    _ready_logits("backward", VOCABULARY, "fp32", False, True),
    _noise(256, True),
    _noise(configs.NOISE_LENGTH, True),
    _noise(4096, False),
]  # fmt: skip
