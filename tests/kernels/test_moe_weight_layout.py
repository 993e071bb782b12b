"""Gradients of the experts' weights lie as the weights do, in every implementation, and have the same values."""

from functools import partial

import pytest
import torch

from unif2ace_kernels._library import runnable
from unif2ace_kernels.moe import arrange, experts_torch

HIDDEN, WIDTH, EXPERTS = 8, 5, 4


def backward_of(name):
    if name == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        from unif2ace_kernels.moe import experts_triton

        launch = experts_triton.Launch(16, 16, 16, 1, 1, 4)
        return tuple(
            partial(each, choose=lambda *_: launch) for each in (experts_triton.forward, experts_triton.backward)
        )
    return tuple(
        next(each.function for each in runnable(op, "cpu") if each.name == name)
        for op in ("moe_experts", "moe_experts_backward")
    )


@pytest.mark.parametrize("name", [*(each.name for each in runnable("moe_experts_backward", "cpu")), "triton"])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_gradients_lie_as_the_weights(triton_interpreter, name, flips):
    forward, backward = backward_of(name)
    rng = torch.Generator().manual_seed(0)
    x, grad_y = (torch.randn(20, HIDDEN, generator=rng) for _ in range(2))
    routing = arrange(torch.randint(EXPERTS - 1, (20, 2), generator=rng), torch.rand(20, 2, generator=rng), EXPERTS)
    plain = [torch.randn(EXPERTS, *shape, generator=rng) for shape in ((HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN))]
    results = []
    for kinds in ((False, False), flips):
        w_in, w_out = (
            w.transpose(1, 2).contiguous().transpose(1, 2) if kind else w for w, kind in zip(plain, kinds, strict=True)
        )
        given = routing.weight, routing.order, routing.offsets
        _, h = forward(x, *given, w_in, None, w_out, None, "swiglu")
        _, _, grad_in, _, grad_out, _ = backward(grad_y, x, h, *given, w_in, w_out, None, False, "swiglu")
        for grad, weight in ((grad_in, w_in), (grad_out, w_out)):
            assert grad.stride() == weight.stride() == experts_torch.empty_gradient(weight).stride()
        results.append((grad_in, grad_out))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (ours[EXPERTS - 1] == 0).all()
