"""What a text claims, and what falls out of a set for it: contradictions, pairs, leakage, questions asked before."""

from __future__ import annotations

import pytest

from unif2ace.attributes.base import Attribute
from unif2ace.attributes.lexicon import Lexicon
from unif2ace.curation import filters
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.endpoint.prompts import load_prompt

MEASURED = Lexicon({each.name: each.words for each in ATTRIBUTES})
TRAITS = Lexicon({"eyeglasses": ("yes", "no"), "hair colour": ("black", "blond"), "emotion": ("happy", "sadness")})


@pytest.mark.parametrize(
    "text, claims",
    [
        ("A person with dark hair and a bright background.", {"hair": {"dark"}, "background": {"bright"}}),
        ("The hair is light, the background behind them is dark.", {"hair": {"light"}, "background": {"dark"}}),
        ("The hair is not light.", {}), ("She has no dark hair.", {}),
        ("A smiling person, facing left in soft light.",
         {"mouth": {"smiling"}, "facing": {"left"}, "lighting": {"soft"}}),
        ("A bright warm green background", {"background": {"bright"}, "tint": {"warm"}, "greenery": {"green"}}),
        ("dark clothes and light hair", {"clothes": {"dark"}, "hair": {"light"}}),
        ("with a smile on their face", {"mouth": {"smiling"}}), ("no smile", {}),
        ("dark hair, medium hair", {"hair": {"dark", "medium"}}), ("", {}), ("a dark day", {}),
    ],
)  # fmt: skip
def test_what_a_text_claims_of_measured_attributes(text, claims):
    assert MEASURED.claims(text) == claims


@pytest.mark.parametrize(
    "text, claims",
    [
        ("A face with glasses on the nose and black hair", {"eyeglasses": {"yes"}, "hair colour": {"black"}}),
        ("no eyeglasses, blond hair", {"eyeglasses": {"no"}, "hair colour": {"blond"}}),
        ("He wears eyeglasses. A cheerful look.", {"eyeglasses": {"yes"}, "emotion": {"happy"}}),
        ("a person without eyeglasses", {"eyeglasses": {"no"}}), ("does not wear eyeglasses", {"eyeglasses": {"no"}}),
        ("not black hair", {}), ("blackhair", {}),
    ],
)  # fmt: skip
def test_what_a_text_claims_of_traits(text, claims):
    assert TRAITS.claims(text) == claims


def test_every_measured_phrase_claims_what_it_says():
    for each in ATTRIBUTES:
        for value in each.words:
            attribute = Attribute(each.name, value, 1.0)
            assert MEASURED.claims(f"A person with {MEASURED.say(attribute)}.") == {each.name: {value}}
            assert value not in MEASURED.topic(attribute).split() and MEASURED.topic(attribute)


TRUTH = {"hair": "dark", "background": "bright", "mouth": "closed"}
FACTS = {"eyeglasses": "yes", "hair colour": "black"}


def test_a_contradiction_is_named_and_silence_is_none():
    assert filters.contradiction("dark hair, a bright background", TRUTH, MEASURED) is None
    assert filters.contradiction("A happy day in soft light", TRUTH, MEASURED) is None
    assert "hair is light, but it is dark" in filters.contradiction("light hair", TRUTH, MEASURED)
    assert "medium" in filters.contradiction("dark hair and medium hair", TRUTH, MEASURED)
    assert filters.told("dark hair and medium hair, a bright background", TRUTH, MEASURED) == {"background"}


@pytest.mark.parametrize(
    "question, answer, fault",
    [
        ("What shade is the hair?", "dark", None), ("What shade is the hair?", "It is dark.", None),
        ("Is the hair dark or light?", "dark", None), ("Is the hair dark?", "Yes", None),
        ("Is the hair light?", "No, it is not.", None),
        ("What shade is the hair?", "light", "contradiction"), ("Is the hair light?", "Yes", "contradiction"),
        ("Is the hair dark?", "No", "contradiction"), ("Is the mouth closed or smiling?", "smiling", "contradiction"),
        ("What shade has the dark hair?", "dark", "holds its answer"),
        ("Is the background bright?", "bright", "holds its answer"),
        ("Tell me of the hair", "dark", "no question"), ("Who is it?", "a friend", "no attribute speaks"),
        ("What does the hair do?", "closed mouth", "no attribute speaks"),
    ],
)  # fmt: skip
def test_pairs_against_measured_attributes(question, answer, fault):
    found = filters.pair_fault(question, answer, TRUTH, MEASURED, unsupported=False)
    assert found is None if fault is None else fault in found
    if fault == "no attribute speaks":
        assert filters.pair_fault(question, answer, TRUTH, MEASURED, unsupported=True) is None


@pytest.mark.parametrize(
    "question, answer, fault",
    [
        ("Does the person wear eyeglasses?", "Yes.", None), ("Does the person wear eyeglasses?", "No", "contradiction"),
        ("What colour is the hair?", "Black", None), ("What hair colour is it?", "Blond", "contradict"),
        ("What hair colour is it?", "Black", None), ("What is on the nose?", "no eyeglasses", "contradiction"),
    ],
)  # fmt: skip
def test_pairs_against_traits(question, answer, fault):
    found = filters.pair_fault(question, answer, FACTS, TRAITS, unsupported=False)
    assert found is None if fault is None else fault in found


@pytest.mark.parametrize(
    "text, leaks",
    [
        ("A portrait of a person.", False), ("This is IMG_1234, a person.", True), ("As an AI language model", True),
        ("<|im_start|> a face", True), ("According to the facts, dark hair", True),
        ("You never guess who a person is, their name", True), ("img_12345 is another", False),
    ],
)  # fmt: skip
def test_leakage(text, leaks):
    prompt = load_prompt("caption", "unif2ace.curation")
    assert (filters.leakage(text, "sub/IMG_1234.jpg", [prompt]) is not None) == leaks


def test_questions_asked_before():
    asked = ["What shade is the hair?"]
    assert filters.alike("What is the shade? the hair is", asked, 0.8)
    assert not filters.alike("How bright is the background?", asked, 0.8) and not filters.alike("x?", [], 0.8)
