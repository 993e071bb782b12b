"""The D3Diff losses and the noise on any shape, layout and value, against the written-out truth in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from values import EXTRAORDINARY, assert_as_good, dtypes, generator, laid_out, layouts, ordinary, seeds, values

from unif2ace_kernels import _philox, d3diff
from unif2ace_kernels.d3diff import reference

pytestmark = pytest.mark.usefixtures("implementation")
IGNORED = -100
SCHEDULES = ("cosine", "log_linear", "linear", "arccos")


@st.composite
def objectives(draw, vocabulary):
    """Keyword arguments of an `Objective` over a head of `vocabulary` columns."""
    start = draw(st.integers(0, vocabulary - 1))
    score = draw(st.sampled_from(d3diff.READINGS))
    return {
        "code_range": (start, draw(st.integers(start + 1, vocabulary))),
        "alpha": draw(st.sampled_from([0.0, 0.01, 0.5])),
        "ce_coef": draw(st.sampled_from([0.0, 1.0, 0.7])),
        "score": score,
        "schedule": draw(st.sampled_from(SCHEDULES)),
        "score_reduction": draw(st.sampled_from(["sum_per_sample", "token_mean"])),
        "normalizer": draw(st.sampled_from(["slice", "full"])),
        "log_scale": draw(st.sampled_from([None, 0.4])),
        "bayes_sigma": draw(st.booleans()),
    }


@st.composite
def problems(draw, values_of=ordinary):
    """(hidden [T, D], weight, bias, targets [T], mask_prob [B], sample_id [T], objective's options), float64."""
    rng = generator(draw(seeds))
    rows, samples = draw(st.integers(1, 13)), draw(st.integers(1, 4))
    hidden_size, vocabulary = draw(st.sampled_from([1, 2, 5, 8])), draw(st.sampled_from([1, 2, 7, 16, 33]))
    options = draw(objectives(vocabulary))
    objective = d3diff.Objective(**options)
    kind = draw(values_of)
    hidden = values(rng, (rows, hidden_size), kind)
    weight = values(rng, (vocabulary, hidden_size), draw(values_of))
    bias = values(rng, (vocabulary,)) if draw(st.booleans()) else None
    targets = torch.randint(*objective.target_range(vocabulary), (rows,), generator=rng)
    targets[torch.rand(rows, generator=rng) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = IGNORED
    sample_id = torch.randint(samples, (rows,), generator=rng).sort().values
    mask_prob = torch.rand(samples, dtype=torch.float64, generator=rng) * 0.9 + 0.05
    return hidden, weight, bias, targets, mask_prob, sample_id, options


def truth(logits, targets, mask_prob, sample_id, options):
    """The written-out loss of the labelled rows, constants kept; 0 without any."""
    options = dict(options)
    score, schedule = options.pop("score"), options.pop("schedule")
    log_scale, bayes_sigma = options.pop("log_scale"), options.pop("bayes_sigma")
    rows = targets != IGNORED
    if not rows.any():
        return logits.sum() * 0
    sigma = d3diff.schedule(schedule).score_weight(mask_prob) / d3diff.ratio(mask_prob)
    sigma = None if score == "bayes" and not bayes_sigma else sigma
    scale = None
    if score in ("unnormalized", "full_vocab") and log_scale is not None:
        scale = d3diff.ratio(mask_prob) * math.exp(log_scale)
    return reference.d3diff_loss(
        logits[rows], targets[rows], mask_prob, sample_id[rows], sigma=sigma, reading=score, scale=scale,
        full_normalizer=options.pop("normalizer") == "full", reduction=options.pop("score_reduction"), **options,
    )  # fmt: skip


def run(function, dtype, hidden, weight, bias, where=lambda each: each):
    """(value, stats or None, gradients of hidden, weight and bias), computed in `dtype`."""
    leaves = [None if e is None else where(e.to(dtype)).detach().requires_grad_() for e in (hidden, weight, bias)]
    value, stats = function(*leaves)
    present = [each for each in leaves if each is not None]
    got = torch.autograd.grad(value, present, allow_unused=True)
    return value, stats, [torch.zeros_like(e) if g is None else g for g, e in zip(got, present, strict=True)]


def compare(ours, written_out, options, dtype, hidden, weight, bias, where):
    """Loss (with its constant) and gradients by the rule of twice the peer's error."""
    logits = hidden if weight is None else hidden @ weight.t() + (0 if bias is None else bias)
    assume(not logits.numel() or logits.max() - logits.min() < 700)  # beyond, the truth's probabilities are denormal
    if dtype == torch.float16 and options.get("score") == "unnormalized":
        assume(not logits.numel() or logits.max() + (options["log_scale"] or 0) < 8)  # e^u has to fit, not alpha e^u
    problem = [None if each is None else each.to(dtype) for each in (hidden, weight, bias)]
    value, stats, gradients = run(ours, dtype, *problem, where)
    peer, _, peer_gradients = run(written_out, dtype, *problem)
    exact, _, exact_gradients = run(written_out, torch.float64, *problem)
    largest = [1.0 if each is None else 1 + each.abs().max().item() for each in (hidden, weight, bias)]
    size = max(largest) if weight is None else math.prod(largest) * hidden.shape[-1]  # of logits, that round
    assume(exact.isfinite() and exact.abs() < 1e4 and peer.isfinite())  # e^z of "unnormalized" is all there is beyond
    size *= max(1.0, exact.abs().item())  # e^u of "unnormalized" is off by as much, relatively, as u absolutely
    constant = options["alpha"] * stats.score_constant  # may cancel most of the loss
    assert_as_good(value + constant, peer, exact, "loss", dtype=dtype, size=max(size, constant.abs().item()))
    for name, g, p, e in zip(("hidden", "weight", "bias"), gradients, peer_gradients, exact_gradients):
        assume(p.isfinite().all())
        assert g.dtype == dtype
        assert_as_good(g, p, e, name, dtype=dtype, size=size * max(largest))


@given(problems(), dtypes, layouts)
def test_loss_is_the_reference(problem, dtype, layout):
    hidden, weight, bias, targets, mask_prob, sample_id, options = problem
    where = lambda each: laid_out(each, "contiguous" if layout == "expanded" else layout)  # noqa: E731

    def ours(hidden, weight, bias):
        return d3diff.loss(hidden, weight, bias, where(targets), where(mask_prob), where(sample_id), **options)

    def written_out(hidden, weight, bias):
        logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
        return truth(logits, targets, mask_prob, sample_id, options), None

    compare(ours, written_out, options, dtype, hidden, weight, bias, where)


@given(problems(), dtypes, layouts)
def test_loss_from_logits_is_the_reference(problem, dtype, layout):
    hidden, weight, _, targets, mask_prob, sample_id, options = problem
    logits = hidden @ weight.t()
    where = lambda each: laid_out(each, "contiguous" if layout == "expanded" else layout)  # noqa: E731

    def ours(logits, *_):
        return d3diff.loss_from_logits(logits, where(targets), where(mask_prob), where(sample_id), **options)

    def written_out(logits, *_):
        return truth(logits, targets, mask_prob, sample_id, options), None

    compare(ours, written_out, options, dtype, logits, None, None, where)


@given(problems(), dtypes, layouts, st.data())
def test_joint_loss_is_the_sum_of_its_tasks(problem, dtype, layout, data):
    hidden, weight, bias, targets, mask_prob, sample_id, options = problem
    rng, vocabulary = generator(data.draw(seeds)), len(weight)
    is_image = torch.rand(len(hidden), generator=rng) < 0.5
    labels = torch.randint(vocabulary, (len(hidden),), generator=rng).where(targets != IGNORED, IGNORED)
    targets = torch.where(is_image, targets, labels)
    sample_id = torch.where(is_image, sample_id, 10**6)
    where = lambda each: laid_out(each, "contiguous" if layout == "expanded" else layout)  # noqa: E731

    def ours(hidden, weight, bias):
        value, stats = d3diff.joint_loss(
            hidden, weight, bias, where(targets), where(is_image), mask_prob, where(sample_id), image_coef=0.5,
            text_coef=0.25, **options,
        )  # fmt: skip
        return value + (0.5 - 1) * options["alpha"] * stats.image.score_constant, stats.image

    def written_out(hidden, weight, bias):
        logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
        image = truth(logits, targets.where(is_image, IGNORED), mask_prob, sample_id.where(is_image, 0), options)
        text = ~is_image & (targets != IGNORED)
        plain = reference.cross_entropy(logits[text], targets[text], (0, vocabulary), True)
        return 0.5 * image + 0.25 * (plain.mean() if len(plain) else plain.sum()), None

    compare(ours, written_out, options, dtype, hidden, weight, bias, where)


@given(problems(), dtypes, st.integers(1, 4), st.booleans())
def test_next_token_loss_is_the_reference(problem, dtype, batch, shift):
    hidden, weight, bias, targets, *_ = problem
    rows = len(hidden) // batch * batch
    assume(rows > 0)
    hidden, targets = hidden[:rows].view(batch, -1, hidden.shape[1]), targets[:rows].view(batch, -1)
    after = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], 1) if shift else targets

    def ours(hidden, weight, bias):
        return d3diff.next_token_loss(hidden, weight, bias, targets, shift=shift)

    def written_out(hidden, weight, bias):
        logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
        labelled = after != IGNORED
        plain = reference.cross_entropy(logits[labelled], after[labelled], (0, len(weight)), True)
        return plain.mean() if len(plain) else plain.sum(), None

    compare(ours, written_out, {"alpha": 0.0}, dtype, hidden, weight, bias, lambda each: each)


