"""A training step's rows: what they hang on, what is masked, what is a target."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch

from unif2ace.configs import MMU, T2I, UniF2aceConfig, VocabularyConfig
from unif2ace.data import captions
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import IGNORE, TENSORS
from unif2ace.training.recipe import Recipe, RecipeConfig, initialise_codes

SIZES = RecipeConfig(t2i=12, mmu=7, captions=2, questions=2, guidance_dropout=0.3, seed=3)


@pytest.fixture(scope="module")
def text():
    return tiny.text_tokenizer()


@pytest.fixture(scope="module")
def config(text) -> UniF2aceConfig:
    return tiny.config(vocabulary=VocabularyConfig(text.size, 16), text_slots=48, image_tokens=16)


@pytest.fixture(scope="module")
def faces(config):
    return tiny.encoded_faces(9, config)


@pytest.fixture
def recipe(faces, text, config) -> Recipe:
    return Recipe(faces, text, config, SIZES)


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def rows(batch, task):
    return (batch.task == task).nonzero()[:, 0].tolist()


def image_of(batch, row, config):
    start = batch.image_start[row]
    return slice(start, start + config.image_tokens)


def test_a_batch_hangs_on_seed_and_step_alone(faces, text, config):
    first = Recipe(faces, text, config, SIZES)
    batches = [first.batch(step) for step in range(3)]
    second = Recipe(faces, text, config, SIZES)
    np.random.seed(7)
    torch.manual_seed(7)
    assert same(second.batch(2), batches[2]) and same(second.batch(0), batches[0])
    assert not same(batches[0], batches[1])
    other = Recipe(faces, text, config, dataclasses.replace(SIZES, seed=4))
    assert not same(other.batch(0), batches[0])


def test_steps_mask_other_places_at_other_times(recipe, config):
    masks = [(recipe.batch(step).input_ids == config.vocabulary.mask)[: SIZES.t2i] for step in range(2)]
    assert not torch.equal(masks[0].sum(1), masks[1].sum(1))


def test_rows_are_as_many_as_asked_for(recipe):
    batch = recipe.batch(0)
    assert (len(rows(batch, T2I)), len(rows(batch, MMU))) == (SIZES.t2i, SIZES.mmu)


def test_as_many_codes_are_masked_as_the_schedule_says(recipe, config):
    """round(N m) of them, at least one; m in every twelfth of the times once, which is the stratified draw."""
    for step in range(5):
        batch = recipe.batch(step)
        for row in rows(batch, T2I):
            masked = (batch.input_ids[row] == config.vocabulary.mask).sum().item()
            assert masked == max(1, round(config.image_tokens * batch.mask_prob[row].item()))
        time = torch.arccos(batch.mask_prob[: SIZES.t2i].double()) * 2 / torch.pi
        assert time.mul(SIZES.t2i).floor().sort().values.tolist() == pytest.approx(list(range(SIZES.t2i)), abs=1)
        assert batch.mask_prob[SIZES.t2i :].tolist() == [1] * SIZES.mmu


def test_targets_are_the_masked_codes_of_a_face(recipe, faces, config):
    first = config.vocabulary.code_range[0]
    known = {tuple(codes) for codes in (faces.codes + first).tolist()}
    batch = recipe.batch(0)
    for row in rows(batch, T2I):
        image = image_of(batch, row, config)
        tokens, labels = batch.input_ids[row, image], batch.labels[row, image]
        masked = tokens == config.vocabulary.mask
        assert torch.equal(labels != IGNORE, masked)
        assert tuple(torch.where(masked, labels, tokens).tolist()) in known
        assert (batch.labels[row] != IGNORE).sum() == masked.sum(), "nothing else is a target"


def caption_ids(batch, row, config, end):
    """What stands between <t2i> <end> and <end> <soi>."""
    tokens = batch.input_ids[row, : config.text_slots]
    tokens = tokens[tokens != config.vocabulary.pad].tolist()
    assert tokens[:2] == [config.vocabulary.t2i, end] and tokens[-1] == end
    return tokens[2:-1]


def test_captions_are_of_the_face_that_is_masked(recipe, faces, text, config):
    """Every attribute word that a caption has is right for its face's classes."""
    first = config.vocabulary.code_range[0]
    batch, told = recipe.batch(0), 0
    for row in rows(batch, T2I):
        ids = caption_ids(batch, row, config, text.end)
        image = image_of(batch, row, config)
        labels, tokens = batch.labels[row, image], batch.input_ids[row, image]
        codes = torch.where(labels == IGNORE, tokens, labels) - first
        face = (faces.codes == codes).all(1).nonzero().item()
        said = text.decode(ids)
        if "smile" in said or "mouth" in said:
            told += 1
            assert ("smile" in said) == (faces.classes[face, captions.NAMES.index("mouth")] == 1)
    assert told > 2


