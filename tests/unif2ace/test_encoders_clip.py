"""CLIP's tokens: transformers' own model says what they are; open_clip's model gives the same from the same weights."""

import importlib.util
import json
import sys
import types

import foreign
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unif2ace.encoders import encoder
from unif2ace.errors import UserError

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 42,
    "patch_size": 14, "projection_dim": 16, "hidden_act": "quick_gelu",
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
    "max_position_embeddings": 8, "eos_token_id": 19,
}  # fmt: skip
IMAGES = [np.random.RandomState(n).randint(0, 256, (60 - 9 * n, 50 + 5 * n, 3)).astype(np.uint8) for n in range(3)]


def draw(model):
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(foreign.drawn(name, value.shape))
    return model.eval()


def preparation(**changes):
    sizes = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    return CLIPImageProcessorPil(**sizes, **changes)


@pytest.fixture
def tower():
    return draw(CLIPVisionModel(CLIPVisionConfig(**VISION)))


@pytest.fixture
def folder(tmp_path, tower):
    tower.save_pretrained(tmp_path / "clip")
    preparation().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def theirs(tower, layer=-2, processor=None):
    pixels = (processor or preparation())(images=IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return tower(pixels, output_hidden_states=True).hidden_states[layer]


@pytest.mark.parametrize("layer", [-2, -1, -4])
def test_tokens_are_transformers_own(folder, tower, layer):
    encode, steps = encoder("clip", folder, layer=layer, batch=2), []
    assert (encode.tokens, encode.channels) == (10, 32)
    features = encode(IMAGES, steps.append)
    assert features.shape == (3, 10, 32) and steps == [2, 1] and not features.requires_grad
    torch.testing.assert_close(features, theirs(tower, layer), rtol=0, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.1
    assert encode([]).shape == (0, 10, 32)


def test_the_folders_own_preparation_is_used_where_there_is_one(folder, tower):
    processor = preparation(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(folder)
    torch.testing.assert_close(encoder("clip", folder)(IMAGES), theirs(tower, -2, processor), rtol=0, atol=1e-5)
    (folder / "preprocessor_config.json").unlink()
    torch.testing.assert_close(encoder("clip", folder)(IMAGES), theirs(tower), rtol=0, atol=1e-5)


def test_a_whole_clip_serves_as_well(tmp_path, capfd):
    whole = draw(CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)))
    whole.save_pretrained(tmp_path / "whole")
    capfd.readouterr()
    features = encoder("clip", tmp_path / "whole")(IMAGES)
    assert capfd.readouterr().err.count("\n") == 1, "the licence, and no list of text tensors"
    with torch.no_grad():
        pixels = preparation()(images=IMAGES, return_tensors="pt")["pixel_values"]
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_the_fingerprint_names_weights_layer_and_preparation(folder):
    first = encoder("clip", folder)
    assert encoder("clip", folder).fingerprint == first.fingerprint
    prints = {first.fingerprint, encoder("clip", folder, layer=-1).fingerprint}
    prints.add(encoder("clip", folder, dtype=torch.bfloat16).fingerprint)
    preparation(image_mean=[0.5] * 3).save_pretrained(folder)
    prints.add(encoder("clip", folder).fingerprint)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).mul_(1.5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    prints.add(encoder("clip", folder).fingerprint)
    assert len(prints) == 5


def refused(kind, folder, *words, **options):
    with pytest.raises(UserError) as raised:
        encoder(kind, folder, **options)
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


def test_what_is_wrong_is_named(folder, tmp_path):
    refused("clip", None, "clip:PATH", "never fetched")
    refused("clip", "openai/clip-vit-large-patch14-336", "there is no folder")
    refused("clip", folder, "model.safetensors is not the file expected", sha256={"model.safetensors": "0" * 64})
    refused("clip", folder, "there is no other.bin here", sha256={"other.bin": "0" * 64})
    with pytest.raises(ValueError, match="layer: expected -4 to -1, got 0"):
        encoder("clip", folder, layer=0)
    weights, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    name = "encoder.layers.1.mlp.fc1.weight"
    assert name in weights
    for changed in ({name: None}, {name: torch.zeros(3, 3)}):
        kept = {k: v for k, v in (weights | changed).items() if v is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        refused("clip", folder, "not the CLIP that its config describes", "1 tensors missing or of another shape", name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    content = (folder / "model.safetensors").read_bytes()
    for part in (0, 0.5, 0.999):
        (folder / "model.safetensors").write_bytes(content[: int(part * len(content))])
        refused("clip", folder, "model.safetensors is damaged or no safetensors", "copy it again")
    (folder / "model.safetensors").write_bytes(content)
    for wrong, words in (
        ("{", "config.json is damaged"),
        ('{"model_type": "bert"}', "not of a CLIP"),
        ("[]", "not of"),
    ):
        (folder / "config.json").write_text(wrong)
        refused("clip", folder, words)
    (folder / "config.json").unlink()
    refused("clip", folder, "config.json is missing")
    (folder / "config.json").write_text(config)
    assert encoder("clip", folder).tokens == 10


def test_a_pickle_is_read_when_allowed_by_name(folder):
    features = encoder("clip", folder)(IMAGES)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused("clip", folder, "pytorch_model.bin is a pickle", "--allow-pickle")
    assert torch.equal(encoder("clip", folder, allow_pickle=True)(IMAGES), features)


# ----------------------------------------------------------------------------------------------------------- open_clip


class _Names(types.ModuleType):
    """A module that has every name, each of a class that does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {"BICUBIC": 3, "BILINEAR": 2})


@pytest.fixture
def open_clip(monkeypatch):
    """The package itself, over names alone of what it imports and its vision tower does not use."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    names = ["torchvision" + name for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")]
    absent = {name for name in ("torchvision", "ftfy") if importlib.util.find_spec(name) is None}
    for name in [*names, "ftfy"]:
        if name.partition(".")[0] in absent:
            monkeypatch.setitem(sys.modules, name, _Names(name))
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, sys.modules[name])
    before = set(sys.modules)
    yield importlib.import_module("open_clip")
    for name in set(sys.modules) - before:
        if name.startswith("open_clip"):
            del sys.modules[name]


