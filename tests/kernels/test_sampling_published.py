"""The loop is that of the published procedures: Show-o's, step by step and quirk by quirk, and LLaDA's for texts."""

import math

import pytest
import torch
from sampler_models import MASK, batch, model, run

from unif2ace_kernels import _philox
from unif2ace_kernels.sampling import MaskedDiffusionSampler, reference


def published_showo(logits_fn, ids, steps, guidance, temperature, seed):
    """Show-o's public procedure in float64 over [B, N] ids, its random numbers those of (seed, step, row).

    Yields (ids after re-masking, whole prediction) of each step. The last column of logits is the mask's.
    """
    ids = ids.clone()
    rows, length = ids.shape
    row = torch.arange(ids.numel())
    for step in range(steps):
        cond, uncond = (each.double() for each in logits_fn(ids, step))
        probs = ((1 + guidance) * cond - guidance * uncond).softmax(-1)
        gumbel = _philox.gumbel(_philox.random_words(seed, step, row, MASK, _philox.TOKEN_STREAM)).double()
        sampled = (probs.view(-1, MASK) / (-gumbel).exp()).argmax(-1).view(rows, length)  # torch.multinomial's race
        unknown = ids == MASK
        sampled = torch.where(unknown, sampled, ids)
        ratio = (step + 1) / steps
        mask_ratio = torch.cos(torch.tensor(ratio) * math.pi * 0.5)
        selected = probs.gather(-1, sampled[..., None])[..., 0]
        selected = torch.where(unknown, selected, torch.finfo(torch.float32).max)
        mask_len = (length * mask_ratio).floor()[None]
        mask_len = torch.max(torch.tensor([1]), torch.min(unknown.sum(-1, keepdim=True) - 1, mask_len)).long()
        temperature = temperature * (1.0 - ratio)
        noise = _philox.gumbel(_philox.words_at(seed, step, row, 0, _philox.REMASK_STREAM)).view(rows, length)
        confidence = selected.clamp(min=1e-20).log() + temperature * noise.double()
        cut_off = confidence.sort(-1).values.gather(1, mask_len)
        ids = torch.where(confidence < cut_off, MASK, sampled)
        yield ids, sampled


