"""Attributes on pictures whose answer is known, and the captions and questions made from their classes."""

import numpy as np
import pytest

from unif2ace.data import captions
from unif2ace.data.attributes import ATTRIBUTES, NAMES, classify, fit_thresholds, measure

COLUMN = {name: index for index, name in enumerate(NAMES)}


def face(**colours):
    """A drawn face: grey background, dark hair, skin, red closed lips, grey clothes; regions may be recoloured."""
    picture = np.full((64, 64, 3), 120, np.uint8)
    paint = {
        "background": (slice(0, 64), slice(0, 64), (120, 120, 120)),
        "hair": (slice(2, 16), slice(16, 48), (40, 30, 30)),
        "skin": (slice(16, 56), slice(14, 50), (200, 150, 130)),
        "forehead": (slice(16, 23), slice(18, 46), (200, 150, 130)),
        "mouth": (slice(44, 50), slice(26, 38), (180, 90, 90)),
        "clothes": (slice(59, 64), slice(0, 64), (110, 110, 110)),
    }
    for name, (rows, columns, colour) in paint.items():
        picture[rows, columns] = colours.get(name, colour)
    return picture


def value(name, picture):
    return measure(picture[None])[0, COLUMN[name]]


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("background", {"background": (30, 30, 30)}, {"background": (230, 230, 230)}),
        ("tint", {"background": (90, 110, 160)}, {"background": (170, 120, 80)}),
        ("greenery", {"background": (120, 120, 120)}, {"background": (80, 150, 70)}),
        ("hair", {"hair": (20, 20, 20)}, {"hair": (220, 190, 130)}),
        ("lighting", {"skin": (110, 80, 70)}, {"skin": (240, 200, 180)}),
        ("clothes", {"clothes": (20, 20, 20)}, {"clothes": (240, 240, 240)}),
        ("mouth", {"mouth": (180, 90, 90)}, {"mouth": (235, 230, 225)}),
        ("forehead", {"forehead": (50, 40, 40)}, {"forehead": (210, 160, 140)}),
    ],
)
def test_measure_follows_its_own_region_alone(name, low, high):
    below, above = value(name, face(**low)), value(name, face(**high))
    assert below < above
    thresholds = fit_thresholds(measure(np.stack([face(**low), face(), face(**high)])))
    classes = classify(measure(np.stack([face(**low), face(**high)])), thresholds)[:, COLUMN[name]]
    assert classes[0] == 0 and classes[1] == ATTRIBUTES[COLUMN[name]].classes - 1
    region = next(iter(high))
    if region != "background":
        assert value("background", face(**low)) == value("background", face(**high))
    for other in ("hair", "clothes"):
        if other != region:
            assert value(other, face(**low)) == value(other, face(**high))


def test_facing_follows_the_nose_side():
    left_cheek_shown, right_cheek_shown = face(), face()
    left_cheek_shown[16:56, 44:50] = (40, 30, 30)
    right_cheek_shown[16:56, 14:20] = (40, 30, 30)
    assert value("facing", left_cheek_shown) > value("facing", face()) > value("facing", right_cheek_shown)
    mirrored = value("facing", np.ascontiguousarray(left_cheek_shown[:, ::-1]))
    assert np.isclose(mirrored, -value("facing", left_cheek_shown), atol=1e-4)


def test_a_row_of_teeth_is_enough():
    teeth = face()
    teeth[46:48, 28:36] = (235, 230, 225)
    assert value("mouth", teeth) > value("mouth", face()) + 0.2


@pytest.mark.parametrize("name", ["mouth", "forehead", "facing"])
def test_shape_attributes_do_not_follow_the_light(name):
    other = {"mouth": {"mouth": (235, 230, 225)}, "forehead": {"forehead": (50, 40, 40)}, "facing": {}}[name]
    contrast = abs(value(name, face(**other)) - value(name, face())) or 1.0
    assert abs(value(name, (face() * 0.6).astype(np.uint8)) - value(name, face())) < 0.1 * contrast


def test_black_picture_has_finite_measures():
    assert np.isfinite(measure(np.zeros((1, 64, 64, 3), np.uint8))).all()


def test_measure_does_not_depend_on_the_batch():
    pictures = np.random.default_rng(0).integers(0, 256, (515, 64, 64, 3), dtype=np.uint8)
    assert np.allclose(measure(pictures)[510:], measure(pictures[510:]), rtol=1e-4, atol=1e-4)


def test_thresholds_balance_the_classes():
    values = np.random.default_rng(0).normal(size=(1200, len(NAMES))).astype(np.float32)
    classes = classify(values, fit_thresholds(values))
    for column, each in enumerate(ATTRIBUTES):
        counts = np.bincount(classes[:, column], minlength=each.classes)
        assert len(counts) == each.classes and np.ptp(counts) <= 2


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="images: expected uint8"):
        measure(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="images: expected uint8"):
        measure(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="values: expected"):
        fit_thresholds(np.zeros((0, len(NAMES)), np.float32))


