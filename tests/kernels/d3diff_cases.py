"""What the tests of the loss in Triton share: its ops in place of torch's, small tiles, rows of two groups."""

import contextlib

import pytest
import torch

from unif2ace_kernels.d3diff import losses, ops
from unif2ace_kernels.d3diff.head import head_torch

pytest.importorskip("triton", reason="needs Triton")

from unif2ace_kernels.d3diff import configs, head_triton, logits_triton, noise_triton  # noqa: E402


def as_torch_op(forward, setup_context, backward):
    """An autograd function of an op's formulas, with the implementation given."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            out = tuple(forward(*inputs))
            setup_context(ctx, inputs, out)
            return out

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

    return Op.apply


@contextlib.contextmanager
def triton_ops():
    """The public functions run the Triton implementations."""
    head = as_torch_op(head_triton.head_triton, ops._head_setup_context, ops._head_backward)
    ready = as_torch_op(logits_triton.logits_triton, ops._logits_setup_context, ops._logits_backward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "head_op", head)
        patch.setattr(losses, "logits_op", ready)
        patch.setattr(losses, "noise_op", noise_triton.noise_triton)
        patch.setattr(ops, "head_backward_op", logits_triton.head_backward_triton)
        patch.setattr(ops, "logits_backward_op", logits_triton.logits_backward_triton)
        yield


@pytest.fixture(params=["pointers", pytest.param("descriptors", marks=pytest.mark.slow)])
def small_tiles(request, triton_interpreter, monkeypatch):
    """Interpreted kernels, with tiles and chunks so small that small problems fill several."""
    shrink(monkeypatch, request.param == "descriptors")


def shrink(monkeypatch, descriptors):
    tile = configs.Product(16, 16, 16, 4, 2, descriptors=descriptors, persistent=descriptors, group=2)
    monkeypatch.setattr(configs, "product", lambda arch, dtype, tf32, aligned: tile)
    monkeypatch.setattr(configs, "machine", lambda device: (90, 3))
    sizes = {"CHUNK_BYTES": 0, "MIN_CHUNK_ROWS": 16, "CHUNK_MULTIPLE": 16, "COMPACT_BLOCK": 16, "COPY_BLOCK": 16}
    sizes |= {"ROW_BLOCK": 16, "SUM_ROWS": 4, "SUM_COLUMNS": 16, "PLACE_BLOCK": 64}
    for name, value in sizes.items():
        monkeypatch.setattr(configs, name, value)


def doubled(arguments):
    """float64 of those that are floating point, with gradients where these had some."""
    floating = [isinstance(each, torch.Tensor) and each.is_floating_point() for each in arguments]
    return [
        each.detach().double().requires_grad_(each.requires_grad) if is_floating else each
        for each, is_floating in zip(arguments, floating, strict=True)
    ]


def assert_as_good(ours, theirs, true, what=""):
    """At most twice the error of theirs, of outputs scaled to order 1."""
    assert ours.shape == true.shape and ours.dtype == theirs.dtype, what
    scale = true.detach().double().abs().max().clamp(min=1e-30)
    ours, theirs = (((each.detach() - true.detach()) / scale).abs().max().item() for each in (ours, theirs))
    assert ours <= 2 * theirs + 1e-6, f"{what}: {ours:.2e} against {theirs:.2e}"


def rows_of_two_groups(T=37, D=24, dtype=torch.float32, label=lambda rng, T: torch.rand(T, generator=rng) < 0.6):
    """Arguments of the head but the last four: group 0 takes columns 6:20 of 70, group 1 all; no size is a block's."""
    rng = torch.Generator().manual_seed(3)
    draw = {"dtype": torch.float64, "generator": rng}
    hidden, weight, bias = torch.randn(T, D, **draw), torch.randn(70, D, **draw) * 0.4, torch.randn(70, **draw)
    targets = torch.where(label(rng, T), torch.randint(6, 20, (T,), generator=rng), -1)
    group, a, b = torch.randint(-1, 2, (T,), generator=rng), torch.rand(T, **draw), torch.rand(T, **draw)
    floats = [each.to(dtype) for each in (hidden, weight, bias)]
    a, b, shift = (each.float() for each in (a, 0.3 * b, torch.randn(T, **draw) - 3))
    return *floats, targets, group, a, b, shift, None, [6, 0], [20, 70], [6, 20], -1


def assert_head(arguments, dtype, asked=(True, True, True)):
    """The Triton head is as good as torch's, against float64."""
    true = head_torch(*doubled(arguments), torch.float64, *asked)
    plain = head_torch(*arguments, dtype, *asked)
    ours = head_triton.head_triton(*arguments, dtype, *asked)
    for name in true._fields[:-3]:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(true, name).double(), rtol=2e-3, atol=2e-3)
    for name, *each in zip(true._fields, ours, plain, true, strict=True):
        if each[2].numel() and each[2].is_floating_point():
            assert_as_good(*each, name)
        else:
            assert torch.equal(each[0], each[1]), name
    return ours


def head_of(logits, targets, **weights):
    """The head whose logits are those given: hidden one-hot rows, the weight the logits' columns."""
    T, C = logits.shape
    names = ("ce", "penalty", "shift", "mass")
    coefficients = [weights.get(name, torch.ones(T) if name == "ce" else None) for name in names]
    features = max(16, T)  # descriptors want rows of whole 16 bytes
    weight = torch.nn.functional.pad(logits.t(), (0, features - T))
    arguments = torch.eye(T, features), weight, None, targets, None, *coefficients, [0], [C], [0, C], -100
    return head_triton.head_triton(*arguments, torch.float32, True, True, True)
