"""Sizes and switches: Show-o's vocabulary, the way through JSON, the full-size shape without its memory."""

import dataclasses
import json

import pytest
import tiny
import torch

from unif2ace.configs import ModelConfig, VocabularyConfig
from unif2ace.model.transformer import UniF2ace
from unif2ace_kernels.moe import GroupedMoE


def test_the_vocabulary_is_show_os():
    vocabulary = VocabularyConfig()
    assert vocabulary.text == 50295
    assert vocabulary.code_range == (50305, 58497)
    assert (vocabulary.mask, vocabulary.size) == (58497, 58498)
    assert (vocabulary.pad, vocabulary.start_of_image, vocabulary.end_of_image) == (50295, 50296, 50297)
    assert (vocabulary.t2i, vocabulary.mmu) == (50300, 50301)
    assert ModelConfig.base().vocabulary == vocabulary


@pytest.mark.parametrize("text,codes", [(40, 16), (404, 1024), (1, 1)])
def test_no_two_tokens_share_an_id(text, codes):
    vocabulary = VocabularyConfig(text=text, codes=codes)
    special = [getattr(vocabulary, name) for name in ("pad", "start_of_image", "end_of_image", "t2i", "mmu")]
    first, stop = vocabulary.code_range
    assert len(set(special)) == 5 and all(text <= each < first for each in special)
    assert stop - first == codes and vocabulary.mask == stop and vocabulary.size == stop + 1


@pytest.mark.parametrize(
    "config",
    [ModelConfig(), ModelConfig.base(), tiny.CONFIG, tiny.config(token_moe=None, sequence_moe=None)],
    ids=["default", "base", "tiny", "dense"],
)
def test_a_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_differs_after_a_change_and_survives_json():
    """Nothing is left out on the way: each field in turn is changed and must come back changed."""
    parts = {"vocabulary": {}, "token_moe": {}, "sequence_moe": {}, "loss": {}}
    for part in [None, *parts]:
        whole = ModelConfig() if part is None else getattr(ModelConfig(), part)
        for each in dataclasses.fields(whole):
            if each.name in parts:
                continue
            value = getattr(whole, each.name)
            if isinstance(value, bool):
                other = not value
            elif isinstance(value, tuple):
                other = tuple(2 * entry for entry in value)
            elif isinstance(value, str):
                other = value + "x"
            else:
                other = 3 if value is None else value + 1
            changed = dataclasses.replace(whole, **{each.name: other})
            config = changed if part is None else ModelConfig(**{part: changed})
            assert config != ModelConfig()
            assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("part", [None, "vocabulary", "token_moe", "sequence_moe", "loss"])
def test_an_unknown_key_is_named(part):
    values = ModelConfig().to_dict()
    (values if part is None else values[part])["expertss"] = 3
    with pytest.raises(ValueError, match="expertss"):
        ModelConfig.from_dict(values)


def test_base_is_the_backbone_of_show_o():
    """Without experts it has as many parameters as Show-o's Phi-1.5 shape, written out; and it takes no memory here."""
    config = dataclasses.replace(ModelConfig.base(), token_moe=None, sequence_moe=None)
    with torch.device("meta"):
        model = UniF2ace(config)
    V, D, F, C = 58498, 2048, 8192, 64
    attention = (3 * D * D + 3 * D) + (D * D + D) + 2 * 2 * C
    block = 2 * D + attention + (D * F + F) + (F * D + D)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == V * D + 24 * block + 2 * D + (D * V + V)


def test_base_has_every_part_at_the_papers_size():
    """The paper says 1.8B and leaves the sizes of the experts open."""
    with torch.device("meta"):
        model = UniF2ace(ModelConfig.base())
    assert len(model.blocks) == 24 and all(p.is_meta for p in model.parameters())
    assert all(isinstance(block.ffn, GroupedMoE) and block.sequence is not None for block in model.blocks)
    assert 1.75e9 < sum(p.numel() for p in model.parameters()) < 1.85e9
