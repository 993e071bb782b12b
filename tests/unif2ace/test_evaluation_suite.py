"""The rows of `unif2ace evaluate` on an untrained model: values, reasons, going on, settings."""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
from evaluations import QUICK, by_name, doubles, opened, some_faces  # noqa: F401
from PIL import Image

from unif2ace.endpoint.config import EndpointConfig
from unif2ace.errors import UserError
from unif2ace.evaluation import suite, work
from unif2ace.evaluation.config import SuiteConfig, VlmConfig
from unif2ace.evaluation.faces import Face, Question
from unif2ace.evaluation.suite import Suite
from unif2ace.evaluation.work import Work

pytestmark = pytest.mark.usefixtures("doubles")


def test_every_row_of_the_paper_s_suite_has_a_value_or_a_reason(checkpoint, tmp_path):
    measured = opened(checkpoint, tmp_path)
    rows = by_name(measured.rows("paper"))
    assert list(rows) == list(suite.SUITES["paper"])
    for name in ("fid", "kid", "fid_tokenizer", "agreement", "vqa_exact", "vqa_soft", "caption_agreement"):
        row = rows[name]
        assert row.value is not None and row.low <= row.value <= row.high and not row.reason, name
    for name, says in {
        "identity": "--identity=arcface-mbf or antelopev2:FOLDER; sface is the model's own",
        "vqascore": "--vlm.folder", "vlm_score": "--vlm.folder",
        "desc_gpt": "--judge_gpt.url", "conv_ds": "--judge_ds.url",
    }.items():  # fmt: skip
        assert rows[name].value is None and re.search(says, rows[name].reason), name
    assert rows["vqa_exact"].count == 10 and rows["vqa_exact"].groups == 5
    assert list(rows["vqa_exact"].by) == ["kind", "category"]
    assert rows["vqa_exact"].by["category"]["facing"][1] == 5
    assert rows["agreement"].by["attribute"]["light"] == (pytest.approx(rows["agreement"].value), 5)
    assert list(rows["agreement"].by["kind"]) == ["other"]
    assert "the faces themselves: " in rows["agreement"].how


def test_agreement_is_of_the_paintings_with_their_own_prompts(checkpoint, tmp_path):
    measured = opened(checkpoint, tmp_path)
    for index, (face, prompt, image) in enumerate(measured.paintings):
        dark = "dark" in prompt
        image = np.full_like(image, 20 if dark == (index != 3) else 230)  # the fourth is not as prompted
        measured._paintings[index] = (face, prompt, image)
    row = measured.agreement("agreement")
    assert row.value == pytest.approx(4 / 5)
    assert [each["face"] for each in measured.shown()["missed"]] == ["face-3"]
    assert measured.shown()["missed"][0]["missed"] == ["light"]


def test_without_a_source_attributes_are_not_measured(checkpoint, tmp_path):
    rows = by_name(opened(checkpoint, tmp_path, some_faces(source=False)).rows("quick"))
    assert rows["agreement"].value is None and "nothing measures attributes" in rows["agreement"].reason
    assert rows["fid"].value is not None


def test_faces_without_words_leave_the_rows_of_words(checkpoint, tmp_path):
    bare = some_faces()
    bare.items = [Face(each.key, each.image, (), ()) for each in bare.items]
    rows = by_name(opened(checkpoint, tmp_path, bare).rows("quick"))
    assert rows["fid"].reason == "no face of the set has a caption to paint from"
    assert rows["vqa_exact"].reason == "no face of the set has a question"
    assert rows["fid_tokenizer"].value is not None


def test_answers_that_are_right_count(checkpoint, tmp_path):
    measured = opened(checkpoint, tmp_path)
    measured.work.answer(measured.faces.asked, 3)
    journal = measured.work.journal("answers")
    for index in range(5):
        journal.put(f"face-{index}?0", {**journal.get(f"face-{index}?0"), "given": "Dark."})
        journal.put(f"face-{index}?1", {**journal.get(f"face-{index}?1"), "given": "ahead" if index < 2 else "up"})
    row = measured.vqa("vqa_exact")
    assert row.value == pytest.approx(7 / 10)
    assert row.by["kind"] == {"appearance": (1.0, 5), "action": (pytest.approx(0.4), 5)}
    assert measured.shown()["wrong_count"] == 3


def test_a_run_that_was_cut_off_goes_on(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "BATCH", 2)
    config = SuiteConfig(paint=QUICK, answer_tokens=3, caption_tokens=3)
    with Work(checkpoint, tmp_path / "whole") as at_once:
        rows = Suite(at_once, some_faces(), config).rows("quick")
    real, calls = work.paint, []

    def dying(*arguments, **options):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(work, "paint", dying)
    with pytest.raises(KeyboardInterrupt), Work(checkpoint, tmp_path / "cut") as cut:
        Suite(cut, some_faces(), config).rows("quick")
    with (tmp_path / "cut" / "paintings.jsonl").open("a") as file:
        file.write('{"key": "face-2", "val')  # a line that a power failure cut
    calls.append("")
    with Work(checkpoint, tmp_path / "cut") as cut:
        again = Suite(cut, some_faces(), config).rows("quick")
    assert [len(each) for each in calls] == [2, 2, 0, 2, 1]  # the first batch once, the others after it
    assert again == rows
    for number in range(5):
        name = f"paintings/{number:05d}.png"
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / each / name)) for each in ("whole", "cut")))
    calls.clear()
    with Work(checkpoint, tmp_path / "cut") as third:
        assert Suite(third, some_faces(), config).rows("quick") == rows and calls == []


