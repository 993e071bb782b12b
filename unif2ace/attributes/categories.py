"""What can be said of a face: categories with their values and phrases, and the label sets that fill them.

A category is one question with answers that exclude each other: "eyeglasses" yes or no, "hair colour" black, blond,
brown, gray or another. A data set's label is one answer to one category, so labels that exclude each other (four hair
colours, eight emotions) become values of one category, and CelebA's and CelebV-HQ's labels meet where they mean the
same.

What is published. CelebA names 40 attributes; CelebV-HQ 83: 40 of appearance, 35 actions, 8 emotions. Of
UniF2aceD-1M it is said that captions cover 46 categories of appearance, action and emotion, and that its classifiers
were trained on CelebV-HQ; the list of the 46 is not published in anything found, so it is not given here. `STILL` is
this project's own choice: every category of CelebV-HQ that a single picture can show.

The labels are what annotators saw, "male" and "young" among them: an impression of a picture, not a fact about a
person.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("appearance", "action", "emotion")
YES, NO, OTHER = "yes", "no", "other"


@dataclass(frozen=True)
class Category:
    """One question on a face.

    Attributes:
        name: of the category.
        kind: of KINDS.
        phrases: of each value, what a caption says to tell it, after "a face with" or "the person" as it may be; ()
            where a caption is silent on it.
        still: a single picture can show it.
    """

    name: str
    kind: str
    phrases: Mapping[str, tuple[str, ...]]
    still: bool = True

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.phrases)


def _trait(name: str, says: str, denies: str = "") -> Category:
    """A yes or no of appearance; phrases apart by |."""
    return Category(name, "appearance", {YES: _split(says), NO: _split(denies)})


def _act(name: str, says: str, denies: str = "", still: bool = True) -> Category:
    return Category(name, "action", {YES: _split(says), NO: _split(denies)}, still)


def _split(phrases: str) -> tuple[str, ...]:
    return tuple(phrases.split("|")) if phrases else ()


_APPEARANCE = (
    _trait("blurry", "a blurred picture", "a sharp picture"),
    _trait("male", "a man|a male face", "a woman|a female face"),
    _trait("young", "a young face|youthful looks", "an older face|a mature face"),
    _trait("chubby", "a chubby face|full cheeks"),
    _trait("pale skin", "pale skin|a pale complexion"),
    _trait("rosy cheeks", "rosy cheeks|flushed cheeks"),
    _trait("oval face", "an oval face"),
    _trait("receding hairline", "a receding hairline"),
    _trait("bald", "a bald head|no hair on the head"),
    _trait("bangs", "bangs|a fringe over the forehead", "a bare forehead|no bangs"),
    Category(
        "hair colour",
        "appearance",
        {
            "black": ("black hair",),
            "blond": ("blond hair", "fair hair"),
            "brown": ("brown hair",),
            "gray": ("gray hair", "graying hair"),
            OTHER: (),
        },
    ),
    Category(
        "hair texture",
        "appearance",
        {"straight": ("straight hair",), "wavy": ("wavy hair", "hair in waves"), OTHER: ()},
    ),
    _trait("long hair", "long hair|hair that falls below the chin", "short hair"),
    _trait("arched eyebrows", "arched eyebrows"),
    _trait("bushy eyebrows", "bushy eyebrows|thick eyebrows"),
    _trait("bags under eyes", "bags under the eyes|puffy lower lids"),
    _trait("eyeglasses", "eyeglasses|glasses on the nose", "no eyeglasses"),
    _trait("sunglasses", "sunglasses|dark glasses", "no sunglasses"),
    _trait("narrow eyes", "narrow eyes"),
    _trait("big nose", "a big nose|a broad nose"),
    _trait("pointy nose", "a pointed nose"),
    _trait("high cheekbones", "high cheekbones"),
    _trait("big lips", "full lips|big lips"),
    _trait("double chin", "a double chin"),
    _trait("beard", "a beard|facial hair", "no beard|a clean-shaven chin"),
    _trait("stubble", "stubble|a five o'clock shadow"),
    _trait("goatee", "a goatee"),
    _trait("mustache", "a mustache", "no mustache"),
    _trait("sideburns", "sideburns"),
    _trait("heavy makeup", "heavy makeup", "little or no makeup"),
    _trait("earrings", "earrings", "no earrings"),
    _trait("hat", "a hat|something worn on the head", "no hat|a bare head"),
    _trait("lipstick", "lipstick", "no lipstick"),
    _trait("necklace", "a necklace", "no necklace"),
    _trait("necktie", "a necktie", "no necktie"),
    _trait("mask", "a mask over the face", "no mask"),
)

# CelebV-HQ's actions are of clips; what only motion or sound shows is no matter for a single picture.
_ACTION = (
    _act("blow", "blowing out air"),
    _act("chew", "chewing", still=False),
    _act("close eyes", "closed eyes|eyes shut", "open eyes"),
    _act("cough", "coughing", still=False),
    _act("cry", "crying|tears in the eyes"),
    _act("drink", "drinking"),
    _act("eat", "eating"),
    _act("frown", "a frown|knitted brows"),
    _act("gaze", "a fixed gaze"),
    _act("glare", "a glare|an angry stare"),
    _act("head wagging", "a head that sways", still=False),
    _act("kiss", "a kiss|lips put forward to kiss"),
    _act("laugh", "a laugh|laughing"),
    _act("listen to music", "listening to music"),
    _act("look around", "looking around", still=False),
    _act("make a face", "making a face|a grimace"),
    _act("nod", "nodding", still=False),
    _act("play instrument", "playing an instrument"),
    _act("read", "reading"),
    _act("shake head", "shaking the head", still=False),
    _act("shout", "shouting|a mouth wide open to shout"),
    _act("sigh", "sighing", still=False),
    _act("sing", "singing"),
    _act("sleep", "sleeping|asleep"),
    _act("smile", "a smile|smiling", "no smile|a serious mouth"),
    _act("smoke", "smoking"),
    _act("sneer", "a sneer"),
    _act("sneeze", "sneezing", still=False),
    _act("sniff", "sniffing", still=False),
    _act("talk", "talking", still=False),
    _act("turn", "turning the head", still=False),
    _act("weep", "weeping|tears on the cheeks"),
    _act("whisper", "whispering", still=False),
    _act("wink", "a wink|one eye shut"),
    _act("yawn", "a yawn"),
    _act("mouth open", "an open mouth|parted lips", "a closed mouth"),  # CelebA's, none of CelebV-HQ's
)

_EMOTION = Category(
    "emotion",
    "emotion",
    {
        "neutral": ("a neutral expression", "a calm look"),
        "anger": ("an angry expression",),
        "contempt": ("an expression of contempt",),
        "disgust": ("an expression of disgust",),
        "fear": ("a frightened expression",),
        "happy": ("a happy expression", "a cheerful look"),
        "sadness": ("a sad expression",),
        "surprise": ("a surprised expression",),
    },
)

# CelebA asks it; it tells of the annotator and not of the face, so that no caption says it.
_JUDGED = _trait("attractive", "")

CATEGORIES: dict[str, Category] = {each.name: each for each in (*_APPEARANCE, *_ACTION, _EMOTION, _JUDGED)}

Label = tuple[str, str]  # a category and the value that the label affirms

_HAIR: dict[str, Label] = {
    "black_hair": ("hair colour", "black"),
    "brown_hair": ("hair colour", "brown"),
    "gray_hair": ("hair colour", "gray"),
    "straight_hair": ("hair texture", "straight"),
    "wavy_hair": ("hair texture", "wavy"),
}
_SHARED = (
    "blurry male young chubby pale_skin rosy_cheeks oval_face receding_hairline bald bangs arched_eyebrows "
    "bushy_eyebrows bags_under_eyes eyeglasses narrow_eyes big_nose pointy_nose high_cheekbones big_lips double_chin "
    "goatee mustache sideburns heavy_makeup"
).split()
_WORN = "earrings hat lipstick necklace necktie".split()
_BOTH: dict[str, Label] = {
    **{name: (name.replace("_", " "), YES) for name in _SHARED},
    **{f"wearing_{name}": (name, YES) for name in _WORN},
    **_HAIR,
    "no_beard": ("beard", NO),
    "5_o_clock_shadow": ("stubble", YES),
}

CELEBA: dict[str, Label] = {
    **_BOTH,
    "blond_hair": ("hair colour", "blond"),
    "attractive": ("attractive", YES),
    "mouth_slightly_open": ("mouth open", YES),
    "smiling": ("smile", YES),
}
CELEBV_HQ_APPEARANCE: dict[str, Label] = {
    **_BOTH,
    "blonde_hair": ("hair colour", "blond"),
    "long_hair": ("long hair", YES),
    "sunglasses": ("sunglasses", YES),
    "wearing_mask": ("mask", YES),
}
CELEBV_HQ_ACTION: dict[str, Label] = {
    each.name.replace(" ", "_"): (each.name, YES) for each in _ACTION if each.name != "mouth open"
}
CELEBV_HQ_EMOTION: dict[str, Label] = {value: ("emotion", value) for value in _EMOTION.values}
CELEBV_HQ: dict[str, Label] = {**CELEBV_HQ_APPEARANCE, **CELEBV_HQ_ACTION, **CELEBV_HQ_EMOTION}
LABELS: dict[str, Label] = {**CELEBA, **CELEBV_HQ}

STILL: tuple[str, ...] = tuple(
    dict.fromkeys(category for category, _ in CELEBV_HQ.values() if CATEGORIES[category].still)
)

# Answers to two categories that cannot both be true of a picture.
_HAIR_OF_THE_BALD = [
    ("bangs", YES),
    ("long hair", YES),
    *((name, value) for name in ("hair colour", "hair texture") for value in CATEGORIES[name].values if value != OTHER),
]
CONTRADICTIONS: frozenset[frozenset[Label]] = frozenset(
    frozenset(pair)
    for pair in (
        *((("bald", YES), other) for other in _HAIR_OF_THE_BALD),
        (("beard", NO), ("goatee", YES)),
        (("eyeglasses", YES), ("sunglasses", YES)),
        (("mouth open", NO), ("shout", YES)),
        (("mouth open", NO), ("yawn", YES)),
        (("smile", NO), ("laugh", YES)),
        (("close eyes", YES), ("gaze", YES)),
        (("close eyes", YES), ("glare", YES)),
        (("close eyes", NO), ("sleep", YES)),
    )
)


def plain(name: str) -> str:
    """A label's name as the tables here have it: "Wearing_Hat", "wearing hat" and "wearing-hat" are wearing_hat."""
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())


def phrases(category: str, value: str) -> tuple[str, ...]:
    """What a caption may say of a value; () where it is silent. A category that is not known here: "value category"."""
    known = CATEGORIES.get(category)
    if known is not None:
        return known.phrases.get(value, ())
    return {YES: (category,), NO: (f"no {category}",)}.get(value, (f"{value} {category}",))
