"""mix: the sequence-level mixture against float64, its gradients, edges and bad input."""

import pytest
import torch

from unif2ace_kernels.moe import mix, mix_torch, reference


def make(injected=2, dtype=torch.float64, batch=3, length=5):
    rng = torch.Generator().manual_seed(0)
    shapes = (batch, length, 4), (batch, 1 + injected), (batch, injected, length, 4)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("injected", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [5, 1041])  # 1,041 x 4 elements: a whole piece of them, a block and a rest
def test_values_and_gradients(injected, dtype, length):
    ours, peer = (make(injected, dtype, length=length) for _ in range(2))
    exact = [each.detach().double().requires_grad_() for each in ours]
    outputs = [mix(*ours), reference.mix(*peer), reference.mix(*exact)]
    grad_y = torch.randn(3, length, 4).to(dtype)
    for y in outputs:
        y.backward(grad_y.to(y.dtype))
    got, same_dtype, want = (
        [y, *(each.grad for each in leaves)] for y, leaves in zip(outputs, (ours, peer, exact), strict=True)
    )
    for g, p, w in zip(got, same_dtype, want, strict=True):
        assert g.shape == w.shape and g.dtype == dtype
        if w.numel():
            tiny = 1e-6 * w.abs().max().clamp(min=1)  # gradients of coef are sums over a sample
            assert (g - w).abs().max() <= 2 * (p - w).abs().max() + tiny


@pytest.mark.parametrize("injected", [0, 1, 3])
def test_the_torch_path(injected):
    leaves, grad_y = make(injected), torch.randn(3, 5, 4, dtype=torch.float64)
    y = reference.mix(*leaves)
    inputs = [each.detach() for each in leaves]
    torch.testing.assert_close(mix_torch.forward(*inputs), y.detach())
    torch.testing.assert_close(mix_torch.backward(grad_y, *inputs), torch.autograd.grad(y, leaves, grad_y))


def test_gradcheck():
    assert torch.autograd.gradcheck(mix, make())


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0)])
def test_nothing_to_mix(batch, length):
    x, coef, injected = make(batch=batch, length=length)
    y = mix(x, coef, injected)
    y.sum().backward()
    assert y.shape == x.shape and (coef.grad == 0).all()


def test_bad_values_stay_in_their_sample():
    x, coef, injected = (each.detach() for each in make())
    clean = mix(x, coef, injected)
    injected[1, 0, 2, 3] = float("nan")
    assert torch.equal(mix(x, coef, injected).isnan().nonzero(), torch.tensor([[1, 2, 3]]))
    assert torch.equal(mix(x, coef, injected)[::2], clean[::2])


def test_strided_inputs():
    x, coef, injected = (each.detach() for each in make())
    strided = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in (x, coef, injected)]
    assert torch.equal(mix(*strided), mix(x, coef, injected))


def test_autocast_keeps_the_dtype_of_x():
    x, coef, injected = (each.detach().float() for each in make())
    with torch.autocast("cpu", torch.bfloat16):
        y = mix(x, coef, injected.bfloat16())
    assert torch.equal(y, mix(x, coef, injected.bfloat16().float()))


def test_opcheck():
    arguments = make(dtype=torch.float32)
    torch.library.opcheck(torch.ops.unif2ace.moe_mix.default, arguments)
    detached = [each.detach() for each in arguments]
    torch.library.opcheck(torch.ops.unif2ace.moe_mix_backward.default, (torch.randn(3, 5, 4), *detached))


def test_second_derivative_is_refused():
    x, coef, injected = make()
    (grad_x,) = torch.autograd.grad(mix(x, coef, injected).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_mix_backward cannot be differentiated"):
        grad_x.sum().backward()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("x", [(3, 5), (3, 3), (3, 2, 5, 4)]),
        ("coef", [(3, 5, 4), (3, 2), (3, 2, 5, 4)]),
        ("injected", [(3, 5, 4), (3, 3), (3, 2, 6, 4)]),
    ],
)
def test_bad_input_is_named(name, shapes):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        mix(*map(torch.zeros, shapes))
