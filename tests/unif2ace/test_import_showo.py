"""Show-o's weights by their public names: its own code's logits, every way a file can be wrong, nothing left behind."""

import hashlib
import json
import os
import resource
import shutil

import foreign
import pytest
import torch
from safetensors.torch import save_file

from unif2ace.cli import main
from unif2ace.configs import TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.errors import UserError
from unif2ace.importers import parts
from unif2ace.importers.phi import Options, Sizes
from unif2ace.importers.showo import import_showo
from unif2ace.importers.weights import Weights
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import Batch, mmu_batch, t2i_batch, t2i_prompts

NUMBERS = foreign.numbers("showo")
TENSORS = foreign.tensors(NUMBERS["tensors"])
SETTINGS = {"llm_vocab_size": 40, "codebook_size": 16, "num_vq_tokens": 4, "vocab_size": 67, "w_clip_vit": False}
END = 0


def write(folder, tensors=TENSORS, settings=SETTINGS):
    folder.mkdir()
    save_file(tensors, folder / "pytorch_model.safetensors")
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def published(tmp_path):
    return write(tmp_path / "show-o")


def batches(model: UniF2aceForConditionalGeneration) -> dict[str, Batch]:
    config = model.config.replace(text_slots=9)
    prompts = t2i_prompts(NUMBERS["captions"], END, config)
    features = torch.randn(3, config.identity), torch.randn(3, config.image_tokens, config.semantic)
    texts = [[END, *text, END] for text in NUMBERS["texts"]]
    return {
        "t2i": t2i_batch(prompts, torch.tensor(NUMBERS["t2i_codes"]), config),
        "mmu": mmu_batch(torch.tensor(NUMBERS["mmu_codes"]), texts, *features, config),
    }