@pytest.mark.parametrize("temperature", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("steps", [1, 6, 16])
def test_showo_parity_at_every_step(steps, temperature):
    step_fn, (weight, bias) = model()

    def logits_fn(ids, step):
        return tuple(torch.nn.functional.linear(h, 3 * weight, bias) for h in step_fn(ids, step))

    ids = batch(4)
    ids[1, 5:20] = 3  # in-painting
    ids[2] = 7  # a complete row
    ids[3, 1:] = 9  # one unknown token
    sampler = MaskedDiffusionSampler.showo(logits_fn, steps, MASK, guidance=1.75, remask_temperature=temperature)
    out, seen = run(sampler, ids, seed=21)
    expected = list(published_showo(logits_fn, ids, steps, 1.75, temperature, 21))
    assert len(seen) == len(expected) == steps
    for got, (want_ids, want_sample) in zip(seen, expected):
        assert torch.equal(got.sample, want_sample)
        assert torch.equal(got.ids, want_ids)
    assert torch.equal(out, expected[-1][1])
    if temperature and steps > 1:
        assert (seen[0].ids[2] == MASK).sum() == 1  # the quirk: a known token of a complete row is masked


def counts_of(steps, **fields):
    sampler = MaskedDiffusionSampler(lambda ids, step: torch.randn(*ids.shape, 40), steps, MASK, **fields)
    return [(step.ids == MASK).sum(-1)[0].item() for step in run(sampler, batch(1, 48))[1]]


def test_each_quirk_by_its_name():
    assert counts_of(3) == [41, 24, 0]
    assert counts_of(3, counts="showo") == [41, 23, 0]  # cos(pi/3) in float32
    assert counts_of(3, last_step="showo") == [41, 24, 0] and counts_of(3, last_step="showo", counts="showo")[-1] == 1
    sampler = MaskedDiffusionSampler(lambda ids, step: None, 4, MASK, remask_temperature=2.0)
    assert [sampler.noise_temperature(s) for s in range(4)] == [1.5, 1.0, 0.5, 0.0]
    sampler = MaskedDiffusionSampler(lambda ids, step: None, 4, MASK, remask_temperature=2.0, temperature_mode="showo")
    assert [sampler.noise_temperature(s) for s in range(4)] == [1.5, 0.75, 0.1875, 0.0]

    def sure(ids, step):  # equal confidences everywhere, all below the floor or all certain
        return torch.zeros(*ids.shape, 40).index_fill_(-1, torch.tensor([3]), 200.0)

    tied = MaskedDiffusionSampler(sure, 3, MASK, remask_temperature=0.0, ties="showo")
    assert (run(tied, batch(1))[1][0].ids != MASK).all()

    def unsure(ids, step):  # code 0 is drawn with probability one, then banned codes rank by their floor
        logits = torch.zeros(*ids.shape, 2)
        logits[..., 1] = 100.0 + torch.arange(ids.shape[1])
        return logits

    ids = batch(1)
    ids[0, 10:] = 4
    finished = MaskedDiffusionSampler(unsure, 5, MASK, known="keep", remask_temperature=50.0)(ids)
    assert torch.equal(finished[0, 10:], ids[0, 10:])
    changed = MaskedDiffusionSampler(unsure, 5, MASK, known="showo", counts="showo", remask_temperature=50.0)(ids)
    assert not torch.equal(changed[0, 10:], ids[0, 10:])


def test_the_confidence_floor_of_showo():
    sampler = MaskedDiffusionSampler(lambda ids, step: None, 2, MASK, remask_temperature=0.0, confidence_floor="showo")
    confidence = torch.tensor([[-60.0, -80.0, -1.0, -0.5]])
    unknown = torch.ones(1, 4, dtype=torch.bool)

    def masked(sampler):
        run = sampler.begin(torch.full((1, 4), MASK), None, 0, 0)._replace(at_start=torch.tensor([2]))
        return sampler._masked(0, unknown, confidence, run).tolist()

    assert masked(sampler) == [[True, False, False, False]]  # floored: equal, so by index
    plain = MaskedDiffusionSampler(lambda ids, step: None, 2, MASK, remask_temperature=0.0)
    assert masked(plain) == [[False, True, False, False]]


def test_one_step_is_the_reference_step():
    step_fn, (weight, bias) = model()
    ids = batch(2)
    ids[1, 3:9] = 2
    branches = torch.nn.functional.linear(torch.stack(step_fn(ids, 0)).double(), weight.double(), bias.double())
    row = torch.arange(96).view(2, 48)
    count = torch.tensor([math.floor(48 * math.cos(math.pi / 8)), math.floor(42 * math.cos(math.pi / 8))])
    sample, mask = reference.step(
        *branches,
        ids,
        mask_id=MASK,
        first_code=4,
        codes=30,
        guidance=1.5,
        temperature=0.9,
        count=count,
        remask_temperature=2.0 * 3 / 4,
        race=(-_philox.gumbel(_philox.random_words(8, 0, row.view(-1), 30, 0)).double()).exp().view(2, 48, 30),
        noise=_philox.gumbel(_philox.words_at(8, 0, row, 0, _philox.REMASK_STREAM)),
    )
    first = run(
        MaskedDiffusionSampler(
            step_fn,
            4,
            MASK,
            head=(weight, bias),
            guidance=1.5,
            temperature=0.9,
            code_range=(4, 34),
            remask_temperature=2.0,
        ),
        ids,
        seed=8,
    )[1][0]
    assert torch.equal(first.sample, sample)
    assert torch.equal(first.ids, torch.where(mask, MASK, sample))


# ------------------------------------------------------------------------------------ texts, as LLaDA and Dream do it


def text_model(vocabulary=30, hidden=16, longest=24, seed=2):
    """Logits [B, N, vocabulary] of a bidirectional text model: a token sees its neighbours and where it is."""
    rng = torch.Generator().manual_seed(seed)
    embed, place = torch.randn(vocabulary + 2, hidden, generator=rng), torch.randn(longest, hidden, generator=rng)
    out = torch.randn(hidden, vocabulary, generator=rng) / 2

    def step_fn(ids, step):
        h = embed[ids]
        h = h + h.roll(1, 1) + h.roll(-1, 1) + place[: ids.shape[1]]
        return (h.tanh() @ out).double()

    return step_fn


TEXT_PAD, TEXT_MASK = 30, 31


def texts():
    """Prompts of 3, 5 and 2 tokens, answers of 12, 8 and 16 to be written, padding after them."""
    ids = torch.full((3, 24), TEXT_PAD)
    for row, (prompt, answer) in enumerate(((3, 12), (5, 8), (2, 16))):
        ids[row, :prompt], ids[row, prompt : prompt + answer] = 7 + row, TEXT_MASK
    return ids


def published_llada(step_fn, ids, steps):
    """LLaDA's `generate` in one block, greedy, low-confidence remasking, by row: an equal number of tokens a step."""
    ids = ids.clone()
    transfer = (ids == TEXT_MASK).sum(-1) // steps
    for step in range(steps):
        probabilities = step_fn(ids, step).softmax(-1)
        confidence, drawn = probabilities.max(-1)
        confidence = torch.where(ids == TEXT_MASK, confidence, -math.inf)
        for row in range(len(ids)):
            chosen = confidence[row].topk(int(transfer[row])).indices
            ids[row, chosen] = drawn[row, chosen]
        yield ids.clone()


def test_a_text_model_writes_answers_of_several_lengths_as_llada_does():
    sampler = MaskedDiffusionSampler(
        text_model(), 4, TEXT_MASK, schedule="linear", temperature=0.0, remask_temperature=0.0
    )
    out, steps = run(sampler, texts())
    want = list(published_llada(text_model(), texts(), 4))
    assert all(torch.equal(step.ids, ids) for step, ids in zip(steps, want, strict=True))
    assert torch.equal(out, want[-1]) and torch.equal(out[texts() != TEXT_MASK], texts()[texts() != TEXT_MASK])


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin", "random"])
def test_a_text_does_not_depend_on_its_padding_or_its_neighbours(policy):
    def step_fn(ids, step):  # a model that does not look at padding
        return text_model()(ids.masked_fill(ids == TEXT_PAD, 0), step)

    sampler = MaskedDiffusionSampler(step_fn, 5, TEXT_MASK, policy=policy, temperature=0.7, top_p=0.9)
    rows = torch.arange(72).view(3, 24)
    whole = sampler(texts(), seed=3, rows=rows)
    assert torch.equal(sampler(texts()[1:2], seed=3, rows=rows[1:2])[0], whole[1])


def test_block_by_block_with_a_token_that_stands_for_later_blocks():
    """Semi-autoregressive decoding: what a later block holds is masked to the model, but not to be drawn yet."""
    later = 99
    seen = []

    def step_fn(ids, step):
        seen.append((ids == later).sum().item())
        return text_model()(ids.masked_fill(ids == later, TEXT_MASK), step)

    sampler = MaskedDiffusionSampler(step_fn, 4, TEXT_MASK, schedule="linear", remask_temperature=0.0)
    ids = torch.full((2, 24), later)
    ids[:, :4] = 9
    for block, start in enumerate(range(4, 24, 10)):
        ids[:, start : start + 10] = TEXT_MASK
        ids = sampler(ids, seed=1, offset=4 * block)
    assert (ids < 30).all() and (ids[:, :4] == 9).all() and seen[0] == 20 and seen[-1] == 0
