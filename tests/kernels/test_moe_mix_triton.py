"""The sequence-level mixture in Triton: interpreted against float64 with the 2x rule; on a GPU end to end."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from unif2ace_kernels.moe import mix, mix_torch, mix_triton, reference  # noqa: E402


def make(dtype=torch.float32, batch=3, length=7, injected=2, hidden=9):
    """x, coef, injected, grad_y."""
    rng = torch.Generator().manual_seed(0)
    shapes = (batch, length, hidden), (batch, 1 + injected), (batch, injected, length, hidden), (batch, length, hidden)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def by_autograd(function, x, coef, injected, grad_y):
    leaves = [each.detach().clone().requires_grad_() for each in (x, coef, injected)]
    y = function(*leaves)
    y.backward(grad_y)
    return [y.detach(), *(each.grad for each in leaves)]


def in_triton(x, coef, injected, grad_y):
    return [mix_triton.forward(x, coef, injected), *mix_triton.backward(grad_y, x, coef, injected)]


def assert_as_good(got, inputs):
    """err(ours) <= 2 err(torch in the same dtype) + tiny, both against float64; the gradient of coef at its scale."""
    exact = by_autograd(reference.mix, *(each.double() for each in inputs))
    for g, p, e in zip(got, by_autograd(reference.mix, *inputs), exact, strict=True):
        assert g.shape == e.shape and g.dtype == p.dtype
        if e.numel():
            scale = max(1.0, float(e.abs().max()))
            assert (g.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + 1e-6 * scale


@pytest.mark.parametrize("injected", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter cuts bfloat16 off
def test_values_and_gradients(triton_interpreter, injected, dtype):
    inputs = make(dtype, injected=injected)
    assert_as_good(in_triton(*inputs), inputs)


def test_many_terms_are_rounded_once(triton_interpreter):
    """Positive ones, whose sum outgrows each: rounded to 16 bits after each it would stay behind."""
    x, coef, injected, _ = (each.abs() + 0.5 for each in make(torch.float16, injected=40))
    exact = reference.mix(x.double(), coef.double(), injected.double())
    assert ((mix_triton.forward(x, coef, injected) - exact).abs() <= (2.0**-11 + 2.0**-18) * exact).all()


@pytest.mark.parametrize("block", [16, 64])
def test_many_blocks(triton_interpreter, monkeypatch, block):
    monkeypatch.setattr(mix_triton, "BLOCK", block)
    for size in ({"length": 8, "hidden": 16}, {"length": 11, "hidden": 13}, {"length": 1, "hidden": 1}):
        inputs = make(**size)
        assert_as_good(in_triton(*inputs), inputs)


@pytest.mark.parametrize("size", [{"batch": 0}, {"length": 0}, {"length": 0, "injected": 0}], ids=str)
def test_nothing_to_mix(triton_interpreter, size):
    inputs = make(**size)
    y, grad_x, grad_coef, grad_injected = in_triton(*inputs)
    assert y.shape == grad_x.shape == inputs[0].shape and grad_injected.shape == inputs[2].shape
    assert grad_coef.shape == inputs[1].shape and (grad_coef == 0).all()


def test_slices_of_a_sequence_are_read_in_place_and_other_strides_copied(triton_interpreter):
    x, coef, injected, grad_y = make()
    want = in_triton(x, coef, injected, grad_y)
    long_x, long_y = torch.full((2, 3, 20, 9), float("nan"))
    long_x[:, 5:12], long_y[:, 5:12] = x, grad_y
    assert mix_triton._rows(long_x[:, 5:12]).data_ptr() == long_x[:, 5:12].data_ptr()
    by_image = injected.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = in_triton(long_x[:, 5:12], coef, by_image, long_y[:, 5:12])
    far = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in (x, coef, injected, grad_y)]
    copied = in_triton(*far)
    same = in_triton(x[:1].expand(3, 7, 9), coef, injected[:1].expand(3, 2, 7, 9), grad_y[:1, :1].expand(3, 7, 9))
    plain = in_triton(*(each.contiguous() for each in (x[:1].expand(3, 7, 9), coef, injected[:1].expand(3, 2, 7, 9),
                                                       grad_y[:1, :1].expand(3, 7, 9))))  # fmt: skip
    for a, b, c, d, e in zip(want, sliced, copied, same, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(d, e)


def test_bad_values_stay_in_their_place(triton_interpreter):
    x, coef, injected, grad_y = make()
    clean = in_triton(x, coef, injected, grad_y)
    injected[1, 0, 2, 3] = float("nan")
    y, grad_x, grad_coef, grad_injected = in_triton(x, coef, injected, grad_y)
    assert y.isnan().nonzero().tolist() == [[1, 2, 3]] and grad_coef.isnan().nonzero().tolist() == [[1, 1]]
    assert torch.equal(y[::2], clean[0][::2])
    assert torch.equal(grad_x, clean[1]) and torch.equal(grad_injected, clean[3])


def check_on(device, dtype, **size):
    inputs = make(dtype, **size)
    got = by_autograd(mix, *(each.to(device) for each in inputs))
    assert_as_good([each.cpu() for each in got], inputs)


def test_the_gpu_checks_pass_where_they_can_run_here():
    check_on("cpu", torch.bfloat16, length=33, hidden=100)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("injected", [0, 1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_values_and_gradients(self, injected, dtype):
        check_on("cuda", dtype, injected=injected, length=129, hidden=264)

    def test_same_bits_on_every_run_compiled_and_captured(self):
        x, coef, injected, grad_y = (each.cuda() for each in make(torch.bfloat16, length=129, hidden=264))
        first = by_autograd(mix, x, coef, injected, grad_y)
        runs = [by_autograd(mix, x, coef, injected, grad_y)]
        runs.append(by_autograd(torch.compile(mix, fullgraph=True), x, coef, injected, grad_y))
        leaves = [each.requires_grad_() for each in (x, coef, injected)]

        def run():
            y = mix(*leaves)
            return [y, *torch.autograd.grad(y, leaves, grad_y)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        for again in (*runs, captured):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_float64_goes_to_torch(self):
        inputs = [each.cuda() for each in make(torch.float64)]
        assert torch.equal(mix(*inputs[:3]), mix_torch.forward(*inputs[:3]))
