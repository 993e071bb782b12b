"""Prompts as files: what is filled in, how an answer is read."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest

from unif2ace.endpoint.prompts import load_prompt
from unif2ace.errors import UserError


def test_json_is_found_among_words_but_never_a_part_of_a_broken_one(prompt):
    assert prompt.read('Sure!\n```json\n{"word": "oak"}\n```')["word"] == "oak"
    with pytest.raises(ValueError, match="not JSON"):
        prompt.read('{"list": [{"word": "oak"}')


def test_what_a_model_says_to_itself_is_no_answer(prompt):
    assert prompt.read('<think>Is it {"word": "elm"}? No [sure].</think>\n{"word": "oak"}')["word"] == "oak"
    with pytest.raises(ValueError, match="not JSON"):
        prompt.read('<think>{"word": "elm"}</think>')


def test_nothing_but_words_goes_into_a_prompt(prompt):
    for value in (np.zeros(128), [0.1, 0.2], 5, None, b"x"):
        with pytest.raises(ValueError, match="thing: expected a text"):
            prompt.messages({"thing": value})
    with pytest.raises(ValueError, match=r"expected values of \['thing'\], got \['name', 'thing'\]"):
        prompt.messages({"thing": "x", "name": "y"})
    assert prompt.messages({"thing": "{thing} {other}"})[0]["content"] == "Say a word on {thing} {other}."


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "expected a prompt's keys"), ("user: x", "schema: it is missing"),
        ("schema: {}", "user: it is missing"),
        ("user: x\nschema: {}\nwhat: 1", "what: expected one of"), ("user: 5\nschema: {}", "user: expected"),
        ("user: x\nschema: {type: wrong}", "is not valid"), ("user: x\nschema: {}\nform: xml", "form: expected"),
        ("user: x\nschema: {}\nform: lines", "form: expected"), ("user: [", "cannot read the prompt"),
        ("user: x\nschema: {}\nform: lines\nline: '('", "missing"),
        ("user: x\nschema: {}\nshots: [{user: a}]", "shots: expected turns"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_none(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_prompt(tmp_path / "p.yaml")


def test_a_prompt_that_is_missing_and_one_of_lines(tmp_path):
    with pytest.raises(UserError, match="cannot read the prompt"):
        load_prompt(tmp_path / "none.yaml")
    (tmp_path / "p.yaml").write_text(
        textwrap.dedent("""
        system: be brief
        shots: [{user: a, assistant: b}]
        user: "{x}"
        form: lines
        line: 'Q: (?P<question>.+?) A: (?P<answer>.+)'
        schema: {type: array, minItems: 1}
        """)
    )
    prompt = load_prompt(tmp_path / "p.yaml")
    assert [each["role"] for each in prompt.messages({"x": "y"})] == ["system", "user", "assistant", "user"]
    assert prompt.read("Well:\nQ: one? A: yes.\n\n Q: two? A: no.\nQ: three?") == [
        {"question": "one?", "answer": "yes."},
        {"question": "two?", "answer": "no."},
    ]
    with pytest.raises(ValueError, match="non-empty|too short"):
        prompt.read("nothing")