def logits(model: UniF2aceForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The columns that the numbers keep, at every position that is no padding."""
    return foreign.logits(model, batch)[batch.attention_mask][:, NUMBERS["columns"]]


@pytest.mark.parametrize("dense", [False, True], ids=["experts", "dense"])
@pytest.mark.parametrize("task", ["t2i", "mmu"])
def test_logits_are_those_of_show_os_own_code(published, task, dense):
    """Pads on both sides, captions of three lengths, masked and known codes; both levels of experts at their start."""
    model, _ = import_showo(published, Options(dense=dense))
    batch = batches(model)[task]
    length = batch.input_ids.shape[1]
    theirs = torch.tensor(NUMBERS[f"{task}_tokens"])
    assert (
        torch.equal(batch.input_ids, theirs[:, :length]) and (theirs[:, length:] == model.config.vocabulary.pad).all()
    )
    expected = torch.tensor(NUMBERS[f"{task}_logits"], dtype=torch.float64).view(-1, len(NUMBERS["columns"]))
    single = (logits(model, batch) - expected).abs().max()
    assert single <= 2 * NUMBERS[f"{task}_float32_error"] + 1e-7
    exact = (logits(model.double(), batch) - expected).abs().max()
    assert exact < 3e-7, "the numbers are kept in float32"


def test_the_experts_are_there_and_change_nothing_yet(published):
    """Both levels exist beside the FFN, may be told to answer, and would then be heard: a start, not an absence."""
    model, _ = import_showo(published)
    config = model.config
    assert config.token_moe == TokenMoEConfig((4, 4), 2, width=2, shared_width=0, dense=True)
    assert config.sequence_moe is not None and UniF2aceConfig.base().token_moe.width == 384
    batch = batches(model)["t2i"]
    before = logits(model, batch)
    routing = model(**vars(batch)).token_routings[0]
    assert (routing.weight > 0).all() and routing.expert.shape[-1] == 2
    for block in model.blocks:
        copies = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 1])
        assert torch.equal(block.sequence.router.bias, copies) and not block.sequence.router.weight.any()
    plain = logits(import_showo(published, Options(dense=True))[0], batch)
    torch.testing.assert_close(before, plain, rtol=0, atol=0)
    with torch.no_grad():
        model.blocks[0].experts.experts_w_out[:4].normal_()
    assert (logits(model, batch) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(import_showo(published)[0], batch), before, rtol=0, atol=0)


def test_the_config_is_read_from_shapes_and_settings(published, tmp_path):
    config = import_showo(published)[0].config
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert sizes == (32, 2, 4, 48) and config.image_tokens == 4 and (config.identity, config.semantic) == (512, 1024)
    assert config.vocabulary == VocabularyConfig(40, 16) and config.parallel_block and not config.image_positions
    file = published / "pytorch_model.safetensors"
    assert import_showo(file)[0].config == config, "the file alone, with the config.json beside it"


def test_at_show_os_own_size_it_is_the_base_model():
    """1.80 B parameters, 1.45 of them Show-o's."""
    sizes = Sizes(rows=58498, hidden=2048, layers=24, heads=32, ffn=8192, qk_norm=True, rotary=0.5)
    config = sizes.config(VocabularyConfig(), 256, Options())
    assert config.replace(eos_token_id=50256) == UniF2aceConfig.base()
    with torch.device("meta"):
        count = sum(each.numel() for each in UniF2aceForConditionalGeneration(config).parameters())
    theirs = sum(torch.Size(shape).numel() for shape in sizes.shapes("").values())
    assert round(count / 1e9, 2) == 1.80 and round(theirs / 1e9, 2) == 1.45


def shards(folder, kind: str, count: int = 2):
    """The same weights cut into shards, with their index."""
    folder.mkdir()
    names, index = sorted(TENSORS), {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.{kind}"
        part = {each: TENSORS[each] for each in names[shard::count]}
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / f"model.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.mark.parametrize("form", ["bin", "old bin", "safetensors shards", "bin shards"])
def test_every_form_of_file_gives_the_same_model(published, tmp_path, form):
    folder = tmp_path / "other"
    if "shards" in form:
        shards(folder, form.split()[0])
    else:
        folder.mkdir()
        torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
        (folder / "config.json").write_text(json.dumps(SETTINGS))
    opened = (Weights(path, allow_pickle="bin" in form) for path in (published, folder))
    a, b = (import_showo(each)[0].state_dict() for each in opened)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(path, out, *more) -> int:
    return main(["import", "showo", str(path), "--out", str(out), *more])


@pytest.mark.parametrize("dtype,exact", [(None, True), ("bfloat16", False)])
def test_the_command_writes_what_comes_back_to_the_same_logits(published, tmp_path, capsys, dtype, exact):
    out = tmp_path / "out"
    assert main(["import", "showo", str(published), "--out", str(out), *(["--dtype", dtype] if dtype else [])]) == 0
    told = capsys.readouterr().out
    assert "licence: MIT or Apache-2.0" in told and "2 layers" in told and "67 rows" in told
    assert sorted(os.listdir(out)) == ["config.json", "generation_config.json", "model.safetensors"]
    before, after = import_showo(published)[0], foreign.load_model(out)
    assert after.config.replace() == before.config.replace() and not after.training
    same = [torch.equal(logits(before, batch), logits(after, batch)) for batch in batches(before).values()]
    assert all(same) if exact else not any(same)
    assert after.head.weight.dtype == torch.float32
    again = UniF2aceForConditionalGeneration.from_pretrained(out)
    assert again.config.replace() == before.config.replace() and (again.head.weight.dtype == torch.float32) == exact
    for batch in batches(before).values():
        assert (logits(before, batch) - logits(after, batch)).abs().max() < 0.1


def test_the_command_leaves_the_experts_out_when_told(published, tmp_path, capsys):
    for name, options in (("experts", []), ("dense", ["--dense"])):
        assert main(["import", "showo", str(published), "--out", str(tmp_path / name), *options]) == 0
        told, config = capsys.readouterr().out, parts.model_config(tmp_path / name)
        assert (config.token_moe is None) == (config.sequence_moe is None) == (name == "dense")
        assert ("experts: none" in told) == (name == "dense")


def test_what_has_no_place_is_named(tmp_path, capsys):
    extra = {name: torch.zeros(2, 2) for name in ("mm_projector.0.weight", "mm_projector.2.weight")}
    extra["showo.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    assert command(write(tmp_path / "show-o", TENSORS | extra), tmp_path / "out") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "not placed" in line]
    assert len(told) == 1 and all(name in told[0] for name in extra)


@pytest.mark.parametrize(
    "card,told",
    [
        ("---\nlibrary_name: x\nlicense: cc-by-nc-4.0\n---\nlicense: of the text\n", "cc-by-nc-4.0 (its model card)"),
        ("---\nlibrary_name: x\n---\nlicense: of the text\n", "MIT or Apache-2.0 (as published"),
    ],
)
def test_the_licence_is_the_model_cards_where_it_names_one(published, tmp_path, capsys, card, told):
    (published / "README.md").write_text(card)
    assert command(published, tmp_path / "out") == 0
    assert f"licence: {told}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- what is wrong


def without(*names):
    return {name: value for name, value in TENSORS.items() if name not in names}


LAYER = "showo.model.layers.1."
WRONG = {
    "a tensor missing": (without(LAYER + "mlp.fc2.bias"), SETTINGS, ["missing", LAYER + "mlp.fc2.bias"]),
    "q and k LayerNorm missing": (
        without(*(name for name in TENSORS if "_layernorm." in name and "self_attn" in name)),
        {**SETTINGS, "num_attention_heads": 4},
        ["q_layernorm"],
    ),
    "no embedding": (without("showo.model.embed_tokens.weight"), SETTINGS, ["is not a Show-o", "embed_tokens"]),
    "another tensor": (TENSORS | {"showo.visual.weight": torch.zeros(3)}, SETTINGS, ["unexpected", "showo.visual"]),
    "a layer left out": (
        {name.replace("layers.1.", "layers.90000000000."): value for name, value in TENSORS.items()},
        SETTINGS,
        ["18 missing (showo.model.layers.1.", "18 unexpected (showo.model.layers.90000000000."],
    ),
    "another shape": (
        TENSORS | {LAYER + "mlp.fc1.weight": torch.zeros(32, 48)},
        SETTINGS,
        ["another shape", LAYER + "mlp.fc1.weight is [32, 48], expected [48, 32]"],
    ),
    "a head of another size": (
        TENSORS | {"showo.lm_head.bias": torch.zeros(66)},
        SETTINGS,
        ["showo.lm_head.bias is [66], expected [67]"],
    ),
    "another vocabulary": (TENSORS, {**SETTINGS, "codebook_size": 32}, ["67 rows", "make 83"]),
    "a config that is none": (TENSORS, [1], ["config.json", "no model's config"]),
    "no config": (TENSORS, None, ["67 rows", "make 58498", "config.json"]),
    "words for numbers": (TENSORS, {**SETTINGS, "codebook_size": "many"}, ["codebook_size 'many'", "whole number"]),
    "no image tokens": (TENSORS, {**SETTINGS, "num_vq_tokens": None}, ["num_vq_tokens None", "whole number"]),
    "no heads": (TENSORS, {**SETTINGS, "num_attention_heads": 0}, ["num_attention_heads 0", "whole number"]),
    "more channels turned than there are": (TENSORS, {**SETTINGS, "partial_rotary_factor": 2}, ["(0, 1]"]),
    "an FFN of no shape": (TENSORS | {"showo.model.layers.0.mlp.fc1.weight": torch.zeros(())}, SETTINGS, ["Show-o"]),
    "a LayerNorm of nothing": (
        TENSORS | {"showo.model.layers.0.self_attn.q_layernorm.weight": torch.zeros(0)},
        SETTINGS,
        ["another shape"],
    ),
    "heads that do not fit": (TENSORS, {**SETTINGS, "num_attention_heads": 5}, ["5 heads"]),
    "names of a Phi": (
        {name.removeprefix("showo."): value for name, value in TENSORS.items()},
        SETTINGS,
        ["is not a Show-o"],
    ),
}


def assert_refused(capsys, code, folder, *words):
    """One line that says it, and the folder as it was."""
    captured = capsys.readouterr()
    assert code == 1 and captured.out == "" and captured.err.count("\n") == 1, captured
    assert all(word in captured.err for word in words), captured.err
    assert sorted(os.listdir(folder)) == ["show-o"]


@pytest.mark.parametrize("tensors,settings,words", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, capsys, tensors, settings, words):
    path = write(tmp_path / "show-o", tensors, settings)
    assert_refused(capsys, command(path, tmp_path / "out"), tmp_path, *words)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_shard_is_named(tmp_path, capsys, kind, part):
    shard = shards(tmp_path / "show-o", kind) / f"model-00002-of-00002.{kind}"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * part)])
    code = command(tmp_path / "show-o", tmp_path / "out", *(["--allow-pickle"] if kind == "bin" else []))
    assert_refused(capsys, code, tmp_path, shard.name, "copy it again")


