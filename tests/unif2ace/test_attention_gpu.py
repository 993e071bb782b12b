"""On CUDA at the sizes of `base`: the attention kernels against float64, forward and backward, and no waiting."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from unif2ace.configs import MMU, T2I
from unif2ace.model.attention import IMPLEMENTATIONS, attend
from unif2ace.model.visibility import Visibility

pytestmark = pytest.mark.gpu

ROWS, LENGTH, N = 6, 387, 256  # 129 caption slots, <soi>, 256 codes, <eoi>


def torchs_own_flash(q, k, v, cu_queries, cu_keys, queries, keys, *, causal, deterministic):
    """flash-attn's varlen kernels as they are built into torch, for where the package is not installed."""
    return torch.ops.aten._flash_attention_forward(q, k, v, cu_queries, cu_keys, queries, keys, 0.0, causal, False)[0]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch) -> str:
    if request.param == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = torchs_own_flash
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    return request.param


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t2i rows padded on the left, mmu rows on either side, plain text; on CUDA."""
    valid = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    valid[0, :100] = valid[1, :3] = False
    valid[2, 300:] = valid[3, :70] = valid[4, :350] = False
    task = torch.tensor([T2I, T2I, MMU, MMU, MMU, MMU])
    return valid.cuda(), task.cuda(), torch.tensor([130, 130, 2, 72, -1, 2]).cuda()


def projected(dtype: torch.dtype) -> torch.Tensor:
    """[3, B, H, L, C] as the layer has them: views of one product."""
    torch.manual_seed(0)
    return torch.randn(ROWS, LENGTH, 3, 32, 64, device="cuda").to(dtype).permute(2, 0, 3, 1, 4)


def output_and_gradient(qkv: torch.Tensor, implementation: str, queries: int) -> list[torch.Tensor]:
    valid, task, image_start = batch()
    real = valid[:, -queries:]
    qkv = qkv.detach().requires_grad_()
    visibility = Visibility(valid, task, image_start, N, queries=queries)
    out = attend(qkv[0][:, :, -queries:], qkv[1], qkv[2], visibility, implementation).transpose(1, 2)[real]
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, device="cuda").to(out.dtype))
    return [out.detach().double(), qkv.grad.double()]


@pytest.mark.parametrize("queries", [LENGTH, 258, 1])
def test_as_exact_as_sdpa_at_the_sizes_of_base(implementation, queries):
    qkv = projected(torch.bfloat16)
    exact = output_and_gradient(qkv.double(), "sdpa", queries)
    peer = output_and_gradient(qkv, "sdpa", queries)
    for given, theirs, want in zip(output_and_gradient(qkv, implementation, queries), peer, exact):
        assert (given - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-6


def test_nothing_is_waited_for(implementation, no_wait):
    """A batch on the device goes through mask and kernel without the host reading anything of it."""
    facts, (q, k, v) = batch(), projected(torch.bfloat16)
    attend(q, k, v, Visibility(*facts, N), implementation)  # compiles what is compiled on first use
    with no_wait():
        attend(q, k, v, Visibility(*facts, N), implementation)
