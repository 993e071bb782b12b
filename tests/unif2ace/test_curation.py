"""Building a set: what is believed, what goes on, that only what may leaves the machine, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from endpoints import Server, said
from toy_source import Toy, eight, picture, stand_ins  # noqa: F401

from unif2ace.attributes.lexicon import Lexicon
from unif2ace.cli import main
from unif2ace.curation import filters
from unif2ace.curation.build import attribute_source, build
from unif2ace.curation.card import PLOT
from unif2ace.curation.config import (
    AttributesConfig,
    BuildConfig,
    CaptionsConfig,
    CardConfig,
    FacesConfig,
    ImagesConfig,
    QuestionsConfig,
)
from unif2ace.data.config import SetConfig
from unif2ace.data.sources import open_source
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.limits import BudgetSpent
from unif2ace.errors import UserError

CARD = CardConfig("cc-by-4.0", "they signed a form", "our studio", "toys", "me@example.org")
TRAITS = Lexicon({"eyeglasses": ("yes", "no"), "hair colour": ("black", "blond"), "emotion": ("happy", "sadness")})


@pytest.fixture
def pictures(tmp_path):
    return eight(tmp_path / "pictures")


PAIRS = [
    {"question": "Does the person wear eyeglasses?", "answer": "Yes, they do."},
    {"question": "What hair colour is it?", "answer": "black"},
    {"question": "What fills the picture?", "answer": "A texture of squares."},
]


def artist(body):
    """An endpoint with eyes that is often wrong: it says eyeglasses and black hair of everybody, and mends it."""
    content = body["messages"][1]["content"]
    if isinstance(content, list):
        assert content[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
        return json.dumps({"caption": "A portrait of a person with eyeglasses and black hair before a plain wall."})
    if "Measured:" in content:
        facts = content.partition("Measured: ")[2].partition("\n")[0]
        return said(json.dumps({"caption": f"A portrait of a person, {facts}, before a plain wall."}), (300, 40))
    return said("Here you are:\n```json\n" + json.dumps(PAIRS) + "\n```", (200, 60))


@pytest.fixture
def config(pictures, tmp_path):
    return BuildConfig(
        out=str(tmp_path / "set"),
        captioner=EndpointConfig("http://127.0.0.1:9/v1", "artist", vision=True, concurrency=2, image_side=64),
        images=ImagesConfig(path=str(pictures)),
        attributes=AttributesConfig(("toy_source:Toy",)),
        captions=CaptionsConfig(least_facts=1),
        card=CARD,
    )


def at(config, server, **changes):
    return replace(config, captioner=replace(config.captioner, url=server.url, known_as="artist", **changes))


@pytest.mark.usefixtures("stand_ins")
def test_a_whole_run(config, tmp_path, untrained):
    from unif2ace.data.encode import EncodingConfig

    with Server(artist) as server:
        config = replace(at(config, server), encoding=EncodingConfig(str(untrained), frame="square"))
        report = build(config)
        asked = len(server.seen)
        out = tmp_path / "set"
        first = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        build(config)
        assert len(server.seen) == asked, "a second run asks nothing"
    assert {name: (out / name).read_bytes() for name in first} | {"report.json": b""} == first | {"report.json": b""}

    told = {each["image"]: each for each in json.loads(first["faces.json"])}
    assert len(told) == 8 and report["stages"] == [
        ["face checks", 8, 8],
        ["captions", 8, 8],
        ["questions", 8, 8],
    ]
    for number in range(8):
        record = told[f"face{number}.png"]
        truth = {"eyeglasses": "yes" if number & 1 else "no", "hair colour": "blond" if number & 2 else "black"}
        assert record["attributes"] == truth, "what a source is unsure of is not believed"
        assert filters.told(record["caption"], truth, TRAITS) == set(truth)
        answers = record["conversations"][1::2]
        right = [truth["eyeglasses"] == "yes", truth["hair colour"] == "black", True]
        assert [each["value"] for each in answers] == [pair["answer"] for pair, keep in zip(PAIRS, right) if keep]
    assert sum(number for stage, _, number in report["dropped"] if stage == "pairs") == 8
    assert asked == 8 + 6 + 8 and report["endpoints"]["captioner"]["tokens_in"] == 8 * 10 + 6 * 300 + 8 * 200

    card = first["README.md"].decode()
    for each in (CARD.license, CARD.consent, CARD.source, CARD.contact, "17.7", "about 120 tokens", "toy_source:Toy"):
        assert each in card
    assert cv2.imdecode(np.frombuffer(first[PLOT], np.uint8), 1).shape[1] > 800
    source = open_source(SetConfig(str(out / "faces.json"), images=config.images.path), "set")
    assert len(source) == 8 and source[0].captions and source[0].conversations
    assert report["shards"]["samples"] == 8 and list((out / report["shards"]["folder"]).glob("*.tar"))


@pytest.mark.usefixtures("stand_ins")
def test_a_set_that_holds_its_pictures_is_read_by_its_file_alone(config, pictures):
    with Server(artist) as server:
        build(replace(at(config, server), out=str(pictures.parent)))
    source = open_source(SetConfig(str(pictures.parent / "faces.json")), "set")
    assert len(source) == 8 and source[0].pixels().shape == picture(False, False, 0).shape
    assert "`image` (below this folder)" in (pictures.parent / "README.md").read_text()


@pytest.mark.usefixtures("stand_ins")
def test_only_what_may_leaves_the_machine(config, pictures, monkeypatch):
    (pictures / "face0.png").rename(pictures / "Jane Doe private.png")
    monkeypatch.setenv("A_KEY", "sk-secret-0123456789")
    with Server(artist) as server:
        build(at(config, server, key="A_KEY"))
        sent = json.dumps([body for _, body, _ in server.seen])
    out = Path(config.out)
    kept = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".png")
    assert "Jane" not in sent and str(pictures) not in sent and b"sk-secret-0123456789" not in kept
    for _, body, _ in server.seen:
        assert set(body) == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
        for message in body["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            numbers = [word for part in parts for word in part.get("text", "").split() if word[:3] in ("0.0", "-0.")]
            assert not numbers
    assert not list(out.rglob("*.npz"))


@pytest.mark.usefixtures("stand_ins")
def test_what_fails_is_quarantined_reported_and_leaves_the_rest(config):
    def answer(body):
        content = body["messages"][1]["content"]
        if not isinstance(content, list) and "Measured:" in content and "no eyeglasses" in content:
            return json.dumps({"caption": "A portrait of a person with eyeglasses, whatever you say."})
        return artist(body)

    with Server(answer) as server:
        report = build(at(config, server))
    out = Path(config.out)
    told = json.loads((out / "faces.json").read_text())
    assert {each["attributes"]["eyeglasses"] for each in told} == {"yes"} and len(told) == 4
    lost = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert len(lost) == 4 and all("eyeglasses is yes, but it is no" in each["reason"] for each in lost)
    quarantine = (out / "work" / "captioner" / "quarantine.jsonl").read_text().splitlines()
    assert len(quarantine) == 4 and report["endpoints"]["captioner"]["quarantined"] == 4
    assert ["captions", 8, 4] in report["stages"]
    assert ("captions", "correction quarantined: contradiction", 4) in report["dropped"]


@pytest.mark.usefixtures("stand_ins")
def test_a_request_without_a_pair_is_counted_and_the_face_kept(config):
    def answer(body):
        asks = "What is certain" in str(body["messages"][1]["content"])
        return "no questions from me" if asks else artist(body)

    with Server(answer) as server:
        report = build(at(config, server))
    told = json.loads((Path(config.out) / "faces.json").read_text())
    assert len(told) == 8 and report["pairs"] == 0 and ("pairs", "request quarantined", 8) in report["dropped"]
    assert ["questions", 8, 0] in report["stages"]


@pytest.mark.usefixtures("stand_ins")
def test_an_endpoint_that_ends_midway_is_gone_on_with(config):
    Toy.calls = 0
    with Server(artist) as server:
        small = at(config, server, budget_tokens=4_000, concurrency=1)
        with pytest.raises(BudgetSpent, match="run it again to go on"):
            build(small)
        asked = len(server.seen)
        assert 3 < asked < 22 and not (Path(config.out) / "faces.json").exists()
        build(at(config, server, concurrency=1))
        assert len(server.seen) == 22 and Toy.calls == 8, "nothing is asked, and nothing read, twice"


@pytest.mark.usefixtures("stand_ins")
def test_a_captioner_without_eyes_is_told_attributes(config):
    def answer(body):
        content = body["messages"][-1]["content"]
        assert isinstance(content, str)
        if content.startswith("List: "):
            return f"A portrait of a person with {content.removeprefix('List: ')}."
        value, topic = content.removeprefix("Answer: ").removesuffix(".").split(". Topic: ")
        return f"Q: What about the {topic}? A: {value}"

    with Server(answer) as server:
        blind = replace(
            at(config, server, vision=False, mend=False),
            captions=CaptionsConfig(facts=2, least_facts=2, shortest=5),
            questions=QuestionsConfig(prompt="question-lines", facts=1, count=2, apart=True, unsupported=False),
        )
        report = build(blind)
        assert len(server.seen) == 8 + 16
    told = json.loads((Path(config.out) / "faces.json").read_text())
    assert len(told) == 8 and report["pairs"] == 16 and not report["vision"]
    assert {each["value"] for record in told for each in record["conversations"][1::2]} == {
        "yes",
        "no",
        "black",
        "blond",
    }
    assert "sees no picture" in (Path(config.out) / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("field", ["license", "consent", "source", "contact"])
@pytest.mark.parametrize("value", ["", " ", "TODO", "unknown"])
def test_no_set_without_licence_and_consent(config, field, value, tmp_path):
    with pytest.raises(UserError, match=f"card.{field}: it must be filled"):
        build(replace(config, card=replace(CARD, **{field: value})))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": ImagesConfig()}, "images: expected one of path, faces and synthetic, got none"),
        ({"images": ImagesConfig(path="a", synthetic=3)}, "got path, synthetic"),
        ({"faces": FacesConfig(same=2.0)}, "faces.same"),
        ({"attributes": AttributesConfig(least=2.0)}, "attributes.least"),
        ({"captioner": EndpointConfig("http://127.0.0.1:9/v1", "m"), "attributes": AttributesConfig()},
         "attributes.sources: expected one"),
        ({"questions": QuestionsConfig(apart=True)}, "questions.facts"),
        ({"writer": EndpointConfig("http://far.org/v1", "m")}, "writer.url: http to far.org"),
        ({"writer": EndpointConfig("https://far.org/v1", "m", key="NO_KEY")}, "writer.key: .*'NO_KEY' is not set"),
    ],
)  # fmt: skip
def test_configs_that_are_not_possible(config, changes, message):
    with pytest.raises(UserError, match=message):
        build(replace(config, **changes))
    assert not Path(config.out).exists(), "before any work"


def test_sources_that_are_not_there():
    for name, message in (
        ("measured", "measured:FACES.npz"),
        ("nothing:here", "expected classifier, face-parser, measured"),
        ("json:no", "no"),
    ):
        with pytest.raises(UserError, match=message):
            attribute_source(name, None)


def test_the_command_names_what_is_missing(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("out: x\ncaptioner: {url: 'https://x/v1', model: m, vision: true}\n")
    assert main(["build-dataset", str(tmp_path / "c.yaml"), f"--images.path={tmp_path}"]) == 1
    assert "card.license: it must be filled" in capsys.readouterr().err
    assert main(["build-dataset", str(tmp_path / "c.yaml"), "--captioner.modle=n"]) == 1
    assert "captioner.modle: there is no such key; did you mean model?" in capsys.readouterr().err
