"""Theorem 1 of UniF2ace, -log p(x0) <= L_1 <= L_2, checked exactly where everything can be enumerated.

    python -m unif2ace_kernels.d3diff.theorem1

d = 3 positions, V = 3 tokens: 27 data points x0, 7 masked sets S, 6 orders of generation. theta is a table, a free
distribution p(x_i | x outside S) for each context and each masked position i. With CE_i(S) = -log p(x0_i | x0 outside
S), k = |S| and m_t the mask probability at t = 1/T, ..., T/T:

    -log p(x0) = -log mean over orders pi of prod_j p(x0_{pi_j} | x0_{pi_1 .. pi_{j-1}})
    L_1        = sum over S of a_k sum_{i in S} CE_i(S),    a_k = (k - 1)! (d - k)! / d!
    L_2        = sum over S of b_k sum_{i in S} CE_i(S),    b_k = sum_t m_t^k (1 - m_t)^(d - k)

a_k is the integral of the score loss's weight, int (m'/m) m^k (1 - m)^(d - k) dt = int m^(k-1) (1 - m)^(d-k) dm: no
schedule is left in it. The CE_i(S) of a free theta are any numbers >= 0, so L_1 <= L_2 for every theta if and only if
b_k >= a_k for every k.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from .._philox import TOKEN_STREAM, gumbel, random_words
from .schedules import schedule

POSITIONS, TOKENS = 3, 3
SCHEDULES = ("cosine", "log_linear", "linear", "arccos")
STEPS = (1, 2, 4, 8, 12, 16, 32)
THETAS = 200
SCALES = (1.0, 4.0)
SLACK = 1e-12
LARGEST_T = 400
SETS = [s for k in range(1, POSITIONS + 1) for s in itertools.combinations(range(POSITIONS), k)]
POINTS = torch.cartesian_prod(*(torch.arange(TOKENS),) * POSITIONS)


class Terms(NamedTuple):
    """nll [R, 27] and, by the size k = 1..d of the masked set, sum_S sum_i CE_i(S), [R, 27, d]."""

    nll: torch.Tensor
    by_size: torch.Tensor


def random_theta(count: int, scale: float, seed: int = 0) -> torch.Tensor:
    """log p [count, 4, 4, 4, d, V]: context (token or TOKENS for a mask) by position, then the masked position.

    The logits are `scale` times Gumbel numbers, so at scale 1 each distribution is uniform on the simplex.
    """
    shape = (TOKENS + 1,) * POSITIONS + (POSITIONS, TOKENS)
    logits = scale * gumbel(random_words(seed, 0, count, math.prod(shape), TOKEN_STREAM)).double()
    return torch.log_softmax(logits.reshape(count, *shape), -1)


def bayes_theta(count: int, scale: float, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A random data distribution q [count, 27] and the theta that is its exact posterior, as `random_theta`."""
    logits = scale * gumbel(random_words(seed, 0, count, len(POINTS), TOKEN_STREAM)).double()
    q = torch.softmax(logits, -1)
    theta = torch.zeros(count, *(TOKENS + 1,) * POSITIONS, POSITIONS, TOKENS, dtype=torch.float64)
    for context in itertools.product(range(TOKENS + 1), repeat=POSITIONS):
        seen = torch.tensor(context)
        consistent = ((POINTS == seen) | (seen == TOKENS)).all(-1)
        for i, v in itertools.product(range(POSITIONS), range(TOKENS)):
            joint = q[:, consistent & (POINTS[:, i] == v)].sum(-1)
            theta[:, context[0], context[1], context[2], i, v] = torch.log(joint) - torch.log(q[:, consistent].sum(-1))
    return q, theta