OPEN = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 42, "layers": 4, "width": 32, "head_width": 16, "patch_size": 14, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


def as_open_clip(tower) -> dict[str, torch.Tensor]:
    """transformers' names and layout to open_clip's."""
    state = tower.state_dict()
    out = {
        "class_embedding": state["embeddings.class_embedding"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "proj": torch.zeros(32, 16),
    }
    for kind in ("weight", "bias"):
        out |= {f"ln_pre.{kind}": state[f"pre_layrnorm.{kind}"], f"ln_post.{kind}": state[f"post_layernorm.{kind}"]}
        for n in range(4):
            layer, block = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
            qkv = [state[f"{layer}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            out[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
            names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            for ours, other in (names | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
                out[f"{block}.{ours}.{kind}"] = state[f"{layer}.{other}.{kind}"]
    return {f"visual.{name}": value.clone() for name, value in out.items()}


@pytest.fixture
def open_folder(tmp_path, tower):
    path = tmp_path / "open"
    path.mkdir()
    text = {"token_embedding.weight": torch.zeros(20, 16), "logit_scale": torch.zeros(())}
    save_file(as_open_clip(tower) | text, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN, "preprocess_cfg": {}}))
    return path


@pytest.mark.parametrize("layer", [-2, -1])
def test_open_clip_gives_the_same_tokens_from_the_same_weights(open_clip, open_folder, tower, layer):
    encode = encoder("open-clip", open_folder, layer=layer)
    assert (encode.tokens, encode.channels, encode.name) == (10, 32, "open-clip")
    torch.testing.assert_close(encode(IMAGES), theirs(tower, layer), rtol=0, atol=2e-5)


def test_open_clip_weights_that_do_not_fit(open_clip, open_folder):
    weights = load_file(open_folder / "open_clip_model.safetensors")
    for name, value, words in (
        ("visual.ln_pre.bias", None, "1 missing (visual.ln_pre.bias)"),
        ("visual.ln_pre.bias", torch.zeros(3), "of another shape"),
        ("visual.extra", torch.zeros(3), "unexpected"),
    ):
        changed = {k: v for k, v in (weights | {name: value}).items() if v is not None}
        save_file(changed, open_folder / "open_clip_model.safetensors")
        refused("open-clip", open_folder, "is not the OpenCLIP", words)
    (open_folder / "open_clip_config.json").write_text("{}")
    refused("open-clip", open_folder, "cannot be read as an OpenCLIP")


def test_without_torchvision_the_error_says_so(open_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in [name for name in sys.modules if name.startswith("open_clip")]:
        monkeypatch.delitem(sys.modules, name)
    refused("open-clip", open_folder, "torchvision", "pip install 'unif2ace[clip]'", "take the encoder clip")
