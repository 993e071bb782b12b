"""Rows that lie more than 2**31 elements into memory: what the ops give for them is what they give for the same rows
side by side. Memory that nothing touches costs nothing, so that any machine can hold such tensors."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator

import pytest
import torch

from unif2ace_kernels import _library, d3diff, moe, sampling

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # that an implementation takes another's place
UNUSED = mmap.MAP_PRIVATE | 0x4000  # Linux's MAP_NORESERVE, which Python 3.10 does not name
FAR = 2**31 + 16  # elements; as many bytes as their type has times that are claimed and not used


def claimed(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory is there once it is written to."""
    return torch.frombuffer(mmap.mmap(-1, elements * torch.empty(0, dtype=dtype).element_size(), UNUSED), dtype=dtype)


def far(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last row, over the first dimension, beginning `FAR` elements or more after the first one."""
    stride = -(-FAR // max(1, len(x) - 1))
    stride += -stride % 64
    moved = claimed((len(x) - 1) * stride + x[0].numel(), x.dtype).as_strided(x.shape, (stride, *x.stride()[1:]))
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


# ---------------------------------------- tensors of more than 2**31 elements, the last rows of which count


def ending(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[count, D] that end with `rows` [R, D] and are zeros before."""
    whole = claimed(count * rows.shape[1], rows.dtype).view(count, rows.shape[1])
    whole[-len(rows) :] = rows
    return whole


def last(values: torch.Tensor, count: int, before: int) -> torch.Tensor:
    """int64 [count] that end with `values`."""
    return torch.cat([torch.full((count - len(values),), before), values])


@pytest.fixture
def on_cpu(implementation):
    if implementation == "triton":
        pytest.skip("needs CUDA: too many programs to interpret, and those with far rows run the same code")


@pytest.mark.usefixtures("on_cpu")
class TestLarge:
    """bfloat16, 4 GiB claimed each."""

    @pytest.mark.parametrize("columns", [32771, 1024])
    def test_rows(self, columns):
        count = FAR // columns + 2
        rows, targets = randn(3, columns, dtype=torch.bfloat16), torch.tensor([3, columns - 1, 77])
        whole, labels = ending(rows, count), last(targets, count, -100)
        ids, drawn = last(torch.full((3,), -7), count, 5), {"seed": 1, "guidance": 2.0, "code_range": (9, columns)}
        weight = randn(300, columns, dtype=torch.bfloat16) / columns**0.5
        places = torch.arange(count)
        for values, target, own, place in ((whole, labels, ids, places), (rows, targets, ids[-3:], places[-3:])):
            half, zero = torch.tensor([0.5]), torch.zeros(len(values), dtype=torch.long)
            target300 = target.clamp(max=299)
            given = {"alpha": 0.3}
            with torch.no_grad():
                found = [
                    *sampling.sample_from_logits(values, values, own, -7, rows=place, **drawn),
                    *sampling.sample_from_hidden(values, None, weight, None, own, -7, rows=place, seed=1),
                    d3diff.loss_from_logits(values, target, half, zero, code_range=(0, columns), **given)[0],
                    d3diff.loss(values, weight, None, target300, half, zero, code_range=(0, 300), **given)[0],
                    d3diff.next_token_loss(values, weight, None, target300)[0],
                ]
            found = [each[-3:] if each.dim() else each for each in found]
            if values is whole:
                large = found
        for ours, small in zip(large, found, strict=True):
            assert torch.equal(ours, small)

    def test_weights_of_experts(self):
        count, width = 258, 8192
        w_in, w_out = (randn(1, *shape, dtype=torch.bfloat16) / 32 for shape in ((1024, width), (width, 1024)))
        whole = [ending(each.view(1, -1), count).view(count, *each.shape[1:]) for each in (w_in, w_out)]
        x, ids, logits = randn(4, 1024, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long), torch.zeros(4, count)
        logits[:, -1] = 9
        with torch.no_grad():
            large = moe.experts(
                x, moe.route(logits, ids, [count], 1), whole[0], None, whole[1], None, activation="gelu"
            )
            small = moe.experts(x, moe.route(logits[:, -1:], ids, [1], 1), w_in, None, w_out, None, activation="gelu")
        assert torch.equal(large, small)
