"""Captions and questions: what is asked of the endpoints, and what is believed of their answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unif2ace.attributes.base import Attribute
from unif2ace.attributes.lexicon import Lexicon
from unif2ace.curation import filters
from unif2ace.curation.config import BuildConfig
from unif2ace.curation.faces import Face
from unif2ace.endpoint.client import Endpoint, Outcome, Question
from unif2ace.endpoint.prompts import Prompt, load_prompt

PACKAGE = "unif2ace.curation"


@dataclass
class Record:
    """One face on its way through the stages.

    Attributes:
        face: and where it is.
        attributes: that are certain enough, one a category.
        caption: "" where there is none.
        pairs: questions with answers that were kept.
        lost: why there is no caption, or no question; "" while there is.
    """

    face: Face
    attributes: tuple[Attribute, ...] = ()
    caption: str = ""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    lost: str = ""

    @property
    def truth(self) -> dict[str, str]:
        return {each.category: each.value for each in self.attributes}

    @property
    def seed(self) -> int:
        """Of everything that is drawn for this face: the same in every run."""
        return int(self.face.id, 16) % 2**30


class Writer:
    """Runs the two writing stages over records, in place.

    Args:
        endpoints: `captioner` and `writer`.
        crop: the picture of a face, as the captioner is to see it.
    """

    def __init__(
        self,
        config: BuildConfig,
        endpoints: Mapping[str, Endpoint],
        lexicon: Lexicon,
        crop: Callable[[Face], np.ndarray],
    ) -> None:
        self.config, self.endpoints, self.lexicon, self.crop = config, endpoints, lexicon, crop
        captions = config.captions
        eyes = config.captioner.vision
        self.caption = _load(captions.prompt if eyes else captions.words)
        self.correct = _load(captions.correct) if eyes else None
        self.questions = _load(config.questions.prompt)
        self.prompts = [each for each in (self.caption, self.correct, self.questions) if each is not None]
        self.dropped: Counter[str] = Counter()  # pairs, by reason

    def write_captions(self, records: Sequence[Record]) -> None:
        """Describe every face; where there are eyes, then correct by the attributes what is wrong or left out."""
        with tqdm(total=len(records), desc="captions", unit="face") as bar:
            asked = {record.face.id: record for record in records}
            for outcome in self.endpoints["captioner"].ask_all(map(self._caption, records)):
                self._take(asked[outcome.question.name], outcome, "caption")
                bar.update()
        if self.correct is not None:
            wrong = [each for each in records if each.caption and self._wrong(each)]
            asked = {record.face.id: record for record in wrong}
            with tqdm(total=len(wrong), desc="corrections", unit="face") as bar:
                for outcome in self.endpoints["writer"].ask_all(map(self._correction, wrong)):
                    record = asked[outcome.question.name]
                    if outcome.kind == "answered" or filters.contradiction(record.caption, record.truth, self.lexicon):
                        self._take(record, outcome, "correction")
                    bar.update()  # a caption that was merely poor stays as it was

    def write_questions(self, records: Sequence[Record]) -> None:
        """Ask for questions on every face that has a caption."""
        asked = {record.face.id: record for record in records if record.caption}
        config, failed = self.config.questions, {}
        rounds = range(config.count if config.apart else min(1, config.count))
        questions = (self._question(record, number) for record in asked.values() for number in rounds)
        found: dict[tuple[str, int], list[Mapping[str, str]]] = {}
        with tqdm(total=len(asked) * len(rounds), desc="questions", unit="request") as bar:
            for outcome in self.endpoints["writer"].ask_all(questions):
                name = outcome.question.name
                if outcome.kind == "answered":
                    found[name, outcome.question.seed] = outcome.value
                else:
                    failed[name] = f"questions {outcome.kind}: {outcome.reason}"
                    self.dropped[f"request {outcome.kind}"] += 1
                bar.update()
        for name, record in asked.items():
            answers = [found.get((name, record.seed + number), []) for number in rounds]
            record.pairs, reasons = self._sorted(record, [pair for pairs in answers for pair in pairs])
            self.dropped.update(_class(each) for each in reasons)
            record.lost = "" if record.pairs else failed.get(name, "")

    def _caption(self, record: Record) -> Question:
        limits = self.config.captions

        def check(value: object) -> str | None:
            text = _caption_of(value)
            if not limits.shortest <= filters.tokens(text) <= limits.longest:
                return f"it has {filters.tokens(text)} words, expected {limits.shortest} to {limits.longest}"
            if (leak := filters.leakage(text, record.face.file, self.prompts)) is not None:
                return leak
            if self.correct is not None:
                return None  # what is wrong in it is corrected
            return self._caption_fault(text, record)

        values, image = {}, None
        if self.caption.image:
            image = self.crop(record.face)
        else:
            values = {"facts": self._facts(record, self.config.captions.facts)}
        return Question(record.face.id, self.caption, values, image, check, record.seed)

    def _caption_fault(self, text: str, record: Record) -> str | None:
        if (wrong := filters.contradiction(text, record.truth, self.lexicon)) is not None:
            return wrong
        told, least = filters.told(text, record.truth, self.lexicon), self.config.captions.least_facts
        return f"it tells {len(told)} of the facts, expected {least}" if len(told) < least else None

    def _wrong(self, record: Record) -> str:
        """What a caption says wrongly, and which facts it leaves out; "" where all is well."""
        contradiction = filters.contradiction(record.caption, record.truth, self.lexicon)
        told = self.lexicon.claims(record.caption)
        missing = [self.lexicon.say(each) for each in record.attributes if each.category not in told]
        return "; ".join(filter(None, [contradiction, *missing]))

    def _correction(self, record: Record) -> Question:
        values = {
            "caption": record.caption,
            "facts": self._facts(record, 0),
            "wrong": self._wrong(record),
        }

        def check(value: object) -> str | None:
            text = _caption_of(value)
            if (leak := filters.leakage(text, record.face.file, self.prompts)) is not None:
                return leak
            return self._caption_fault(text, record)

        assert self.correct is not None
        return Question(record.face.id, self.correct, values, None, check, record.seed)

    def _question(self, record: Record, number: int) -> Question:
        told = self.config.questions
        chosen = self._chosen(record, told.facts, salt=1, first=number * told.facts)
        every = {
            "caption": record.caption,
            "facts": "; ".join(map(self.lexicon.say, chosen)) or "nothing",
            "count": str(told.count),
            "topic": "; ".join(map(self.lexicon.topic, chosen)),
            "value": "; ".join(each.value for each in chosen),
        }

        def check(value: list[dict[str, str]]) -> str | None:
            kept, reasons = self._sorted(record, value)
            return None if kept else f"no pair can be used: {reasons[0] if reasons else 'there is none'}"

        values = {name: each for name, each in every.items() if f"{{{name}}}" in self.questions.user}
        return Question(record.face.id, self.questions, values, None, check, record.seed + number)

    def _sorted(self, record: Record, value: Iterable[Mapping[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
        """Pairs that are kept, and the reasons of those that are not."""
        config = self.config.questions
        kept: list[tuple[str, str]] = []
        reasons: list[str] = []
        for pair in value:
            question, answer = pair["question"].strip(), pair["answer"].strip()
            reason = filters.leakage(f"{question} {answer}", record.face.file, self.prompts)
            if len(filters.words(question)) > config.longest_question:
                reason = reason or "the question is too long"
            if not 1 <= len(filters.words(answer)) <= config.longest_answer:
                reason = reason or "the answer is too long or empty"
            if filters.alike(question, [each for each, _ in kept], config.alike):
                reason = reason or "asked before on this face"
            reason = reason or filters.pair_fault(question, answer, record.truth, self.lexicon, config.unsupported)
            if reason is None:
                kept.append((question, answer))
            else:
                reasons.append(reason)
        return kept, reasons

    def _facts(self, record: Record, count: int) -> str:
        return ", ".join(map(self.lexicon.say, self._chosen(record, count))) or "nothing"

    def _chosen(self, record: Record, count: int, salt: int = 0, first: int = 0) -> list[Attribute]:
        """Attributes that have words, in an order of chance: `count` from `first` on, around the end; 0: all."""
        told = [each for each in record.attributes if self.lexicon.say(each)]
        random.Random(record.seed + salt).shuffle(told)
        start = first % max(1, len(told))
        told = told[start:] + told[:start]
        return told[:count] if count else told

    def _take(self, record: Record, outcome: Outcome, stage: str) -> None:
        record.caption = _caption_of(outcome.value) if outcome.kind == "answered" else ""
        record.lost = "" if outcome.kind == "answered" else f"{stage} {outcome.kind}: {outcome.reason}"


def _caption_of(value: object) -> str:
    text = value["caption"] if isinstance(value, dict) else value
    return " ".join(str(text).split())


def _class(reason: str) -> str:
    """A reason without its particulars, to be counted."""
    return reason.partition(":")[0]


def _load(where: str) -> Prompt:
    return load_prompt(where, None if Path(where).suffix else PACKAGE)
