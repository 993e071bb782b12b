"""Noise: counts, uniformity over subsets, independence of how a batch is split, and what the op promises."""

import itertools
import math

import pytest
import torch

from unif2ace_kernels import d3diff
from unif2ace_kernels._philox import NOISE_STREAM, random_words, uniform
from unif2ace_kernels.d3diff.noise_torch import noise_torch

MASK_ID = 999


def chi_square_bound(degrees):
    """A chi-square beyond this has probability below 1e-6 (Wilson-Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.76 * math.sqrt(2 / (9 * degrees))) ** 3


def tokens(rows, length):
    return torch.arange(rows * length).reshape(rows, length) % 900


@pytest.mark.parametrize("length", [1, 5, 256])
def test_exact_count_is_show_o_s(length):
    m = torch.cat([torch.linspace(1e-6, 1, 98), torch.tensor([0.5 / length, 1.5 / length])]).clamp(max=1)
    clean = tokens(m.numel(), length)
    kept = clean.clone()
    noised, mask = d3diff.noise(clean, m, MASK_ID, seed=1)
    assert torch.equal(mask.sum(1), torch.round(length * m).clamp(min=1).long())
    assert torch.equal(noised, torch.where(mask, MASK_ID, clean)) and torch.equal(clean, kept)
    assert mask.dtype == torch.bool and noised.dtype == torch.int64


@pytest.mark.parametrize("dtype, length, m", [
    (torch.bfloat16, 1000, 0.7), (torch.float16, 3001, 0.3), (torch.float16, 70_000, 0.95), (torch.float32, 50, 0.05),
])  # fmt: skip
def test_the_count_is_of_a_product_in_float32_at_least(dtype, length, m):
    m = torch.tensor([m], dtype=dtype)
    _, mask = d3diff.noise(tokens(1, length), m, MASK_ID, seed=3)
    assert mask.sum() == torch.round(length * m.float())


@pytest.mark.parametrize("function", [noise_torch, torch.ops.unif2ace.d3diff_noise], ids=["torch", "op"])
def test_equal_words_are_told_apart_by_their_columns(function):
    """Row 76 has its 3,035th smallest word twice, in columns 143 and 2719."""
    _, mask = function(tokens(1, 4096), torch.tensor([3035 / 4096]), MASK_ID, True, 0, 0, 76)
    assert mask.sum() == 3035 and mask[0, 143] and not mask[0, 2719]


def test_every_subset_is_equally_likely():
    rows, length, count = 20_000, 6, 3
    _, mask = d3diff.noise(tokens(rows, length), torch.full((rows,), count / length), MASK_ID, seed=5)
    code = (mask.long() << torch.arange(length)).sum(1)
    subsets = [sum(1 << i for i in each) for each in itertools.combinations(range(length), count)]
    seen = torch.bincount(code, minlength=1 << length)[subsets].double()
    assert seen.sum() == rows
    expected = rows / len(subsets)
    assert ((seen - expected) ** 2 / expected).sum() < chi_square_bound(len(subsets) - 1)


def test_bernoulli_is_independent_and_of_the_right_rate():
    rows, length, m = 20_000, 4, 0.3
    _, mask = d3diff.noise(tokens(rows, length), torch.full((rows,), m), MASK_ID, exact_count=False, seed=6)
    code = (mask.long() << torch.arange(length)).sum(1)
    seen = torch.bincount(code, minlength=1 << length).double()
    ones = torch.tensor([bin(i).count("1") for i in range(1 << length)])
    expected = rows * m**ones * (1 - m) ** (length - ones)
    assert ((seen - expected) ** 2 / expected).sum() < chi_square_bound(len(seen) - 1)
    _, everything = d3diff.noise(tokens(9, length), torch.ones(9), MASK_ID, exact_count=False, seed=6)
    assert bool(everything.all())


@pytest.mark.parametrize("exact", [True, False])
def test_the_words_decide(exact):
    m = torch.tensor([0.25, 0.5, 1.0])
    _, mask = d3diff.noise(tokens(3, 8), m, MASK_ID, exact_count=exact, seed=2**40 + 7, offset=3, first_row=11)
    words = random_words(2**40 + 7, 3, torch.arange(11, 14), 8, NOISE_STREAM)
    if exact:
        expected = words.argsort(-1).argsort(-1) < torch.tensor([[2], [4], [8]])
    else:
        expected = uniform(words) < m[:, None]
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("exact", [True, False])
def test_split_batches_agree_with_the_whole(exact):
    clean, m = tokens(12, 33), torch.linspace(0.1, 0.9, 12)
    whole = d3diff.noise(clean, m, MASK_ID, exact_count=exact, seed=9, offset=4)
    again = d3diff.noise(clean, m, MASK_ID, exact_count=exact, seed=9, offset=4)
    parts = [
        d3diff.noise(clean[at : at + 5], m[at : at + 5], MASK_ID, exact_count=exact, seed=9, offset=4, first_row=at)
        for at in (0, 5, 10)
    ]
    for index in (0, 1):
        assert torch.equal(whole[index], again[index])
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))
    for other in ({"seed": 10, "offset": 4}, {"seed": 9, "offset": 5}, {"seed": 9 + 2**32, "offset": 4}):
        assert not torch.equal(whole[1], d3diff.noise(clean, m, MASK_ID, exact_count=exact, **other)[1])
    rows = d3diff.noise(clean, torch.full((12,), 0.5), MASK_ID, seed=9)[1]
    assert len({tuple(row.tolist()) for row in rows}) == 12


def test_empty_batch_and_empty_rows():
    for shape in ((0, 4), (3, 0)):
        noised, mask = d3diff.noise(torch.zeros(shape, dtype=torch.int64), torch.ones(shape[0]), MASK_ID, seed=1)
        assert noised.shape == shape and mask.shape == shape


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": torch.zeros(2, 3)}, "tokens: expected dtype int64, got float32"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: expected shape \[B, N\], got shape \[3\]"),
        ({"mask_prob": torch.ones(3)}, r"mask_prob: expected shape \[2\], got shape \[3\]"),
        ({"mask_prob": torch.tensor([0.5, 0.0])}, r"mask_prob: expected values in \(0, 1\], got \[0.0\]"),
        ({"mask_prob": torch.tensor([1.5, float("nan")])}, r"mask_prob: expected values in \(0, 1\], got \[1.5, nan\]"),
    ],
)
def test_bad_input(change, message):
    good = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "mask_prob": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        d3diff.noise(**{**good, **change}, mask_id=MASK_ID, seed=1)


@pytest.mark.parametrize("exact", [True, False])
def test_what_torch_asks_of_an_op(exact):
    arguments = (tokens(3, 7), torch.tensor([0.2, 0.6, 1.0]), MASK_ID, exact, 2**33, 1, 0)
    torch.library.opcheck(torch.ops.unif2ace.d3diff_noise.default, arguments)
    compiled = torch.compile(
        lambda *a: d3diff.noise(*a[:3], exact_count=exact, seed=a[4], offset=a[5]), fullgraph=True, backend="aot_eager"
    )
    eager = d3diff.noise(*arguments[:3], exact_count=exact, seed=2**33, offset=1)
    for ours, theirs in zip(compiled(*arguments), eager):
        assert torch.equal(ours, theirs)
