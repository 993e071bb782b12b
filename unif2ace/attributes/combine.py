"""Several sources of attributes as one: what they agree on, what the surer one says, and silence where neither wins.

Sources read the same picture, so their errors come together: two that agree are taken for no surer than the surer one.
Two that disagree are weighed by their odds,

    p = o / (1 + o),   o = p1 / (1 - p1) x (1 - p2) / p2

with p1 the likeliest answer's and p2 the likeliest other answer's probability, and there is no answer where p is below
`confidence`. Of answers to two categories that contradict each other (a bald head with bangs) the less likely goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from unif2ace.attributes.base import Attribute, AttributeSource
from unif2ace.attributes.categories import CONTRADICTIONS

CONFIDENCE = 0.7
_SUREST = 1 - 1e-6  # what is measured has probability 1, which no odds could outweigh


def combine(said: Iterable[Attribute], confidence: float = CONFIDENCE) -> list[Attribute]:
    """One verdict a category of what several sources say of one picture; a category in doubt is left out."""
    of_category: dict[str, dict[str, float]] = {}
    for each in said:
        answers = of_category.setdefault(each.category, {})
        answers[each.value] = max(answers.get(each.value, 0.0), each.probability)
    verdicts = [_verdict(category, answers) for category, answers in of_category.items()]
    likely = [each for each in verdicts if each.probability >= confidence]
    kept: list[Attribute] = []
    for each in sorted(likely, key=lambda one: -one.probability):
        if not any(frozenset((each[:2], other[:2])) in CONTRADICTIONS for other in kept):
            kept.append(each)
    return [each for each in likely if each in kept]


def _verdict(category: str, answers: dict[str, float]) -> Attribute:
    (value, most), *others = sorted(answers.items(), key=lambda item: -item[1])
    if not others:
        return Attribute(category, value, most)
    first, second = (min(max(each, 1 - _SUREST), _SUREST) for each in (most, others[0][1]))
    odds = first / (1 - first) * (1 - second) / second
    return Attribute(category, value, odds / (1 + odds))


class Combined:
    """An AttributeSource of several."""

    def __init__(self, sources: Sequence[AttributeSource], confidence: float = CONFIDENCE) -> None:
        self.name = " + ".join(each.name for each in sources)
        self._sources, self._confidence = list(sources), confidence
        self.categories: dict[str, tuple[str, ...]] = {}
        for source in sources:
            for name, values in source.categories.items():
                self.categories[name] = tuple(dict.fromkeys((*self.categories.get(name, ()), *values)))

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Attribute]]:
        """Of each picture the verdicts; see `combine`."""
        said = [source(images) for source in self._sources]
        return [
            combine((each for source in said for each in source[index]), self._confidence)
            for index in range(len(images))
        ]
