"""The draw: its law, its bits, its confidences, and what a caller may get wrong."""

import math

import pytest
import torch

from unif2ace_kernels import _philox
from unif2ace_kernels._library import EXTENSION_MISSING, explain
from unif2ace_kernels.sampling import draw_torch, reference, sample_from_hidden, sample_from_logits

MASK = -1  # no code, so every position is unknown where ids is filled with it
NEG = float("-inf")


def masked(*shape):
    return torch.full(shape, MASK)


def noise(rows, codes, seed, offset):
    """The Gumbel numbers of a call, in float64."""
    return _philox.gumbel(_philox.random_words(seed, offset, rows, codes, _philox.TOKEN_STREAM)).double()


def p_value(counts, law):
    """Upper tail of Pearson's chi-square, codes expected fewer than five times pooled."""
    expected = law * counts.sum()
    often = expected >= 5
    rest = [values[~often].sum()[None] for values in (counts.double(), expected)]
    seen, wanted = torch.cat([counts[often].double(), rest[0]]), torch.cat([expected[often], rest[1]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    assert len(seen) > 5
    return torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2.0).double(), statistic / 2).item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.6},
        {"top_k": 40},
        {"top_p": 0.7},
        {"temperature": 1.3, "top_k": 60, "top_p": 0.9, "guidance": 1.5},
    ],
    ids=str,
)
def test_the_law_of_the_draw_over_8192_codes(options):
    draws, codes = 4096, 8192
    rng = torch.Generator().manual_seed(11)
    cond, uncond = (2.5 * torch.randn(codes, generator=rng) for _ in range(2))
    ids, _ = sample_from_logits(
        cond.expand(draws, codes), uncond.expand(draws, codes), masked(draws), MASK, seed=5, offset=2, **options
    )
    filters = {name: value for name, value in options.items() if name != "guidance"}
    law = reference.draw_law(reference.guide(cond, uncond, options.get("guidance", 0)), **filters)
    counts = ids.bincount(minlength=codes)
    assert counts[law == 0].sum() == 0
    assert 1e-3 < p_value(counts, law) < 1 - 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.4}, {"top_k": 9, "top_p": 0.6}],
    ids=str,
)
@pytest.mark.parametrize("guidance", [1.0, 2.0, 60.0])
def test_the_same_noise_gives_the_reference_draw(guidance, options, dtype):
    rows, codes = 300, 37
    rng = torch.Generator().manual_seed(1)
    cond, uncond = (torch.randn(rows, codes, generator=rng, dtype=dtype) for _ in range(2))
    ids, logp = sample_from_logits(cond, uncond, masked(rows), MASK, guidance=guidance, seed=3, offset=9, **options)
    logits = reference.guide(cond, uncond, guidance)
    want = reference.draw(reference.draw_law(logits, **options), (-noise(rows, codes, 3, 9)).exp())
    assert torch.equal(ids, want)
    assert len(set(want.tolist())) > 10
    exact = reference.log_confidence(logits, want)
    torch.testing.assert_close(logp.double(), exact, rtol=0, atol=1e-5 * (1 + guidance / 10))  # as the logits grow


