"""The re-mask: exact counts, ties, noise, and what a caller may get wrong."""

import math

import pytest
import torch

from unif2ace_kernels import _philox
from unif2ace_kernels._library import EXTENSION_MISSING
from unif2ace_kernels.sampling import draw_torch, reference, remask


def case(rows=6, length=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    confidence = torch.randn(rows, length, generator=rng).round(decimals=1)  # rounded: many ties
    unknown = torch.rand(rows, length, generator=rng) < 0.6
    return confidence.masked_fill(~unknown, math.inf), unknown, torch.tensor([0, 1, 5, 9, 1000, -3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_it_masks_the_exact_count_of_the_least_confident(temperature, dtype):
    confidence, unknown, count = case()
    mask = remask(confidence.to(dtype), unknown, count, temperature, seed=3, offset=4)
    row = torch.arange(confidence.numel()).view(confidence.shape)
    noise = _philox.gumbel(_philox.words_at(3, 4, row, 0, _philox.REMASK_STREAM))
    noisy = confidence.to(dtype) + temperature * noise
    assert torch.equal(mask, reference.lowest(noisy, unknown, count))
    assert torch.equal(mask.sum(-1), torch.minimum(count.clamp(min=0), unknown.sum(-1)))


def test_equal_confidences_go_by_index_or_all_stay():
    confidence = torch.tensor([[1.0, 0.0, 0.0, 0.0, -1.0, 0.0]])
    unknown = torch.tensor([[True, True, True, False, True, True]])
    assert remask(confidence, unknown, 3, seed=0).tolist() == [[False, True, True, False, True, False]]
    # The value of rank 3 is 0; strictly below it is position 4 alone.
    assert remask(confidence, unknown, 3, seed=0, ties="showo").tolist() == [[False] * 4 + [True, False]]


def test_showo_ties_without_equals_mask_the_count():
    confidence = torch.randn(3, 30)
    unknown = torch.ones(3, 30, dtype=torch.bool)
    options = {"temperature": 0.7, "seed": 1}
    showo = remask(confidence, unknown, 11, ties="showo", **options)
    assert torch.equal(showo, remask(confidence, unknown, 11, **options)) and (showo.sum(-1) == 11).all()


def test_no_distribution_is_masked_first_and_a_known_token_never():
    confidence = torch.tensor([[0.0, math.nan, -math.inf, math.inf, -5.0]])
    unknown = torch.tensor([[True, True, True, True, False]])
    for count, want in ((2, [1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3])):
        mask = remask(confidence, unknown, count, 1.0, seed=5)
        assert mask[0].nonzero()[:, 0].tolist() == want


def test_a_part_of_a_batch_is_masked_alike():
    confidence, unknown, count = case()
    row = torch.arange(confidence.numel()).view(confidence.shape)
    whole = remask(confidence, unknown, count, 2.0, seed=1)
    for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
        got = remask(confidence[part], unknown[part], count[part], 2.0, seed=1, rows=row[part])
        assert torch.equal(got, whole[part])


def test_the_noise_is_not_the_draws_and_moves_with_seed_and_offset():
    confidence, unknown = torch.zeros(4, 64), torch.ones(4, 64, dtype=torch.bool)
    masks = [remask(confidence, unknown, 32, 1.0, seed=s, offset=o) for s, o in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    row = torch.arange(256).view(4, 64)
    token = _philox.gumbel(_philox.words_at(0, 0, row, 0, _philox.TOKEN_STREAM))
    assert not torch.equal(masks[0], reference.lowest(token, unknown, torch.full((4,), 32)))


def test_a_temperature_on_the_device_is_the_number():
    confidence, unknown, count = case()
    for temperature in (0.0, 0.3, 7.0):
        as_tensor = torch.tensor([temperature])
        for ties in ("index", "showo"):
            options = {"seed": 2, "ties": ties}
            want = remask(confidence, unknown, count, temperature, **options)
            assert torch.equal(remask(confidence, unknown, count, as_tensor, **options), want)


@pytest.mark.skipif(EXTENSION_MISSING is not None, reason="extension not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 256, 1023])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 80.0])
def test_the_compiled_remask_is_the_torch_one_bit_for_bit(temperature, length, dtype):
    rng = torch.Generator().manual_seed(length)
    rows = 40
    confidence = torch.randn(rows, length, generator=rng, dtype=dtype)
    confidence[::2] = confidence[::2].round(decimals=1)  # ties
    odd = torch.rand(rows, length, generator=rng)
    for value, low in ((math.nan, 0.0), (math.inf, 0.05), (-math.inf, 0.1), (torch.finfo(dtype).max, 0.15)):
        confidence[(odd >= low) & (odd < low + 0.05)] = value
    unknown = torch.rand(rows, length, generator=rng) < torch.linspace(0, 1, rows)[:, None]
    count = torch.randint(-2, length + 3, (rows,), generator=rng)
    row = torch.randint(2**32, (rows, length), generator=rng)
    words = torch.tensor(2**62 + 9), torch.tensor(2**32 + 3)
    for ties in ("index", "showo"):
        arguments = (confidence, unknown, count, row, *words, torch.tensor(temperature), ties)
        assert torch.equal(torch.ops.unif2ace_native.remask(*arguments), draw_torch.remask(*arguments))


def test_strides_do_not_matter_and_an_empty_batch_is_empty():
    confidence, unknown, count = case()
    want = remask(confidence, unknown, count, 0.5, seed=1)
    turned = confidence.t().contiguous().t(), unknown.t().contiguous().t()
    assert torch.equal(remask(*turned, torch.stack([count, count], 1)[:, 0], 0.5, seed=1), want)
    assert remask(confidence[:0], unknown[:0], count[:0], 0.5, seed=1).shape == (0, 40)
    assert remask(confidence[:, :0], unknown[:, :0], count, 0.0, seed=1).shape == (6, 0)
    words = torch.tensor(1), torch.tensor(0)
    for ties in ("index", "showo"):
        assert remask(confidence[:, :0], unknown[:, :0], count, 0.0, seed=1, ties=ties).shape == (6, 0)
        nothing = confidence[:, :0], unknown[:, :0], count, torch.empty(6, 0, dtype=torch.int64)
        assert draw_torch.remask(*nothing, *words, torch.tensor(0.5), ties).shape == (6, 0)


def test_opcheck():
    confidence, unknown, count = case()
    row = torch.arange(confidence.numel()).view(confidence.shape)
    for ties in ("index", "showo"):
        arguments = (confidence, unknown, count, row, torch.tensor(1), torch.tensor(2), torch.tensor(0.5), ties)
        torch.library.opcheck(torch.ops.unif2ace.remask.default, arguments)


@pytest.mark.parametrize(
    "name, change",
    [
        ("confidence", {"confidence": torch.zeros(3)}),
        ("confidence", {"confidence": torch.zeros(2, 3).half()}),
        ("unknown", {"unknown": torch.ones(2, 3)}),
        ("unknown", {"unknown": torch.ones(2, 4, dtype=torch.bool)}),
        ("count", {"count": torch.zeros(3, dtype=torch.int64)}),
        ("count", {"count": torch.zeros(2)}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": torch.zeros(1).double()}),
        ("temperature", {"temperature": torch.zeros(2)}),
        ("ties", {"ties": "strict"}),
        ("rows", {"rows": torch.zeros(6, dtype=torch.int64)}),
        ("seed", {"seed": 2**63}),
    ],
)
def test_bad_arguments_are_named(name, change):
    good = {"confidence": torch.zeros(2, 3), "unknown": torch.ones(2, 3, dtype=torch.bool), "count": 1, "seed": 0}
    remask(**good)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        remask(**{**good, **change})
