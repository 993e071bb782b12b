"""What a text says of a face, in the categories of the attributes: to hold words against what sources measured.

Read by rules: phrases of each value, near the word that they are about, in one clause, with its denials. What is said
in other words is not seen, so that these counts are lower bounds and silence is no contradiction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from unif2ace.attributes.base import Attribute
from unif2ace.attributes.categories import NO, YES, phrases
from unif2ace.data.words import WORDS

_CLAUSE = re.compile(r"[,.;:!?()]|\b(?:and|with|while|but|or|against|in front of|under)\b")
_DENIED = re.compile(r"\b(?:no|not|without|isn't|aren't|doesn't|don't|never|lacks?|free of)\b(?:\W+\w+){0,2}\W*$")
_WORD = re.compile(r"[a-z']+")


@dataclass(frozen=True)
class Lexicon:
    """Attributes:
    categories: of each category, the values it may have.
    """

    categories: Mapping[str, tuple[str, ...]]

    def say(self, attribute: Attribute) -> str:
        """One phrase for it; "" where captions are silent on it."""
        words, value = WORDS.get(attribute.category), attribute.value
        if words is None:
            return next(iter(phrases(attribute.category, value)), "")
        return words.said.format(value) if value in words.called else ""

    def topic(self, attribute: Attribute) -> str:
        """What it is about, in words that do not tell its value."""
        said = self.say(attribute) if attribute.category in WORDS else attribute.category
        return " ".join(each for each in said.split() if each != attribute.value)

    def claims(self, text: str) -> dict[str, set[str]]:
        """Values that a text gives to each category that it speaks of."""
        found: dict[str, set[str]] = {}
        for clause in clauses(text):
            for category, values in self.categories.items():
                for value in self._claimed(clause, category, values):
                    found.setdefault(category, set()).add(value)
        return found

    def _claimed(self, clause: str, category: str, values: Iterable[str]) -> set[str]:
        if category not in WORDS:
            return _phrased(clause, category, values)
        words, found = WORDS[category], set()
        for value, each in words.called.items():
            alone = words.alone.get(value)
            before = rf"\b(?:{each})\b(?:[ -]\w+){{0,2}}[ -](?:{words.noun})\b"
            after = rf"\b(?:{words.noun})\b(?: [\w']+){{0,5}} (?:{each})\b"
            for pattern in filter(None, (before, after, alone and rf"\b(?:{alone})\b")):
                match = re.search(pattern, clause)
                if match and not _DENIED.search(clause[: match.start()]) and " not " not in match[0]:
                    found.add(value)
        return found

    def topics(self, question: str) -> list[str]:
        """Categories that a question may be about."""
        words = _words(question)
        return [
            category
            for category, values in self.categories.items()
            if (
                words & set(WORDS[category].noun.split("|"))
                if category in WORDS
                else _words(category) <= words or _phrased(question.lower(), category, values)
            )
        ]

    def answered(self, answer: str, category: str) -> set[str]:
        """Values of a category that an answer names, where its question has said what it is about."""
        words, text = _words(answer), answer.lower()
        if category in WORDS:
            return {value for value, each in WORDS[category].called.items() if words & set(each.split("|"))}
        values = self.categories[category]
        named = {value for value in values if value not in (YES, NO) and _words(value) <= words}
        return named | _phrased(text, category, values)


def clauses(text: str) -> list[str]:
    """Parts of a text in each of which an adjective goes with its noun."""
    return [each.strip() for each in _CLAUSE.split(" ".join(text.lower().split())) if each.strip()]


def _phrased(text: str, category: str, values: Iterable[str]) -> set[str]:
    """Values whose phrases a text has; of one that is denied, the other of yes and no."""
    found, rest = set(), text
    options = [(_bare(phrase), value) for value in values for phrase in phrases(category, value)]
    for phrase, value in sorted(options, key=lambda each: -len(each[0])):  # "no hat" before "hat"
        match = re.search(rf"\b{re.escape(phrase)}\b", rest)
        if match is None:
            continue
        denied = _DENIED.search(rest[: match.start()]) is not None
        rest = rest[: match.start()] + " " * len(match[0]) + rest[match.end() :]
        if not denied:
            found.add(value)
        elif value in (YES, NO):
            found.add(NO if value == YES else YES)
    return found


def _bare(phrase: str) -> str:
    return re.sub(r"^(?:an?|the) ", "", phrase.lower())


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