def test_a_missing_shard_and_a_wrong_one_are_named(tmp_path, capsys):
    folder = shards(tmp_path / "show-o", "safetensors", count=3)
    last = folder / "model-00003-of-00003.safetensors"
    content = last.read_bytes()
    last.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    assert_refused(capsys, command(folder, tmp_path / "out"), tmp_path, "both in", last.name)
    save_file({"another": torch.zeros(2)}, last)
    assert_refused(capsys, command(folder, tmp_path / "out"), tmp_path, last.name, "as the index says")
    last.unlink()
    assert_refused(capsys, command(folder, tmp_path / "out"), tmp_path, "lacks", last.name)
    last.write_bytes(content)
    assert command(folder, tmp_path / "out") == 0


def test_a_shard_whose_name_no_file_can_have_is_lacking(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a" * 5000 + ".safetensors"}}))
    with pytest.raises(UserError, match="lacks a+"):
        Weights(index)


def sums(folder) -> list[str]:
    return [f"{each.name}={hashlib.sha256(each.read_bytes()).hexdigest()}" for each in folder.glob("*.safetensors")]


def test_files_are_held_against_their_sums(tmp_path, capsys):
    """Given ones come before those of a file beside the weights, and all before a file is opened."""
    folder, out = shards(tmp_path / "show-o", "safetensors"), tmp_path / "out"
    first, second = sorted(sums(folder))
    assert command(folder, out, "--sha256", first) == 0
    assert "files: 1 of 2 files held against their SHA-256; no sum known of model-00002" in capsys.readouterr().out
    shutil.rmtree(out)
    wrong = second.partition("=")[0] + "=" + "0" * 64
    for more, words in (
        (["--sha256", first, "--sha256", wrong], ["model-00002-of-00002.safetensors is not the file expected", "0000"]),
        (["--sha256", "model.safetensors=" + "0" * 64], ["there is no model.safetensors here, only model-00001"]),
        (["--sha256", "model.safetensors"], ["expected NAME=HEX"]),
        (["--sha256", second[:-1]], ["expected NAME=HEX"]),
    ):
        assert_refused(capsys, command(folder, out, *more), tmp_path, *words)
    (folder / "SHA256SUMS").write_text("{}  {}\n".format(*reversed(wrong.split("="))))
    assert_refused(capsys, command(folder, out), tmp_path, "is not the file expected")
    (folder / wrong.partition("=")[0]).write_bytes(b"cut")
    assert_refused(capsys, command(folder, out), tmp_path, "is not the file expected")
    shutil.rmtree(folder)
    shards(folder, "safetensors")
    (folder / "SHA256SUMS").write_text("{}  {}\n".format(*reversed(wrong.split("="))))
    assert command(folder, out, "--sha256", second) == 0


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(2)], {"a": Intruder()}], ids=["number", "list", "code"])
def test_a_pickle_of_more_than_tensors_is_not_run(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)  # where an intruder would show
    (tmp_path / "show-o").mkdir()
    torch.save(content, tmp_path / "show-o" / "pytorch_model.bin")
    assert_refused(capsys, command(tmp_path / "show-o", tmp_path / "out"), tmp_path, "is a pickle", "--allow-pickle")
    code = command(tmp_path / "show-o", tmp_path / "out", "--allow-pickle")
    assert_refused(capsys, code, tmp_path, "pytorch_model.bin", "tensors")


