"""The loss against the written-out truth: five readings, reductions, normalisers, both entries, and Show-o's field."""

import math

import pytest
import torch
import torch.nn.functional as F

from unif2ace_kernels import d3diff
from unif2ace_kernels.d3diff import reference

CODES = (6, 20)
B, N, D, V = 4, 9, 8, 23


def problem(seed=0, codes=CODES, exact=True, dtype=torch.float64):
    """Hidden states, a head, clean tokens at masked positions and m of each sample."""
    rng = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": rng}
    hidden = torch.randn(B, N, D, **draw).to(dtype).requires_grad_()
    weight = torch.randn(V, D, **draw).to(dtype).requires_grad_()
    bias = torch.randn(V, **draw).to(dtype).requires_grad_()
    m = d3diff.schedule("cosine").mask_prob(torch.rand(B, **draw), length=N)
    clean = torch.randint(*codes, (B, N), generator=rng)
    _, mask = d3diff.noise(clean, m, V - 1, exact_count=exact, seed=seed)
    return hidden, weight, bias, torch.where(mask, clean, -100), m


def truth(hidden, weight, bias, targets, m, *, score="radd", schedule="cosine", bayes_sigma=False, **options):
    """`reference.d3diff_loss` of masked rows, sigma' from the schedule (1 for `bayes` without it)."""
    mask = targets != -100
    z = (hidden @ weight.t() + bias)[mask]
    sample = torch.arange(B)[:, None].expand(B, N)[mask]
    sigma = d3diff.schedule(schedule).score_weight(m) / d3diff.ratio(m)
    sigma = None if score == "bayes" and not bayes_sigma else sigma
    options = {"code_range": CODES, **options}
    return reference.d3diff_loss(z, targets[mask], m, sample, sigma=sigma, reading=score, **options)


