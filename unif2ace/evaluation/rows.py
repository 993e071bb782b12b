"""The rows of a result: what is measured, which way is better, and a row's value or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from unif2ace.evaluation import paper
from unif2ace.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Measure:
    """Attributes:
    title: in tables. part: generation, understanding or tokenizer. higher: whether more is better. digits: shown.
    what: one line on how it is measured.
    """

    title: str
    part: str
    higher: bool
    digits: int
    what: str


MEASURES: dict[str, Measure] = {
    "vqascore": Measure(
        "VQAScore", "generation", True, 3, "probability that a vision-language model says that it shows the prompt"
    ),
    "fid": Measure("FID", "generation", False, 1, "Fréchet distance of Inception features, paintings to faces"),
    "vlm_score": Measure("VLM-score", "generation", True, 1, "a vision-language model's rating of the match, 0 to 100"),
    "kid": Measure("KID x 1000", "generation", False, 2, "kernel distance of Inception features, unbiased"),
    "fid_tokenizer": Measure(
        "FID of the tokenizer", "generation", False, 1, "faces through the image tokenizer to the faces: FID's bound"
    ),
    "agreement": Measure(
        "attributes as prompted", "generation", True, 3, "share of a prompt's attributes that its painting has"
    ),
    "identity": Measure(
        "identity cosine", "generation", True, 3, "painting from a face's caption to the face, by another encoder"
    ),
    "identity_others": Measure(
        "identity cosine to others", "generation", False, 3, "the same to the next face of the set: by chance"
    ),
    "desc_gpt": Measure("Desc-GPT", "understanding", True, 2, "a judge's score of the caption, 0 to 10"),
    "conv_gpt": Measure("Conv-GPT", "understanding", True, 2, "a judge's score of the answers, 0 to 10"),
    "desc_ds": Measure("Desc-DS", "understanding", True, 2, "as Desc-GPT, by the second judge"),
    "conv_ds": Measure("Conv-DS", "understanding", True, 2, "as Conv-GPT, by the second judge"),
    "vqa_exact": Measure("answers, exact", "understanding", True, 3, "share of answers equal to a reference"),
    "vqa_soft": Measure("answers, soft", "understanding", True, 3, "VQA v2's accuracy over the references"),
    "caption_agreement": Measure(
        "attributes in captions", "understanding", True, 3, "share of the reference's attributes told alike"
    ),
}  # fmt: skip
QUICK = (
    "fid", "kid", "fid_tokenizer", "agreement", "identity", "identity_others", "vqa_exact", "vqa_soft",
    "caption_agreement",
)  # fmt: skip
SUITES = {"quick": QUICK, "paper": tuple(MEASURES)}


@dataclass
class Row:
    """A measure of a run.

    Attributes:
        value, low, high: None where there is none.
        count, groups: numbers and faces behind it.
        by: of a category or kind, (value, count).
        reason: why it is not there.
        how: with what it was measured: which network, which judge, how often.
    """

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0
    groups: int = 0
    by: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    reason: str = ""
    how: str = ""

    @classmethod
    def of(cls, name: str, estimate: Estimate, how: str = "", **more: Any) -> Row:
        return cls(name, *estimate, how=how, **more)

    def plain(self) -> dict[str, Any]:
        """What result.json holds."""
        measure = MEASURES[self.name]
        told = {"title": measure.title, "part": measure.part, "higher_is_better": measure.higher, "what": measure.what}
        return {**asdict(self), **told, "paper": paper.published(self.name)}


class Absent(Exception):
    """A row has no value; the message says why."""


def tally(keys: Sequence[str], values: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Mean and number of the values of each key, in the keys' order of first sight."""
    found: dict[str, list[float]] = {}
    for key, value in zip(keys, values):
        found.setdefault(key, []).append(value)
    return {key: (sum(each) / len(each), len(each)) for key, each in found.items()}