@pytest.mark.parametrize("share", [0.0, 1.0, 0.3])
def test_guidance_dropout_leaves_captions_out(faces, text, config, share):
    recipe = Recipe(faces, text, config, dataclasses.replace(SIZES, t2i=200, guidance_dropout=share))
    batch = recipe.batch(0)
    empty = np.mean([caption_ids(batch, row, config, text.end) == [] for row in rows(batch, T2I)])
    assert empty == share if share in (0.0, 1.0) else abs(empty - share) < 0.12  # 3.7 standard deviations


def test_answers_and_their_ends_are_the_targets(recipe, faces, text, config):
    first = config.vocabulary.code_range[0]
    batch = recipe.batch(0)
    for number, row in enumerate(rows(batch, MMU)):
        image = image_of(batch, row, config)
        face = (faces.codes == batch.input_ids[row, image] - first).all(1).nonzero().item()
        assert torch.equal(batch.identity[row], faces.identity[face])
        assert torch.equal(batch.semantic[row], faces.semantic[face])
        tokens, labels = batch.input_ids[row], batch.labels[row]
        wanted = torch.zeros_like(tokens, dtype=torch.bool)
        wanted[1:] = labels[:-1] != IGNORE
        assert torch.equal(tokens[1:][wanted[1:]], labels[:-1][wanted[1:]]), "a target is the next token"
        pairs, question, answer = [], [], []
        for token, is_answer in zip(tokens[image.stop + 1 :].tolist(), wanted[image.stop + 1 :].tolist()):
            if token == config.vocabulary.pad:
                assert not is_answer
                continue
            (answer if is_answer else question).append(token)
            if is_answer and token == text.end:
                pairs.append((text.decode(question), text.decode(answer)))
                question, answer = [], []
        assert question == answer == []
        if number < SIZES.captions:
            caption = text.decode(text.encode(captions.full_caption(faces.classes[face])))
            assert pairs == [(text.decode(text.encode(captions.CAPTION_PROMPTS[0])), caption)]
            continue
        assert len(pairs) == SIZES.questions
        attributes = [next(i for i in range(len(ATTRIBUTES)) if asked in captions.questions(i)) for asked, _ in pairs]
        assert len(set(attributes)) == SIZES.questions
        for attribute, (_, said) in zip(attributes, pairs):
            assert said == ATTRIBUTES[attribute].words[faces.classes[face, attribute]]


def test_a_batch_trains(recipe, config):
    loss, terms = tiny.loss(UniF2aceForConditionalGeneration(config), recipe.batch(0))
    assert loss.isfinite() and terms["mask"] > 0 and terms["mmu"] > 0


def test_codes_that_share_bits_start_out_similar(config):
    """Alike in the embedding and in the head, the more bits the more alike; sizes and other rows stay."""
    torch.manual_seed(0)
    bits = 6
    config = tiny.config(vocabulary=VocabularyConfig(40, 2**bits), hidden_size=256, num_attention_heads=4)
    model = UniF2aceForConditionalGeneration(config)
    before = [each.weight.detach().clone() for each in (model.embedding, model.head)]
    tokenizer = ImageTokenizer(ImageTokenizerConfig(side=16, bits=bits, fine=8, coarse=8, blocks=1))
    initialise_codes(model, tokenizer)
    first, stop = config.vocabulary.code_range
    codes = torch.arange(stop - first)
    apart = torch.tensor([[bin(a ^ b).count("1") for b in codes.tolist()] for a in codes.tolist()])
    for each, old in zip((model.embedding, model.head), before):
        rows = each.weight.detach()[first:stop]
        alike = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        means = [alike[apart == distance].mean().item() for distance in range(bits + 1)]
        assert means == sorted(means, reverse=True) and means[1] > 0.3 > -0.3 > means[bits]
        assert rows.std().item() == pytest.approx(old[first:stop].std().item(), rel=0.15)
        kept = torch.ones(len(old), dtype=torch.bool)
        kept[first:stop] = False
        assert torch.equal(each.weight.detach()[kept], old[kept])
