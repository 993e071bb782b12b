"""The commands on faces: many at once, in-painting, captions, chat, the watermark, the model card."""

import io
import os
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from unif2ace.cli import main
from unif2ace.safety import watermark

SIDE = 64


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def painted(untrained, tmp_path, capsys):
    """A painting of the model's own size: it needs no face found in it."""
    path = tmp_path / "own.png"
    more = ("--count", 1, "--steps", 2, "--no-watermark", "--out", path)
    assert run(capsys, "generate", "--checkpoint", untrained, "--prompt", "dark hair", *more)[0] == 0
    return path


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ----------------------------------------------------------------------------------------------------------- generate


def test_a_row_a_prompt(untrained, tmp_path, capsys):
    out = tmp_path / "sheet.jpg"
    prompts = ("--prompt", "dark hair", "--prompt", "light hair")
    code, said, _ = run(
        capsys, "generate", "--checkpoint", untrained, *prompts, "--count", 3, "--steps", 2, "--out", out
    )
    assert code == 0 and read(out).shape == (2 * SIDE, 3 * SIDE, 3)
    assert said == f"{out}: 6 faces from 'dark hair', 'light hair'\n"


def test_one_file_a_face(untrained, tmp_path, capsys):
    out = tmp_path / "{prompt}-{n}.png"
    prompts = ("--prompt", "dark hair", "--prompt", "a Light hair!")
    code, said, _ = run(
        capsys, "generate", "--checkpoint", untrained, *prompts, "--count", 2, "--steps", 2, "--out", out
    )
    names = ["dark-hair-1.png", "dark-hair-2.png", "a-light-hair-3.png", "a-light-hair-4.png"]
    assert code == 0 and sorted(os.listdir(tmp_path)) == sorted(names) and said.count("\n") == 4
    sheet = tmp_path / "sheet.png"
    same = ("--no-watermark", "--count", 2, "--steps", 2)
    assert run(capsys, "generate", "--checkpoint", untrained, *prompts, *same, "--out", sheet)[0] == 0
    assert run(capsys, "generate", "--checkpoint", untrained, *prompts, *same, "--out", out, "--force")[0] == 0
    assert np.array_equal(read(tmp_path / names[3]), read(sheet)[SIDE:, SIDE:])


@pytest.mark.parametrize(
    "out,words",
    [
        ("{seed}.png", ["{n}", "{seed}"]),
        ("{prompt}.png", ["one name", "{n}"]),
        ("face.gif", [".png"]),
        ("face", [".png"]),
    ],
)
def test_a_name_that_cannot_be(untrained, tmp_path, capsys, out, words):
    code, _, error = run(capsys, "generate", "--checkpoint", untrained, "--prompt", "hair", "--out", tmp_path / out)
    assert code == 1 and all(word in error for word in words) and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_replaced_on_demand_alone(untrained, tmp_path, capsys):
    (tmp_path / "a-2.png").write_bytes(b"mine")
    command = ("generate", "--checkpoint", untrained, "--prompt", "hair", "--count", 2, "--steps", 1)
    code, _, error = run(capsys, *command, "--out", tmp_path / "a-{n}.png")
    assert code == 1 and "there already" in error and "--force" in error and os.listdir(tmp_path) == ["a-2.png"]
    assert run(capsys, *command, "--out", tmp_path / "a-{n}.png", "--force")[0] == 0
    assert read(tmp_path / "a-2.png").shape == (SIDE, SIDE, 3)


def test_paintings_are_marked_unless_told_otherwise(untrained, tmp_path, capsys):
    command = ("generate", "--checkpoint", untrained, "--prompt", "hair", "--count", 1, "--steps", 2)
    code, _, error = run(capsys, *command, "--out", tmp_path / "with.png")
    assert code == 0 and error == "" and watermark.detect(read(tmp_path / "with.png")).found
    code, _, error = run(capsys, *command, "--out", tmp_path / "without.png", "--no-watermark")
    assert code == 0 and "no watermark" in error and not watermark.detect(read(tmp_path / "without.png")).found
    code, said, _ = run(capsys, "watermark", tmp_path / "with.png", tmp_path / "without.png")
    lines = said.splitlines()
    assert code == 0 and "carries the watermark" in lines[0] and "no watermark found" in lines[1]


