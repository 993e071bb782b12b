"""The kernels of the room sampling at Show-o's sizes (V 8192 or 58498, D 2048, N 1024), for resources.py."""

import torch
from resources import AotCase

from unif2ace_kernels.sampling import configs, draw_triton, head_triton, remask_triton

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PLACES = {"p_ids": "*i64", "p_rows": "*i64", "p_seed": "*i64", "p_offset": "*i64"}
_OUTPUTS = {"p_out_ids": "*i64", "p_out_confidence": "*fp32"}


def _case(name, kernel, signature, constexprs, tile, aligned, **options):
    options |= {"num_warps": tile.num_warps, "aligned": aligned, "enable_fp_fusion": False}
    return AotCase(name, kernel, signature, lambda arch: (constexprs, options))


def _draw(dtype: str, codes: int, confidence: str = "log_prob", greedy=False, filtered=False) -> AotCase:
    """Rows of the code columns of a wider head: no row begins at a multiple of 16 bytes."""
    tile = configs.draw_tile(codes, filtered)
    signature = {"p_cond": f"*{dtype}", "p_uncond": f"*{dtype}", "p_unknown": "*u8", **_PLACES, **_OUTPUTS}
    signature |= dict.fromkeys(("stride_cond", "stride_uncond", "first_code", "codes", "top_k"), "i32")
    signature |= dict.fromkeys(("up", "down", "inverse", "top_p"), "fp32")
    constexprs = {"GUIDED": True, "GREEDY": greedy, "TOP_K": filtered, "TOP_P": filtered, "CONFIDENCE": confidence}
    constexprs |= {"SINGLE": codes <= tile.block, "BLOCK": tile.block}
    words = ", temperature 0" * greedy + ", top-k and top-p" * filtered
    name = f"draw, V {codes}, {dtype}, {confidence}{words}"
    options = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return _case(name, draw_triton.draw_kernel, signature, constexprs, tile, tuple(_PLACES), **options)


def _fold(dtype: str) -> AotCase:
    tile = configs.FOLD
    signature = {"p_cond": f"*{dtype}", "p_uncond": f"*{dtype}", "p_ids": "*i64", "p_unknown": "*u8"}
    signature |= {"p_folded": f"*{dtype}", "p_list": "*i32", "p_count": "*i32", "p_ticket": "*i32", **_OUTPUTS}
    signature |= dict.fromkeys(("rows", "hidden", "tickets", "stride_cond", "stride_uncond"), "i32")
    signature |= {"up": "fp32", "down": "fp32"}
    constexprs = {"GUIDED": True, "ROWS": tile.rows, "BLOCK": tile.hidden}
    aligned = tuple(name for name in signature if name.startswith(("p_", "hidden", "stride_")))
    return _case(f"head fold, D 2048, {dtype}", head_triton.fold_kernel, signature, constexprs, tile, aligned)


def _head(dtype: str, confidence: str = "log_prob", store: bool = False, precision: str = "ieee") -> AotCase:
    tile = configs.head_tile(_DTYPES[dtype], store)
    signature = {name: f"*{dtype}" for name in ("p_folded", "p_weight", "p_bias")}
    signature |= dict.fromkeys(("p_list", "p_count", "p_ticket", "p_codes"), "*i32") | {"p_parts": "*fp32"}
    signature |= {"p_logits": "*fp32", **_PLACES, **_OUTPUTS, "inverse": "fp32"}
    signature |= dict.fromkeys(("row_tiles", "codes", "hidden", "stride_weight", "first_code"), "i32")
    constexprs = {"BIAS": True, "GREEDY": False, "CONFIDENCE": confidence, "STORE": store, "EVEN": True}
    constexprs |= {"PRECISION": precision, "ROWS": tile.rows, "COLUMNS": tile.columns, "HIDDEN": tile.hidden}
    constexprs["GROUP"] = 8
    aligned = ("p_folded", "p_weight", "p_list", "p_parts", "p_codes", "p_logits", "hidden", "stride_weight")
    kind = "logits stored for a filter" if store else f"drawn, {confidence}"
    name = f"head, D 2048, V 8192, {dtype}{' as tf32' * (precision == 'tf32')}, {kind}"
    return _case(name, head_triton.head_kernel, signature, constexprs, tile, aligned, num_stages=tile.num_stages)


def _remask(length: int, ties: str) -> AotCase:
    tile = configs.remask_tile(length)
    signature = {"p_confidence": "*fp32", "p_unknown": "*u8", "p_count": "*i64", "p_rows": "*i64", "p_seed": "*i64"}
    signature |= {"p_offset": "*i64", "p_temperature": "*fp32", "p_mask": "*u8", "length": "i32"}
    constexprs = {"SHOWO": ties == "showo", "BLOCK": tile.block}
    aligned = (*(name for name in signature if name.startswith("p_")), "length")
    return _case(f"remask, N {length}, {ties}", remask_triton.remask_kernel, signature, constexprs, tile, aligned)


CASES = [
    _draw("bf16", 8192),
    _draw("fp32", 8192, "neg_entropy"),
    _draw("bf16", 8192, "margin"),
    _draw("bf16", 8192, greedy=True),
    _draw("bf16", 8192, "margin", filtered=True),
    _draw("bf16", 58498),
    _draw("bf16", 58498, filtered=True),
    _fold("bf16"),
    _head("bf16"),
    _head("bf16", "margin"),
    _head("bf16", "neg_entropy"),
    _head("bf16", store=True),
    _head("fp32"),
    _head("fp32", precision="tf32"),
    _remask(1024, "index"),
    _remask(1024, "showo"),
    _remask(configs.LARGEST_ROW, "index"),
]
