"""A vision-language model in a folder: the smallest there is, with random weights, saved and read as a user's is."""

import json

import numpy as np
import pytest
import torch
from evaluations import QUICK, some_faces
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.evaluation.config import SuiteConfig, VlmConfig
from unif2ace.evaluation.suite import Suite
from unif2ace.evaluation.vlm import LocalModel
from unif2ace.evaluation.work import Work

WORDS = "<unk> <s> </s> <pad> <image> yes no Yes 7 42 100 Does this figure show please answer or a face hair".split()
ASKED = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
IMAGES = [np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8) for seed in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=8, **{**sizes, "num_hidden_layers": 2})
    text = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **sizes)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=ASKED,
    )  # fmt: skip
    where = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


def test_vqascore_is_the_probability_of_yes(folder):
    model = LocalModel(folder)
    prompt = 'Does this figure show "a face"? Please answer yes or no.'
    inputs = model._processor(images=[IMAGES[0]], text=["<image> " + prompt], return_tensors="pt")
    with torch.no_grad():
        law = model._model(**inputs).logits[0, -1].double().softmax(0)
    expected = (law[WORDS.index("yes")] + law[WORDS.index("Yes")]).item()
    first, second = model.vqascore(IMAGES, ["a face", "a face"])
    assert first == pytest.approx(expected) and 0 < first < 1 and second != first
    assert model.vqascore(IMAGES[:1], ["hair"])[0] != first
    assert LocalModel(folder).vqascore(IMAGES, ["a face", "a face"]) == [first, second]


def test_a_rating_is_read_from_what_the_model_writes(folder, monkeypatch):
    model = LocalModel(folder)
    said = iter(["42 </s>", "no"])

    def generate(**inputs):
        more = model._processor.tokenizer.encode(next(said), add_special_tokens=False)
        return torch.cat([inputs["input_ids"], torch.tensor([more])], 1)

    monkeypatch.setattr(model._model, "generate", generate)
    assert model.vlm_score(IMAGES, ["a face", "hair"]) == [42, None]


def test_a_folder_s_rows_go_on_where_they_were(folder, untrained, tmp_path, monkeypatch):
    config = SuiteConfig(paint=QUICK, vlm=VlmConfig(folder=str(folder)))
    with Work(Checkpoint.load(untrained), tmp_path) as first:
        row = Suite(first, some_faces(3), config).vlm("vqascore")
    assert 0 < row.value < 1 and row.count == 3 and folder.name in row.how
    monkeypatch.setattr("unif2ace.evaluation.vlm.LocalModel", lambda *_: pytest.fail("it was asked again"))
    with Work(Checkpoint.load(untrained), tmp_path) as again:
        assert Suite(again, some_faces(3), config).vlm("vqascore") == row


def test_another_model_s_scores_are_its_own(folder, untrained, tmp_path):
    """Under the same name too: what it said hangs on what it is."""
    other = tmp_path / folder.name
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: each + 0.1 * torch.randn_like(each) for name, each in weights.items()}, other / "model.safetensors"
    )
    rows = []
    for each in (folder, other, folder):
        config = SuiteConfig(paint=QUICK, vlm=VlmConfig(folder=str(each)))
        with Work(Checkpoint.load(untrained), tmp_path / "out") as kept:
            rows.append(Suite(kept, some_faces(3), config).vlm("vqascore"))
    assert rows[0] == rows[2] and rows[1].value != rows[0].value


def test_a_folder_that_is_none_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        LocalModel(tmp_path / "none")
    with pytest.raises(UserError, match="is no vision-language model that transformers reads"):
        LocalModel(tmp_path)
    config = json.loads((folder / "tokenizer.json").read_text())
    words = config["model"]["vocab"]
    for word in ("yes", "Yes"):
        words[f"{word}x"] = words.pop(word)
    broken = tmp_path / "wordless"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no word yes"):
        LocalModel(broken)
