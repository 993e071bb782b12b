"""The draws, the re-mask, the loop and the Gumbel noise on any shape, layout and value, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from values import FLOATS, any_values, dtypes, generator, laid_out, layouts, seeds, values

from unif2ace_kernels import _philox, random, sampling
from unif2ace_kernels._dtypes import accumulation_dtype
from unif2ace_kernels.sampling import reference

pytestmark = pytest.mark.usefixtures("implementation")
MASK = -7
WORDS = st.integers(0, 2**63 - 1)


@st.composite
def draws(draw, columns):
    """Keyword arguments of the two samplers, for logits of that many columns."""
    first = draw(st.integers(0, columns - 1))
    return {
        "code_range": draw(st.sampled_from([None, (first, draw(st.integers(first + 1, columns)))])),
        "guidance": draw(st.sampled_from([0.0, 0.5, 1.75, 30.0, -0.5])),
        "temperature": draw(st.sampled_from([1.0, 0.0, 0.3, 1e-6, 2.5])),
        "top_k": draw(st.sampled_from([0, 1, 3, 10**6])),
        "top_p": draw(st.sampled_from([1.0, 0.5, 0.9, 1e-9])),
        "confidence": draw(st.sampled_from(sampling.ops.CONFIDENCES)),
        "seed": draw(WORDS),
        "offset": draw(WORDS),
        "compact": draw(st.booleans()),
    }


def expect_drawn(out, ids, unknown, rows, cond, uncond, options, dtype, slack):
    """Each drawn code is possible, is the one of a float64 draw unless that was close, and has its confidence.

    cond, uncond: float64 logits [R, V] of what the op computed with; slack: what their rounding may come to.
    """
    code_range = options["code_range"] or (0, cond.shape[-1])
    codes, window = code_range[1] - code_range[0], slice(*code_range)
    drawn, confidence = (each.reshape(-1) for each in out)
    logits = reference.guide(cond[:, window], None if uncond is None else uncond[:, window], options["guidance"])
    words = _philox.random_words(options["seed"], options["offset"], rows.reshape(-1), codes, _philox.TOKEN_STREAM)
    noise = _philox.gumbel(words).double()
    for r, (was, code, sure) in enumerate(zip(ids.reshape(-1).tolist(), drawn.tolist(), confidence.tolist())):
        if not unknown.reshape(-1)[r]:
            assert code == was and sure == math.inf
            continue
        z, peak = logits[r], logits[r].max().item()
        if not math.isfinite(peak):
            assert code == was and sure == -math.inf
            continue
        assert code_range[0] <= code < code_range[1]
        at = code - code_range[0]
        assert z[at] > -math.inf, "a code that cannot be was drawn"
        near = slack * max(1.0, z[z.isfinite()].abs().max().item())
        temperature, top_k, top_p = options["temperature"], options["top_k"], options["top_p"]
        if temperature == 0:
            assert z[at] >= peak - near
            continue
        law = reference.draw_law(z[None], temperature, top_k, top_p)[0]
        filtered = (top_k and top_k < codes) or top_p < 1
        score = torch.where(law > 0, (z - peak) / temperature + noise[r], -math.inf)
        if not filtered:
            assert score[at] >= score.max() - 2 * near / temperature - 1e-5
        elif top_p == 1:
            assert z[at] >= z.topk(top_k).values[-1] - near
        if options["confidence"] == "log_prob":
            want = reference.log_confidence(logits[r : r + 1], torch.tensor([at])).item()
            assert abs(sure - want) <= 4 * near + 1e-5 * max(1, abs(want))
        elif options["confidence"] == "margin":
            assert -1e-5 <= sure <= 1 + 1e-5
        else:
            assert -math.log(codes) - 1e-4 <= sure <= 1e-5


def guided_slack(dtype, guidance):
    """Relative rounding of guided logits that are computed in float32 or better from `dtype`."""
    return (1e-13 if dtype == torch.float64 else 1e-6) * (2 + 2 * abs(guidance))


@given(st.integers(0, 9), st.sampled_from([1, 2, 5, 16, 33]), st.booleans(), dtypes, any_values, layouts, st.data())
def test_draw_from_logits(rows, columns, guided, dtype, kind, layout, data):
    options = data.draw(draws(columns))
    rng = generator(data.draw(seeds))
    options["guidance"] = options["guidance"] if guided else 0.0
    cond, uncond = (laid_out(values(rng, (rows, columns), kind).to(dtype), layout) for _ in range(2))
    ids = laid_out(torch.where(torch.rand(rows, generator=rng) < 0.7, MASK, 3), "every second")
    places = torch.randint(2**32, (rows,), generator=rng)
    second = uncond if guided else None
    out = sampling.sample_from_logits(cond, second, ids, MASK, rows=laid_out(places, "offset"), **options)
    assert out[1].dtype == accumulation_dtype(dtype)
    if kind in ("huge",) and dtype != torch.float64:
        return  # guidance overflows float32, where the truth in float64 does not
    if dtype == torch.float16:
        cond, uncond = cond.float(), uncond.float()
    expect_drawn(out, ids, ids == MASK, places, cond.double(), None if second is None else uncond.double(), options,
                 dtype, guided_slack(dtype, options["guidance"]))  # fmt: skip
    if rows > 1:  # a row alone is the row of the batch
        one = sampling.sample_from_logits(
            cond.to(dtype)[1:2], None if second is None else uncond.to(dtype)[1:2], ids[1:2], MASK, rows=places[1:2],
            **options,
        )  # fmt: skip
        assert torch.equal(one[0], out[0][1:2])
        torch.testing.assert_close(one[1], out[1][1:2], rtol=0, atol=0, equal_nan=True)


@given(
    st.integers(0, 9), st.sampled_from([0, 1, 3, 8]), st.sampled_from([1, 2, 5, 33]), st.booleans(), dtypes,
    any_values, layouts, st.data(),
)  # fmt: skip
def test_draw_from_hidden(rows, hidden, columns, guided, dtype, kind, layout, data):
    options = data.draw(draws(columns))
    rng = generator(data.draw(seeds))
    options["guidance"] = options["guidance"] if guided else 0.0
    cond, uncond = (laid_out(values(rng, (rows, hidden), kind).to(dtype), layout) for _ in range(2))
    weight = laid_out(values(rng, (columns, hidden)).to(dtype), layout)
    bias = data.draw(st.sampled_from([None, laid_out(values(rng, (columns,)).to(dtype), layout)]))
    if bias is not None and data.draw(st.booleans()):
        bias = bias.clone()
        bias[0] = -math.inf
    ids = torch.where(torch.rand(rows, generator=rng) < 0.7, MASK, 3)
    second = uncond if guided else None
    places = torch.arange(rows)
    out = sampling.sample_from_hidden(cond, second, weight, bias, ids, MASK, **options)
    assert out[1].dtype == accumulation_dtype(dtype) and out[0].shape == ids.shape
    if kind in ("huge", "NaN", "inf", "-inf", "all -inf", "all NaN"):
        assert (out[0][ids != MASK] == 3).all()
        return
    mixed = cond.double()
    if second is not None:
        mixed = (1 + options["guidance"]) * mixed - options["guidance"] * uncond.double()
    logits = mixed @ weight.double().t() + (0 if bias is None else bias.double())
    slack = (1e-12 if dtype == torch.float64 else 4 * hidden * torch.finfo(dtype).eps) * (
        2 + 2 * abs(options["guidance"])
    )
    expect_drawn(out, ids, ids == MASK, places, logits, None, options | {"guidance": 0.0}, dtype, slack * 8)


@given(
    st.integers(0, 4), st.integers(0, 40), any_values, layouts, st.sampled_from(["index", "showo"]),
    st.sampled_from([0.0, 0.7, 1e4]), st.sampled_from([torch.float32, torch.float64]), WORDS, WORDS, seeds,
)  # fmt: skip
def test_remask(batch, length, kind, layout, ties, temperature, dtype, seed, offset, values_seed):
    rng = generator(values_seed)
    confidence = laid_out(values(rng, (batch, length), kind).to(dtype), layout)
    unknown = laid_out(torch.rand(batch, length, generator=rng) < 0.6, layout)
    count = torch.randint(-3, length + 4, (batch,), generator=rng)
    rows = torch.randint(2**32, (batch, length), generator=rng)
    mask = sampling.remask(
        confidence, unknown, count, temperature, seed=seed, offset=offset, ties=ties, rows=laid_out(rows, layout)
    )
    rows = laid_out(rows, layout)
    assert mask.shape == unknown.shape and not (mask & ~unknown).any()
    largest = torch.finfo(dtype).max
    ranked = confidence.nan_to_num(nan=-math.inf, posinf=largest, neginf=-math.inf)
    noise = _philox.gumbel(_philox.words_at(seed, offset, rows, 0, _philox.REMASK_STREAM)).view(rows.shape)
    ranked = (ranked + torch.tensor(temperature) * noise).clamp(max=largest)
    if ties == "index":
        assert torch.equal(mask, reference.lowest(ranked, unknown, count))
        assert torch.equal(mask.sum(-1), count.clamp(min=0).minimum(unknown.sum(-1)))
    elif length:
        ranked = ranked.masked_fill(~unknown, math.inf)
        cut = ranked.sort(-1).values.gather(-1, count.clamp(0, length - 1)[:, None])
        assert torch.equal(mask, (ranked < cut) & unknown)


@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.sampled_from(sorted(sampling.sampler.POLICIES)),
    st.sampled_from(sorted(sampling.sampler.SCHEDULES)), st.sampled_from([0.0, 1.5]), st.sampled_from([0.0, 1.0]),
    st.booleans(), seeds,
)  # fmt: skip
def test_sampler_fills_and_keeps(batch, length, steps, policy, schedule, guidance, remask_temperature, head, seed):
    rng = generator(seed)
    embed, weight = torch.randn(12, 6, generator=rng), torch.randn(11, 6, generator=rng)
    places = torch.randn(length, 6, generator=rng)
    mask_id = 11

    def step_fn(ids, step):
        h = embed[ids] + places
        both = h + h.mean(1, keepdim=True), h
        return both if head else tuple(each @ weight.t() for each in both)

    sampler = sampling.MaskedDiffusionSampler(
        step_fn, steps, mask_id, head=(weight, None) if head else None, schedule=schedule, policy=policy,
        guidance=guidance, remask_temperature=remask_temperature,
    )  # fmt: skip
    ids = torch.where(torch.rand(batch, length, generator=rng) < 0.7, mask_id, torch.randint(11, (batch, length)))
    seen = []
    out = sampler(ids, seed=seed, offset=5, callback=seen.append)
    known = ids != mask_id
    assert torch.equal(out[known], ids[known]) and (out < mask_id).all() and len(seen) <= steps
    left = [(each.ids == mask_id).sum().item() for each in seen]
    assert left == sorted(left, reverse=True)
    rows = torch.arange(ids.numel()).view(ids.shape)
    last = sampler(ids[-1:], seed=seed, offset=5, rows=rows[-1:])
    assert head or torch.equal(last, out[-1:])  # a product may round by its shape where the head is not ours


@given(WORDS, WORDS, st.integers(0, 5), st.integers(0, 70), st.sampled_from([0, 1, 2]))
def test_gumbel_is_philox(seed, offset, rows, columns, stream):
    out = random.gumbel(torch.tensor(seed), torch.tensor(offset), rows, columns, stream=stream)
    words = _philox.random_words(seed, offset, rows, columns, stream)
    assert torch.equal(out, _philox.gumbel(words)) and out.shape == (rows, columns)
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    assert ((out - exact).abs() <= 3e-7 * exact.abs().clamp(min=1)).all()


@given(st.sampled_from(["cond", "uncond", "ids", "code_range", "guidance", "temperature", "top_k", "top_p", "seed",
                        "offset", "confidence", "rows", "unknown"]), st.data())  # fmt: skip
def test_draw_names_what_is_wrong(argument, data):
    ids = torch.tensor([MASK, 3, MASK])
    good = {"cond": torch.randn(3, 5), "uncond": torch.randn(3, 5), "ids": ids, "guidance": 1.0, "seed": 1}
    nan = math.nan
    bad = {
        "cond": [torch.randn(2, 5), torch.randn(3), torch.ones(3, 5).long(), None, torch.randn(3, 0)],
        "uncond": [torch.randn(3, 4), torch.randn(3, 5).double(), torch.randn(2, 5), 3],
        "ids": [torch.zeros(3), torch.zeros(4).long(), None, [1, 2, 3]],
        "code_range": [(0, 6), (3, 3), (-1, 4), (4, 2)],
        "guidance": [math.inf, nan, -math.inf],
        "temperature": [-1.0, nan, math.inf, 1e-9],
        "top_k": [-1, 2.5, None],
        "top_p": [0.0, 1.1, nan, -0.5],
        "seed": [-1, 2**63, 1.5, torch.tensor([1, 2]), torch.tensor(1.0), None],
        "offset": [-1, 2**63, 1.5, torch.tensor([1, 2]), None],
        "confidence": ["entropy", None, 3],
        "rows": [torch.zeros(2).long(), torch.zeros(3), 7],
        "unknown": [torch.zeros(3), torch.ones(2).bool(), True],
    }[argument]
    changed = good | {argument: data.draw(st.sampled_from(bad))}
    with pytest.raises(ValueError, match=rf"^({argument}|cond|uncond|code_range|unknown): expected"):
        sampling.sample_from_logits(mask_id=MASK, **changed)


def test_every_float_is_fuzzed():
    assert set(FLOATS) == set(sampling.ops._FLOATS)
