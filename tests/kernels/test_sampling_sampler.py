"""The loop: counts, in-painting, batches, policies with their exact laws, and parity with Show-o's procedure."""

import itertools
import math

import pytest
import torch

from unif2ace_kernels import _philox
from unif2ace_kernels.sampling import MaskedDiffusionSampler, reference

MASK = 40


def model(hidden=24, codes=40, seed=0):
    """(step_fn giving two branches of hidden states, head): every token sees the mean of its sample."""
    rng = torch.Generator().manual_seed(seed)
    embed, weight = torch.randn(codes + 1, hidden, generator=rng), torch.randn(codes, hidden, generator=rng)
    place = torch.randn(64, hidden, generator=rng)

    def step_fn(ids, step):
        h = embed[ids]
        return (h + h.mean(1, keepdim=True) + place[: ids.shape[1]]) / 2, (h + place[: ids.shape[1]]) / 2

    return step_fn, (weight / 3, torch.randn(codes, generator=rng) / 3)


def run(sampler, ids, **arguments):
    steps = []
    return sampler(ids, callback=steps.append, **arguments), steps


def batch(rows=3, length=48):
    return torch.full((rows, length), MASK)


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "square", "cubic", lambda r: (1 - r) ** 2])
def test_counts_follow_the_schedule(schedule, policy):
    step_fn, head = model()
    ids = batch()
    ids[1, :12], ids[2] = 5, 6
    sampler = MaskedDiffusionSampler(step_fn, 6, MASK, head=head, schedule=schedule, policy=policy, guidance=1.0)
    out, steps = run(sampler, ids, seed=1)
    share = {"cosine": lambda r: math.cos(math.pi * r / 2), "linear": lambda r: 1 - r, "square": lambda r: 1 - r * r,
             "cubic": lambda r: 1 - r**3}.get(schedule, schedule)
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
    assert (out < MASK).all() and len(steps) <= 3
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
    sampler = MaskedDiffusionSampler.showo(
        logits_fn, steps, MASK, guidance=1.75, remask_temperature=temperature
    )
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
    changed = MaskedDiffusionSampler(
        unsure, 5, MASK, known="showo", counts="showo", remask_temperature=50.0
    )(ids)
    assert not torch.equal(changed[0, 10:], ids[0, 10:])


def test_the_confidence_floor_of_showo():
    sampler = MaskedDiffusionSampler(lambda ids, step: None, 2, MASK, remask_temperature=0.0, confidence_floor="showo")
    confidence = torch.tensor([[-60.0, -80.0, -1.0, -0.5]])
    unknown = torch.ones(1, 4, dtype=torch.bool)
    arguments = (0, unknown, torch.tensor([2]), confidence, 0, 0, torch.arange(4).view(1, 4))
    assert sampler._masked(*arguments).tolist() == [[True, False, False, False]]  # floored: equal, so by index
    plain = MaskedDiffusionSampler(lambda ids, step: None, 2, MASK, remask_temperature=0.0)
    assert plain._masked(*arguments).tolist() == [[False, True, False, False]]


def test_one_step_is_the_reference_step():
    step_fn, (weight, bias) = model()
    ids = batch(2)
    ids[1, 3:9] = 2
    branches = torch.nn.functional.linear(torch.stack(step_fn(ids, 0)).double(), weight.double(), bias.double())
    row = torch.arange(96).view(2, 48)
    count = torch.tensor([math.floor(48 * math.cos(math.pi / 8)), math.floor(42 * math.cos(math.pi / 8))])
    sample, mask = reference.step(
        *branches, ids, mask_id=MASK, first_code=4, codes=30, guidance=1.5, temperature=0.9, count=count,
        remask_temperature=2.0 * 3 / 4,
        race=(-_philox.gumbel(_philox.random_words(8, 0, row.view(-1), 30, 0)).double()).exp().view(2, 48, 30),
        noise=_philox.gumbel(_philox.words_at(8, 0, row, 0, _philox.REMASK_STREAM)),
    )
    first = run(
        MaskedDiffusionSampler(step_fn, 4, MASK, head=(weight, bias), guidance=1.5, temperature=0.9,
                               code_range=(4, 34), remask_temperature=2.0), ids, seed=8,
    )[1][0]
    assert torch.equal(first.sample, sample)
    assert torch.equal(first.ids, torch.where(mask, MASK, sample))


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
