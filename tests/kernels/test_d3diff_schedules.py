"""Schedules: values at both ends, the weight against the derivative, and what the two reductions come to."""

import math

import pytest
import torch

from unif2ace_kernels import d3diff

NAMES = ("cosine", "log_linear", "linear", "arccos")
LEAST = {"cosine": 0.0, "log_linear": 0.0, "linear": 0.0, "arccos": 0.0}
MOST = {"cosine": 1.0, "log_linear": 1 - 1e-3, "linear": 1.0, "arccos": 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_ends_and_direction(name):
    schedule = d3diff.schedule(name)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    m = schedule.mask_prob(u)
    assert m[0].item() == MOST[name] and m[-1].item() == LEAST[name]
    assert bool((m[1:] < m[:-1]).all()) and m.dtype == torch.float64
    assert schedule.mask_prob(torch.ones(1), length=256).item() == 1 / 256


@pytest.mark.parametrize("name", NAMES)
def test_weight_is_the_logarithmic_derivative(name):
    schedule = d3diff.schedule(name)
    u = torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64).requires_grad_()
    m = schedule.mask_prob(u)
    (dm_du,) = torch.autograd.grad(m.sum(), u)
    torch.testing.assert_close(schedule.score_weight(m), (-dm_du / m).detach(), rtol=1e-10, atol=1e-12)


def test_relative_accuracy_where_little_is_masked():
    s = torch.tensor([1e-4, 1e-6, 1e-9, 2.0**-40], dtype=torch.float64)  # s = 1 - u, small
    u = 1 - s
    s = 1 - u  # as far as u can say
    series = {
        "cosine": math.pi / 2 * s * (1 - (math.pi / 2 * s) ** 2 / 6),
        "linear": s,
        "log_linear": (1 - 1e-3) * s,
        "arccos": 2 / math.pi * torch.sqrt(2 * s) * (1 + s / 12 + 3 * s**2 / 160),
    }
    for name, expected in series.items():
        schedule = d3diff.schedule(name)
        torch.testing.assert_close(schedule.mask_prob(u), expected, rtol=2e-12, atol=0)
    weights = d3diff.schedule("cosine").score_weight(torch.tensor([1 / 256, 1 / 1024, 1.0], dtype=torch.float64))
    assert [round(w) for w in weights.tolist()] == [402, 1608, 0]
    assert d3diff.schedule("arccos").score_weight(torch.ones(1)).item() == pytest.approx(2 / math.pi, rel=1e-15)


def test_ratio_at_both_ends():
    m = torch.tensor([1e-12, 0.25, 1 - 2.0**-40, 1.0], dtype=torch.float64)
    sbar = -torch.log1p(-m)
    torch.testing.assert_close(d3diff.ratio(m)[:3], 1 / torch.expm1(sbar[:3]), rtol=1e-12, atol=0)
    torch.testing.assert_close(d3diff.log_ratio(m)[:3], -torch.log(torch.expm1(sbar[:3])), rtol=1e-12, atol=0)
    assert d3diff.ratio(m)[3].item() == 0 and d3diff.log_ratio(m)[3].item() == -math.inf


def test_float32_input_is_computed_in_float64():
    u = torch.tensor([1 / 3], dtype=torch.float32)
    assert d3diff.schedule("cosine").mask_prob(u).item() == pytest.approx(math.cos(math.pi * u.item() / 2), rel=1e-15)


def test_unknown_name():
    with pytest.raises(ValueError, match="schedule: expected one of 'cosine', 'log_linear', 'linear', 'arccos'"):
        d3diff.schedule("sigmoid")
    schedule = d3diff.schedule("linear")
    assert d3diff.schedule(schedule) is schedule


@pytest.mark.parametrize("length", [256, 1024])
def test_gap_between_the_two_terms(length):
    """score / ce with the same CE everywhere: N for a sum per sample, pi / 2 for a token mean, under cosine."""
    samples = 4000
    u = (torch.arange(samples) + 0.5) / samples
    m = d3diff.schedule("cosine").mask_prob(u, length=length)
    count = torch.round(length * m).long().clamp(min=1)
    column = torch.arange(length)
    few = slice(0, samples, 40)  # enough samples for the loss itself
    targets = torch.where(column < count[few, None], 0, -100)
    hidden, weight = torch.zeros(*targets.shape, 1), torch.zeros(3, 1)
    for reduction, expected in (("sum_per_sample", length), ("token_mean", math.pi / 2)):
        _, stats = d3diff.loss(
            hidden, weight, None, targets, m[few], code_range=(0, 3), score_reduction=reduction, check_values=False
        )
        assert (stats.score / stats.ce).item() == pytest.approx(expected, rel=0.02)
