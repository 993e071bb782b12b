"""The loss in Triton, interpreted, at the edges: infinities, NaN, rows of no weight, wrong targets, nothing at all."""

import math

import d3diff_cases
import pytest
import torch
from d3diff_cases import assert_head, doubled, head_of, rows_of_two_groups, triton_ops
from test_d3diff_loss import CODES, V, problem

from unif2ace_kernels import d3diff
from unif2ace_kernels.d3diff import configs, head_triton, logits_triton, noise_triton
from unif2ace_kernels.d3diff.head import head_torch

small_tiles = d3diff_cases.small_tiles  # fixture


def test_float16_keeps_the_statistics_of_float32_sums(small_tiles):
    """Logits are kept in 16 bits, but counted from their tile's largest: see `logits_kernel`."""
    arguments = list(rows_of_two_groups(dtype=torch.float16))
    arguments[2], arguments[6:8] = arguments[2] + 20, (None, None)  # torch's logits lose 2**-11 of 20
    true = head_torch(*doubled(arguments), torch.float64, True, True, True)
    plain = head_torch(*arguments, torch.float16, True, True, True)
    ours = head_triton.head_triton(*arguments, torch.float16, True, True, True)
    for name in ("ce", "lse"):
        ours_off, theirs_off = ((getattr(each, name) - getattr(true, name)).norm() for each in (ours, plain))
        assert ours_off < theirs_off / 3, name


def test_extreme_logits(small_tiles):
    logits = torch.zeros(5, V)
    logits[0, 1], logits[0, 2] = 1e4, -1e4
    logits[1] = -1e30
    logits[1, 10] = 3.0  # one logit above all others, the target's
    logits[3, 20], logits[4, :] = 1e4, -1e4
    out = head_of(logits, torch.tensor([2, 10, 13, 20, 4]))
    expected = torch.tensor([2e4, 0, math.log(V), 0, math.log(V)])
    torch.testing.assert_close(out.ce, expected)
    assert torch.equal(out.hit, torch.tensor([False, True, True, True, True]))
    assert out.grad_hidden.isfinite().all() and out.grad_weight.isfinite().all()


def test_minus_infinity(small_tiles):
    """From the bias, as a mask of columns; whole tiles of it; and a row of nothing else, which is NaN and says so."""
    arguments = list(rows_of_two_groups())
    arguments[2][torch.tensor([*range(7, 19), 21, *range(32, 70)])] = -math.inf
    arguments[3] = torch.where(arguments[3] >= 0, 6, -1)
    assert_head(arguments, torch.float32)
    arguments[2][6:20] = -math.inf
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    hopeless = (arguments[4] == 0) & (arguments[3] >= 0)
    assert hopeless.any() and (out.lse[hopeless] == -math.inf).all() and out.ce[hopeless].isnan().all()
    assert out.loss.isnan() and out.lse[~hopeless].isfinite().all() and out.grad_hidden[~hopeless].isfinite().all()


def test_a_row_of_weight_0_is_0_even_where_its_loss_is_infinite(small_tiles):
    arguments = list(rows_of_two_groups(label=lambda rng, T: torch.arange(T) < 2))
    arguments[2][6], arguments[3][:2], arguments[4] = -math.inf, torch.tensor([6, 7]), None
    arguments[5][0], arguments[6:8], arguments[9:11] = 0, (None, None), ([6], [20])
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert out.ce[0] == math.inf and out.loss.isfinite() and out.loss > 0 and (out.grad_hidden[0] == 0).all()


@pytest.mark.parametrize("score", ["radd", "unnormalized", "full_vocab"])
def test_a_row_of_weight_0_is_0_whatever_its_logits(small_tiles, score):
    hidden, weight, bias, targets, m = problem(dtype=torch.float32)
    targets[0], m[0] = 7, 1  # at full noise the score term weighs nothing under cosine
    options = {"code_range": CODES, "score": score, "ce_coef": 0.0, "alpha": 1.0, "check_values": False}
    far, ready = hidden.detach().clone(), (hidden @ weight.t() + bias).detach()
    far[0, 2:] = 1e38  # logits of +-inf, and NaN
    spoilt = ready.clone()
    spoilt[0, 2], spoilt[0, 3], spoilt[0, 4] = math.nan, -math.inf, math.inf
    with triton_ops():
        for loss, *inputs in (
            (lambda each: d3diff.loss(each, weight, bias, targets, m, **options), hidden.detach().clone(), far),
            (lambda each: d3diff.loss_from_logits(each, targets, m, **options), ready, spoilt),
        ):
            results = []
            for each in inputs:
                value, stats = loss(each.requires_grad_())
                results.append((value.detach(), stats.score, *torch.autograd.grad(value, each)))
            torch.testing.assert_close(*results)
            assert results[0][0] > 0 and (results[1][2][0] == 0).all()