@given(problems(st.sampled_from(EXTRAORDINARY + ("wide", "normal"))), dtypes)
def test_extraordinary_values_are_told_or_propagate(problem, dtype):
    """A row of -inf alone is refused by name; anything else gives a number, or NaN or inf, and no NaN from nowhere."""
    hidden, weight, bias, targets, mask_prob, sample_id, options = problem
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = targets != IGNORED
    for function, inputs in (
        (d3diff.loss, (hidden, weight, bias)),
        (d3diff.loss_from_logits, (hidden @ weight.t() if bias is None else hidden @ weight.t() + bias,)),
    ):
        leaves = [None if each is None else each.detach().requires_grad_() for each in inputs]
        try:
            value, stats = function(*leaves, targets, mask_prob, sample_id, **options)
        except ValueError as error:
            assert str(error).startswith("logits: expected a logit above -inf")
            continue
        value.backward()
        assert stats.masked_count == rows.sum() and 0 <= stats.accuracy <= 1
        if not rows.any():
            assert value == 0
        # Rows without a label are not read: their gradient is 0 whatever they hold.
        if function is d3diff.loss_from_logits or hidden.isfinite().all():
            assert (leaves[0].grad[~rows] == 0).all()


@given(
    st.integers(0, 5), st.sampled_from([0, 1, 2, 5, 16, 33, 100]), st.booleans(), st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1), st.integers(0, 2**31), dtypes, layouts, seeds,
)  # fmt: skip
def test_noise_masks_as_many_as_it_should(batch, length, exact, seed, offset, first_row, dtype, layout, values_seed):
    rng = generator(values_seed)
    tokens = laid_out(torch.randint(-5, 50, (batch, length), generator=rng), layout)
    mask_prob = (torch.rand(batch, dtype=torch.float64, generator=rng) * 0.999 + 1e-3).to(dtype).clamp(max=1)
    options = {"exact_count": exact, "seed": seed, "offset": offset, "first_row": first_row}
    noised, mask = d3diff.noise(tokens, laid_out(mask_prob, "every second"), 77, **options)
    assert torch.equal(noised, torch.where(mask, 77, tokens))
    words = _philox.random_words(seed, offset, torch.arange(first_row, first_row + batch), length, 2)
    for row in range(batch):
        want = [False] * length
        if exact and length:
            wide = mask_prob[row].to(torch.promote_types(dtype, torch.float32))
            count = min(max(round((length * wide).item()), 1), length)
            order = sorted(range(length), key=lambda n: (words[row, n].item() << 31) | n)
            for place in order[:count]:
                want[place] = True
        elif not exact:
            want = ((words[row].double() + 0.5) * 2.0**-32 < mask_prob[row].double()).tolist()
        assert mask[row].tolist() == want
    if batch > 1:
        part = d3diff.noise(tokens[1:], mask_prob[1:], 77, **{**options, "first_row": first_row + 1})
        assert torch.equal(part[1], mask[1:])