def gradients(value, *inputs):
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("reduction", ["sum_per_sample", "token_mean"])
@pytest.mark.parametrize("normalizer", ["slice", "full"])
@pytest.mark.parametrize("score", d3diff.READINGS)
def test_values_and_gradients(score, normalizer, reduction):
    inputs = problem()
    hidden, weight, bias, targets, m = inputs
    options = {"alpha": 0.3, "ce_coef": 0.7}
    expected = truth(*inputs, score=score, full_normalizer=normalizer == "full", reduction=reduction, **options)
    ours = {"code_range": CODES, "score": score, "normalizer": normalizer, "score_reduction": reduction, **options}
    value, stats = d3diff.loss(*inputs, **ours)
    torch.testing.assert_close(value + 0.3 * stats.score_constant, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(value, 0.7 * stats.ce + 0.3 * stats.score, rtol=1e-11, atol=1e-12)
    wanted = gradients(expected, hidden, weight, bias)
    torch.testing.assert_close(gradients(value, hidden, weight, bias), wanted, rtol=1e-10, atol=1e-11)
    logits = hidden @ weight.t() + bias
    from_logits, logit_stats = d3diff.loss_from_logits(logits, targets, m, **ours)
    torch.testing.assert_close(gradients(from_logits, hidden, weight, bias), wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(tuple(logit_stats), tuple(stats), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "log_linear", "linear", "arccos"])
@pytest.mark.parametrize(
    "options", [{}, {"score": "bayes", "bayes_sigma": True}, {"score": "unnormalized"}, {"score": "paper"}]
)
def test_schedules(schedule, options):
    inputs = problem(1)
    value, stats = d3diff.loss(*inputs, code_range=CODES, schedule=schedule, **options)
    expected = truth(*inputs, schedule=schedule, **options)
    torch.testing.assert_close(value + 0.01 * stats.score_constant, expected, rtol=1e-11, atol=0)


def test_scale_of_the_score():
    inputs = problem(2)
    r = d3diff.ratio(inputs[-1])
    for score in ("unnormalized", "full_vocab"):
        value, stats = d3diff.loss(*inputs, code_range=CODES, score=score, log_scale=0.4, alpha=1.0)
        expected = truth(*inputs, score=score, scale=r * math.exp(0.4), alpha=1.0)
        torch.testing.assert_close(value + stats.score_constant, expected, rtol=1e-11, atol=0)
        torch.testing.assert_close(
            gradients(value, inputs[1])[0], gradients(expected, inputs[1])[0], rtol=1e-10, atol=1e-11
        )


def test_paper_and_radd_have_one_gradient():
    inputs = problem(3)
    radd, radd_stats = d3diff.loss(*inputs, code_range=CODES, score="radd")
    paper, paper_stats = d3diff.loss(*inputs, code_range=CODES, score="paper")
    for one, other in zip(gradients(radd, *inputs[:3]), gradients(paper, *inputs[:3])):
        assert torch.equal(one, other)
    assert radd_stats.score_constant == 0 and paper_stats.score_constant > 0
    assert radd == paper


def test_full_vocab_against_finite_differences():
    hidden, weight, bias, targets, m = (each.detach() for each in problem(4))
    options = {"code_range": CODES, "score": "full_vocab", "alpha": 0.5}
    logits = (hidden @ weight.t() + bias).requires_grad_()
    (gradient,) = gradients(d3diff.loss_from_logits(logits, targets, m, **options)[0], logits)
    row = int((targets[0] != -100).nonzero()[0])
    for column in (0, CODES[0], CODES[1] - 1, V - 1, int(targets[0, row])):
        step = torch.zeros_like(logits)
        step[0, row, column] = 1e-5
        high, low = (d3diff.loss_from_logits(logits + sign * step, targets, m, **options)[0] for sign in (1, -1))
        assert (high - low).item() / 2e-5 == pytest.approx(gradient[0, row, column].item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("score", d3diff.READINGS)
def test_gradcheck(score):
    hidden, weight, bias, targets, m = problem(5)
    small = hidden[:2, :4].detach().requires_grad_()

    def function(*tensors):
        return d3diff.loss(*tensors, targets[:2, :4], m[:2], code_range=CODES, score=score, alpha=0.5)[0]

    assert torch.autograd.gradcheck(function, (small, weight, bias), fast_mode=True)


def test_only_the_range_gets_a_gradient():
    inputs = problem(6)
    value, _ = d3diff.loss(*inputs, code_range=CODES)
    _, d_weight, d_bias = gradients(value, *inputs[:3])
    inside = torch.zeros(V, dtype=torch.bool)
    inside[slice(*CODES)] = True
    assert bool((d_weight[~inside] == 0).all()) and bool((d_bias[~inside] == 0).all())
    assert bool((d_weight[inside] != 0).any(1).all())
    hidden, weight, bias, targets, m = inputs
    d_hidden = gradients(d3diff.loss(hidden, weight, None, targets, m, code_range=CODES)[0], hidden)[0]
    assert torch.equal((d_hidden != 0).any(-1), targets != -100)


def test_flat_rows_equal_batched_rows():
    hidden, weight, bias, targets, m = problem(7)
    sample = torch.arange(B).repeat_interleave(N)
    batched = d3diff.loss(hidden, weight, bias, targets, m, code_range=CODES)
    flat = d3diff.loss(hidden.flatten(0, 1), weight, bias, targets.flatten(), m, sample, code_range=CODES)
    keep = targets.flatten() != -100
    packed = d3diff.loss(
        hidden.flatten(0, 1)[keep], weight, bias, targets.flatten()[keep], m, sample[keep], code_range=CODES
    )
    for other in (flat, packed):
        torch.testing.assert_close(other[0], batched[0], rtol=1e-14, atol=0)
    objective = d3diff.Objective(code_range=CODES)
    assert torch.equal(d3diff.loss(hidden, weight, bias, targets, m, objective=objective)[0], batched[0])


def test_mask_only_score_only_and_max_weight():
    inputs = problem(8)
    both, stats = d3diff.loss(*inputs, code_range=CODES, alpha=0.01)
    mask_only, _ = d3diff.loss(*inputs, code_range=CODES, alpha=0.0)
    score_only, _ = d3diff.loss(*inputs, code_range=CODES, ce_coef=0.0, alpha=0.01)
    torch.testing.assert_close(both, mask_only + score_only, rtol=1e-13, atol=0)
    torch.testing.assert_close(mask_only, stats.ce, rtol=1e-13, atol=0)
    weight = d3diff.schedule("cosine").score_weight(inputs[-1])
    limit = weight.median().item()
    assert weight.max() > limit
    hidden, head, bias, targets, m = inputs
    mask = targets != -100
    ce = F.cross_entropy((hidden @ head.t() + bias)[mask][:, slice(*CODES)], targets[mask] - CODES[0], reduction="none")
    rows = weight.clamp(max=limit)[:, None].expand(B, N)[mask]
    capped, _ = d3diff.loss(*inputs, code_range=CODES, ce_coef=0.0, alpha=1.0, max_weight=limit)
    torch.testing.assert_close(capped, (rows * ce).sum() / B, rtol=1e-12, atol=0)


def test_accuracy_count_and_lse():
    hidden, weight, bias, targets, m = problem(9)
    _, stats = d3diff.loss(hidden, weight, bias, targets, m, code_range=CODES)
    mask = targets != -100
    z = (hidden @ weight.t() + bias)[mask][:, slice(*CODES)]
    assert stats.masked_count == mask.sum() and not any(each.requires_grad for each in stats)
    torch.testing.assert_close(stats.lse, z.logsumexp(-1).mean().detach(), rtol=1e-13, atol=0)
    hits = (z.argmax(-1) == targets[mask] - CODES[0]).double().mean()
    torch.testing.assert_close(stats.accuracy, hits, rtol=1e-13, atol=0)


# The field's public losses, from their papers' formulas: each is one setting of ours.


def _row_problem(schedule, seed=10):
    hidden, weight, bias, targets, _ = problem(seed)
    t = torch.tensor([0.1, 0.4, 0.75, 1.0], dtype=torch.float64)
    m = d3diff.schedule(schedule).mask_prob(1 - t)
    mask = targets != -100
    z = (hidden @ weight.t() + bias)[mask]
    sample = torch.arange(B)[:, None].expand(B, N)[mask]
    return (hidden, weight, bias, targets, m), t, z, targets[mask], sample


def test_equals_sedd_absorbing():
    """Lou et al. 2024: dsigma * score entropy, the network's output scaled by 1 / (expm1(sigma) (n - 1))."""
    inputs, t, z, token, sample = _row_problem("log_linear")
    eps = 1e-3
    sigma, dsigma = -torch.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)
    esigm1 = torch.expm1(sigma)[sample]
    codes = CODES[1] - CODES[0]
    log_score = z[:, slice(*CODES)] - torch.log(esigm1)[:, None] - math.log(codes)
    ratio = 1 / esigm1
    negative = ratio * log_score.gather(1, token[:, None] - CODES[0])[:, 0]
    entropy = log_score.exp().sum(-1) - negative + ratio * (torch.log(ratio) - 1)
    expected = (dsigma[sample] * entropy).sum() / B
    value, stats = d3diff.loss(
        *inputs, code_range=CODES, ce_coef=0.0, alpha=1.0, score="unnormalized", schedule="log_linear"
    )
    torch.testing.assert_close(value + stats.score_constant, expected, rtol=1e-11, atol=0)


def test_equals_the_elbo_of_mdlm_and_radd():
    """Sahoo et al. 2024, Ou et al. 2024: -alpha'_t / (1 - alpha_t) log p(x0), alpha_t = 1 - m, summed over a sample."""
    inputs, t, z, token, sample = _row_problem("log_linear")
    alpha_t, d_alpha = 1 - (1 - 1e-3) * t, -(1 - 1e-3)
    log_p = torch.log_softmax(z[:, slice(*CODES)], -1).gather(1, token[:, None] - CODES[0])[:, 0]
    expected = (d_alpha / (1 - alpha_t) * torch.ones(B))[sample] @ log_p / B
    value, _ = d3diff.loss(*inputs, code_range=CODES, ce_coef=0.0, alpha=1.0, score="radd", schedule="log_linear")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_equals_llada():
    """Nie et al. 2025: cross entropy / t over masked tokens, t the mask probability, divided by B * N."""
    inputs, t, z, token, sample = _row_problem("linear")
    ce = F.cross_entropy(z, token, reduction="none")
    expected = (ce / t[sample]).sum() / (B * N)
    options = {"code_range": CODES, "ce_coef": 0.0, "alpha": 1 / N, "normalizer": "full", "schedule": "linear"}
    for score in ("bayes", "radd"):  # with linear time they are one
        value, _ = d3diff.loss(*inputs, score=score, **options)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_equals_show_o_and_maskgit():
    """Chang et al. 2022, Xie et al. 2024: mean cross entropy of masked tokens over the vocabulary, -100 ignored."""
    hidden, weight, bias, targets, m = problem(11)
    targets[:, 0] = 2  # Show-o labels soi and eoi too, which are no codes
    expected = F.cross_entropy((hidden @ weight.t() + bias).flatten(0, 1), targets.flatten(), ignore_index=-100)
    value, _ = d3diff.loss(hidden, weight, bias, targets, m, code_range=CODES, alpha=0.0, normalizer="full")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_next_token_loss():
    hidden, weight, bias, _, _ = problem(12)
    ids = torch.randint(0, V, (B, N), generator=torch.Generator().manual_seed(1))
    ids[:, -3:] = -100
    logits = hidden @ weight.t() + bias
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    value, stats = d3diff.next_token_loss(hidden, weight, bias, ids, shift=True)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert stats.masked_count == (ids[:, 1:] != -100).sum() and stats.score == 0
    wanted = gradients(expected, hidden, weight, bias)
    torch.testing.assert_close(gradients(value, hidden, weight, bias), wanted, rtol=1e-10, atol=1e-12)
    aligned, _ = d3diff.next_token_loss(hidden, weight, bias, d3diff.shift_labels(ids))
    assert torch.equal(aligned, value)
    part, _ = d3diff.next_token_loss(hidden, weight, bias, ids % 5, columns=(0, 5))
    torch.testing.assert_close(part, F.cross_entropy(logits[..., :5].flatten(0, 1), (ids % 5).flatten()))


@pytest.mark.parametrize("score", d3diff.READINGS)
def test_joint_loss_is_the_sum_of_its_tasks(score):
    hidden, weight, bias, targets, m = problem(13)
    text = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.tensor([0, 5, -100, 22, 7, 1, -100])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    rows = torch.cat([text[order][:3], hidden.flatten(0, 1), text[order][3:]])
    everything = torch.cat([labels[order][:3], targets.flatten(), labels[order][3:]])
    is_image = torch.tensor([False] * 3 + [True] * (B * N) + [False] * 4)
    sample = torch.cat([torch.full((3,), 77), torch.arange(B).repeat_interleave(N), torch.full((4,), -1)])
    value, stats = d3diff.joint_loss(
        rows, weight, bias, everything, is_image, m, sample, code_range=CODES, score=score, alpha=0.2,
        image_coef=0.5, text_coef=0.1,
    )  # fmt: skip
    image, image_stats = d3diff.loss(hidden, weight, bias, targets, m, code_range=CODES, score=score, alpha=0.2)
    plain, text_stats = d3diff.next_token_loss(text, weight, bias, labels)
    torch.testing.assert_close(value, 0.5 * image + 0.1 * plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(tuple(stats.image), tuple(image_stats), rtol=1e-12, atol=0)
    torch.testing.assert_close(tuple(stats.text), tuple(text_stats), rtol=1e-12, atol=0)
    tensors = (hidden, text, weight, bias)
    wanted = gradients(0.5 * image + 0.1 * plain, *tensors)
    torch.testing.assert_close(gradients(value, *tensors), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("score", d3diff.READINGS)
def test_the_mask_probability_is_a_constant(score):
    hidden, weight, bias, targets, m = problem()
    value, stats = d3diff.loss(hidden, weight, bias, targets, m.requires_grad_(), code_range=CODES, score=score)
    assert not any(each.requires_grad for each in stats)
    assert torch.autograd.grad(value, (hidden, m), allow_unused=True)[1] is None
    value, stats = d3diff.loss_from_logits((hidden @ weight.t()).detach(), targets, m, code_range=CODES, score=score)
    assert not any(each.requires_grad for each in (value, *stats))
