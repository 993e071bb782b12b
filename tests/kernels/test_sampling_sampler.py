"""The loop: counts, in-painting, batches, and policies with their exact laws."""

import itertools
import math

import pytest
import torch
from sampler_models import MASK, batch, model, run

from unif2ace_kernels.sampling import MaskedDiffusionSampler


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "square", "cubic", lambda r: (1 - r) ** 2])
def test_counts_follow_the_schedule(schedule, policy):
    step_fn, head = model()
    ids = batch()
    ids[1, :12], ids[2] = 5, 6
    sampler = MaskedDiffusionSampler(step_fn, 6, MASK, head=head, schedule=schedule, policy=policy, guidance=1.0)
    out, steps = run(sampler, ids, seed=1)
    share = {
        "cosine": lambda r: math.cos(math.pi * r / 2),
        "linear": lambda r: 1 - r,
        "square": lambda r: 1 - r * r,
        "cubic": lambda r: 1 - r**3,
    }.get(schedule, schedule)
    want = [[math.floor(m * share((s + 1) / 6) + 1e-6) for m in (48, 36, 0)] for s in range(6)]
    assert [(step.ids == MASK).sum(-1).tolist() for step in steps] == want
    assert (out < MASK).all() and (ids[0] == MASK).all()
    assert torch.equal(out[1, :12], ids[1, :12]) and torch.equal(out[2], ids[2])
    for before, after in itertools.pairwise(steps):
        kept = before.ids != MASK
        assert torch.equal(after.ids[kept], before.ids[kept]) and (after.confidence[kept] == math.inf).all()
        assert (after.sample != MASK).all()


def test_what_is_least_sure_is_masked_again():
    step_fn, head = model()
    for policy in ("confidence", "entropy", "margin"):
        sampler = MaskedDiffusionSampler(step_fn, 4, MASK, head=head, policy=policy, remask_temperature=0.0)
        for step in run(sampler, batch())[1][:-1]:
            masked = step.ids == MASK
            for b in range(3):
                assert step.confidence[b][masked[b]].max() <= step.confidence[b][~masked[b]].min()


def test_more_steps_than_tokens_end_early_and_one_step_is_one_draw():
    step_fn, head = model()
    few = batch(2, 3)
    out, steps = run(MaskedDiffusionSampler(step_fn, 50, MASK, head=head), few)
    assert (out < MASK).all()
    left = [few, *(step.ids for step in steps)]
    left = [(ids == MASK).sum(1).amax().item() for ids in left]
    assert left == list(range(left[0], -1, -1))  # a step draws one at least, whatever the schedule says
    out, steps = run(MaskedDiffusionSampler(step_fn, 1, MASK, head=head), few)
    assert len(steps) == 1 and torch.equal(out, steps[0].sample) and torch.equal(out, steps[0].ids)
    full = torch.zeros(2, 3, dtype=torch.int64)
    out, steps = run(MaskedDiffusionSampler(step_fn, 5, MASK, head=head), full)
    assert torch.equal(out, full) and steps == [] and out.data_ptr() != full.data_ptr()


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin", "random"])
def test_a_sample_does_not_depend_on_its_batch(policy):
    step_fn, head = model()
    sampler = MaskedDiffusionSampler(step_fn, 7, MASK, head=head, policy=policy, guidance=0.5)
    rows = torch.arange(3 * 48).view(3, 48)
    whole = sampler(batch(), seed=9, offset=100)
    assert torch.equal(whole, sampler(batch(), seed=torch.tensor(9), offset=torch.tensor(100)))
    for b in range(3):
        assert torch.equal(sampler(batch(1), seed=9, offset=100, rows=rows[b : b + 1])[0], whole[b])
    assert not torch.equal(sampler(batch(), seed=10, offset=100), whole)
    assert not torch.equal(whole[0], whole[1])


def test_hidden_states_and_logits_give_one_sample():
    step_fn, (weight, bias) = model()

    def logits_fn(ids, step):
        return tuple(torch.nn.functional.linear(h.double(), weight.double(), bias.double()) for h in step_fn(ids, step))

    def hidden_fn(ids, step):
        return tuple(h.double() for h in step_fn(ids, step))

    options = {"guidance": 2.0, "top_k": 9, "code_range": (3, 38)}
    head = (weight.double(), bias.double())
    left = MaskedDiffusionSampler(hidden_fn, 5, MASK, head=head, **options)(batch(), seed=2)
    assert torch.equal(left, MaskedDiffusionSampler(logits_fn, 5, MASK, **options)(batch(), seed=2))
    assert left.min() >= 3 and left.max() < 38


CODES, PLACES, FORGET = 3, 3, 3  # the tiny model: 3 places, 3 codes, FORGET stands for a masked place


