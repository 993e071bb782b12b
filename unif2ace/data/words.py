"""The measured attributes in words: their classes, how captions and questions say them, what other texts call them.

One table for what is measured, taught, asked, and looked for in what others write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Words:
    """The words of one attribute; {} stands for the word of a class.

    Attributes:
        called: of each class, from the low end of the measure to the high one, what texts call it (a regular
            expression's alternatives).
        noun: what texts call that which is so, likewise.
        questions: about it; the word of a class answers.
        said: how a language model is told of it.
        phrases: how captions say it; none for the background's, which are adjectives of one noun.
        own: the phrase of a class in place of these.
        alone: what tells a class without the noun (alternatives).
    """

    called: Mapping[str, str]
    noun: str
    questions: tuple[str, ...]
    said: str
    phrases: tuple[str, ...] = ()
    own: Mapping[str, str] = field(default_factory=dict)
    alone: Mapping[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The word of each class."""
        return tuple(self.called)

    def in_captions(self, value: str) -> tuple[str, ...]:
        """The phrases that say a class."""
        return (self.own[value],) if value in self.own else tuple(each.format(value) for each in self.phrases)


WORDS: dict[str, Words] = {
    "background": Words(
        {"dark": "dark|dim|black", "medium": "medium", "bright": "bright|light|white"},
        noun="background",
        questions=("how bright is the background?", "is the background dark, medium or bright?"),
        said="{} background",
    ),
    "tint": Words(
        {"cool": "cool|blue|bluish|gray|grey", "neutral": "neutral", "warm": "warm|orange|beige"},
        noun="background",
        questions=("what tint has the background?", "is the background cool, neutral or warm?"),
        said="{} background",
    ),
    "greenery": Words(
        {"plain": "plain", "green": "green"},
        noun="background",
        questions=("is the background plain or green?", "what fills the background?"),
        said="{} background",
    ),
    "hair": Words(
        {"dark": "dark|black|brown", "medium": "medium", "light": "light|blond|blonde|fair|white"},
        noun="hair",
        questions=("how light is the hair?", "is the hair dark, medium or light?"),
        said="{} hair",
        phrases=("{} hair",),
    ),
    "lighting": Words(
        {"dim": "dim|dimly", "soft": "soft|softly", "strong": "strong|strongly|harsh|bright|brightly"},
        noun="light|lighting|lit",
        questions=("how is the light on the face?", "is the light dim, soft or strong?"),
        said="{} light on the face",
        phrases=("{} light",),
    ),
    "clothes": Words(
        {"dark": "dark|black", "medium": "medium", "bright": "bright|light|white"},
        noun="clothes|clothing|outfit|shirt",
        questions=("how bright are the clothes?", "are the clothes dark, medium or bright?"),
        said="{} clothes",
        phrases=("{} clothes",),
    ),
    "mouth": Words(
        {"closed": "closed|shut|sealed", "smiling": "smiling|smile|smiles|open|grin|grinning"},
        noun="mouth|lips|smile|smiling|expression",
        questions=("is the mouth closed or smiling?", "what does the mouth do?"),
        said="{} mouth",
        phrases=("{} mouth",),
        own={"smiling": "big smile"},
        alone={"smiling": "smile|smiling|smiles|grinning"},
    ),
    "facing": Words(
        {"left": "left", "ahead": "ahead|straight|forward", "right": "right"},
        noun="face|facing|faces|looking|looks|look|turned|gaze|head",
        questions=("where does the face look?", "does the face look left, ahead or right?"),
        said="face looking {}",
        phrases=("facing {}", "looking {}"),
    ),
    "forehead": Words(
        {"covered": "covered|hidden", "bare": "bare|exposed|uncovered|visible"},
        noun="forehead|brow",
        questions=("is the forehead covered or bare?", "how is the forehead?"),
        said="{} forehead",
        phrases=("{} forehead",),
    ),
}
