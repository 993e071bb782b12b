"""Rows that lie more than 2**31 elements into memory: what the ops give for them is what they give for the same rows
side by side. Memory that nothing touches costs nothing, so that any machine can hold such tensors."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator

import pytest
import torch

from unif2ace_kernels import _library, d3diff, moe, sampling

UNUSED = mmap.MAP_PRIVATE | 0x4000  # Linux's MAP_NORESERVE, which Python 3.10 does not name
FAR = 2**31 + 16  # elements; as many bytes as their type has times that are claimed and not used


def far(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last row, over the first dimension, beginning `FAR` elements or more after the first one."""
    stride = -(-FAR // max(1, len(x) - 1))
    stride += -stride % 64
    elements = (len(x) - 1) * stride + x[0].numel()
    held = mmap.mmap(-1, elements * x.element_size(), UNUSED)
    moved = torch.frombuffer(held, dtype=x.dtype).as_strided(x.shape, (stride, *x.stride()[1:]))
    return moved.copy_(x)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.fixture(params=["c++", "torch", pytest.param("triton", marks=pytest.mark.slow)])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every op runs the implementation of this name; Triton's is interpreted, in small tiles."""
    name, chosen = request.param, {}
    if name == "c++" and _library.EXTENSION_MISSING is not None:
        pytest.skip(f"extension not built: {_library.EXTENSION_MISSING}")
    if name == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        import d3diff_cases
        import experts_cases

        request.getfixturevalue("triton_interpreter")
        d3diff_cases.shrink(monkeypatch, descriptors=False)
        chosen = dict.fromkeys(("moe_experts", "moe_experts_backward"), {"choose": experts_cases.small})
    with torch.library._scoped_library("unif2ace", "IMPL") as library:
        for op in _library.registered_ops():
            for each in _library.runnable(op, "cuda" if name == "triton" else "cpu"):
                if each.name == name and each.function is not None:
                    library.impl(op, functools.partial(each.function, **chosen.get(op, {})), "CPU")
        yield name


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DTYPES = [torch.float32, torch.float16]  # the interpreter rounds bfloat16 wrongly


def both(run, *tensors):
    """`run` of the tensors as they are and of the same ones far apart: (outputs, gradients) each, all equal."""
    results = []
    for place in (lambda each: each.clone(), far):
        leaves = [each if each is None else place(each) for each in tensors]
        leaves = [e.requires_grad_() if e is not None and e.is_floating_point() else e for e in leaves]
        out = [each for each in run(*leaves) if isinstance(each, torch.Tensor)]
        values = [each for each in out if each.requires_grad]
        wanted = [each for each in leaves if each is not None and each.requires_grad]
        cotangents = [torch.linspace(-1, 1, each.numel()).view(each.shape).to(each) for each in values]
        grads = torch.autograd.grad(values, wanted, cotangents, allow_unused=True) if values else ()
        results.append([*out, *grads])
    for near, distant in zip(*results, strict=True):
        assert (near is None) == (distant is None)
        assert near is None or torch.equal(near.nan_to_num(), distant.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route(implementation, dtype):
    ids = torch.arange(40) % 2
    both(lambda logits, ids: moe.route(logits, ids, [4, 6], 2, shared=1), randn(40, 10, dtype=dtype), ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(implementation, dtype):
    routing = moe.route(randn(12, 6), torch.arange(12) % 2, [3, 3], 2, shared=1)
    shapes = (12, 16), (8, 16, 64), (8, 32, 16), (8, 64), (8, 16)
    given = [randn(*shape, dtype=dtype) for shape in shapes]

    def run(x, w_in, w_out, b_in, b_out):
        return (moe.experts(x, routing, w_in, b_in, w_out, b_out, activation="swiglu"),)

    both(run, *given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix(implementation, dtype):
    both(lambda *given: (moe.mix(*given),), randn(3, 5, 8, dtype=dtype), randn(3, 3), randn(3, 2, 5, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(implementation, dtype):
    targets, mask_prob = torch.randint(4, 12, (18,)), torch.tensor([0.2, 0.5, 0.9])
    targets[::3] = -100
    sample = torch.arange(18) // 6
    options = {"code_range": (4, 12), "alpha": 0.3}
    given = randn(18, 16, dtype=dtype), randn(12, 16, dtype=dtype), randn(12, dtype=dtype), targets
    both(lambda *each: d3diff.loss(*each, **options)[:1], *given, mask_prob, sample)
    both(
        lambda *each: d3diff.loss_from_logits(*each, **options)[:1],
        randn(18, 12, dtype=dtype), targets, mask_prob, sample,
    )  # fmt: skip
    both(lambda *each: d3diff.next_token_loss(*each)[:1], *given)


def test_noise(implementation):
    tokens, mask_prob = torch.randint(99, (5, 7)), torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0])
    both(lambda *each: d3diff.noise(*each, mask_id=100, seed=3, offset=4), tokens, mask_prob)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws(implementation, dtype):
    ids = torch.where(torch.arange(9) % 3 == 0, 5, -7)
    options = {"seed": 1, "offset": 2, "guidance": 1.5, "top_k": 5, "top_p": 0.9}
    with torch.no_grad():
        both(
            lambda cond, uncond, ids: sampling.sample_from_logits(cond, uncond, ids, -7, **options),
            randn(9, 33, dtype=dtype), randn(9, 33, dtype=dtype), ids,
        )  # fmt: skip
        both(
            lambda cond, uncond, weight, bias, ids: sampling.sample_from_hidden(
                cond, uncond, weight, bias, ids, -7, **options
            ),
            randn(9, 16, dtype=dtype), randn(9, 16, dtype=dtype), randn(33, 16, dtype=dtype),
            randn(33, dtype=dtype), ids,
        )  # fmt: skip
        both(
            lambda sure, unknown, count: (sampling.remask(sure, unknown, count, seed=1, offset=2),),
            randn(4, 6), torch.arange(24).view(4, 6) % 3 > 0, torch.tensor([0, 1, 2, 3]),
        )  # fmt: skip
