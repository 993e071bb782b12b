"""Several sources: agreement is no surer than the surer one, odds decide or nobody does, contradictions go."""

from __future__ import annotations

import numpy as np
import pytest

from unif2ace.attributes.base import Attribute
from unif2ace.attributes.combine import Combined, combine


def told(*said: tuple[str, str, float], confidence: float = 0.7) -> list[tuple[str, str, float]]:
    return [
        (each.category, each.value, round(each.probability, 4))
        for each in combine((Attribute(*one) for one in said), confidence)
    ]


def test_one_source_is_believed_as_far_as_it_is_sure() -> None:
    assert told(("hat", "yes", 0.8)) == [("hat", "yes", 0.8)]
    assert told(("hat", "yes", 0.6)) == [] and told(("hat", "yes", 0.6), confidence=0.6) == [("hat", "yes", 0.6)]


def test_two_that_agree_are_as_sure_as_the_surer() -> None:
    assert told(("hat", "yes", 0.8), ("hat", "yes", 0.75)) == [("hat", "yes", 0.8)]


def test_two_that_disagree_are_weighed_by_odds() -> None:
    odds = (0.97 / 0.03) * (0.4 / 0.6)
    for order in (1, -1):
        said = [("hat", "yes", 0.97), ("hat", "no", 0.6)][::order]
        assert told(*said) == [("hat", "yes", round(odds / (1 + odds), 4))]
    assert told(("hat", "yes", 0.9), ("hat", "no", 0.9)) == []
    assert told(("hat", "yes", 0.9), ("hat", "no", 0.88)) == []


def test_what_is_measured_wins_unless_something_else_is_measured_too() -> None:
    assert [each[:2] for each in told(("size", "big", 1.0), ("size", "small", 0.99))] == [("size", "big")]
    assert told(("size", "big", 1.0), ("size", "small", 1.0)) == []
    assert told(("size", "big", 0.0), ("size", "small", 0.0)) == []


def test_of_answers_that_contradict_each_other_the_likelier_stays() -> None:
    bald, bangs, hat = ("bald", "yes", 0.95), ("bangs", "yes", 0.9), ("hat", "no", 0.9)
    assert told(bangs, bald, hat) == [bald, hat]
    assert told(("bangs", "yes", 0.99), bald) == [("bangs", "yes", 0.99)]
    assert told(("bald", "no", 0.95), bangs) == [("bald", "no", 0.95), bangs]
    assert told(bald, ("hair colour", "black", 0.8), ("hair colour", "other", 0.75), confidence=0.5)[0] == bald


class Source:
    def __init__(self, name: str, categories: dict, *answers: list[tuple[str, str, float]]) -> None:
        self.name, self.categories = name, categories
        self._answers = [[Attribute(*each) for each in one] for one in answers]

    def __call__(self, images):
        return self._answers


def test_sources_become_one() -> None:
    first = Source("a", {"hat": ("yes",), "hair": ("dark", "light")}, [("hat", "yes", 0.9)], [])
    second = Source("b", {"hat": ("yes", "no")}, [("hat", "yes", 0.95)], [("hat", "no", 0.8)])
    both = Combined([first, second])
    assert both.name == "a + b" and both.categories == {"hat": ("yes", "no"), "hair": ("dark", "light")}
    images = [np.zeros((2, 2, 3), np.uint8)] * 2
    assert both(images) == [[Attribute("hat", "yes", 0.95)], [Attribute("hat", "no", 0.8)]]
    assert Combined([first, second], confidence=0.92)(images) == [[Attribute("hat", "yes", 0.95)], []]
    assert both(images)[0][0].probability == pytest.approx(0.95)
