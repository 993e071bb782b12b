"""A model on disk: back to the same bits, whole or not there, and every way it can be wrong said in one line."""

import errno
import json
import os
import resource

import pytest
import tiny
import torch
from safetensors import SafetensorError

from unif2ace import checkpoint as module
from unif2ace.checkpoint import CONFIG, INDEX, PROCESSOR, TEXT, WEIGHTS, Checkpoint
from unif2ace.configs import VocabularyConfig
from unif2ace.errors import UserError
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.text_tokenizer import END, TextTokenizer

TEXT_TOKENIZER = tiny.text_tokenizer()


def make(seed=0, **changes) -> Checkpoint:
    torch.manual_seed(seed)
    config = tiny.config(vocabulary=VocabularyConfig(TEXT_TOKENIZER.size, 16), **changes)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(side=16, bits=4, fine=8, coarse=8, blocks=1))
    return Checkpoint.of(UniF2aceForConditionalGeneration(config).eval(), tokenizer, TEXT_TOKENIZER)


def outputs(checkpoint: Checkpoint) -> list[torch.Tensor]:
    config = checkpoint.model.config
    batch = tiny.single(tiny.mixed(config=config))
    codes = torch.arange(16).view(4, 4)
    with torch.no_grad():
        return [checkpoint.model(**vars(batch)).last_hidden_state, checkpoint.image_tokenizer.decode(codes)]


def same_outputs(a: Checkpoint, b: Checkpoint) -> bool:
    """Every tensor to the bit; and what is computed with them, where memory lies otherwise, to rounding."""
    states = a.model.state_dict(), b.model.state_dict()
    same = states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
    return same and all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(outputs(a), outputs(b)))


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "checkpoint"
    make().save(folder)
    return folder


def test_the_image_tokenizer_is_not_trained(saved):
    model = Checkpoint.load(saved).model.train()
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained and not any(name.startswith("image_tokenizer") for name in trained)
    assert not model.image_tokenizer.training


def assert_one_line(folder, *words) -> None:
    with pytest.raises(UserError) as raised:
        Checkpoint.load(folder)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "changes",
    [{}, {"token_moe": None}, {"sequence_moe": None}, {"parallel_block": True, "image_positions": False}],
    ids=["full", "no token experts", "no sequence experts", "Show-o's block"],
)
def test_a_model_comes_back_to_the_bit(tmp_path, changes):
    before = make(**changes)
    before.save(tmp_path / "checkpoint")
    after = Checkpoint.load(tmp_path / "checkpoint")
    assert same_outputs(before, after) and not same_outputs(make(seed=1, **changes), after)
    assert after.model.config == before.model.config
    assert after.image_tokenizer.config == before.image_tokenizer.config
    assert not after.model.training and not after.image_tokenizer.training
    ids = after.text_tokenizer.encode("a face with dark hair")
    assert ids == TEXT_TOKENIZER.encode("a face with dark hair") and after.text_tokenizer.end == TEXT_TOKENIZER.end
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


def test_a_new_one_takes_the_place_of_the_old(saved):
    make(seed=1).save(saved)
    assert same_outputs(Checkpoint.load(saved), make(seed=1))
    assert os.listdir(saved.parent) == ["checkpoint"]
    files = [CONFIG, "generation_config.json", WEIGHTS, TEXT, "tokenizer_config.json", PROCESSOR]
    assert sorted(os.listdir(saved)) == sorted(files)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TEXT])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert_one_line(saved, name, "missing")


def test_a_missing_folder_says_what_to_run(tmp_path):
    assert_one_line(tmp_path / "nowhere", "no checkpoint at", "nowhere", "unif2ace demo")
    (tmp_path / "file").write_text("")
    assert_one_line(tmp_path / "file", "no checkpoint at")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TEXT])
def test_a_truncated_file_is_named(saved, name, part):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * part)])
    assert_one_line(saved, name, "damaged")


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"[1, 2]", b'"text"', b"{}", b"null", b'{"format": 99}'])
def test_a_config_that_is_none_is_named(saved, content):
    (saved / CONFIG).write_bytes(content)
    assert_one_line(saved, CONFIG)


def edit(saved, change) -> None:
    config = json.loads((saved / CONFIG).read_text())
    change(config)
    (saved / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(hiden=3),
        lambda config: config.update(hidden_size="wide"),
        lambda config: config.update(token_moe=7),
        lambda config: config["token_moe"].update(top_k=100),
        lambda config: config["image_tokenizer"].update(colour=True),
        lambda config: config["image_tokenizer"].update(kind="painter"),
        lambda config: config.update(vocab_size=7),
        lambda config: config.update(num_hidden_layers=5000),
        lambda config: config.update(dtype=-1e308),
        lambda config: config.update(dtype="int8"),
        lambda config: config.update(dtype=None, torch_dtype=["float32"]),
        lambda config: config["image_tokenizer"].update(blocks=5000),
    ],
)
def test_a_config_that_describes_no_model_is_named(saved, change):
    edit(saved, change)
    assert_one_line(saved, CONFIG, "does not describe a model")


@pytest.mark.parametrize("content", ["[]", "[1]", "3", "{", "[" * 10_000])
def test_damaged_settings_of_generation_are_named(saved, content):
    (saved / "generation_config.json").write_text(content)
    assert_one_line(saved, "generation_config.json is damaged")


@pytest.mark.parametrize("kind", [None, "phi"])
def test_a_config_of_another_kind_of_model_is_named(saved, kind):
    edit(saved, lambda config: config.update(model_type=kind))
    assert_one_line(saved, CONFIG, "unif2ace")


