"""Captions, and questions with answers, made from attribute classes by small varied templates.

Vocabulary and lengths are kept small on purpose (a caption is at most 24 words, a question at most 10, an answer one
or two): the demo's model has 32 text positions and minutes to learn.
"""

from __future__ import annotations

import numpy as np

from unif2ace.data.attributes import ATTRIBUTES, NAMES
from unif2ace.data.words import WORDS

DROPOUT = 0.15
CAPTION_PROMPTS = ("describe this face .",)  # what a model is asked that is to answer with a caption

# In the order in which their phrases are drawn, so that a seed's captions stay what they are.
_SPOKEN = ("hair", "forehead", "mouth", "facing", "lighting", "clothes")
# attribute -> for every class the phrases that say it
_PHRASES = {name: tuple(map(WORDS[name].in_captions, WORDS[name].classes)) for name in _SPOKEN}
_BACKGROUND = ("background", "tint", "greenery")  # adjectives of one noun, in this order
_OPENINGS = ("a face", "a person", "portrait of a person", "photo of a face")


def caption(classes: np.ndarray, rng: np.random.Generator, dropout: float = DROPOUT) -> str:
    """One caption of a face with attribute `classes` [A]; each attribute is left out with probability `dropout`.

    Example: ``a person with dark hair, big smile, facing left, soft light, bright warm green background``.
    """
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability, got {dropout}")
    kept = {
        name: int(value)
        for name, value, draw in zip(NAMES, _checked(classes), rng.random(len(NAMES)), strict=True)
        if draw >= dropout
    }
    parts = [str(rng.choice(phrases[kept[name]])) for name, phrases in _PHRASES.items() if name in kept]
    rng.shuffle(parts)
    adjectives = [ATTRIBUTES[NAMES.index(name)].words[kept[name]] for name in _BACKGROUND if name in kept]
    if adjectives:
        parts.append(" ".join([*adjectives, "background"]))
    opening = str(rng.choice(_OPENINGS))
    return f"{opening} with {', '.join(parts)}" if parts else opening


def full_caption(classes: np.ndarray) -> str:
    """The caption that names every attribute, in one fixed wording."""
    return caption(classes, np.random.default_rng(0), dropout=0.0)


def told(text: str) -> np.ndarray:
    """Attribute classes [A] that a caption names, -1 where it names none: the inverse of `caption`."""
    classes = np.full(len(NAMES), -1)
    for part in text.partition(" with ")[2].split(","):
        words = part.split()
        named, parts = _PHRASES, [" ".join(words)]
        if words[-1:] == ["background"]:
            adjectives = {name: ATTRIBUTES[NAMES.index(name)].words for name in _BACKGROUND}
            named, parts = {name: tuple((each,) for each in told) for name, told in adjectives.items()}, words[:-1]
        for name, options in named.items():
            for value, phrases in enumerate(options):
                if any(phrase in parts for phrase in phrases):
                    classes[NAMES.index(name)] = value
    return classes


def question_answer(classes: np.ndarray, attribute: int, rng: np.random.Generator) -> tuple[str, str]:
    """A question on `attribute` (its index) and the answer for a face with attribute `classes` [A]."""
    if not 0 <= attribute < len(ATTRIBUTES):
        raise ValueError(f"attribute: expected an index below {len(ATTRIBUTES)}, got {attribute}")
    value = int(_checked(classes)[attribute])
    return str(rng.choice(questions(attribute))), ATTRIBUTES[attribute].words[value]


def questions(attribute: int) -> tuple[str, ...]:
    """Every phrasing of the question on `attribute`."""
    return WORDS[NAMES[attribute]].questions


def random_classes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniformly random classes [count, A] int64, independent of one another: prompts that favour no training face."""
    return np.stack([rng.integers(each.classes, size=count) for each in ATTRIBUTES], axis=1)


def all_texts() -> list[str]:
    """Texts that between them hold every word that can be said: what a text tokenizer is to be trained on."""
    texts = [*CAPTION_PROMPTS, *_OPENINGS]
    for name, phrases in _PHRASES.items():
        texts += [f"a face with {each}, {name}" for options in phrases for each in options]
    for index, each in enumerate(ATTRIBUTES):
        texts += [f"{question} {word}" for question in questions(index) for word in each.words]
        if each.name in _BACKGROUND:
            texts += [f"{word} background" for word in each.words]
    return texts


def _checked(classes: np.ndarray) -> np.ndarray:
    classes = np.asarray(classes)
    counts = [each.classes for each in ATTRIBUTES]
    if classes.shape != (len(counts),) or (classes < 0).any() or (classes >= counts).any():
        raise ValueError(f"classes: expected {len(counts)} class indices below {counts}, got {classes.tolist()}")
    return classes
