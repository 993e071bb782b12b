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

# of the measured attributes: what they are about, and the words of each value
_MEASURED: dict[str, tuple[str, dict[str, str]]] = {
    "background": ("background", {"dark": "dark|dim|black", "medium": "medium", "bright": "bright|light|white"}),
    "tint": (
        "background",
        {"cool": "cool|blue|bluish|gray|grey", "neutral": "neutral", "warm": "warm|orange|beige"},
    ),
    "greenery": ("background", {"plain": "plain", "green": "green"}),
    "hair": ("hair", {"dark": "dark|black|brown", "medium": "medium", "light": "light|blond|blonde|fair|white"}),
    "lighting": (
        "light|lighting|lit",
        {"dim": "dim|dimly", "soft": "soft|softly", "strong": "strong|strongly|harsh|bright|brightly"},
    ),
    "clothes": (
        "clothes|clothing|outfit|shirt",
        {"dark": "dark|black", "medium": "medium", "bright": "bright|light|white"},
    ),
    "mouth": (
        "mouth|lips|smile|smiling|expression",
        {"closed": "closed|shut|sealed", "smiling": "smiling|smile|smiles|open|grin|grinning"},
    ),
    "facing": (
        "face|facing|faces|looking|looks|look|turned|gaze|head",
        {"left": "left", "ahead": "ahead|straight|forward", "right": "right"},
    ),
    "forehead": ("forehead|brow", {"covered": "covered|hidden", "bare": "bare|exposed|uncovered|visible"}),
}
_SAID: dict[str, dict[str, tuple[str, ...]]] = {
    "background": {each: (f"{each} background",) for each in ("dark", "medium", "bright")},
    "tint": {each: (f"{each} background",) for each in ("cool", "neutral", "warm")},
    "greenery": {each: (f"{each} background",) for each in ("plain", "green")},
    "hair": {each: (f"{each} hair",) for each in ("dark", "medium", "light")},
    "lighting": {each: (f"{each} light on the face",) for each in ("dim", "soft", "strong")},
    "clothes": {each: (f"{each} clothes",) for each in ("dark", "medium", "bright")},
    "mouth": {"closed": ("closed mouth",), "smiling": ("smiling mouth",)},
    "facing": {each: (f"face looking {each}",) for each in ("left", "ahead", "right")},
    "forehead": {each: (f"{each} forehead",) for each in ("covered", "bare")},
}
_ALONE = {"mouth": {"smiling": "smile|smiling|smiles|grinning"}}  # tell by themselves
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
        return next(iter(_phrases(attribute.category, attribute.value)), "")

    def topic(self, attribute: Attribute) -> str:
        """What it is about, in words that do not tell its value."""
        said = self.say(attribute) if attribute.category in _MEASURED else attribute.category
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
        if category not in _MEASURED:
            return _phrased(clause, category, values)
        nouns, words = _MEASURED[category]
        found = set()
        for value, each in words.items():
            alone = _ALONE.get(category, {}).get(value)
            before = rf"\b(?:{each})\b(?:[ -]\w+){{0,2}}[ -](?:{nouns})\b"
            after = rf"\b(?:{nouns})\b(?: [\w']+){{0,5}} (?:{each})\b"
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
                words & set(_MEASURED[category][0].split("|"))
                if category in _MEASURED
                else _words(category) <= words or _phrased(question.lower(), category, values)
            )
        ]

    def answered(self, answer: str, category: str) -> set[str]:
        """Values of a category that an answer names, where its question has said what it is about."""
        words, text = _words(answer), answer.lower()
        if category in _MEASURED:
            return {value for value, each in _MEASURED[category][1].items() if words & set(each.split("|"))}
        values = self.categories[category]
        named = {value for value in values if value not in (YES, NO) and _words(value) <= words}
        return named | _phrased(text, category, values)


def clauses(text: str) -> list[str]:
    """Parts of a text in each of which an adjective goes with its noun."""
    return [each.strip() for each in _CLAUSE.split(" ".join(text.lower().split())) if each.strip()]


def _phrases(category: str, value: str) -> tuple[str, ...]:
    return _SAID[category].get(value, ()) if category in _SAID else phrases(category, value)


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