@pytest.mark.parametrize("forbid", ["cond", "uncond", "both"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_a_code_that_a_branch_forbids_is_never_drawn(forbid, temperature):
    cond, uncond = torch.randn(512, 12), torch.randn(512, 12)
    banned = torch.tensor([0, 3, 4, 11])
    for name, logits in (("cond", cond), ("uncond", uncond)):
        if forbid in (name, "both"):
            logits[:, banned] = NEG
    ids, logp = sample_from_logits(cond, uncond, masked(512), MASK, guidance=3.0, temperature=temperature, seed=1)
    assert not torch.isin(ids, banned).any()
    want = reference.log_confidence(reference.guide(cond, uncond, 3.0), ids)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=1e-5)


def test_a_bias_of_minus_infinity_bans_a_code():
    bias = torch.zeros(9)
    bias[2] = NEG
    hidden = torch.randn(2, 300, 4)
    ids, logp = sample_from_hidden(*hidden, torch.randn(9, 4), bias, masked(300), MASK, guidance=1.0, seed=2)
    assert set(ids.tolist()) == set(range(9)) - {2}
    assert logp.isfinite().all()


def test_a_row_without_a_finite_largest_keeps_its_id_at_the_lowest_confidence():
    cond = torch.zeros(5, 6)
    cond[0], cond[1, 3], cond[2, 2] = NEG, float("nan"), float("inf")
    cond[3, 1:] = NEG
    ids, logp = sample_from_logits(cond, None, torch.full((5,), 99), 99, seed=0)
    assert ids[:4].tolist() == [99, 99, 99, 0]
    assert logp[:4].tolist() == [NEG, NEG, NEG, 0.0]
    assert 0 <= ids[4] < 6


def test_guidance_zero_is_cond_bit_for_bit():
    cond = torch.randn(64, 50)
    broken = torch.full_like(cond, float("nan"))
    for left, right in zip(
        sample_from_logits(cond, broken, masked(64), MASK, guidance=0.0, seed=4),
        sample_from_logits(cond, None, masked(64), MASK, seed=4),
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_guidance_is_as_near_to_float64_as_combined_logits(dtype):
    rng = torch.Generator().manual_seed(8)
    weight = torch.randn(96, 48, generator=rng, dtype=torch.float64) / 48**0.5
    hidden = torch.randn(2, 256, 48, generator=rng, dtype=torch.float64)
    bias = torch.randn(96, generator=rng, dtype=torch.float64)
    low_h, low_w, low_b = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    exact = reference.guide(*(low_h.double() @ low_w.double().T + low_b.double()), 5.0)
    _, logp = sample_from_hidden(*low_h, low_w, low_b, masked(256), MASK, guidance=5.0, seed=6, temperature=0.0)
    ids, _ = sample_from_logits(exact, None, masked(256), MASK, seed=6, temperature=0.0)
    cond, uncond = torch.nn.functional.linear(low_h, low_w, low_b)
    theirs = (6.0 * cond - 5.0 * uncond).log_softmax(-1).amax(-1).double()
    want = reference.log_confidence(exact, ids)
    ours_error, their_error = (logp.double() - want).abs(), (theirs - want).abs()
    assert ours_error.mean() <= 2 * their_error.mean() + 1e-6
    assert ours_error.max() <= 2 * their_error.max() + 1e-5


def test_folded_guidance_draws_what_combined_logits_draw():
    rng = torch.Generator().manual_seed(8)
    weight = torch.randn(130, 16, generator=rng, dtype=torch.float64)
    hidden = torch.randn(2, 4, 100, 16, generator=rng, dtype=torch.float64)
    bias = torch.randn(130, generator=rng, dtype=torch.float64)
    options = {"code_range": (20, 90), "guidance": 1.75, "temperature": 1.2, "top_k": 30, "seed": 7, "offset": 3}
    folded = sample_from_hidden(*hidden, weight, bias, masked(4, 100), MASK, **options)
    combined = sample_from_logits(*(hidden @ weight.T + bias), masked(4, 100), MASK, **options)
    assert torch.equal(folded[0], combined[0])
    torch.testing.assert_close(folded[1], combined[1])
    assert folded[0].min() >= 20 and folded[0].max() < 90


def test_temperature_zero_takes_the_first_of_the_largest():
    cond = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [NEG, 2.0, 1.0, 2.0]])
    ids, logp = sample_from_logits(cond, None, masked(3), MASK, temperature=0.0, seed=0)
    assert ids.tolist() == [1, 0, 1]
    torch.testing.assert_close(logp, cond.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("plain", [False, True])
def test_a_nucleus_that_is_reached_exactly_ends_there(plain):
    logits = torch.tensor([0.0, -math.log(2), -math.log(2)]).expand(200, 3)
    assert torch.equal(logits[0].exp(), torch.tensor([1.0, 0.5, 0.5]))
    if plain:
        words = torch.arange(200), torch.tensor(1), torch.tensor(0)
        ids, _ = draw_torch.draw(logits, None, *words, 0.0, 1.0, 0, 0.5, "log_prob")
    else:
        ids, _ = sample_from_logits(logits, None, masked(200), MASK, seed=1, top_p=0.5)
    assert (ids == 0).all()


def test_ties_at_the_border_of_a_filter_stay_in():
    cond = torch.tensor([3.0, 2.0, 2.0, 2.0, -1.0]).expand(4000, 5)
    by_k, _ = sample_from_logits(cond, None, masked(4000), MASK, top_k=2, seed=0)
    by_p, _ = sample_from_logits(cond, None, masked(4000), MASK, top_p=0.6, seed=0)
    assert set(by_k.tolist()) == set(by_p.tolist()) == {0, 1, 2, 3}
    first, _ = sample_from_logits(cond, None, masked(4000), MASK, top_p=1e-9, seed=0)
    assert set(first.tolist()) == {0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_confidence_is_log_p_of_the_guided_law_whatever_the_dtype(dtype):
    rng = torch.Generator().manual_seed(3)
    cond, uncond = (torch.randn(64, 1000, generator=rng).to(dtype) for _ in range(2))
    ids, logp = sample_from_logits(cond, uncond, masked(64), MASK, guidance=1.75, temperature=0.8, top_k=20, seed=3)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = reference.log_confidence(reference.guide(cond, uncond, 1.75), ids)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = reference.guide(cond, uncond, 1.75).to(wide).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert (logp.double() - want).abs().max() <= 2 * (theirs.double() - want).abs().max() + 1e-6


def test_entropy_and_margin():
    cond = 2 * torch.randn(200, 40)
    cond[:, 5] = NEG
    law = cond.double().softmax(-1)
    top = law.topk(2).values
    want = {"neg_entropy": (law * law.clamp(min=1e-300).log()).sum(-1), "margin": top[:, 0] - top[:, 1]}
    for kind, value in want.items():
        ids, got = sample_from_logits(cond, None, masked(200), MASK, seed=1, confidence=kind)
        torch.testing.assert_close(got.double(), value, rtol=0, atol=2e-6)
        assert torch.equal(ids, sample_from_logits(cond, None, masked(200), MASK, seed=1)[0])
    one = sample_from_logits(cond[:, :1], None, masked(200), MASK, seed=1, confidence="margin")[1]
    assert (one == 1).all()


def test_known_tokens_stay_and_nothing_is_written_in_place():
    ids = torch.tensor([[7, 7, 99, 99], [1, 2, 3, 4]])
    before = ids.clone()
    cond = torch.randn(2, 4, 10)
    drawn, logp = sample_from_logits(cond, None, ids, 99, seed=0)
    known = ids != 99
    assert torch.equal(drawn[known], before[known]) and torch.equal(ids, before)
    assert (logp[known] == math.inf).all() and logp[~known].isfinite().all() and (drawn[~known] < 10).all()
    chosen = torch.tensor([[True, False, False, True], [False] * 4])
    drawn, logp = sample_from_logits(cond, None, ids, 99, seed=0, unknown=chosen)
    assert torch.equal(logp.isfinite(), chosen) and torch.equal(drawn[~chosen], ids[~chosen])


def test_a_draw_has_no_gradient():
    """Else a backward through the confidences would end with a warning and no gradient, or with that of one path."""
    logits, weight = torch.randn(4, 9, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for confidence in (
        sample_from_logits(logits, None, masked(4), MASK, seed=1)[1],
        sample_from_hidden(hidden, None, weight.double(), None, masked(4), MASK, seed=1)[1],
    ):
        with pytest.raises(RuntimeError, match="does not require grad"):
            confidence.sum().backward()


@pytest.mark.parametrize("unknown", [0, 1])
def test_none_or_one_unknown(unknown):
    ids = torch.full((3, 5), 2)
    ids.view(-1)[:unknown] = 8
    weight = torch.randn(8, 6)
    drawn, logp = sample_from_hidden(torch.randn(3, 5, 6), None, weight, None, ids, 8, seed=0)
    assert int(logp.isfinite().sum()) == unknown and (drawn < 8).all()
    empty = sample_from_logits(torch.randn(0, 4), None, masked(0), MASK, seed=0)
    assert empty[0].shape == empty[1].shape == (0,)


def head(rows, hidden, codes, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(2, rows, hidden, generator=rng).to(dtype)
    return h, (torch.randn(codes, hidden, generator=rng) / hidden**0.5).to(dtype), torch.randn(codes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden, codes", [(192, 1024), (37, 1001), (64, 40000)])
@pytest.mark.parametrize("confidence", ["log_prob", "neg_entropy"])
def test_compaction_and_batch_splits_change_no_bit(hidden, codes, dtype, confidence):
    rows = 150
    h, weight, bias = head(rows, hidden, codes, dtype)
    logits = torch.nn.functional.linear(h, weight, bias)
    ids = torch.where(torch.rand(rows, generator=torch.Generator().manual_seed(1)) < 0.4, MASK, 3)
    options = {"guidance": 1.5, "top_k": 30, "seed": 9, "offset": 1, "confidence": confidence}
    row = torch.arange(rows)
    shuffle = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    for sample in (
        lambda part, **more: sample_from_logits(*logits[:, part], ids[part], MASK, **options, **more),
        lambda part, **more: sample_from_hidden(*h[:, part], weight, bias, ids[part], MASK, **options, **more),
    ):
        whole = sample(row)
        compaction_off = sample(row, compact=False)
        pieces = [sample(part, rows=part) for part in (row[:1], row[1:2], row[2:40], row[40:])]
        shuffled = sample(shuffle, rows=shuffle)
        for i in range(2):
            assert torch.equal(whole[i], compaction_off[i])
            assert torch.equal(whole[i], torch.cat([piece[i] for piece in pieces]))
            assert torch.equal(whole[i][shuffle], shuffled[i])


def test_seed_and_offset_name_the_sample_and_may_be_tensors():
    cond = torch.zeros(50, 30)

    def sample(seed, offset):
        return sample_from_logits(cond, None, masked(50), MASK, seed=seed, offset=offset)[0]

    base = sample(1, 2)
    assert torch.equal(base, sample(1, 2))
    assert torch.equal(base, sample(torch.tensor(1), torch.tensor([2])))
    for other in (sample(2, 2), sample(1, 3), sample(1 + 2**40, 2)):
        assert (other != base).float().mean() > 0.8


def arguments_of_ops():
    rng = torch.Generator().manual_seed(0)
    ids = torch.tensor([99, 1, 99, 99, 2])
    h, logits = torch.randn(2, 5, 6, generator=rng), torch.randn(2, 5, 8, generator=rng)
    shared = (ids, ids == 99, torch.arange(5), torch.tensor(1), torch.tensor(0), 1, 6, 1.0, 1.0, 3, 0.9)
    ops = torch.ops.unif2ace
    return [
        (ops.sample_logits.default, (*logits, *shared, "log_prob", True)),
        (ops.sample_logits.default, (logits[0].half(), None, *shared[:7], 0.0, *shared[8:], "margin", False)),
        (ops.sample_hidden.default, (*h, torch.randn(8, 6), torch.randn(8), *shared, "neg_entropy", True)),
        (
            ops.sample_hidden.default,
            (h[0].double(), None, torch.randn(8, 6).double(), None, *shared[:7], 0.0, *shared[8:], "log_prob", False),
        ),
        (ops.draw.default, (*logits, *shared[2:5], *shared[7:], "log_prob")),
    ]


@pytest.mark.parametrize("op, arguments", arguments_of_ops(), ids=lambda value: getattr(value, "_name", ""))
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)


def test_explain_says_what_runs():
    for op in ("draw", "sample_logits", "sample_hidden", "remask"):
        assert explain(op).implementation == ("torch" if EXTENSION_MISSING else "c++")


BAD = [
    ("ids", {"ids": torch.zeros(3)}),
    ("cond", {"cond": torch.zeros(4, 7)}),
    ("cond", {"cond": torch.zeros(3, 7, dtype=torch.int64)}),
    ("uncond", {"uncond": torch.zeros(3, 6)}),
    ("uncond", {"uncond": torch.zeros(3, 7).double()}),
    ("code_range", {"code_range": (2, 8)}),
    ("code_range", {"code_range": (3, 3)}),
    ("guidance", {"guidance": float("nan")}),
    ("guidance", {"guidance": 1.0, "uncond": None}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": float("inf")}),
    ("temperature", {"temperature": 1e-9}),
    ("top_k", {"top_k": -1}),
    ("top_k", {"top_k": 2.5}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.5}),
    ("confidence", {"confidence": "probability"}),
    ("rows", {"rows": torch.zeros(2, dtype=torch.int64)}),
    ("unknown", {"unknown": torch.zeros(3)}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": torch.zeros(2, dtype=torch.int64)}),
    ("offset", {"offset": torch.tensor(1.0)}),
]


@pytest.mark.parametrize("name, change", BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arguments_are_named(name, change):
    good = {"cond": torch.zeros(3, 7), "uncond": torch.zeros(3, 7), "ids": masked(3), "mask_id": MASK, "seed": 0}
    sample_from_logits(**good)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample_from_logits(**{**good, **change})


def test_sizes_of_zero_and_one_whatever_their_strides():
    """Torch calls them contiguous with any stride; a hidden state without elements leaves the bias to draw by."""
    for rows, width in ((0, 3), (4, 1), (0, 1)):
        strided = torch.randn(rows, width, 2)[..., 0]
        for ids, confidence in (
            sample_from_logits(strided, strided, masked(rows), MASK, guidance=1.0, seed=0),
            sample_from_hidden(strided, strided, torch.randn(5, width), None, masked(rows), MASK, guidance=1.0, seed=0),
        ):
            assert ids.shape == confidence.shape == (rows,) and (ids != MASK).all()
    bias = torch.tensor([0.0, 9.0, 0.0])
    empty = torch.empty(4, 0)
    ids, _ = sample_from_hidden(empty, None, torch.empty(3, 0), bias, masked(4), MASK, temperature=0.0, seed=0)
    assert ids.tolist() == [1] * 4
    with pytest.raises(ValueError, match="^code_range: expected"):
        sample_from_logits(torch.empty(3, 0), None, masked(3), MASK, seed=0)


@pytest.mark.parametrize(
    "name, change",
    [
        ("h_cond", {"h_cond": torch.zeros(3, 5)}),
        ("h_uncond", {"h_uncond": torch.zeros(2, 4)}),
        ("h_uncond", {"h_uncond": torch.zeros(3, 4).half()}),
        ("weight", {"weight": torch.zeros(7)}),
        ("bias", {"bias": torch.zeros(6)}),
        ("code_range", {"code_range": (0, 8)}),
    ],
)
def test_bad_arguments_of_the_head_are_named(name, change):
    good = {
        "h_cond": torch.zeros(3, 4),
        "h_uncond": None,
        "weight": torch.zeros(7, 4),
        "bias": torch.zeros(7),
        "ids": masked(3),
        "mask_id": MASK,
        "seed": 0,
    }
    sample_from_hidden(**good)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample_from_hidden(**{**good, **change})