def test_places_that_hold_no_weights_are_named(tmp_path, capsys):
    (tmp_path / "show-o").mkdir()
    assert_refused(capsys, command(tmp_path / "show-o", tmp_path / "out"), tmp_path, "holds no weights")
    assert_refused(capsys, command(tmp_path / "nowhere", tmp_path / "out"), tmp_path, "there is nothing at")
    for name in ("a.bin", "b.bin"):
        torch.save(TENSORS, tmp_path / "show-o" / name)
    assert_refused(capsys, command(tmp_path / "show-o", tmp_path / "out"), tmp_path, "a.bin, b.bin", "name one")
    (tmp_path / "show-o" / "model.bin.index.json").write_text("{}")
    assert_refused(capsys, command(tmp_path / "show-o", tmp_path / "out"), tmp_path, "no index")


def test_a_folder_that_is_there_stays_as_it_is(published, capsys):
    before = sorted(os.listdir(published))
    assert_refused(capsys, command(published, published), published.parent, "exists")
    assert sorted(os.listdir(published)) == before
    assert_refused(capsys, command(published / "nowhere", published), published.parent, "exists")  # said before work


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_full_disk_leaves_nothing(published, tmp_path, capsys, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        code = command(published, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(capsys, code, tmp_path, "cannot write", "free space")


def test_a_part_that_is_damaged_afterwards_is_named(published, tmp_path):
    out = tmp_path / "out"
    parts.save(import_showo(published)[0], out)
    with pytest.raises(UserError, match="holds no image_tokenizer of its own: it has a model"):
        parts.load_image_tokenizer(out)
    config = json.loads((out / "config.json").read_text())
    for change, words in (
        ({"hidden_size": 64}, "of different models"),
        ({"num_hidden_layers": 1}, "of different models"),
        ({"num_hidden_layers": 3}, "of different models"),
        ({"hiden": 3}, "does not describe a model.*hiden"),
    ):
        (out / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            foreign.load_model(out)
    (out / "config.json").write_text(json.dumps(config))
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="is damaged or no"):
        foreign.load_model(out)
    with pytest.raises(UserError, match="there is no folder"):
        foreign.load_model(tmp_path / "nowhere")


def test_names_are_listed_a_few_at_a_time(tmp_path):
    save_file({f"extra.{n}": torch.zeros(1) for n in range(9)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"9 unexpected \(extra.0, extra.1, extra.2, extra.3, \.\.\.\)") as raised:
        Weights(tmp_path / "x.safetensors").check({}, "a model")
    assert "extra.4" not in str(raised.value)
