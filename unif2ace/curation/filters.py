"""What is wrong with a caption or with a question and its answer: a reason, or None."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from unif2ace.attributes.lexicon import Lexicon
from unif2ace.endpoint.prompts import Prompt

Truth = Mapping[str, str]  # category -> value, of one face
_LEAK = 7  # words in a row that only an instruction has
_STOP = frozenset(
    "a an the is are was were be it its this that of in on at to and or with has have does do what how which who where "
    "person's person face their his her they he she".split()
)
_META = re.compile(
    r"\b(?:as an ai|language model|i cannot|i can't|i'm sorry|system prompt|the facts?\b|attributes? list|"
    r"according to the (?:facts|attributes|list)|the caption)|<\|?\w+\|?>|\[/?inst\]",
    re.IGNORECASE,
)


def tokens(text: str) -> int:
    """Words and punctuation marks."""
    return len(re.findall(r"\w+(?:'\w+)?|[^\w\s]", text))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def contradiction(text: str, truth: Truth, lexicon: Lexicon) -> str | None:
    """What a text says against the attributes."""
    for category, said in lexicon.claims(text).items():
        wrong = said - {truth.get(category, "")}
        if category in truth and wrong:
            return (
                f"contradiction: it says that {category} is {' and '.join(sorted(wrong))}, but it is {truth[category]}"
            )
    return None


def told(text: str, truth: Truth, lexicon: Lexicon) -> set[str]:
    """Categories of which a text says what is true."""
    return {category for category, said in lexicon.claims(text).items() if said == {truth.get(category)}}


def leakage(text: str, file: str, prompts: Sequence[Prompt]) -> str | None:
    """Whether a text gives away where it comes from: the picture's file name, the prompts, the machine that wrote."""
    stem = PurePath(file).stem.lower()
    if len(stem) >= 4 and re.search(rf"(?<!\w){re.escape(stem)}(?!\w)", text.lower()):
        return "it holds the name of the picture's file"
    if (match := _META.search(text)) is not None:
        return f"it speaks of how it was made: {match[0]!r}"
    said = words(text)
    runs = {tuple(said[start : start + _LEAK]) for start in range(len(said) - _LEAK + 1)}
    for prompt in prompts:
        told_ = words(f"{prompt.system} {prompt.user}")
        if any(tuple(told_[start : start + _LEAK]) in runs for start in range(len(told_) - _LEAK + 1)):
            return "it repeats the instruction"
    return None


def pair_fault(question: str, answer: str, truth: Truth, lexicon: Lexicon, unsupported: bool) -> str | None:
    """What is wrong with a question and its answer, against the attributes of the face.

    Args:
        unsupported: pairs that no attribute speaks for or against are right.
    """
    if not question.rstrip().endswith("?"):
        return "no question"
    if _given_away(question, answer):
        return "the question holds its answer"
    supported = False
    first = words(answer)[:1]
    if first in (["yes"], ["no"]):
        for category, said in lexicon.claims(question).items():
            if category in truth:
                agrees = said == {truth[category]}
                if agrees != (first == ["yes"]):
                    return f"contradiction: {category} is {truth[category]}"
                supported = True
        for category in lexicon.topics(question):  # "does the person wear glasses?" names no value
            if truth.get(category) in ("yes", "no") and not supported:
                if truth[category] != first[0]:
                    return f"contradiction: {category} is {truth[category]}"
                supported = True
    if (wrong := contradiction(answer, truth, lexicon)) is not None:
        return wrong
    topics = lexicon.topics(question)
    named = told(answer, truth, lexicon)
    supported = supported or bool(named & set(topics) if topics else named)
    for category in topics:
        said = lexicon.answered(answer, category)
        if category in truth and said:
            if said != {truth[category]}:
                return f"contradiction: {category} is {truth[category]}"
            supported = True
    return None if supported or unsupported else "no attribute speaks for it"


def _given_away(question: str, answer: str) -> bool:
    """All that the answer says stands in the question, which offers no choice."""
    said = [each for each in words(answer) if each not in _STOP]
    asked = set(words(question))
    if not said or said[0] in ("yes", "no") or "or" in asked:
        return False
    return all(each in asked for each in said)


def alike(question: str, earlier: Sequence[str], share: float) -> bool:
    """Whether a question has been asked before, in nearly these words."""
    mine = set(words(question))
    return any(len(mine & set(words(each))) >= share * len(mine | set(words(each))) for each in earlier)