@pytest.mark.parametrize(
    "change,name",
    [
        (lambda config: config.update(hidden_size=64), "blocks.0"),
        (lambda config: config.update(num_hidden_layers=1), "blocks.1"),
        (lambda config: config.update(num_hidden_layers=3), "blocks.2"),
        (lambda config: config.update(token_moe=None), "ffn"),
        (lambda config: config.update(image_tokenizer=None), "image_tokenizer"),
        (lambda config: config["image_tokenizer"].update(bits=5), "bits"),
        (lambda config: config.update(intermediate_size=2**40, token_moe=None), "ffn"),  # more than memory holds
    ],
)
def test_weights_of_another_model_are_not_taken(saved, change, name):
    edit(saved, change)
    assert_one_line(saved, CONFIG, WEIGHTS, "different models", name)


def test_shards_come_back_to_the_bit(tmp_path):
    """And one that is cut short or missing is said."""
    before = make()
    folder = tmp_path / "checkpoint"
    before.save(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and (folder / INDEX).is_file() and not (folder / WEIGHTS).exists()
    assert same_outputs(before, Checkpoint.load(folder))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    assert_one_line(folder, "damaged")
    shards[1].unlink()
    assert_one_line(folder, shards[1].name)


def test_the_dtype_is_that_of_the_weights_unless_asked(tmp_path):
    checkpoint = make()
    checkpoint.model.bfloat16()
    checkpoint.save(tmp_path / "checkpoint")
    assert Checkpoint.load(tmp_path / "checkpoint").model.dtype == torch.bfloat16
    wide = Checkpoint.load(tmp_path / "checkpoint", dtype=torch.float32).model
    for (name, a), b in zip(wide.state_dict().items(), checkpoint.model.state_dict().values()):
        assert a.dtype == torch.float32 and torch.equal(a, b.float()), name


def test_a_text_tokenizer_without_its_end_token_is_not_taken(saved):
    """Of the right size, so that only the token tells."""
    (saved / TEXT).write_text(TEXT_TOKENIZER.tokenizer.to_str().replace(END, "<|another|>"))
    assert_one_line(saved, TEXT)


def test_a_text_tokenizer_of_another_model_is_not_taken(saved):
    """Its ids would run into the special tokens', or name other words."""
    TextTokenizer.train(["the quick brown fox jumps over the lazy dog " * 9], size=2000).save(saved / TEXT)
    edit(saved, lambda config: config["vocabulary"].update(text=100))
    edit(saved, lambda config: [config.pop("vocab_size"), config.pop("pad_token_id")])
    assert_one_line(saved, "different models")


def test_a_tokenizer_without_an_end_is_not_taken(saved):
    content = json.loads((saved / TEXT).read_text())
    content["added_tokens"] = []
    content["model"]["vocab"]["<|end|>"] = content["model"]["vocab"].pop("<|endoftext|>")
    (saved / TEXT).write_text(json.dumps(content))
    assert_one_line(saved, TEXT)


@pytest.mark.parametrize("there", ["file", "run", "another model", "damaged", "here"])
def test_nothing_but_a_checkpoint_gives_way_to_one(there, tmp_path, monkeypatch):
    """A mistyped folder is not removed with all that is in it."""
    folder = tmp_path / "there"
    if there == "file":
        folder.write_text("keep me")
    else:
        folder.mkdir()
        (folder / ("weeks.bin" if there in ("run", "here") else CONFIG)).write_text(
            '{"model_type": "llama"}' if there == "another model" else "keep me"
        )
    if there == "here":
        monkeypatch.chdir(folder)
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    with pytest.raises(UserError, match="is no checkpoint: name another folder"):
        make().save("." if there == "here" else folder)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before


def test_an_empty_folder_gives_way(tmp_path):
    make().save(tmp_path)
    assert same_outputs(Checkpoint.load(tmp_path), make())


def assert_old_one_is_whole(saved) -> None:
    assert os.listdir(saved.parent) == ["checkpoint"]
    assert same_outputs(Checkpoint.load(saved), make())


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_full_disk_leaves_the_old_one(saved, size):
    """A real limit on the size of files, which every writer meets in its own way: weights, tokenizer, config."""
    new = make(seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError) as raised:
            new.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in str(raised.value) and "free space" in str(raised.value) and "\n" not in str(raised.value)
    assert_old_one_is_whole(saved)


@pytest.mark.parametrize("writer", ["model", "processor"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("no space")])
def test_whichever_file_does_not_fit_the_old_one_stays(saved, monkeypatch, writer, error):
    def fail(*arguments, **options):
        raise error

    kinds = {"model": module.UniF2aceForConditionalGeneration, "processor": module.UniF2aceProcessor}
    monkeypatch.setattr(kinds[writer], "save_pretrained", fail)
    with pytest.raises(UserError, match="cannot write .*checkpoint.*free space"):
        make(seed=1).save(saved)
    monkeypatch.undo()
    assert_old_one_is_whole(saved)


def test_ctrl_c_while_saving_leaves_the_old_one(saved, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.UniF2aceProcessor, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        make(seed=1).save(saved)
    monkeypatch.undo()
    assert_old_one_is_whole(saved)


def test_a_failure_between_the_renames_brings_the_old_one_back(saved, monkeypatch):
    rename = module.Path.rename

    def fail(self, target):
        if target == saved and self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(module.Path, "rename", fail)
    with pytest.raises(UserError, match="cannot write"):
        make(seed=1).save(saved)
    monkeypatch.undo()
    assert_old_one_is_whole(saved)


def test_a_place_that_cannot_hold_it_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make().save(tmp_path / "file" / "checkpoint")
