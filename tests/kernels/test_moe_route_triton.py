"""route in Triton, interpreted: the edge grid against float64 and the torch path; many blocks; ids out of range."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from route_cases import CASES, RouteCase, check  # noqa: E402

from unif2ace_kernels.moe import order_triton, route_torch, route_triton  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted(triton_interpreter, case):
    check(case, route_triton.forward, route_triton.backward)


@pytest.mark.parametrize("shape", [(8, 16), (64, 32)], ids=str)
def test_blocks_and_columns_over_several_programs(triton_interpreter, monkeypatch, shape):
    monkeypatch.setattr(route_triton, "tiles", lambda tokens, widest: {"BT": shape[0], "BN": shape[1], "num_warps": 4})
    monkeypatch.setattr(order_triton, "SCAN_BLOCK", 4)
    case = RouteCase("blocks", tokens=130, sizes=(13, 11), top_k=3, shared=2)
    check(case, route_triton.forward, route_triton.backward)


def test_same_bits_on_every_run_and_for_every_layout(triton_interpreter):
    runs = [
        route_triton.forward(*RouteCase("runs", tokens=200, strided=strided).arguments())
        for strided in (False, False, True)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_ids_out_of_range_stay_in_bounds(triton_interpreter):
    logits, ids, *rest = RouteCase("bad ids").arguments()
    ids[3], ids[9], ids[20] = -1, 2, 2**62
    outputs = route_triton.forward(logits, ids, *rest)
    clamped = route_torch.forward(logits, ids.clamp(0, 1), *rest)
    for place in (1, 2, 3, 4):
        assert torch.equal(outputs[place], clamped[place])
    given = torch.ones(60, 3), None, torch.ones(()), None
    gradient = route_triton.backward(*given, logits, ids, *outputs[1:3], [3, 5], 2, [0.1, 0.1], True, "softmax", 0.0)
    assert gradient.isfinite().all()
