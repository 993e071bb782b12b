"""Triton's kernels, interpreted, on any shape, layout and value: what the torch path gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from values import any_values, generator, laid_out, layouts, ordinary, seeds, values

pytest.importorskip("triton", reason="needs Triton")

from unif2ace_kernels.d3diff.noise_torch import noise_torch  # noqa: E402
from unif2ace_kernels.d3diff.noise_triton import noise_triton  # noqa: E402
from unif2ace_kernels.moe import mix_torch, mix_triton, route_torch, route_triton  # noqa: E402
from unif2ace_kernels.sampling import draw_torch, draw_triton, ops, remask_triton  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton_interpreter")]
few = settings(max_examples=max(3, settings.default.max_examples // 10))
WORDS = st.integers(0, 2**63 - 1)
HALF = st.sampled_from([torch.float32, torch.float16])


@few
@given(st.integers(0, 5), st.integers(0, 40), st.booleans(), WORDS, st.integers(0, 2**32 - 1), layouts, HALF, seeds)
def test_noise(batch, length, exact, seed, offset, layout, dtype, values_seed):
    rng = generator(values_seed)
    tokens = laid_out(torch.randint(99, (batch, length), generator=rng), layout)
    mask_prob = torch.rand(batch, generator=rng).to(dtype).clamp(min=1e-3)
    arguments = (tokens, mask_prob, 1234, exact, seed, offset, 2**31)
    for ours, torchs in zip(noise_triton(*arguments), noise_torch(*arguments), strict=True):
        assert torch.equal(ours, torchs)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 20), any_values, HALF, layouts, st.data())
def test_route(sizes, tokens, kind, dtype, layout, data):
    rng = generator(data.draw(seeds))
    logits = laid_out(values(rng, (tokens, sum(sizes)), kind).to(dtype), layout)
    ids = torch.randint(len(sizes), (tokens,), generator=rng)
    top_k, shared = data.draw(st.integers(1, min(sizes))), data.draw(st.integers(0, 2))
    scoring, normalize = data.draw(st.sampled_from(["softmax", "sigmoid"])), data.draw(st.booleans())
    rest = sizes, top_k, shared, [0.2] * len(sizes), normalize, scoring, None, 0.1
    ours, torchs = (each.forward(logits, ids, *rest) for each in (route_triton, route_torch))
    for place in (1, 2, 3, 4):  # expert, counts, offsets, order
        assert torch.equal(ours[place], torchs[place])
    for place in (0, 5, 6):
        torch.testing.assert_close(ours[place], torchs[place], rtol=1e-5, atol=1e-6, equal_nan=True)
    for place in (7, 8):  # losses: infinite or not a number, the logsumexp of an infinite logit is neither's to tell
        one, other = (torch.where(each[place].isfinite(), each[place], torch.nan) for each in (ours, torchs))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


@few
@given(st.integers(0, 3), st.integers(0, 5), st.sampled_from([1, 7, 33]), st.integers(0, 3), HALF, ordinary, seeds)
def test_mix(batch, length, hidden, injections, dtype, kind, seed):
    rng = generator(seed)
    x, injected = (values(rng, shape, kind).to(dtype) for shape in ((batch, length, hidden),
                                                                    (batch, injections, length, hidden)))  # fmt: skip
    coef, grad = values(rng, (batch, 1 + injections)).float(), values(rng, (batch, length, hidden)).to(dtype)
    close = {"rtol": 2e-3, "atol": 2e-3 if dtype == torch.float16 else 1e-4}
    torch.testing.assert_close(mix_triton.forward(x, coef, injected), mix_torch.forward(x, coef, injected), **close)
    for ours, torchs in zip(
        mix_triton.backward(grad, x, coef, injected), mix_torch.backward(grad, x, coef, injected), strict=True
    ):
        size = max(1.0, torchs.abs().max().item()) if torchs.numel() else 1.0
        torch.testing.assert_close(ours, torchs, rtol=2e-3, atol=close["atol"] * size)


@few
@given(st.integers(1, 6), st.sampled_from([1, 2, 5, 33]), any_values, st.booleans(), st.data())
def test_draw(rows, columns, kind, guided, data):
    assume(kind not in ("huge", "denormal"))
    rng = generator(data.draw(seeds))
    cond, uncond = (values(rng, (rows, columns), kind).float() for _ in range(2))
    ids = torch.where(torch.rand(rows, generator=rng) < 0.7, -7, 3)
    draw = (data.draw(st.sampled_from([1.0, 0.0, 0.3, 2.5])), data.draw(st.sampled_from([0, 1, 3])), 1.0)
    confidence = data.draw(st.sampled_from(ops.CONFIDENCES))
    words = torch.tensor(data.draw(WORDS)), torch.tensor(data.draw(WORDS))
    arguments = (cond, uncond if guided else None, ids, ids == -7, torch.randint(2**32, (rows,), generator=rng), *words,
                 0, columns, 1.5 if guided else 0.0, *draw, confidence, True)  # fmt: skip
    ours, torchs = draw_triton.sample_logits(*arguments), draw_torch.sample_logits(*arguments)
    assert torch.equal(ours[0], torchs[0])
    torch.testing.assert_close(ours[1], torchs[1], rtol=1e-5, atol=1e-5, equal_nan=True)


@few
@given(st.integers(0, 3), st.integers(0, 40), any_values, st.sampled_from(["index", "showo"]), WORDS, layouts, seeds)
def test_remask(batch, length, kind, ties, seed, layout, values_seed):
    rng = generator(values_seed)
    confidence = laid_out(values(rng, (batch, length), kind).float(), layout)
    unknown = laid_out(torch.rand(batch, length, generator=rng) < 0.6, layout)
    count, rows = torch.randint(-2, length + 3, (batch,), generator=rng), torch.randint(2**32, (batch, length))
    arguments = (confidence, unknown, count, rows, torch.tensor(seed), torch.tensor(5), torch.tensor(0.7), ties)
    assert torch.equal(remask_triton.remask(*arguments), draw_torch.remask(*arguments))
