"""The fused head at its edges: nothing masked, extreme logits, chunks, dtypes, bad input, and torch's own op checks."""

import math

import pytest
import torch

from unif2ace_kernels import d3diff
from unif2ace_kernels.d3diff import head, rows_torch

CODES = (6, 20)
B, N, D, V = 3, 10, 8, 23


def problem(seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": rng}
    tensors = [torch.randn(*shape, **draw).to(dtype).requires_grad_() for shape in ((B, N, D), (V, D), (V,))]
    targets = torch.where(torch.rand(B, N, **draw) < 0.6, torch.randint(*CODES, (B, N), generator=rng), -100)
    return *tensors, targets, torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)


def run(inputs, **options):
    value, stats = d3diff.loss(*inputs, **{"code_range": CODES, **options})
    return value.detach(), stats, torch.autograd.grad(value, inputs[:3])


@pytest.mark.parametrize("score", d3diff.READINGS)
def test_nothing_masked(score):
    hidden, weight, bias, targets, m = problem()
    value, stats, gradients = run((hidden, weight, bias, torch.full_like(targets, -100), m), score=score)
    assert value == 0 and stats.ce == 0 and stats.masked_count == 0 and stats.score == 0
    assert all(bool((each == 0).all()) for each in gradients)


@pytest.mark.parametrize("score", d3diff.READINGS)
def test_one_masked_and_all_masked_and_the_edges_of_time(score):
    hidden, weight, bias, targets, _ = problem()
    one = torch.full_like(targets, -100)
    one[1, 4] = CODES[1] - 1
    every = torch.full_like(targets, CODES[0])
    for labels in (one, every):
        m = torch.tensor([1e-12, 1 / N, 1.0], dtype=torch.float64)
        value, _, gradients = run((hidden, weight, bias, labels, m), score=score, max_weight=1e4)
        assert math.isfinite(value) and all(bool(each.isfinite().all()) for each in gradients)


def test_paper_constant_is_infinite_at_full_noise_and_out_of_the_loss():
    hidden, weight, bias, _, m = problem()
    value, stats, _ = run((hidden, weight, bias, torch.full((B, N), CODES[0]), m), score="paper")
    assert stats.score_constant == math.inf and math.isfinite(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype):
    logits = torch.zeros(3, V, dtype=dtype)
    logits[0, CODES[0]], logits[0, CODES[0] + 1] = 1e4, -1e4
    logits[1, :] = -math.inf
    logits[1, 10] = 3.0  # one finite logit, the target's
    logits[2, 12] = -math.inf
    logits.requires_grad_()
    targets, sample = torch.tensor([CODES[0] + 1, 10, 13]), torch.zeros(3, dtype=torch.int64)
    options = {"code_range": CODES, "alpha": 0.0}
    value, stats = d3diff.loss_from_logits(logits, targets, torch.tensor([0.5]), sample, **options)
    assert value.item() == pytest.approx((2e4 + 0 + math.log(13)) / 3, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, logits)
    assert bool(gradient.isfinite().all()) and gradient[1].abs().max() == 0
    assert gradient[0, CODES[0]].item() == pytest.approx(1 / 3)