def test_watermark_of_what_is_no_picture(tmp_path, capsys):
    (tmp_path / "a.png").write_text("no")
    code, said, error = run(capsys, "watermark", tmp_path / "a.png")
    assert code == 1 and said == "" and "not a picture" in error


def test_a_safety_checker(untrained, tmp_path, capsys, monkeypatch):
    (tmp_path / "cli_rules.py").write_text(
        "def refuse(prompts, images):\n    return ['never'] * len(prompts)\n"
        "def blank(prompts, images):\n    return [images is not None and i == 1 and 'odd' or None "
        "for i in range(len(prompts))]\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ("generate", "--checkpoint", untrained, "--prompt", "hair", "--count", 2, "--steps", 1)
    code, _, error = run(capsys, *command, "--safety", "cli_rules:refuse", "--out", "a.png")
    assert code == 1 and "refused by the safety checker: never" in error and not os.path.exists("a.png")
    code, _, error = run(capsys, *command, "--safety", "cli_rules:blank", "--out", "a.png", "--no-watermark")
    assert code == 0 and "face 2 is blanked by the safety checker: odd" in error
    assert (read("a.png")[:, SIDE:] == 127).all() and read("a.png")[:, :SIDE].std() > 0


# ------------------------------------------------------------------------------------------------------------ inpaint


def test_inpaint_keeps_what_is_outside_the_box(untrained, painted, tmp_path, capsys):
    out = tmp_path / "new.png"
    command = ("inpaint", "--checkpoint", untrained, "--image", painted, "--prompt", "light hair", "--no-watermark")
    code, said, _ = run(capsys, *command, "--box", "8,16,40,64", "--steps", 2, "--out", out, "--seed", 3)
    before, after = read(painted), read(out)
    outside = np.ones((SIDE, SIDE), bool)
    outside[16:64, 8:40] = False
    assert code == 0 and "1 face from 'light hair'" in said
    assert np.array_equal(before[outside], after[outside]) and (before != after).any()
    mask = tmp_path / "mask.png"
    cv2.imwrite(str(mask), np.where(outside, 0, 255).astype(np.uint8))
    again = tmp_path / "again.png"
    assert run(capsys, *command, "--mask", mask, "--steps", 2, "--out", again, "--seed", 3)[0] == 0
    assert np.array_equal(read(again), after)
    assert b"compositeWithTrainedAlgorithmicMedia" in out.read_bytes()


def test_inpaint_on_a_photograph_works_in_its_frame(untrained, photograph, tmp_path, capsys):
    out = tmp_path / "new.png"
    command = ("inpaint", "--checkpoint", untrained, "--image", photograph, "--prompt", "hair", "--steps", 1)
    assert run(capsys, *command, "--box", "64,128,192,240", "--count", 2, "--out", out)[0] == 0
    assert read(out).shape == (SIDE, 2 * SIDE, 3)


@pytest.mark.parametrize(
    "where,words",
    [
        (("--box", "1,2,3"), ["--box", "left,top,right,bottom"]),
        (("--box", "90,90,99,99"), ["nothing of it"]),
        (("--box", "5,5,5,9"), ["nothing of it"]),
        (("--mask", "small.png"), ["--mask", "64 x 64", "8 x 8"]),
        (("--mask", "black.png"), ["--mask", "white"]),
        (("--mask", "none.png"), ["cannot read"]),
    ],
)
def test_a_mask_that_cannot_be(untrained, painted, tmp_path, capsys, monkeypatch, where, words):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("small.png", np.full((8, 8, 3), 255, np.uint8))
    cv2.imwrite("black.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    command = ("inpaint", "--checkpoint", untrained, "--image", painted, "--prompt", "hair", "--out", "new.png")
    code, _, error = run(capsys, *command, *where)
    assert code == 1 and all(word in error for word in words) and error.count("\n") == 1
    assert not os.path.exists("new.png")


# --------------------------------------------------------------------------------------------------- ask, caption, chat


def test_several_pictures_and_questions_in_one_call(untrained, painted, photograph, capsys):
    command = ("ask", "--checkpoint", untrained, "--max-tokens", 4)
    both = (photograph, painted)
    questions = ("how light is the hair?", "is it dark?")
    asked = [each for question in questions for each in ("--question", question)]
    code, said, _ = run(capsys, *command, "--image", *both, *asked)
    rows = [line.split("\t") for line in said.splitlines()]
    assert code == 0 and [row[:2] for row in rows] == [[str(image), q] for image in both for q in questions]
    for image, question, answer in rows:
        code, said, _ = run(capsys, *command, "--image", image, "--question", question)
        assert code == 0 and said == answer + "\n"


def test_a_caption_of_a_model_that_never_learned_to_is_not_passed_off_as_one(untrained, painted, capsys):
    code, said, error = run(capsys, "caption", "--checkpoint", untrained, "--image", painted, "--max-tokens", 3)
    assert code == 0 and said.count("\n") == 1
    assert "not trained to write captions" in error and "describe this face ." in error
    told = ("--prompt", "describe this face .")
    other = run(capsys, "caption", "--checkpoint", untrained, "--image", painted, "--max-tokens", 3, *told)
    assert other == (0, said, "")


def test_a_caption_is_asked_for_as_was_trained(untrained, painted, capsys, monkeypatch):
    from unif2ace.checkpoint import Checkpoint
    from unif2ace.generation.reading import FaceReader

    load, asked = Checkpoint.load, []

    def with_prompt(folder):
        checkpoint = load(folder)
        checkpoint.processor.prompts["caption"] = "what is this ?"
        return checkpoint

    def answer(self, faces, questions, max_tokens):
        asked.extend(questions)
        return ["a face"] * len(questions)

    monkeypatch.setattr(Checkpoint, "load", with_prompt)
    monkeypatch.setattr(FaceReader, "answer", answer)
    assert run(capsys, "caption", "--checkpoint", untrained, "--image", painted) == (0, "a face\n", "")
    assert asked == ["what is this ?"]
    code, said, _ = run(capsys, "caption", "--checkpoint", untrained, "--image", painted, painted)
    assert code == 0 and said == f"{painted}\ta face\n" * 2


def test_chat_answers_line_by_line_and_remembers(untrained, painted, capsys, monkeypatch):
    from unif2ace.generation.reading import FaceReader

    seen = []
    converse = FaceReader.converse

    def watched(self, face, history, question, max_tokens):
        seen.append((len(history), question))
        return converse(self, face, history, question, max_tokens)

    monkeypatch.setattr(FaceReader, "converse", watched)
    lines = f"is it dark?\n\nhow light is the hair?\n/image {painted}\nis it dark?\n/exit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, said, error = run(capsys, "chat", "--checkpoint", untrained, "--image", painted, "--max-tokens", 3)
    answers = said.split("\n")
    assert code == 0 and error == "" and len(answers) == 4
    assert [question for _, question in seen] == ["is it dark?", "how light is the hair?", "is it dark?"]
    assert seen[0][0] == seen[2][0] == 0 < seen[1][0] and answers[0] == answers[2]


def test_chat_goes_on_after_a_line_it_cannot_answer(untrained, painted, capsys, monkeypatch):
    lines = "is it dark?\n/image nowhere.png\n" + "long " * 200 + "\nis it dark?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, said, error = run(capsys, "chat", "--checkpoint", untrained, "--image", painted, "--max-tokens", 2)
    assert code == 1 and said.count("\n") == 2
    assert "nowhere.png" in error and "at most" in error and "2 of the lines" in error


def test_chat_forgets_the_oldest_turns_when_there_is_no_room(untrained):
    from unif2ace.checkpoint import Checkpoint
    from unif2ace.generation import reading

    turns = reading.split_turns([5, 6, 0, 7, 0, 8], 0)
    assert turns == [[5, 6, 0], [7, 0], [8]]
    checkpoint = Checkpoint.load(untrained)
    reader = reading.FaceReader.__new__(reading.FaceReader)
    reader.checkpoint = checkpoint
    config = checkpoint.model.config
    import torch

    face = reading.Faces(
        torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, config.identity), torch.zeros(1, 64, config.semantic)
    )
    history = [5] * 30 + [0] + [6] * 30 + [0]
    _, after = reader.converse(face, history, "is it dark?", max_tokens=2)
    asked = checkpoint.text_tokenizer.encode("is it dark?")
    assert after[: 31 + len(asked)] == [6] * 30 + [0] + asked and after[-1] == 0


@pytest.mark.parametrize("command", ["ask", "caption", "chat"])
def test_answers_have_a_length(untrained, painted, capsys, command):
    more = ("--question", "what?") if command == "ask" else ()
    given = (command, "--checkpoint", untrained, "--image", painted, "--max-tokens", 0, *more)
    code, _, error = run(capsys, *given)
    assert code == 1 and "--max-tokens: expected" in error


def test_a_picture_without_a_face_can_be_taken_whole(untrained, tmp_path, capsys):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "noise.png"), rng.integers(0, 255, (90, 120, 4), dtype=np.uint8))
    Image.fromarray(rng.integers(0, 255, (90, 120), dtype=np.uint8)).save(tmp_path / "grey.png")
    command = ("ask", "--checkpoint", untrained, "--question", "what?", "--max-tokens", 2, "--no-crop")
    assert run(capsys, *command, "--image", tmp_path / "noise.png", tmp_path / "grey.png")[0] == 0


