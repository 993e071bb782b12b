"""A caption that is read once gives the states, and the codes, of one that is read in every step."""

import pytest
import tiny
import torch
from test_model import VARIANTS, assert_same

from unif2ace.configs import UniF2aceConfig
from unif2ace.generation.image import PaintSettings, paint_codes
from unif2ace.model.blocks import Block
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.prefix import TextPrefix
from unif2ace.model.sequences import t2i_batch, t2i_prompts
from unif2ace_kernels import sampling

N = tiny.CONFIG.image_tokens


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def config(request) -> UniF2aceConfig:
    return request.param


def prompts_of(lengths, config) -> torch.Tensor:
    return t2i_prompts(tiny.texts(lengths, config=config), tiny.END, config)


def images(rows: int, config: UniF2aceConfig, seed: int = 0) -> torch.Tensor:
    """[rows, N] codes, some of them masked."""
    rng = torch.Generator().manual_seed(seed)
    codes = config.vocabulary.code_range[0] + torch.randint(config.vocabulary.codes, (rows, N), generator=rng)
    return codes.masked_fill(torch.rand(rows, N, generator=rng) < 0.5, config.vocabulary.mask)


@torch.no_grad()
def whole(model: UniF2aceForConditionalGeneration, prompts: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The states of the image tokens when the whole sequence runs."""
    (batch,) = tiny.double(t2i_batch(prompts, ids, model.config))
    return model.image_hidden(model(**vars(batch)).last_hidden_state, batch.image_start)


@pytest.mark.parametrize("lengths", [(3, 0, 4), (1, 1), (0,)], ids=str)
def test_steps_after_a_prefix_are_those_of_the_whole_sequence(config, lengths):
    model, prompts = tiny.lively(config), prompts_of(lengths, config)
    prefix = TextPrefix(model, prompts)
    for seed in range(3):  # the same cache again and again
        ids = images(len(lengths), config, seed)
        assert_same(prefix.image_hidden(ids), whole(model, prompts, ids))


def test_only_the_rows_that_are_wanted(config):
    model, prompts = tiny.lively(config), prompts_of((3, 0, 4), config)
    ids, rows = images(3, config), torch.tensor([[3, 0], [1, 2], [0, 1]])
    want = whole(model, prompts, ids).gather(1, rows[:, :, None].expand(-1, -1, config.hidden_size))
    assert_same(TextPrefix(model, prompts).image_hidden(ids, rows), want)


def test_captions_may_share_an_image_and_come_again(config):
    """As the two branches of guidance do, and faces of one caption."""
    model, prompts, ids = tiny.lively(config), prompts_of((3, 0, 4, 2), config), images(2, config)
    prefix = TextPrefix(model, prompts)
    assert_same(prefix.image_hidden(ids), whole(model, prompts, ids.repeat(2, 1)))
    again = torch.tensor([2, 0, 0, 3, 1, 1])
    assert_same(prefix.at(again).image_hidden(ids), whole(model, prompts[again], ids.repeat(3, 1)))
    assert_same(prefix.image_hidden(ids), whole(model, prompts, ids.repeat(2, 1)))


def test_the_last_layer_runs_masked_rows_alone(monkeypatch):
    """Where there are no sequence-level experts; the others need all rows in every layer."""
    seen = []
    feed_forward = Block.feed_forward

    def counted(self, x, context):
        seen.append(tuple(x.shape[:2]))
        return feed_forward(self, x, context)

    monkeypatch.setattr(Block, "feed_forward", counted)
    for config, last in ((tiny.config(sequence_moe=None), (3, 2)), (tiny.CONFIG, (3, N + 2))):
        prefix = TextPrefix(tiny.lively(config), prompts_of((3, 0, 4), config))
        seen.clear()
        prefix.image_hidden(images(3, config), torch.zeros(3, 2, dtype=torch.int64))
        assert seen == [(3, N + 2), last]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_painting_with_a_prefix_gives_the_codes_of_painting_without(config, guidance):
    """Given the same random numbers the same codes: so the law is the same."""
    model, end, vocabulary = tiny.lively(config), tiny.END, config.vocabulary
    captions = [*tiny.texts((3, 2), config=config), tiny.texts((3,), config=config)[0]]
    prompts, empty = t2i_prompts(captions, end, config), t2i_prompts([[]] * 3, end, config)
    settings = PaintSettings(steps=3, guidance=guidance, seed=5)
    codes = paint_codes(model, captions, end, settings)
    sampler = sampling.MaskedDiffusionSampler(
        lambda ids, step: (whole(model, prompts, ids), whole(model, empty, ids)),
        steps=3,
        mask_id=vocabulary.mask,
        head=(model.head.weight, model.head.bias),
        code_range=vocabulary.code_range,
        guidance=guidance,
        top_p=settings.top_p,
    )
    want = sampler(torch.full((3, N), vocabulary.mask), seed=5)
    assert torch.equal(codes, want - vocabulary.code_range[0])
    assert len({tuple(row) for row in codes.tolist()}) == 3


def test_a_model_in_bfloat16_paints(config):
    model = tiny.lively(config).bfloat16()
    codes = paint_codes(model, tiny.texts((3, 2), config=config), tiny.END, PaintSettings(steps=3, guidance=1.0))
    assert codes.shape == (2, N) and codes.min() >= 0 and codes.max() < config.vocabulary.codes


@pytest.mark.gpu
def test_on_cuda_the_faces_are_those_of_the_cpu(config):
    """In float64, where products that round otherwise do not move a draw."""
    captions = tiny.texts((3, 2), config=config)
    settings = PaintSettings(steps=3, guidance=1.0, seed=3)
    want = paint_codes(tiny.lively(config), captions, tiny.END, settings)
    got = paint_codes(tiny.lively(config).cuda(), captions, tiny.END, settings)
    assert torch.equal(got.cpu(), want)