def tiny_model():
    """Logits [4, 4, 4, places, codes] for every state, and its conditional probabilities."""
    logits = 1.5 * torch.randn(4, 4, 4, PLACES, CODES, generator=torch.Generator().manual_seed(5))
    return logits, logits.double().softmax(-1)


def p_value_of(samples, law):
    """Upper tail of chi-square of samples [n, places] against law {outcome: probability}, rare outcomes pooled."""
    assert abs(sum(law.values()) - 1) < 1e-9
    outcomes = list(itertools.product(range(CODES), repeat=PLACES))
    counts = (samples @ torch.tensor([9, 3, 1])).bincount(minlength=27).double()
    expected = torch.tensor([law.get(each, 0.0) for each in outcomes]).double() * len(samples)
    often = expected >= 5
    if not often.all():
        counts, expected = (torch.cat([each[often], each[~often].sum()[None]]) for each in (counts, expected))
    assert len(counts) > 20 and expected.min() > 1
    half_statistic = ((counts - expected) ** 2 / expected).sum() / 2
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0).double(), half_statistic).item()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_random_policy_is_the_reverse_process_of_absorbing_diffusion(schedule):
    logits, table = tiny_model()
    steps = 3
    share = [math.cos(math.pi * s / 6) if schedule == "cosine" else 1 - s / 3 for s in range(4)]
    law: dict[tuple, float] = {}
    # Each place is revealed at step s with probability m(s) - m(s+1); within a step places are independent.
    for times in itertools.product(range(steps), repeat=PLACES):
        chance = math.prod(share[s] - (share[s + 1] if s + 1 < steps else 0.0) for s in times)
        for outcome in itertools.product(range(CODES), repeat=PLACES):
            probability = chance
            for place, time in enumerate(times):
                state = tuple(outcome[other] if times[other] < time else FORGET for other in range(PLACES))
                probability *= table[state][place, outcome[place]].item()
            law[outcome] = law.get(outcome, 0.0) + probability
    sampler = MaskedDiffusionSampler(
        lambda ids, step: logits[ids[:, 0], ids[:, 1], ids[:, 2]], steps, FORGET, schedule=schedule, policy="random"
    )
    samples = sampler(torch.full((60000, PLACES), FORGET), seed=1)
    assert 1e-3 < p_value_of(samples, law) < 1 - 1e-3


def test_confidence_policy_without_noise_has_its_exact_law():
    logits, table = tiny_model()
    counts = [2, 1, 0]  # floor(3 cos(pi s / 6)) is 2, 1, 0

    def law_from(state, step):
        """{outcome: probability}: draw every masked place, mask the counts[step] least likely again."""
        unknown = [place for place in range(PLACES) if state[place] == FORGET]
        law: dict[tuple, float] = {}
        for codes in itertools.product(range(CODES), repeat=len(unknown)):
            p = {place: table[state][place, code].item() for place, code in zip(unknown, codes)}
            filled = list(state)
            for place, code in zip(unknown, codes):
                filled[place] = code
            for place in sorted(unknown, key=lambda each: (p[each], each))[: counts[step]]:
                filled[place] = FORGET
            after = {tuple(filled): 1.0} if step == 2 else law_from(tuple(filled), step + 1)
            for outcome, probability in after.items():
                law[outcome] = law.get(outcome, 0.0) + math.prod(p.values()) * probability
        return law

    sampler = MaskedDiffusionSampler(
        lambda ids, step: logits[ids[:, 0], ids[:, 1], ids[:, 2]], 3, FORGET, remask_temperature=0.0
    )
    samples = sampler(torch.full((60000, PLACES), FORGET), seed=4)
    assert 1e-3 < p_value_of(samples, law_from((FORGET,) * PLACES, 0)) < 1 - 1e-3


def test_a_model_without_a_distribution_is_an_error():
    sampler = MaskedDiffusionSampler(lambda ids, step: torch.full((*ids.shape, 40), math.nan), 3, MASK)
    with pytest.raises(ValueError, match="^step_fn: expected"):
        sampler(batch())


@pytest.mark.parametrize(
    "name, change",
    [
        ("steps", {"steps": 0}),
        ("schedule", {"schedule": "sine"}),
        ("policy", {"policy": "best"}),
        ("temperature_mode", {"temperature_mode": "linear"}),
        ("ties", {"ties": "random"}),
        ("known", {"known": "forget"}),
        ("counts", {"counts": "float"}),
        ("last_step", {"last_step": "mask"}),
        ("confidence_floor", {"confidence_floor": 0.0}),
        ("remask_temperature", {"remask_temperature": -1.0}),
    ],
)
def test_bad_fields_are_named(name, change):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        MaskedDiffusionSampler(**{"step_fn": lambda ids, step: None, "steps": 2, "mask_id": 0, **change})


def test_bad_ids_are_named():
    sampler = MaskedDiffusionSampler(lambda ids, step: None, 2, MASK)
    for ids in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="^ids: expected"):
            sampler(ids)
