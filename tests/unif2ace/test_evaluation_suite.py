"""`unif2ace evaluate` on an untrained model, with doubles for what is outside: rows, reasons, resuming, the report."""

import json
import re

import conftest
import numpy as np
import pytest
import sets
from endpoints import Server
from PIL import Image

from unif2ace.attributes.base import Attribute
from unif2ace.attributes.sources import open_source
from unif2ace.checkpoint import Checkpoint
from unif2ace.cli import main
from unif2ace.data.config import SetConfig
from unif2ace.endpoint import EndpointConfig
from unif2ace.errors import UserError
from unif2ace.evaluation import judge, page, suite, work
from unif2ace.evaluation.faces import Face, Faces, Question, open_faces, subject, teller
from unif2ace.evaluation.suite import Suite, SuiteConfig, VlmConfig
from unif2ace.evaluation.vlm import rating
from unif2ace.evaluation.work import Work
from unif2ace.model.painting import PaintSettings

SIDE = conftest.SIDE
QUICK = PaintSettings(steps=2)


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    """No face encoder, and Inception in little."""

    class Inception:
        def __init__(self, device):
            pass

        def __call__(self, images):
            return np.stack([image[::16, ::16].astype(float).ravel() for image in images])

    monkeypatch.setattr("unif2ace.generation.reading.face_encoder", lambda: conftest._no_encoder)
    monkeypatch.setattr(suite, "Inception", Inception)


@pytest.fixture
def checkpoint(untrained):
    return Checkpoint.load(untrained)


class Light:
    """Tells light faces from dark ones."""

    name = "light"
    categories = {"light": ("dark", "bright")}

    def __call__(self, images):
        return [[Attribute("light", "bright" if image.mean() > 127 else "dark", 1.0)] for image in images]


def some_faces(count=5, source=True):
    rng = np.random.default_rng(0)
    items = [
        Face(
            f"face-{index}", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            (f"a face with {('dark hair', 'big smile')[index % 2]} {index}",),
            (Question("how light is the hair?", ("dark", f"dark {index}"), "hair", "appearance"),
             Question("where does the face look?", ("left", "ahead", f"{index}"), "facing", "action")),
        )
        for index in range(count)
    ]  # fmt: skip

    def told(text):
        return {"light": "dark"} if "dark" in text else {"light": "bright"} if "big" in text else {}

    return Faces("five faces", "f", items, told, Light() if source else None)


def opened(checkpoint, folder, faces=None, **changes):
    config = SuiteConfig(paint=QUICK, answer_tokens=3, caption_tokens=3, repeats=2, **changes)
    return Suite(Work(checkpoint, folder), faces or some_faces(), config)


def by_name(rows):
    return {row.name: row for row in rows}