# --------------------------------------------------------------------------------------------------------------- card


def test_a_model_card_and_what_becomes_of_ones_own(untrained, tmp_path, capsys):
    import json
    import shutil

    folder = tmp_path / "mine" / "checkpoint"
    shutil.copytree(untrained, folder)
    code, said, _ = run(capsys, "card", folder)
    card = (folder / "README.md").read_text()
    assert code == 0 and "without results" in said
    assert card.startswith("---\nlibrary_name: unif2ace\n") and "\nlicense: other\n" in card and "# mine\n" in card
    assert "| layers x hidden size | 2 x 32 |" in card and "3 + 4" in card and "**identifying**" in card
    attribute = {"match": 0.75, "chance": 0.5, "accuracy": 0.875, "majority": 0.625}
    results = {
        "faces": 12, "parameters": 1234567,
        "generation": {"prompts": 8, "attributes": {"hair": attribute}},
        "understanding": {"faces": 9, "attributes": {"hair": attribute}},
    }  # fmt: skip
    (folder.parent / "results.json").write_text(json.dumps(results))
    assert run(capsys, "card", folder, "--license", "apache-2.0")[0] == 0  # ours is replaced
    card = (folder / "README.md").read_text()
    assert "| hair | 0.75 | 0.50 | 0.88 | 0.62 |" in card and "1,234,567" in card and "12 synthetic faces" in card
    assert "license: apache-2.0" in card
    (folder / "README.md").write_text(card.replace("Research", "Fun"))
    code, _, error = run(capsys, "card", folder)
    assert code == 1 and "by hand" in error and "Fun" in (folder / "README.md").read_text()
    assert run(capsys, "card", folder, "--force")[0] == 0 and "Fun" not in (folder / "README.md").read_text()


def test_a_card_of_nothing(tmp_path, capsys):
    code, _, error = run(capsys, "card", tmp_path / "none")
    assert code == 1 and "no checkpoint" in error


def test_what_is_missing_for_the_page_is_named(untrained, capsys, monkeypatch):
    for name in ("gradio", "starlette", "starlette.middleware"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, error = run(capsys, "demo-app", "--checkpoint", untrained)
    assert code == 1 and "pip install 'unif2ace[app]'" in error and error.count("\n") == 1