def test_nan_is_not_lost(small_tiles):
    arguments = list(rows_of_two_groups(label=lambda rng, T: (torch.arange(T) > 0) & (torch.arange(T) < 4)))
    arguments[0][0, 2], arguments[4] = math.nan, torch.ones(37, dtype=torch.int64)
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert all(each.isfinite().all() for each in out)  # row 0 has no label, and is what a chunk's padding might hold
    arguments[0][2, 2] = math.nan
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert out.loss.isnan() and out.ce[1:4].isnan().tolist() == out.lse[1:4].isnan().tolist() == [False, True, False]
    assert out.grad_hidden[2].isnan().all() and out.grad_hidden[[0, 1, *range(3, 37)]].isfinite().all()


def test_a_target_outside_its_range_is_nan(small_tiles):
    for token in (-1, V, 2**40):
        targets = torch.full((20,), 4)
        targets[17] = token  # in the second chunk, whose memory holds what the first one left
        out = head_of(torch.zeros(20, V), targets)
        assert out.ce.isnan().nonzero().tolist() == [[17]]
        with triton_ops():
            value, _ = d3diff.next_token_loss(
                torch.zeros(3, 16), torch.zeros(V, 16), None, torch.tensor([2, token, 4]), check_values=False
            )
        assert value.isnan()


@pytest.mark.parametrize("u", [-60.0, -0.6, -0.4, -1e-3, 0.0, 1e-6, 0.3, 2.0, 79.0, 88.5, 200.0])
def test_penalty_over_its_whole_range(small_tiles, u):
    logits, shift = torch.zeros(1, V), torch.tensor([u - math.log(V)])
    out = head_of(logits, torch.tensor([3]), ce=torch.full((1,), 1e-30), penalty=torch.ones(1), shift=shift)
    at = torch.tensor(u, dtype=torch.float64)
    low = at.clamp(max=80)
    penalty, slope = torch.expm1(low) + torch.exp(low) * (at - low) - at, torch.expm1(low)
    close = {"rtol": 2e-5, "atol": 2e-7}  # of float32 sums lse + shift of a few ulp
    torch.testing.assert_close(out.loss.double(), penalty, **close)
    torch.testing.assert_close(out.grad_weight[:, :1].double(), (slope / V).expand(V, 1), **close)


def test_ready_logits_at_their_edges(triton_interpreter, monkeypatch):
    monkeypatch.setattr(configs, "ROW_BLOCK", 16)
    rows = torch.zeros(6, V)
    rows[0, 1], rows[0, 2], rows[1, :20], rows[1, 10] = 1e4, -1e4, -math.inf, 3.0
    rows[2], rows[3, 7] = -math.inf, math.nan
    targets = torch.tensor([2, 10, 4, 4, 25, -100])
    out = logits_triton.logits_triton(rows, targets, torch.ones(6), None, None, None, 0, 20, [0, 20], -100)
    assert out[1][:2].tolist() == [2e4, 0.0] and out[1][2:5].isnan().all() and out[1][5] == 0
    assert out[2][2] == -math.inf and out[0].isnan()
    gradient = logits_triton.logits_backward_triton(
        torch.tensor(2.0), rows, targets, torch.ones(6), None, None, None, *out[2:4], 0, 20, [0, 20], -100
    )
    assert gradient[0, :3].tolist() == [0.0, 2.0, -2.0] and (gradient[1] == 0).all()
    assert (gradient[[0, 1, 2, 4, 5], 20:] == 0).all() and (gradient[5] == 0).all()


def test_empty_calls(small_tiles):
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert noise_triton.noise_triton(none, torch.ones(0), 9, True, 1, 0, 0)[0].shape == (0, 4)
    assert noise_triton.noise_triton(none.t(), torch.ones(4), 9, True, 1, 0, 0)[1].shape == (4, 0)
    arguments = rows_of_two_groups()
    arguments = [each[:0] if isinstance(each, torch.Tensor) and len(each) == 37 else each for each in arguments]
    out = head_triton.head_triton(*arguments, torch.float32, True, True, True)
    assert out.loss == 0 and (out.grad_weight == 0).all() and out.grad_weight.shape == (70, 24)
    assert (
        logits_triton.logits_triton(torch.zeros(0, V), none[:, 0], torch.ones(0), None, None, None, 0, V, [0, V], -1)[0]
        == 0
    )