def test_penalty_beyond_the_exponent_s_range():
    logits = torch.full((1, V), 200.0, requires_grad=True)
    arguments = (torch.tensor([7]), torch.tensor([0.5]), torch.tensor([0]))
    value, stats = d3diff.loss_from_logits(logits, *arguments, code_range=CODES, score="unnormalized", alpha=1.0)
    torch.testing.assert_close(value.detach(), stats.ce + stats.score)  # the op's own penalty, and rows_torch's
    (gradient,) = torch.autograd.grad(value, logits)
    assert math.isfinite(value.item()) and bool(gradient.isfinite().all()) and bool((gradient[0, 8:20] > 0).all())
    u = torch.tensor([-3.0, 0.0, 1e-5, 70.0], dtype=torch.float64)
    torch.testing.assert_close(rows_torch.penalty(u), torch.expm1(u) - u, rtol=1e-12, atol=1e-16)
    beyond = torch.tensor([79.0, 90.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(rows_torch.penalty(beyond).sum(), beyond)
    torch.testing.assert_close(slope, torch.expm1(beyond.detach().clamp(max=80.0)), rtol=1e-12, atol=0)


def test_chunks_of_the_torch_path_change_nothing_but_rounding(monkeypatch):
    hidden, weight, bias, targets, _ = problem(1)
    a = torch.rand(B * N, dtype=torch.float64)
    for row_weights in ([a, a / 2, a, None], [a, None, None, a / 2]):
        arguments = (hidden.detach().flatten(0, 1), weight.detach(), bias.detach(), targets.flatten(), None)
        arguments += (*row_weights, [0], [V], CODES, -100, torch.float64, True, True, True)
        whole = head.head_torch(*arguments)
        monkeypatch.setattr(head, "CHUNK_BYTES", 3 * V * 8)
        monkeypatch.setattr(head, "CHUNK_SHARE_OF_WEIGHT", 1000)
        parts = head.head_torch(*arguments)
        monkeypatch.undo()
        torch.testing.assert_close(tuple(parts), tuple(whole), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("score", d3diff.READINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_torch_in_the_same_dtype(dtype, score):
    """Gradients against float64, errors pooled over problems: under `unnormalized` a row or two decide a single one.

    Torch is `loss_from_logits` of its own matrix product in `dtype`.
    """
    ours_total, theirs_total = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for seed in range(8):
        low = problem(seed, dtype)
        high = tuple(each.detach().double().requires_grad_() for each in low[:3]) + low[3:]
        truth, ours = run(high, score=score)[2], run(low, score=score)[2]
        logits = (low[0] @ low[1].t() + low[2]).float()
        value, _ = d3diff.loss_from_logits(logits, *low[3:], code_range=CODES, score=score)
        theirs = torch.autograd.grad(value, low[:3])
        assert [each.dtype for each in ours] == [dtype] * 3
        for total, those in ((ours_total, ours), (theirs_total, theirs)):
            total += torch.stack([((one - true).norm() / true.norm()) ** 2 for one, true in zip(those, truth)])
    assert bool((ours_total.sqrt() <= 2 * theirs_total.sqrt()).all())


def test_autocast_uses_its_dtype_and_keeps_the_weights_gradient():
    inputs = problem(3, torch.float32)
    plain, _, wanted = run(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value, _, gradients = run(inputs)
    assert value.dtype == torch.float32 and value != plain
    torch.testing.assert_close(value, plain, rtol=2e-2, atol=0)
    assert [each.dtype for each in gradients] == [torch.float32] * 3
    assert (gradients[1] - wanted[1]).norm() < 2e-2 * wanted[1].norm()


def test_runs_repeat_to_the_bit():
    inputs = problem(4, torch.float32)
    first, second = run(inputs, score="unnormalized"), run(inputs, score="unnormalized")
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[2], second[2]))


def test_strides_do_not_matter():
    hidden, weight, bias, targets, m = problem(dtype=torch.float32)
    flat, labels, sample = hidden.detach().flatten(0, 1), targets.flatten(), torch.arange(B).repeat_interleave(N)
    plain = run((flat.clone().requires_grad_(), weight, bias, labels, m, sample))

    def every_second(each):
        return torch.stack([each, each + 1], -1)[..., 0]

    strided = flat.t().contiguous().t().requires_grad_(), every_second(weight.detach()).requires_grad_()
    strided += every_second(bias.detach()).requires_grad_(), *map(every_second, (labels, m, sample))
    value, stats, gradients = run(strided)
    assert torch.equal(value, plain[0]) and torch.equal(stats.lse, plain[1].lse)
    for one, other in zip(gradients, plain[2], strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    logits = (flat @ weight.detach().t()).requires_grad_()
    options = {"code_range": CODES, "sample_id": strided[-1]}
    value, _ = d3diff.loss_from_logits(logits.t().contiguous().t(), strided[3], strided[4], **options)
    assert torch.equal(value, d3diff.loss_from_logits(logits, labels, m, code_range=CODES, sample_id=sample)[0])


def test_differentiating_twice_raises():
    inputs = problem()
    value, _ = d3diff.loss(*inputs, code_range=CODES)
    (gradient,) = torch.autograd.grad(value, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="d3diff_head_backward"):
        torch.autograd.grad(gradient.sum(), inputs[0])
    logits = torch.randn(B, N, V, requires_grad=True)
    value, _ = d3diff.loss_from_logits(logits, *inputs[3:], code_range=CODES)
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="d3diff_logits_backward"):
        torch.autograd.grad(gradient.sum(), logits)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask_prob": torch.tensor([0.5, 0.0, 1.0])}, r"mask_prob: expected values in \(0, 1\], got \[0.0\]"),
        ({"mask_prob": torch.tensor([0.5, 1.0])}, r"mask_prob: expected shape \[3\], got shape \[2\]"),
        ({"targets": torch.full((B, N), 20)}, r"targets: expected tokens in \[6, 20\) or ignore_index, got \[20"),
        ({"targets": torch.full((B, N), 5)}, r"targets: expected tokens in \[6, 20\)"),
        ({"targets": torch.full((B, N), V), "normalizer": "full"}, r"targets: expected tokens in \[0, 23\)"),
        ({"targets": torch.full((B, N), 5), "score": "full_vocab"}, r"targets: expected tokens in \[6, 20\)"),
        ({"targets": torch.full((B, N), 7.0)}, "targets: expected dtype int64, got float32"),
        ({"sample_id": torch.full((B, N), 3)}, r"sample_id: expected values in \[0, B = 3\), got \[3"),
        ({"sample_id": torch.arange(B).flip(0)[:, None].expand(B, N)}, "sample_id: expected rows of a sample together"),
        ({"hidden": torch.zeros(B, N, 0)}, "hidden: expected at least one column"),
        ({"hidden": torch.zeros(B * N, D), "targets": torch.zeros(B * N, dtype=torch.int64)}, "sample_id: expected"),
        ({"weight": torch.zeros(V, D + 1)}, r"weight: expected shape \[V, 8\], got shape \[23, 9\]"),
        ({"bias": torch.zeros(V + 1)}, r"bias: expected shape \[23\], got shape \[24\]"),
        ({"bias": torch.full((V,), -math.inf)}, "logits: expected a logit above -inf in every row"),
        ({"code_range": (6, 24)}, "code_range: expected end <= V = 23"),
        ({"code_range": (6, 6)}, "code_range: expected 0 <= start < end"),
        ({"score": "sedd"}, "score: expected one of 'radd', 'paper'"),
        ({"schedule": "warp"}, "schedule: expected one of"),
        ({"score_reduction": "mean"}, "score_reduction: expected one of"),
        ({"normalizer": "none"}, "normalizer: expected one of"),
        ({"alpha": -1.0}, "alpha: expected a number >= 0"),
        ({"max_weight": 0.0}, "max_weight: expected None or a number > 0"),
        ({"objective": d3diff.Objective(code_range=CODES)}, "objective: expected no keywords"),
    ],
)
def test_bad_input(change, message):
    names = ("hidden", "weight", "bias", "targets", "mask_prob")
    arguments = {**dict(zip(names, problem(0, torch.float32))), "code_range": CODES, **change}
    with pytest.raises(ValueError, match=message):
        d3diff.loss(**arguments)


@pytest.mark.parametrize("extra", ["none", "penalty", "mass"])
def test_what_torch_asks_of_an_op(extra):
    hidden, weight, bias, targets, _ = problem(5, torch.float32)
    rows, labels = hidden.detach().flatten(0, 1).requires_grad_(), targets.flatten()
    row = torch.rand(B * N)
    penalty, shift = (row / 2, row) if extra == "penalty" else (None, None)
    mass = row / 2 if extra == "mass" else None
    ops = torch.ops.unif2ace
    group = (labels % 2).abs()
    common = (group, row, penalty, shift, mass, [6, 0], [20, V], [*CODES], -100, torch.float32, True, True, True)
    torch.library.opcheck(ops.d3diff_head.default, (rows, weight, bias, labels, *common))
    logits = torch.randn(B * N, V, requires_grad=True)
    integers = (0, V, [*CODES], -100)
    torch.library.opcheck(ops.d3diff_logits.default, (logits, labels, row, penalty, shift, mass, *integers))
    saved = (torch.randn(B * N, D), torch.randn(14, D), torch.randn(14))
    torch.library.opcheck(ops.d3diff_head_backward.default, (torch.tensor(2.0), *saved, V, 6))
    lse, ps = torch.randn(B * N), torch.rand(B * N)
    arguments = (torch.tensor(2.0), logits.detach(), labels, row, penalty, shift, mass, lse, ps, *integers)
    torch.library.opcheck(ops.d3diff_logits_backward.default, arguments)


def test_compiles_as_one_graph():
    inputs = problem(6, torch.float32)

    def step(*tensors):
        return d3diff.loss(*tensors, code_range=CODES, score="unnormalized")[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(*inputs), step(*inputs)
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(ours, inputs[:3]), torch.autograd.grad(eager, inputs[:3])):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
