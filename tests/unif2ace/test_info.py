"""`unif2ace info`: every parameter counted once, what a token uses worked out by hand."""

import json

import pytest
import tiny
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.cli import main
from unif2ace.configs import SequenceMoEConfig, TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.importers import parts
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.magvit import Magvit, MagvitConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.planning.parameters import parameters

CONFIGS = {
    "full": tiny.CONFIG,
    "Show-o's block": tiny.config(parallel_block=True, image_positions=False),
    "no shared experts": tiny.config(token_moe=TokenMoEConfig((3, 4), 2, 16, 0)),
    "no encoders": tiny.config(sequence_moe=SequenceMoEConfig(clip=False, face=False)),
    "dense": tiny.config(token_moe=None, sequence_moe=None),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_is_counted_once(config):
    total = sum(parameter.numel() for parameter in UniF2aceForConditionalGeneration(config).parameters())
    found = parameters(config)
    assert sum(part.total for part in found) == total
    assert all(0 <= used <= part.total for part in found for used in part.used)
    assert len({part.name for part in found}) == len(found) and all(part.total for part in found)


def test_what_a_token_uses_by_hand():
    """tiny: D = 32, 2 layers, experts of width 16, (3, 4) routed, 2 of them used, a shared one of width 16 each."""
    D, one = 32, 32 * 16 + 16 + 16 * 32 + 32
    found = {part.name: part for part in parameters(tiny.CONFIG)}
    assert found["routed experts"][1:] == (2 * 7 * one, (2 * 2 * one, 2 * 2 * one))
    assert found["shared experts"][1:] == (2 * 2 * one, (2 * one, 2 * one))
    assert found["token-level routers"][1:] == (2 * 7 * D, (2 * 3 * D, 2 * 4 * D))
    assert found["embedding"].total == (67 + 4) * D and found["head"].total == 67 * D + 67
    noise = 64 * 2 * D + 2 * D + 2 * D + 4 * D + (2 * D * D + 2 * D) + (D * D + D)
    assert found["noise resampler"][1:] == (noise, (noise, 0))
    assert all(found[f"{name} resampler"].used == (0, found[f"{name} resampler"].total) for name in ("CLIP", "face"))


def test_base_lands_at_the_papers_size(capsys):
    assert main(["info", "base"]) == 0
    lines = capsys.readouterr().out.splitlines()
    last = [line for line in lines if line.startswith("| all")][0].split("|")
    total, t2i, mmu = (int(each.replace(",", "")) for each in last[2:5])
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(UniF2aceConfig.base())
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e9, 2) == 1.80 and round(t2i / 1e9, 2) == 1.54 and round(mmu / 1e9, 2) == 1.56
    rows = [line for line in lines if line.startswith("| ") and "parameters" not in line]
    columns = zip(*([int(each.replace(",", "")) for each in row.split("|")[2:5]] for row in rows))
    assert [sum(column[:-1]) for column in columns] == [total, t2i, mmu] and len(rows) > 10


def make(folder) -> UniF2aceConfig:
    text = tiny.text_tokenizer()
    config = tiny.config(vocabulary=VocabularyConfig(text.size, 16), num_hidden_layers=1)
    image = ImageTokenizer(ImageTokenizerConfig(side=16, bits=4, fine=8, coarse=8, blocks=1))
    Checkpoint.of(UniF2aceForConditionalGeneration(config), image, text).save(folder)
    return config


def test_a_checkpoint_and_an_import_tell_their_config(tmp_path, capsys):
    config = make(tmp_path / "whole")
    parts.save(UniF2aceForConditionalGeneration(config), tmp_path / "part")
    told = []
    for name in ("whole", "part"):
        assert main(["info", str(tmp_path / name)]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert UniF2aceConfig.from_dict(json.loads(told[0].splitlines()[-1])) == config
    text, first = config.vocabulary.text, config.vocabulary.code_range[0]
    words = f"vocabulary: {config.vocabulary.size} = {text} text [0, {text}) + 10 special [{text}, {first}) + 16 image"
    assert words in told[0] and f"mask {config.vocabulary.mask}" in told[0]


def test_what_cannot_be_told_is_said_in_one_line(tmp_path, capsys):
    make(tmp_path / "whole")
    small = MagvitConfig(side=8, bits=3, width=32, encoder=((1, 1),), decoder=((1, 1),))
    parts.save(Magvit(small), tmp_path / "image")
    path = tmp_path / "whole" / "config.json"
    config = json.loads(path.read_text())
    for name, change, words in (
        ("nowhere", {}, "there is no folder"),
        ("image", {}, "holds no model: it has image_tokenizer"),
        ("whole", {"hidden_size": "wide"}, "does not describe a model"),
        ("whole", {"num_attention_heads": 0}, "does not describe a model"),
        ("whole", {"token_moe": {"top_k": 9}}, "does not describe a model"),
        ("whole", {"colour": 3}, "does not describe a model"),
    ):
        path.write_text(json.dumps({**config, **change}))
        assert main(["info", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    path.write_text(json.dumps({**config, "format": 99}))
    assert main(["info", str(tmp_path / "whole")]) == 1 and "got also ['format']" in capsys.readouterr().err


def test_base_is_a_backbone_and_two_levels_of_experts(capsys):
    assert main(["info", "base"]) == 0
    wanted = "1.80 B = 1.45 B backbone + 0.30 B token-level experts + 0.05 B sequence-level experts"
    assert wanted in capsys.readouterr().out.splitlines()