GOOD = {
    "hidden": torch.randn(4, 3),
    "weight": torch.randn(6, 3),
    "bias": torch.randn(6),
    "targets": torch.tensor([1, 4, IGNORED, 2]),
    "mask_prob": torch.tensor([0.5, 1.0]),
    "sample_id": torch.tensor([0, 0, 1, 1]),
    "code_range": (1, 5),
}
NAN = math.nan
BAD = {
    "hidden": [torch.randn(4), torch.randn(4, 2), torch.randn(5, 3), torch.randint(3, (4, 3)), torch.randn(0, 3), None],
    "weight": [torch.randn(6, 2), torch.randn(6), torch.randint(3, (6, 3)), torch.randn(4, 3), None],
    "bias": [torch.randn(5), torch.randn(6, 1), torch.zeros(6).long(), 0.5],
    "targets": [torch.tensor([1, 4, 5, 2]), torch.tensor([0, 1, 1, 1]), torch.tensor([-1, 1, 1, 1]),
                torch.tensor([2**40, 1, 1, 1]), torch.ones(4), torch.ones(3).long(), None],
    "mask_prob": [torch.tensor([0.5, 0.0]), torch.tensor([0.5, -0.1]), torch.tensor([1.1, 0.5]),
                  torch.tensor([NAN, 0.5]), torch.tensor([0.5]), torch.tensor([1, 1]), torch.ones(2, 1),
                  torch.ones(0), None],
    "sample_id": [torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 2]), torch.tensor([-1, 0, 1, 1]),
                  torch.zeros(4), torch.zeros(3).long(), None],
    "code_range": [(1, 7), (3, 3), (-1, 4), (4, 2), (5, 6)],
}  # fmt: skip


@given(st.sampled_from(sorted(BAD)), st.data())
def test_loss_names_what_is_wrong(argument, data):
    """One argument of a right call is made wrong; the error names it or an argument that it must agree with."""
    arguments = GOOD | {argument: data.draw(st.sampled_from(BAD[argument]))}
    code_range = arguments.pop("code_range")
    with pytest.raises(ValueError, match=rf"^({argument}|targets|weight|bias|sample_id): expected"):
        d3diff.loss(*arguments.values(), code_range=code_range)
    if argument not in ("hidden", "weight", "bias"):
        logits = torch.randn(4, 6)
        rest = [arguments[name] for name in ("targets", "mask_prob", "sample_id")]
        with pytest.raises(ValueError, match=rf"^({argument}|targets|sample_id): expected"):
            d3diff.loss_from_logits(logits, *rest, code_range=code_range)
