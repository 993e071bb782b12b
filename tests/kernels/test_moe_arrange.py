"""arrange: any router's choice, held against the definition, against route's own order, and through the experts."""

import pytest
import torch

from unif2ace_kernels._library import runnable
from unif2ace_kernels.moe import arrange, arrange_torch, experts, reference, route

IMPLEMENTATIONS = [each.name for each in runnable("moe_arrange", "cpu")]


def choice(tokens, slots, num_experts, seed=0):
    """Experts [T, K], some of them twice in a token, some in none."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(num_experts, (tokens, slots), generator=rng) // 2 * 2


CASES = [
    (choice(0, 2, 4), 4),
    (choice(1, 1, 1), 1),
    (choice(7, 3, 5), 5),
    (choice(130, 4, 33), 33),
    (torch.full((70, 2), 3), 5),
]


def assert_is_the_definition(forward, expert, num_experts):
    for ours, theirs in zip(forward(expert, num_experts), reference.arrange(expert, num_experts), strict=True):
        assert ours.dtype == torch.int64 and ours.tolist() == theirs


CHUNKS = (choice(2100, 2, 300), 300)  # more slots than C++ gives a chunk; the interpreter would take a minute


@pytest.mark.parametrize("case", [*CASES, CHUNKS], ids=lambda case: f"{list(case[0].shape)} of {case[1]}")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_is_the_definition(name, case):
    (forward,) = (each.function for each in runnable("moe_arrange", "cpu") if each.name == name)
    assert_is_the_definition(forward, *case)
    assert_is_the_definition(forward, torch.stack([case[0], case[0]], -1)[..., 0], case[1])  # no stride is 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{list(case[0].shape)} of {case[1]}")
def test_interpreted(triton_interpreter, monkeypatch, case):
    from unif2ace_kernels.moe import arrange_triton, order_triton

    monkeypatch.setattr(order_triton, "SCAN_BLOCK", 4)
    assert_is_the_definition(arrange_triton.forward, *case)


def test_interpreted_out_of_range_stays_in_bounds(triton_interpreter):
    from unif2ace_kernels.moe import arrange_triton

    expert = torch.tensor([[-1, 3], [2**62, 0], [-(2**40), 5]])
    for ours, theirs in zip(arrange_triton.forward(expert, 4), arrange_torch.forward(expert.clamp(0, 3), 4)):
        assert torch.equal(ours, theirs)


def test_arranges_as_route_does():
    logits, ids = torch.randn(90, 12), torch.zeros(90, dtype=torch.int64)
    routed = route(logits, ids, (12,), 3, normalize=False)
    ours = arrange(routed.expert, routed.weight, 12)
    for name in ("weight", "expert", "counts", "offsets", "order", "frequency"):
        torch.testing.assert_close(getattr(ours, name), getattr(routed, name), rtol=1e-6, atol=0, msg=name)
    assert ours.probability.shape == (12,) and float(ours.balance_loss + ours.z_loss) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer(dtype):
    expert, num_experts = CASES[2]
    ours, theirs = (arrange(each, torch.ones(7, 3), num_experts) for each in (expert.to(dtype), expert))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs))


def test_experts_and_gradients_of_a_users_router():
    """Through the op against the equation, both in float64, an expert twice in a token among them."""
    torch.manual_seed(0)
    tokens, num_experts, hidden, width = 40, 6, 8, 5
    expert = choice(tokens, 3, num_experts)
    assert (expert[:, 0] == expert[:, 1]).any()
    double = {"dtype": torch.float64, "requires_grad": True}
    shapes = [(tokens, hidden), (tokens, 3), (num_experts, hidden, 2 * width), (num_experts, width, hidden)]
    leaves = [torch.randn(*shape, **double) for shape in shapes]

    def ours(x, weight, w_in, w_out):
        return experts(x, arrange(expert, weight, num_experts), w_in, None, w_out, None, activation="swiglu")

    def truth(x, weight, w_in, w_out):
        return reference.experts(x, expert, weight, w_in, None, w_out, None, "swiglu")

    grad_y = torch.randn(tokens, hidden, dtype=torch.float64)
    gradients = (torch.autograd.grad(each(*leaves), leaves, grad_y) for each in (ours, truth))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(*leaves), truth(*leaves), rtol=1e-12, atol=1e-12)


def test_16_bit_weights_become_float32():
    routing = arrange(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.bfloat16), 2)
    assert routing.weight.dtype == routing.frequency.dtype == torch.float32


def test_what_torch_asks_of_an_op():
    torch.library.opcheck(torch.ops.unif2ace.moe_arrange.default, (CASES[2][0], 5))

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(expert, weight):
        return arrange(expert, weight, 5).order

    for tokens in (7, 9):
        expert = choice(tokens, 3, 5)
        assert torch.equal(compiled(expert, torch.ones(tokens, 3)), arrange(expert, torch.ones(tokens, 3), 5).order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.ones(3, 2), 4), "expert: expected dtype int64"),
        ((torch.zeros(3).long(), torch.ones(3), 4), r"expert: expected shape \[T, K\]"),
        ((torch.zeros(3, 2).long(), torch.ones(3, 1), 4), r"weight: expected shape \[3, 2\]"),
        ((torch.zeros(3, 2).long(), torch.ones(3, 2).long(), 4), "weight: expected dtype float64"),
        ((torch.zeros(3, 2).long(), torch.ones(3, 2), 0), "num_experts: expected an int >= 1, got 0"),
        ((torch.full((3, 2), 4), torch.ones(3, 2), 4), r"expert: expected values in \[0, 4\), got .* in \[4, 4\]"),
        ((torch.full((3, 2), -1), torch.ones(3, 2), 4), r"expert: expected values in \[0, 4\), got .* in \[-1, -1\]"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        arrange(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{list(case[0].shape)} of {case[1]}")
def test_on_cuda_without_a_wait(case, no_wait):
    expert, weight = case[0].cuda(), torch.rand(case[0].shape).cuda()
    with no_wait():
        routing = arrange(expert, weight, case[1])
    for ours, theirs in zip((routing.counts, routing.offsets, routing.order), reference.arrange(*case), strict=True):
        assert ours.tolist() == theirs
