"""The loop: counts, in-painting, batches, policies with their exact laws, and parity with Show-o's procedure."""

import functools
import itertools
import math

import pytest
import torch

from unif2ace_kernels import _philox
from unif2ace_kernels.sampling import MaskedDiffusionSampler, draw_torch, reference

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


# ------------------------------------------------------------------------------------------------- steps on a device


SETTINGS = {
    "default": {},
    "entropy": {"policy": "entropy"},
    "margin": {"policy": "margin"},
    "random": {"policy": "random"},
    "Show-o": dict.fromkeys(("temperature_mode", "ties", "known", "counts", "last_step", "confidence_floor"), "showo"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_number_on_the_device_is_the_step(settings):
    step_fn, head = model()
    sampler = MaskedDiffusionSampler(lambda ids, step: step_fn(ids, 0), 5, MASK, head=head, guidance=1.0, **settings)
    ids = batch()
    ids[1, 5:20] = 3
    numbered, steps = run(sampler, ids, seed=4, offset=9)
    tables = sampler.begin(ids, None, 4, 9)
    for step, want in enumerate(steps):
        ids, sample, confidence = sampler.advance(ids, torch.tensor(step), tables)
        assert torch.equal(ids, want.ids) and torch.equal(sample, want.sample)
        assert torch.equal(confidence, want.confidence)
    assert torch.equal(sample, numbered)


class NothingOnTheHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor of the host takes part: on a GPU it would be copied there, which no graph can hold.

    torch.tensor and torch.as_tensor copy too, and show no op of it.
    """

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in ("tensor", "as_tensor"):
            self._patch.setattr(torch, name, functools.partial(self._refuse, name))
        return super().__enter__()

    def __exit__(self, *args):
        self._patch.undo()
        return super().__exit__(*args)

    @staticmethod
    def _refuse(name, *args, **kwargs):
        raise AssertionError(f"torch.{name} copies from the host")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            assert not (isinstance(each, torch.Tensor) and each.device.type == "cpu"), func
        return out


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_reads_nothing_from_the_device_and_copies_nothing_to_it(settings, head):
    """Tensors of the device "meta" have no data: what reads one, or asks how many are masked, raises."""
    weight = torch.empty(40, 24, device="meta"), torch.empty(40, device="meta")

    def step_fn(ids, step):
        return tuple(torch.empty(*ids.shape, 24 if head else 40, device="meta") for _ in range(2))

    sampler = MaskedDiffusionSampler(
        step_fn, 5, MASK, head=weight if head else None, guidance=1.0, top_p=0.9, **settings
    )
    tables = sampler.begin(batch(), None, 4, 9)
    tables = type(tables)(*(each.to("meta") for each in tables))
    start = batch().to("meta")
    for step in (1, torch.empty((), dtype=torch.int64, device="meta")):
        with NothingOnTheHost():
            ids, sample, confidence = sampler.advance(start, step, tables)
        assert ids.shape == sample.shape == confidence.shape == (3, 48)


@pytest.mark.parametrize("ties", ["index", "showo"])
def test_the_torch_ops_neither_read_nor_copy(ties):
    """As above for the op bodies, which run on a GPU where no kernel does."""
    on_meta = {"device": "meta"}
    ids, words = torch.empty(6, dtype=torch.int64, **on_meta), [torch.empty((), dtype=torch.int64, **on_meta)] * 2
    unknown, logits = torch.empty(6, dtype=torch.bool, **on_meta), torch.empty(2, 6, 9, **on_meta)
    draw = (0.7, 3, 0.9, "log_prob")
    with NothingOnTheHost():
        draw_torch.draw(*logits, ids, *words, 1.5, *draw)
        draw_torch.sample_logits(*logits, ids, unknown, ids, *words, 1, 7, 1.5, *draw, True)
        head = torch.empty(9, 4, **on_meta), torch.empty(9, **on_meta)
        draw_torch.sample_hidden(*logits[..., :4], *head, ids, unknown, ids, *words, 1, 7, 1.5, *draw, True)
        pairs = [each.view(2, 3) for each in (logits[0, :, 0].contiguous(), unknown, ids)]
        temperature, count = torch.empty((), **on_meta), torch.empty(2, dtype=torch.int64, **on_meta)
        draw_torch.remask(*pairs[:2], count, pairs[2], *words, temperature, ties)


def test_a_loop_that_must_end_early_knows_it_without_looking():
    def sampler(**fields):
        return MaskedDiffusionSampler(lambda ids, step: None, 50, MASK, **fields)

    assert sampler().steps_at_most(3) == 3 and sampler().steps_at_most(1) == 1
    assert sampler(policy="random").steps_at_most(3) == sampler(known="showo").steps_at_most(3) == 50
    assert MaskedDiffusionSampler(lambda ids, step: None, 4, MASK).steps_at_most(48) == 4


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match="^cuda_graph: expected False .* got True on cpu"):
        MaskedDiffusionSampler(lambda ids, step: None, 2, MASK, cuda_graph=True)(batch())


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def cuda_sampler(**settings):
    """Its model reads no tensor of the host."""
    rng = torch.Generator().manual_seed(0)
    embed, place, weight = (torch.randn(size, 24, generator=rng).cuda() for size in (41, 48, 40))

    def step_fn(ids, step):
        h = embed[ids] + place
        return h + h.mean(1, keepdim=True), h

    return MaskedDiffusionSampler(step_fn, 6, MASK, head=(weight / 3, weight[:, 0] + 0), guidance=1.0, **settings)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_on_cuda_no_step_waits_and_a_graph_is_the_loop(settings):
    eager, graph = cuda_sampler(**settings), cuda_sampler(**settings, cuda_graph=True)
    ids = batch().cuda()
    ids[1, 5:20] = 3
    tables = eager.begin(ids, None, 4, 9)
    eager.advance(ids, 0, tables)  # what compiles or loads does so here
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        state = ids
        for step in range(6):
            state, sample, _ = eager.advance(state, step, tables)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, steps = run(eager, ids, seed=4, offset=9)
    assert torch.equal(sample, want)
    got, replayed = run(graph, ids, seed=4, offset=9)
    assert torch.equal(got, want)
    for left, right in zip(replayed, steps, strict=True):
        assert torch.equal(left.ids, right.ids) and torch.equal(left.confidence, right.confidence)
    # The same graph for another seed, other known tokens and other rows.
    others = torch.full_like(ids, MASK)
    rows = torch.arange(1000, 1000 + ids.numel(), device="cuda").view(ids.shape)
    arguments = {"seed": torch.tensor(77, device="cuda"), "offset": 3, "rows": rows}
    assert torch.equal(graph(others, **arguments), eager(others, **arguments))
    assert len(graph._graphs) == 1
    assert torch.equal(graph(ids[:1], seed=4), eager(ids[:1], seed=4)) and len(graph._graphs) == 2


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_the_ids_are_those_of_the_cpu():
    logits = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(6))

    def sample(device):
        on_device = logits.to(device)
        sampler = MaskedDiffusionSampler(
            lambda ids, step: tuple(on_device), 6, MASK, guidance=1.5, policy="random", top_p=0.9
        )
        return sampler(batch().to(device), seed=12).cpu()

    assert torch.equal(sample("cuda"), sample("cpu"))


@pytest.mark.gpu
@needs_cuda
def test_a_step_function_that_waits_cannot_be_captured():
    def waits(ids, step):
        return torch.zeros(*ids.shape, 40, device="cuda") + float((ids == MASK).sum())

    with pytest.raises(ValueError, match="^step_fn: expected one that a CUDA graph can hold"):
        MaskedDiffusionSampler(waits, 3, MASK, cuda_graph=True)(batch().cuda())
    assert MaskedDiffusionSampler(waits, 3, MASK)(batch().cuda()).shape == (3, 48)