def test_a_painting_that_was_lost_is_painted_again(checkpoint, tmp_path):
    with Work(checkpoint, tmp_path) as first:
        Suite(first, some_faces(), SuiteConfig(paint=QUICK)).fid("fid")
    file = tmp_path / "paintings" / "00003.png"
    before = file.read_bytes()
    file.unlink()
    with Work(checkpoint, tmp_path) as again:
        assert len(Suite(again, some_faces(), SuiteConfig(paint=QUICK)).paintings) == 5
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "chunk", "text"])
def test_a_painting_that_is_damaged_is_named(checkpoint, tmp_path, damage):
    with Work(checkpoint, tmp_path) as first:
        Suite(first, some_faces(), SuiteConfig(paint=QUICK)).fid("fid")
    file = tmp_path / "paintings" / "00003.png"
    content = file.read_bytes()
    (length,) = struct.unpack(">I", content[33:37])  # of the first chunk after the header's, a text
    other = {
        "cut": content[:-200], "text": b"no picture",
        "chunk": content[: 41 + length] + b"\0\0\0\0" + content[45 + length :],
    }  # fmt: skip
    file.write_bytes(other[damage])
    (tmp_path / "inception-paintings.npy").unlink()
    with Work(checkpoint, tmp_path) as again:
        rows = by_name(Suite(again, some_faces(), SuiteConfig(paint=QUICK)).rows("quick"))
    assert "00003.png is damaged" in rows["fid"].reason and "delete it, and it is painted" in rows["fid"].reason
    assert rows["vqa_exact"].value is not None


@pytest.mark.parametrize("count,expected", [(3, 3), (24, 24), (30, 24), (100, 24)])
def test_wrong_answers_are_shown_from_all_over(checkpoint, tmp_path, count, expected):
    measured = opened(checkpoint, tmp_path)
    for number in range(count):
        measured.work.journal("answers").put(str(number), {"given": "no", "references": ["yes"], "number": number})
    shown = measured.shown()
    numbers = [each["number"] for each in shown["wrong"]]
    assert len(numbers) == expected and shown["wrong_count"] == count and numbers[0] == 0
    assert all(abs(number - place * count / expected) <= 1 for place, number in enumerate(numbers))


def test_prompts_and_questions_without_room_are_left_out(checkpoint, tmp_path):
    long = some_faces()
    first = long.items[0]
    question = Question("where " * 70, ("left",), "facing", "action")
    long.items[0] = Face(first.key, first.image, ("a face " * 40,), (question,))
    measured = opened(checkpoint, tmp_path, long)
    assert [face.key for face, *_ in measured.paintings] == [f"face-{index}" for index in (1, 2, 3, 4)]
    assert len(measured.answers) == 8


class Nobody:
    """Vectors of faces, by their mean colour; none in a black picture."""

    def __call__(self, images):
        import torch

        vectors = torch.tensor(np.stack([image.mean((0, 1)) - 127 for image in images])).float()
        return torch.nn.functional.normalize(vectors, dim=1)


def test_identity_by_another_encoder_keeps_cosines_alone(checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("unif2ace.encoders.encoder", lambda kind, **options: asked.append((kind, options)) or Nobody())
    measured = opened(checkpoint, tmp_path, identity="arcface-mbf")
    row, others = measured.identity("identity"), measured.identity("identity_others")
    (kind, options), *more = asked
    assert kind == "arcface-mbf" and options["frame"].shape == (5, 2) and not more
    same = []
    for face, _, image in measured.paintings:
        one, two = Nobody()([face.image, image])
        same.append(float(one @ two))
    assert row.value == pytest.approx(np.mean(same), abs=1e-5) and others.value != row.value
    for line in (tmp_path / "identity.jsonl").read_text().splitlines():
        assert set(json.loads(line)["value"]) == {"same", "other"}


def test_one_face_has_no_other(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("unif2ace.encoders.encoder", lambda kind, **options: Nobody())
    measured = opened(checkpoint, tmp_path, some_faces(1), identity="arcface-mbf")
    rows = by_name(measured.rows("quick"))
    assert rows["identity"].value is not None
    assert rows["identity_others"].value is None and "there is no other" in rows["identity_others"].reason


@pytest.mark.parametrize("same", ["sface", "sface:somewhere"])
def test_the_model_s_own_identity_encoder_is_refused(checkpoint, tmp_path, same):
    rows = by_name(opened(checkpoint, tmp_path, identity=same).rows("quick"))
    assert "sface is what the model itself is given" in rows["identity"].reason and rows["fid"].value is not None


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"frame": "oval"}, "frame: expected one of face, square"), ({"faces": -1}, "faces: expected at least 0"),
        ({"repeats": 0}, "repeats: expected at least 1"), ({"vlm": VlmConfig()}, "vlm: expected one of folder"),
        ({"vlm": VlmConfig(endpoint=EndpointConfig("http://localhost:1/v1", "m"))}, "vlm.endpoint.vision: expected"),
        ({"judge_gpt": EndpointConfig("http://example.org/v1", "m")}, "judge_gpt.url: http to example.org"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(changes, says):
    with pytest.raises(UserError, match=says):
        SuiteConfig(**changes).check()


def test_a_folder_holds_results_of_one_kind_of_settings(tmp_path):
    suite.claim(tmp_path, {"suite": "quick", "seed": 0})
    suite.claim(tmp_path, {"suite": "quick", "seed": 0})
    with pytest.raises(UserError, match="holds results of another seed: name another --out"):
        suite.claim(tmp_path, {"suite": "quick", "seed": 1})
