"""`unif2ace evaluate` from its command to its page."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import sets
from evaluations import SIDE, Inception, doubles  # noqa: F401
from PIL import Image

from unif2ace.checkpoint import Checkpoint
from unif2ace.cli import main
from unif2ace.data.attributes import classify, fit_thresholds, measure
from unif2ace.data.dataset import FaceSet
from unif2ace.evaluation import page, work

pytestmark = pytest.mark.usefixtures("doubles")


def evaluated(tmp_path, untrained, *more):
    if not (tmp_path / "set").exists():
        path = sets.llava(tmp_path / "set", 4)
        records = json.loads(path.read_text())
        for each in records:
            each["caption"] = "a face with a smile <b>" if each["id"] != "face-3" else "no smile"
        path.write_text(json.dumps(records))
    arguments = ["--out", str(tmp_path / "out"), "--data", str(tmp_path / "set" / "faces.json"), "--frame=square",
                 "--paint.steps=2", "--answer_tokens=3", "--caption_tokens=3", *more]  # fmt: skip
    return main(["evaluate", *map(str, untrained), *arguments])


def test_the_command_writes_one_page_of_several_runs(untrained, tmp_path, capsys):
    other = tmp_path / "other" / "checkpoint"
    checkpoint = Checkpoint.load(untrained)
    checkpoint.model.config.loss = checkpoint.model.config.loss.__class__(alpha=0.1)
    checkpoint.save(other)
    assert evaluated(tmp_path, [untrained, other.parent], "--suite", "paper") == 0
    told, progress = capsys.readouterr()
    assert "not measured: no judge is named" in told and "report: " in told
    assert "features: rebuilt: 100%" in progress, "minutes of a CPU are not spent in silence"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = results["runs"]
    assert second["run"] == "other" and first["faces"] == 4
    assert "NaN" not in (tmp_path / "out" / "results.json").read_text()
    rows = {each["name"]: each for each in first["rows"]}
    assert rows["fid"]["paper"] == 66.0 and rows["fid"]["value"] is not None
    assert [row["variant"] for row in results["ablations"]["loss"]] == ["full", "alpha 0.1"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text  # it is whole, and asks for nothing
    assert "<b>" not in re.sub(r"<b>(other|" + first["run"] + r")</b>", "", text)  # a caption's marks are no marks
    for words in ("88.0", "other faces", "95 % interval", "Ablations", "alpha 0.1", "none is better than"):
        assert words in text, words
    assert text.count("data:image/jpeg") >= 8


def test_runs_on_their_own_faces_are_not_compared(untrained, tmp_path, capsys):
    """Two demo runs: as many held-out faces of the same name, and other ones."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        shutil.copytree(untrained, run / "checkpoint")
        images = np.random.default_rng(seed).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
        thresholds = fit_thresholds(measure(images))
        classes = classify(measure(images), thresholds)
        FaceSet(images, classes, thresholds, np.ones((8, 4), np.float32), 4, {"held_out": 4}).save(run / "faces.npz")
    arguments = ["--paint.steps=1", "--answer_tokens=2", "--caption_tokens=2", "--questions=1", "--faces=2"]
    assert main(["evaluate", *map(str, runs), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert "not measured on the same faces" in (tmp_path / "out" / "report.html").read_text()
    first = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    assert {row["name"]: row["count"] for row in first["rows"]}["vqa_exact"] == 2


def test_the_command_goes_on_in_its_folder_and_minds_other_settings(untrained, tmp_path, capsys, monkeypatch):
    assert evaluated(tmp_path, [untrained]) == 0
    before = (tmp_path / "out" / "results.json").read_text()
    monkeypatch.setattr(work, "paint", lambda *_, **__: pytest.fail("painted again"))
    assert evaluated(tmp_path, [untrained]) == 0
    assert (tmp_path / "out" / "results.json").read_text() == before
    capsys.readouterr()
    assert evaluated(tmp_path, [untrained], "--seed=1") == 1
    assert "holds results of another" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more,says",
    [
        (["--fases=3"], "fases: there is no such key; did you mean faces?"),
        (["--attributes=hair"], "no source of attributes 'hair': expected classifier:FOLDER"),
        (["--attributes=classifier:none"], "none"),
    ],
)
def test_the_command_names_what_is_wrong(untrained, tmp_path, capsys, more, says):
    assert evaluated(tmp_path, [untrained], *more) == 1
    assert says in capsys.readouterr().err


def test_a_run_without_faces_of_its_own_needs_data(untrained, tmp_path, capsys):
    assert main(["evaluate", str(untrained), "--out", str(tmp_path)]) == 1
    assert "--data: name a set of faces" in capsys.readouterr().err


def test_an_interval_s_bars_share_one_scale():
    rows = [{"low": 1.0, "high": 3.0, "value": 2.0}, {"low": 2.0, "high": 5.0, "value": 3.0}, None]
    bars = page._intervals("fid", rows)
    ends = [tuple(map(float, each)) for each in re.findall(r'x1="([\d.]+)" x2="([\d.]+)"', bars)]
    assert ends == [(4, 90), (47, 176)] and "1.0 to 5.0" in bars
    assert page._intervals("fid", rows[:1]) == "1.0 to 3.0"


@pytest.fixture
def without_client(monkeypatch):
    """Evaluation as it is imported where neither httpx nor jsonschema is installed."""
    import unif2ace

    for name in [*sys.modules]:
        if name.startswith(("unif2ace.evaluation", "unif2ace.endpoint")):
            monkeypatch.delitem(sys.modules, name)
    for name in ("evaluation", "endpoint"):  # as an import sets them
        monkeypatch.setattr(unif2ace, name, None, raising=False)
    for name in ("httpx", "jsonschema"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.import_module("unif2ace.evaluation.suite"), "Inception", Inception)


def test_no_client_is_needed_where_nobody_is_asked(without_client, untrained, tmp_path, capsys):
    assert evaluated(tmp_path, [untrained]) == 0
    assert "report: " in capsys.readouterr().out and sys.modules["httpx"] is None


@pytest.mark.parametrize(
    "asked,named",
    [(["--judge_gpt.url=http://localhost:1/v1", "--judge_gpt.model=m"], "judge_gpt"), (["--vlm.folder=x"], "vlm")],
)
def test_who_asks_without_the_client_is_told_what_to_install(
    without_client, untrained, tmp_path, capsys, monkeypatch, asked, named
):
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("it went to work"))
    assert evaluated(tmp_path, [untrained], "--suite=paper", *asked) == 1
    assert f"{named}: jsonschema is not installed: pip install 'unif2ace[evaluation]'" in capsys.readouterr().err


def test_a_judge_s_key_is_looked_for_before_anything_is_painted(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("it went to work"))
    judge = ["--judge_ds.url=https://localhost:1/v1", "--judge_ds.model=m", "--judge_ds.key=NO_KEY"]
    assert evaluated(tmp_path, [untrained], "--suite=paper", *judge) == 1
    assert "judge_ds.key: the environment variable 'NO_KEY' is not set" in capsys.readouterr().err


def test_a_painting_that_is_damaged_or_gone_is_no_end_of_the_page(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    content = file.read_bytes()
    assert page._picture(file).startswith("data:image/jpeg;base64,")
    for place in range(8, 45):  # of the chunks' heads, where PIL has errors of all kinds
        for bits in (1, 128, 255):
            file.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
            page._picture(file)
        file.write_bytes(content[: place // 2])
        assert page._picture(file) == ""
    file.unlink()
    assert page._picture(file) == ""