def said(text):
    """What a caption says: attribute -> class, read back by its phrases."""
    found = {}
    for name, options in captions._PHRASES.items():
        for index, phrases in enumerate(options):
            if any(phrase in text for phrase in phrases):
                assert name not in found
                found[name] = index
    if text.endswith("background"):
        words = text.split(",")[-1].split(" with ")[-1].split()[:-1]
        for name in captions._BACKGROUND:
            options = ATTRIBUTES[COLUMN[name]].words
            if words and words[0] in options:
                found[name] = options.index(words.pop(0))
        assert not words
    return found


def test_captions_say_the_classes_and_nothing_else():
    rng = np.random.default_rng(0)
    mentioned, texts = np.zeros(len(NAMES)), set()
    for classes in captions.random_classes(600, rng):
        text = captions.caption(classes, rng)
        for name, index in said(text).items():
            assert classes[COLUMN[name]] == index
            mentioned[COLUMN[name]] += 1
        texts.add(text)
        assert len(text.split()) <= 24
    assert np.abs(mentioned / 600 - (1 - captions.DROPOUT)).max() < 0.06
    assert len(texts) > 590


def test_full_caption_says_everything_and_no_dropout_means_all():
    for classes in captions.random_classes(50, np.random.default_rng(1)):
        everything = {name: classes[COLUMN[name]] for name in NAMES}
        assert said(captions.full_caption(classes)) == everything
        assert said(captions.caption(classes, np.random.default_rng(2), dropout=0.0)) == everything
    nothing = captions.caption(classes, np.random.default_rng(2), dropout=1.0)
    assert nothing in captions._OPENINGS


def test_texts_follow_the_seed():
    classes = np.zeros(len(NAMES), int)

    def draw(seed):
        rng = np.random.default_rng(seed)
        asked = [captions.question_answer(classes, i % len(NAMES), rng) for i in range(20)]
        return [captions.caption(classes, rng) for _ in range(10)], asked

    assert draw(0) == draw(0) and draw(0) != draw(1)


def test_questions_and_answers():
    rng = np.random.default_rng(0)
    for classes in captions.random_classes(100, rng):
        for attribute, each in enumerate(ATTRIBUTES):
            question, answer = captions.question_answer(classes, attribute, rng)
            assert question in captions.questions(attribute) and question.endswith("?")
            assert answer == each.words[classes[attribute]]
            assert len(question.split()) <= 12
    asked = [question for attribute in range(len(NAMES)) for question in captions.questions(attribute)]
    assert len(set(asked)) == len(asked) >= 2 * len(NAMES)


def test_all_texts_hold_every_word():
    known = set(" ".join(captions.all_texts()).replace(",", " ").replace("?", " ").split())
    rng = np.random.default_rng(0)
    for classes in captions.random_classes(300, rng):
        question, answer = captions.question_answer(classes, int(rng.integers(len(NAMES))), rng)
        text = f"{captions.caption(classes, rng)} {question} {answer}"
        assert set(text.replace(",", " ").replace("?", " ").split()) <= known


def test_random_classes_are_uniform():
    classes = captions.random_classes(3000, np.random.default_rng(0))
    for column, each in enumerate(ATTRIBUTES):
        share = np.bincount(classes[:, column], minlength=each.classes) / 3000
        assert len(share) == each.classes and np.abs(share - 1 / each.classes).max() < 0.04


@pytest.mark.parametrize("classes", [[0] * (len(NAMES) - 1), [9] * len(NAMES), [-1] * len(NAMES)])
def test_bad_classes(classes):
    with pytest.raises(ValueError, match="classes: expected"):
        captions.caption(np.array(classes), np.random.default_rng(0))


def test_bad_attribute_and_dropout():
    classes = np.zeros(len(NAMES), int)
    with pytest.raises(ValueError, match="attribute: expected"):
        captions.question_answer(classes, len(NAMES), np.random.default_rng(0))
    with pytest.raises(ValueError, match="dropout: expected"):
        captions.caption(classes, np.random.default_rng(0), dropout=1.5)


def test_what_a_caption_tells_is_read_back():
    """Of every caption what it says, of what it leaves out -1; and nothing of a text that is no caption."""
    rng = np.random.default_rng(2)
    for classes in captions.random_classes(200, rng):
        assert captions.told(captions.full_caption(classes)).tolist() == classes.tolist()
        some = captions.told(captions.caption(classes, rng, dropout=0.5))
        assert ((some == classes) | (some == -1)).all()
    assert (some == -1).any() and (some >= 0).any()
    assert captions.told("the hair is dark").tolist() == [-1] * len(ATTRIBUTES)