def test_every_row_of_the_paper_s_suite_has_a_value_or_a_reason(checkpoint, tmp_path):
    measured = opened(checkpoint, tmp_path)
    rows = by_name(measured.rows("paper"))
    assert list(rows) == list(suite.SUITES["paper"])
    for name in ("fid", "kid", "fid_tokenizer", "agreement", "vqa_exact", "vqa_soft", "caption_agreement"):
        row = rows[name]
        assert row.value is not None and row.low <= row.value <= row.high and not row.reason, name
    for name, says in {
        "identity": "no encoder is named.*not sface", "vqascore": "--vlm.folder", "vlm_score": "--vlm.folder",
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


@pytest.mark.parametrize("same", ["sface", "sface:somewhere"])
def test_the_model_s_own_identity_encoder_is_refused(checkpoint, tmp_path, same):
    rows = by_name(opened(checkpoint, tmp_path, identity=same).rows("quick"))
    assert "sface is what the model itself is given" in rows["identity"].reason and rows["fid"].value is not None


def endpoint(server, **changes):
    return EndpointConfig(server.url, "judge-1", tries=1, answers=2, give_up=3, concurrency=2, timeout=5, **changes)


def test_a_judge_is_asked_the_same_several_times(checkpoint, tmp_path):
    """6 the first time and 8 the second (the client's seed tells them apart): mean 7, means spread by sqrt(2)."""
    with Server(lambda body: json.dumps({"score": 6 + 2 * (body["seed"] % 2)})) as server:
        measured = opened(checkpoint, tmp_path, judge_gpt=endpoint(server))
        row, answers = measured.judged("desc_gpt"), measured.judged("conv_gpt")
        assert len(server.seen) == 2 * 5 + 2 * 10
    assert row.value == 7 and (row.count, row.groups) == (10, 5) and answers.count == 20
    assert measured.spent["judge_gpt"]["requests"] == 30 and measured.spent["judge_gpt"]["tokens_in"] == 300
    assert "asked 2 times" in row.how and "means spread by 1.414" in row.how and "judge-description" in row.how
    body = server.seen[0][1]
    said = json.dumps(body)
    assert "a face with dark hair" in said or "a face with big smile" in said
    assert "image_url" not in said  # a judge of texts sees no picture


def test_an_endpoint_that_fails_leaves_what_is_done(checkpoint, tmp_path):
    """After 4 answers it fails; the row says so, the others stand, and the next run asks for the rest alone."""
    count = iter(range(1000))

    def failing(body):
        return json.dumps({"score": 5}) if next(count) < 4 else (500, {}, b"broken")

    with Server(failing) as server:
        with Work(checkpoint, tmp_path) as first:
            config = SuiteConfig(paint=QUICK, judge_gpt=endpoint(server), repeats=2)
            rows = by_name(Suite(first, some_faces(), config).rows("paper"))
        assert rows["desc_gpt"].value is None and "did not answer" in rows["desc_gpt"].reason
        assert rows["fid"].value is not None and rows["vqa_soft"].value is not None
        before = len(server.seen)
        server.answer = lambda body: json.dumps({"score": 5})
        with Work(checkpoint, tmp_path) as again:
            row = Suite(again, some_faces(), config).judged("desc_gpt")
        assert row.value == 5 and row.count == 10
        assert len(server.seen) - before == 10 - 4


def test_an_answer_that_is_none_is_asked_again_then_counted(checkpoint, tmp_path):
    def wrong(body):
        return json.dumps({"score": 11}) if "dark hair" in json.dumps(body["messages"][1]) else '{"score": 3}'

    with Server(wrong) as server:
        measured = opened(checkpoint, tmp_path, judge_ds=endpoint(server))
        row = measured.judged("desc_ds")
    assert row.value == 3 and row.count == 4 and "6 never answered as asked" in row.how


def test_a_seeing_endpoint_scores_paintings(checkpoint, tmp_path):
    def answer(body):
        text = json.dumps(body["messages"])
        assert "data:image/jpeg;base64," in text
        return ("Yes." if "dark hair" in text else "no") if "figure show" in text else "The match: 40"

    with Server(answer) as server:
        vlm = VlmConfig(endpoint=endpoint(server, vision=True))
        measured = opened(checkpoint, tmp_path, vlm=vlm)
        assert measured.vlm("vqascore").value == pytest.approx(3 / 5)
        row = measured.vlm("vlm_score")
    assert row.value == 40 and "asked 2 times" in row.how


@pytest.mark.parametrize(
    "text,expected",
    [("85", 85), ("I say 70 of 100.", 70), ("250, no: 30", 30), ("none", None), ("7.5", 7), ("-", None), ("100", 100)],
)
def test_a_rating_is_the_first_number_up_to_a_hundred(text, expected):
    assert rating(text) == expected


def test_yes_is_yes():
    assert [judge.said_yes(each) for each in ("Yes", " yes, it does", '"Yes."', "No", "not yes")] == [1, 1, 1, 0, 0]


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


# Faces


def test_a_set_s_faces(tmp_path):
    path = sets.llava(tmp_path, 4)
    records = json.loads(path.read_text())
    extra = {"id": "more", "image": "0.png", "conversations": [
        {"from": "human", "value": "which face is this, 0?"}, {"from": "gpt", "value": "another answer"}]}  # fmt: skip
    path.write_text(json.dumps([*records, extra]))
    (tmp_path / "2.png").write_bytes(b"no picture")
    found = open_faces(SetConfig(str(path)), 16, "square", 10, 16, 0, None)
    assert [each.key for each in found.items] == ["face-0", "face-1", "face-3"]
    assert found.items[0].image.shape == (16, 16, 3) and found.items[0].captions == ("a face with dark hair 0",)
    assert found.items[0].questions[0].references == ("the face 0", "another answer")
    (where, reason), = found.left_out  # fmt: skip
    assert "2.png" in where and "not a picture" in reason
    assert len(open_faces(SetConfig(str(path)), 16, "square", 1, 16, 0, None).items) == 1
    assert len(open_faces(SetConfig(str(path)), 16, "square", 9, 1, 0, None).items[1].questions) == 1
    other = open_faces(SetConfig(str(path)), 16, "square", 1, 16, 0, None)
    assert other.fingerprint != found.fingerprint


def test_a_set_without_a_face_says_why(tmp_path, monkeypatch):
    path = sets.llava(tmp_path, 1)
    monkeypatch.setattr("unif2ace.data.identity.find_face", lambda image: None)
    with pytest.raises(UserError, match="no face in it that can be used: .*no face is found in it"):
        open_faces(SetConfig(str(path)), 16, "face", 10, 16, 0, None)


@pytest.mark.parametrize(
    "question,answer,expected",
    [
        ("What is the hair colour?", "black", ("hair colour", "appearance")),
        ("Does the person wear eyeglasses?", "yes", ("eyeglasses", "appearance")),
        ("What does the mouth do?", "a smile", ("smile", "action")),
        ("How does the person feel?", "a sad expression", ("emotion", "emotion")),
        ("What time is it?", "noon", ("other", "other")),
    ],
)
def test_a_question_s_category(question, answer, expected):
    assert subject(question, answer) == expected


def test_a_caption_tells_its_attributes():
    told = teller({"hat": ("yes", "no"), "hair colour": ("black", "blond"), "whiskers": ("yes", "no")})
    assert told("A man with no hat and fair hair.") == {"hat": "no", "hair colour": "blond"}
    assert told("someone in a HAT, no whiskers") == {"hat": "yes", "whiskers": "no"}
    assert told("a chat on hats") == {}


def test_the_demo_s_held_out_faces(tmp_path):
    from unif2ace.data.attributes import ATTRIBUTES, NAMES, classify, fit_thresholds, measure
    from unif2ace.data.dataset import FaceSet

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    thresholds = fit_thresholds(measure(images))
    classes = classify(measure(images), thresholds)
    identity = rng.normal(size=(9, 4)).astype(np.float32)
    FaceSet(images, classes, thresholds, identity, 4, {"held_out": 4}).save(tmp_path / "faces.npz")
    found = open_faces(SetConfig(str(tmp_path / "faces.npz")), 64, "face", 3, 16, 0, None)
    assert [each.key for each in found.items] == ["face-5", "face-6", "face-7"]
    for face, row in zip(found.items, classes[5:]):
        words = {each.name: each.words[value] for each, value in zip(ATTRIBUTES, row)}
        assert found.told(face.captions[0]) == words
        assert {each.category: each.value for each in found.source([face.image])[0]} == words
        assert [each.references[0] for each in face.questions] == [words[name] for name in NAMES]
    assert found.source([]) == []
    assert open_source(f"measured:{tmp_path / 'faces.npz'}")(images[5:7]) == found.source(images[5:7])
    light = Light()  # another is taken where it is named
    assert open_faces(SetConfig(str(tmp_path / "faces.npz")), 64, "face", 3, 16, 0, light).source is light
    with pytest.raises(UserError, match="has pictures of 64 pixels, the model paints 32"):
        open_faces(SetConfig(str(tmp_path / "faces.npz")), 32, "face", 3, 16, 0, None)


# The command and its page


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
    told = capsys.readouterr().out
    assert "not measured: no judge is named" in told and "report: " in told
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
