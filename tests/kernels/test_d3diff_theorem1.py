"""Theorem 1: the page's counts come from the script, and the conditions it states hold."""

from pathlib import Path

import pytest
import torch

from unif2ace_kernels.d3diff import theorem1


def test_the_page_is_the_script_s_output():
    page = Path(theorem1.__file__).with_name("THEOREM1.md").read_text()
    assert page.endswith(theorem1.report() + "\n")


def test_nll_is_below_l1_and_meets_the_entropy_for_the_posterior():
    a = theorem1.l1_coefficients(theorem1.POSITIONS)
    for scale in theorem1.SCALES:
        free = theorem1.terms(theorem1.random_theta(50, scale, seed=7))
        assert bool((free.nll <= free.by_size @ a + 1e-12).all())
        q, theta = theorem1.bayes_theta(50, scale, seed=8)
        data = theorem1.terms(theta)
        entropy = -(q * torch.log(q)).sum(-1)
        torch.testing.assert_close((q * data.nll).sum(-1), entropy, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((q * (data.by_size @ a)).sum(-1), entropy, rtol=1e-10, atol=1e-12)


def test_l1_is_the_time_integral_of_the_score_loss_for_any_schedule():
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for name in ("cosine", "linear"):
        schedule = theorem1.schedule(name)
        m = schedule.mask_prob(u)
        weight = schedule.score_weight(m)
        integral = torch.stack([(weight * m**k * (1 - m) ** (3 - k)).mean() for k in (1, 2, 3)])
        torch.testing.assert_close(integral, theorem1.l1_coefficients(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", theorem1.SCHEDULES)
def test_the_condition_is_sharp(name):
    steps = theorem1.smallest_steps(name, theorem1.POSITIONS)
    data = theorem1.terms(theorem1.random_theta(100, 4.0, seed=9))
    assert all(theorem1.violations(name, t, data) == 0 for t in range(steps, steps + 20))
    short = theorem1.l2_coefficients(name, steps - 1, 3) - theorem1.l1_coefficients(3)
    worst = torch.zeros(1, 1, 3, dtype=torch.float64)
    worst[..., short.argmin()] = 1.0  # a theta that is wrong only where b_k < a_k
    assert theorem1.violations(name, steps - 1, theorem1.Terms(torch.zeros(1, 1), worst)) == 1
