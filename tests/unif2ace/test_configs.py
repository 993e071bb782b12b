"""Sizes and switches: Show-o's vocabulary, the way through JSON, the full-size shape without its memory."""

import dataclasses
import json

import pytest
import tiny
import torch

from unif2ace.configs import UniF2aceConfig, VocabularyConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace_kernels.moe import GroupedMoE


def test_the_vocabulary_is_show_os():
    vocabulary = VocabularyConfig()
    assert vocabulary.text == 50295
    assert vocabulary.code_range == (50305, 58497)
    assert (vocabulary.mask, vocabulary.size) == (58497, 58498)
    assert (vocabulary.pad, vocabulary.start_of_image, vocabulary.end_of_image) == (50295, 50296, 50297)
    assert (vocabulary.t2i, vocabulary.mmu) == (50300, 50301)
    assert UniF2aceConfig.base().vocabulary == vocabulary


@pytest.mark.parametrize("text,codes", [(40, 16), (404, 1024), (1, 1)])
def test_no_two_tokens_share_an_id(text, codes):
    vocabulary = VocabularyConfig(text=text, codes=codes)
    special = [getattr(vocabulary, name) for name in ("pad", "start_of_image", "end_of_image", "t2i", "mmu")]
    first, stop = vocabulary.code_range
    assert len(set(special)) == 5 and all(text <= each < first for each in special)
    assert stop - first == codes and vocabulary.mask == stop and vocabulary.size == stop + 1


@pytest.mark.parametrize(
    "config",
    [UniF2aceConfig(), UniF2aceConfig.base(), tiny.CONFIG, tiny.config(token_moe=None, sequence_moe=None)],
    ids=["default", "base", "tiny", "dense"],
)
def test_a_config_survives_json(config):
    assert UniF2aceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_differs_after_a_change_and_survives_json():
    """Nothing is left out on the way: each field in turn is changed and must come back changed."""
    parts = {"vocabulary": {}, "token_moe": {}, "sequence_moe": {}, "loss": {}}
    for part in [None, *parts]:
        whole = UniF2aceConfig() if part is None else getattr(UniF2aceConfig(), part)
        names = [each.name for each in dataclasses.fields(whole)] if part else [*UniF2aceConfig.__annotations__]
        for name in names:
            if name in (*parts, "model_type", "keys_to_ignore_at_inference"):
                continue
            value = getattr(whole, name)
            if isinstance(value, bool):
                other = not value
            elif isinstance(value, tuple):
                other = tuple(2 * entry for entry in value)
            elif isinstance(value, str):
                other = "image_tokenizer" if part is None else value + "x"
            elif name == "image_tokenizer":
                other = {"kind": "lfq", "side": 64}
            elif isinstance(value, float):
                other = value / 2
            elif name == "num_attention_heads":
                other = 4
            elif name == "hidden_size":
                other = 96
            else:
                other = 3 if value is None else value + 1
            changed = (dataclasses.replace if part else UniF2aceConfig.replace)(whole, **{name: other})
            config = changed if part is None else UniF2aceConfig(**{part: changed})
            assert config != UniF2aceConfig()
            assert UniF2aceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("part", [None, "vocabulary", "token_moe", "sequence_moe", "loss"])
def test_an_unknown_key_is_named(part):
    values = UniF2aceConfig().to_dict()
    (values if part is None else values[part])["expertss"] = 3
    with pytest.raises(ValueError, match="expertss"):
        UniF2aceConfig.from_dict(values)


@pytest.mark.parametrize(
    "name,value",
    [
        ("hidden_size", 0), ("hidden_size", 1.5), ("num_attention_heads", 5), ("partial_rotary_factor", 0.0),
        ("token_moe", 7), ("semantic_source", "ears"), ("vocab_size", 9), ("image_tokens", -1), ("vocabulary", None),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(name, value):
    with pytest.raises(ValueError, match=f"config.{name}: expected .*got .{{0,1}}{value}".replace("None", ".*")):
        UniF2aceConfig(**{name: value})


def test_base_is_the_backbone_of_show_o():
    """Without experts it has as many parameters as Show-o's Phi-1.5 shape, written out; and it takes no memory here."""
    config = UniF2aceConfig.base().replace(token_moe=None, sequence_moe=None)
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(config)
    V, D, F, C = 58498, 2048, 8192, 64
    attention = (3 * D * D + 3 * D) + (D * D + D) + 2 * 2 * C
    block = 2 * D + attention + (D * F + F) + (F * D + D)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == V * D + 24 * block + 2 * D + (D * V + V)


def test_base_has_every_part_at_the_papers_size():
    """The paper says 1.8B and leaves the sizes of the experts open."""
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(UniF2aceConfig.base())
    assert len(model.blocks) == 24 and all(p.is_meta for p in model.parameters())
    assert all(isinstance(block.experts, GroupedMoE) and block.ffn is not None for block in model.blocks)
    assert all(block.sequence is not None for block in model.blocks)
    assert 1.75e9 < sum(p.numel() for p in model.parameters()) < 1.85e9
