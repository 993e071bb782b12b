"""When an answer counts as right: VQA v2's normalisation, exact match, and its soft accuracy over several references.

Normalisation and rule are those of the public evaluation code of VQA v2 (Antol et al., 2015; Goyal et al., 2017):
lower case, no punctuation but within numbers, no articles, number words as digits, contractions with their apostrophe.
An answer is worth min(n / 3, 1) where n of the other references say it, averaged over leaving out each reference in
turn. With `FULL` references or fewer that would never reach 1, so there any one that says it counts full.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FULL = 3  # references that make an answer wholly right
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_WITHOUT = (
    "aint arent cant couldve couldnt didnt doesnt dont hadnt hasnt havent hed hes howd hows im ive isnt itd itll "
    "mightve mustve mustnt oughtnt shant shes shouldve shouldnt somebodyd someoned thats thered theres theyd theyre "
    "theyve wasnt weve werent whatll whatre whats whatve whens whered wheres whereve whod wholl whos whove whyll "
    "whyre whys wont wouldve wouldnt yall youd youll youre youve"
).split()
_ENDINGS = ("nt", "ll", "re", "ve", "d", "s", "m")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA, _PERIOD = re.compile(r"\d,\d"), re.compile(r"\.(?!\d)")


def _apostrophe(word: str) -> str:
    if word == "aint":
        return "ain't"
    if word == "yall":
        return "y'all"
    ending = next(each for each in _ENDINGS if word.endswith(each))
    cut = len(word) - (1 if ending == "nt" else len(ending))
    return f"{word[:cut]}'{word[cut:]}"


_CONTRACTIONS = {word: _apostrophe(word) for word in _WITHOUT}


def normalised(answer: str) -> str:
    """An answer as it is compared."""
    given = text = answer.replace("\n", " ").replace("\t", " ").strip()
    commas = _NUMBER_COMMA.search(given) is not None
    for mark in _PUNCTUATION:
        # a mark that stands by a space, and any in a text with a number's comma, goes without leaving a space
        alone = f"{mark} " in given or f" {mark}" in given or commas
        text = text.replace(mark, "" if alone else " ")
    text = _PERIOD.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def exact(answer: str, references: Sequence[str]) -> float:
    """1 where a reference says it, else 0."""
    return float(normalised(answer) in {normalised(each) for each in references})


def soft(answer: str, references: Sequence[str]) -> float:
    """VQA v2's accuracy of an answer, in [0, 1].

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("references: expected at least one, got none")
    said, others = normalised(answer), [normalised(each) for each in references]
    if len(others) <= FULL:
        return float(said in others)
    same = sum(each == said for each in others)
    # leaving out one that says it leaves same - 1, and there are `same` of those
    return (same * min((same - 1) / FULL, 1) + (len(others) - same) * min(same / FULL, 1)) / len(others)