def terms(theta: torch.Tensor) -> Terms:
    """Negative log-likelihood and cross entropies of every data point."""
    cross_entropy: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    by_size = torch.zeros(theta.shape[0], len(POINTS), POSITIONS, dtype=torch.float64)
    for s in SETS:
        context = POINTS.clone()
        context[:, list(s)] = TOKENS
        for i in s:
            cross_entropy[i, s] = -theta[:, context[:, 0], context[:, 1], context[:, 2], i, POINTS[:, i]]
            by_size[:, :, len(s) - 1] += cross_entropy[i, s]
    orders = [
        -torch.stack([cross_entropy[order[j], tuple(sorted(order[j:]))] for j in range(POSITIONS)]).sum(0)
        for order in itertools.permutations(range(POSITIONS))
    ]
    nll = math.log(len(orders)) - torch.logsumexp(torch.stack(orders), 0)
    return Terms(nll, by_size)


def l1_coefficients(d: int) -> torch.Tensor:
    """a_k, k = 1..d."""
    return torch.tensor([1 / (k * math.comb(d, k)) for k in range(1, d + 1)], dtype=torch.float64)


def l2_coefficients(name: str, steps: int, d: int) -> torch.Tensor:
    """b_k, k = 1..d, for T = `steps`."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    m, k = schedule(name).mask_prob(1 - t)[:, None], torch.arange(1, d + 1)
    return (m**k * (1 - m) ** (d - k)).sum(0)


def smallest_steps(name: str, d: int) -> int | None:
    """The smallest T from which on, up to LARGEST_T, b_k >= a_k for every k; None if there is none."""
    a = l1_coefficients(d)
    holds = [bool((l2_coefficients(name, steps, d) >= a * (1 - SLACK)).all()) for steps in range(1, LARGEST_T + 1)]
    failures = [steps for steps, good in enumerate(holds, 1) if not good]
    smallest = failures[-1] + 1 if failures else 1
    return None if smallest > LARGEST_T else smallest


def violations(name: str, steps: int, data: Terms, mean: bool = False, q: torch.Tensor | None = None) -> int:
    """Cases with L_1 > L_2 among (theta, x0), or among theta when averaged over x0 ~ q."""
    b = l2_coefficients(name, steps, POSITIONS) / (steps if mean else 1)
    l1, l2 = data.by_size @ l1_coefficients(POSITIONS), data.by_size @ b
    if q is not None:
        l1, l2 = (q * l1).sum(-1), (q * l2).sum(-1)
    return int((l1 > l2 * (1 + SLACK)).sum())


def report() -> str:
    """The tables of THEOREM1.md."""
    a = l1_coefficients(POSITIONS)
    lines = []
    for scale in SCALES:
        data = terms(random_theta(THETAS, scale))
        cases, broken = data.nll.numel(), int((data.nll > data.by_size @ a * (1 + SLACK)).sum())
        q, theta = bayes_theta(THETAS, scale)
        bayes = terms(theta)
        gap = ((q * bayes.nll).sum(-1) - (q * (bayes.by_size @ a)).sum(-1)).abs().max()
        lines += [
            f"logit scale {scale:g}: -log p > L_1 in {broken} of {cases} cases (free theta);"
            f" Bayes theta: |mean(-log p) - mean L_1| {'<' if gap < 1e-12 else '>='} 1e-12",
            "",
            f"| L_1 > L_2, scale {scale:g} | " + " | ".join(f"T = {steps}" for steps in STEPS) + " |",
            "|---|" + "---|" * len(STEPS),
        ]
        for title, total, arguments in (
            ("free theta, sum over t", cases, {"data": data}),
            ("free theta, mean over t", cases, {"data": data, "mean": True}),
            ("Bayes theta, mean over x0, sum over t", THETAS, {"data": bayes, "q": q}),
        ):
            for name in SCHEDULES:
                counts = " | ".join(str(violations(name, steps, **arguments)) for steps in STEPS)
                lines.append(f"| {title}, {name} (of {total}) | {counts} |")
        lines.append("")
    lengths = (2, 3, 4, 8, 16, 32, 64)
    lines += [
        f"| smallest T with b_k >= a_k for all k, up to T = {LARGEST_T} | "
        + " | ".join(f"d = {d}" for d in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]  # fmt: skip
    for name in SCHEDULES:
        values = " | ".join(str(smallest_steps(name, d) or "none") for d in lengths)
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
