"""Settings from YAML and from the command line: what is read, and that a wrong key is named."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from unif2ace.errors import UserError
from unif2ace.settings import parse, read_settings


@dataclass(frozen=True)
class Part:
    size: int = 1
    rate: float = 0.5


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...] = ()
    part: Part = field(default_factory=Part)
    maybe: str | None = "x"
    words: tuple[str, ...] = ("a",)
    on: bool = False


def test_nested_values_become_dataclasses():
    values = {"name": "n", "parts": [{"size": 3}, {"rate": 2}], "maybe": None, "words": ["b", "c"], "on": True}
    assert parse(Whole, values, "w") == Whole("n", (Part(3), Part(rate=2.0)), maybe=None, words=("b", "c"), on=True)
    assert isinstance(parse(Part, {"rate": 2}, "").rate, float)


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, r"^w\.name: it is missing"),
        ({"name": "n", "nmae": 1}, r"^w\.nmae: there is no such key; did you mean name\?"),
        ({"name": "n", "zzz": 1}, r"^w\.zzz: there is no such key; there are: name, parts"),
        ({"name": 3}, r"^w\.name: expected a text, got 3"),
        ({"name": "n", "parts": {"size": 3}}, r"^w\.parts: expected a list"),
        ({"name": "n", "parts": [{}, {"size": 1.5}]}, r"^w\.parts\[1\]\.size: expected a whole number, got 1.5"),
        ({"name": "n", "part": {"size": True}}, r"^w\.part\.size: expected a whole number, got True"),
        ({"name": "n", "part": 3}, r"^w\.part: expected keys and values, got 3"),
        ({"name": "n", "maybe": 3}, r"^w\.maybe: expected a text, got 3"),
        ({"name": "n", "on": "yes"}, r"^w\.on: expected true or false"),
    ],
)
def test_a_wrong_key_is_named(values, message):
    with pytest.raises(UserError, match=message):
        parse(Whole, values, "w")


def test_a_key_of_the_outermost_has_no_prefix():
    with pytest.raises(UserError, match=r"^part\.rate: expected a number, got 'x'"):
        parse(Whole, {"name": "n", "part": {"rate": "x"}}, "")


def test_the_command_line_goes_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: n\npart: {size: 2, rate: 1e-4}\nparts: [{size: 3}]\n")
    values = read_settings(path, ["--part.size=7", "--parts.0.size=8", "--words=[q]", "--maybe=null"])
    assert values["part"]["size"] == 7 and values["parts"] == [{"size": 8}]
    whole = parse(Whole, {**values, "part": {"size": 7}}, "")
    assert whole.words == ("q",) and whole.maybe is None
    assert read_settings(None, ["--a.b.c=1"]) == {"a": {"b": {"c": 1}}}


def test_a_number_in_exponents_is_a_number(tmp_path):
    """YAML 1.1 takes 1e-4 for a text; nobody who writes a learning rate means one."""
    path = tmp_path / "c.yaml"
    path.write_text("rate: 1e-4\n")
    assert parse(Part, read_settings(path, []), "").rate == 1e-4
    assert parse(Part, read_settings(None, ["--rate=5E3"]), "").rate == 5000.0


@pytest.mark.parametrize("given", ["name=n", "--name", "--=3", "--parts.7.size=1", "--name.x.y=1", "--a=[1"])
def test_a_word_without_a_place_is_named(given, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: n\nparts: [{size: 3}]\n")
    with pytest.raises(UserError, match=r"^" + given.replace("[", r"\[").replace(".", r"\.") + ": "):
        read_settings(path, [given])


@pytest.mark.parametrize("content", ["- a\n", "a: [1\n", "3", ""])
def test_a_file_that_is_no_settings(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="c.yaml"):
        read_settings(path, [])
    with pytest.raises(UserError, match="none.yaml is missing"):
        read_settings(tmp_path / "none.yaml", [])
