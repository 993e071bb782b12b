"""One face and what is said of it, whatever file it comes from; and how a record of a file becomes one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unif2ace.data.config import FieldMap
from unif2ace.errors import UserError
from unif2ace.parsing import parsing
from unif2ace.pictures import decode

Conversation = tuple[tuple[str, str], ...]  # turns: what is asked, what is answered

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


class SampleError(Exception):
    """A sample that cannot be used.

    Attributes:
        where: the file, and where in it.
        reason: what is wrong.
        corrupt: whether that is damage, which is counted against the limit, or merely no use for this task.
    """

    def __init__(self, where: str, reason: str, corrupt: bool = True) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason, self.corrupt = where, reason, corrupt


@dataclass(frozen=True)
class Sample:
    """Attributes:
    key: its name. where: the file, and where in it, for messages.
    image: the file of the picture, or its bytes.
    codes: [N] codes of the image tokenizer, from 0.
    captions: each describes the whole face.
    conversations: questions and answers on it.
    text: plain text, where the sample is no face.
    identity, semantic: [C] and [S, C] features, None where there are none.
    """

    key: str
    where: str
    image: Path | bytes | None = None
    codes: np.ndarray | None = None
    captions: tuple[str, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    text: str | None = None
    identity: np.ndarray | None = field(default=None, repr=False)  # who a person is: never said
    semantic: np.ndarray | None = None

    def serves(self, task: str) -> bool:
        """Whether it has the words that `task` needs (mmu: a caption can answer a request to describe)."""
        return _serves(self.captions, self.conversations, self.text)[task]

    def image_bytes(self) -> bytes:
        """The picture's file.

        Raises:
            SampleError: there is none, or it cannot be read.
        """
        if self.image is None:
            raise SampleError(self.where, "it has no image", corrupt=False)
        if isinstance(self.image, bytes):
            return self.image
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise SampleError(str(self.image), error.strerror or str(error)) from error
        except ValueError as error:
            raise SampleError(self.where, f"image: {str(self.image)!a} names no file ({error})") from error

    def pixels(self, content: bytes | None = None) -> np.ndarray:
        """The picture as [H, W, 3] uint8 RGB; `content` is its file where that was read already.

        Raises:
            SampleError: it cannot be read or is no picture.
        """
        content = self.image_bytes() if content is None else content
        where = str(self.image) if isinstance(self.image, Path) else self.where
        try:
            return decode(content)
        except ValueError as error:
            raise SampleError(where, f"it {error}") from error


def _serves(captions: object, conversations: object, text: object) -> dict[str, bool]:
    return {"t2i": bool(captions), "mmu": bool(conversations or captions), "lm": bool(text)}


def record_serves(record: Mapping[str, Any], fields: FieldMap) -> dict[str, bool]:
    """`Sample.serves` of a record for every task, from the presence of its fields alone."""
    talk = look_up(record, fields.conversations) or look_up(record, fields.question)
    return _serves(look_up(record, fields.caption), talk, look_up(record, fields.text))


def look_up(record: Any, name: str | None) -> Any:
    """The field of that name; `a.b` is field b of field a. None where there is none."""
    if name is None:
        return None
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping):
            return None
        record = record.get(part)
    return record


def record_of(content: bytes | memoryview, where: str) -> dict[str, Any]:
    """The record that some bytes of JSON are.

    Raises:
        SampleError: they are none.
    """
    with parsing(lambda why: SampleError(where, f"not JSON ({why})")):
        record = json.loads(bytes(content))
    if not isinstance(record, dict):
        raise SampleError(where, f"expected a record with its fields, got {record!r:.80}")
    return record


def check_fields(record: Mapping[str, Any], fields: FieldMap, where: str) -> None:
    """Hold a set's first record against the field map.

    Raises:
        UserError: a field that was named is not there, or nothing is known of what the record says. The message lists
            the fields that there are.
    """
    found = ", ".join(_names(record))
    for ours, theirs in fields.asked().items():
        if look_up(record, theirs) is None:
            raise UserError(f"{where}: fields.{ours} is {theirs!r}, but a record has: {found}")
    if not any(record_serves(record, fields).values()):
        raise UserError(
            f"{where}: no caption, conversation or text is known in a record that has: {found}; name them, "
            "for example fields: {caption: NAME}"
        )


def _names(record: Mapping[str, Any]) -> list[str]:
    names = []
    for name, value in record.items():
        within = isinstance(value, Mapping) and all(isinstance(each, str) for each in value)
        names += [f"{name}.{each}" for each in _names(value)] if within else [str(name)]
    return names


def sample_of(record: Mapping[str, Any], fields: FieldMap, where: str, key: str, images: Path | None) -> Sample:
    """The sample that a record is.

    Args:
        key: its name where the record has none.
        images: folder of the image files.

    Raises:
        SampleError: a field holds something that cannot be what it should be.
    """
    own = look_up(record, fields.key)
    text = look_up(record, fields.text)
    if text is not None and not isinstance(text, str):
        raise SampleError(where, f"field {fields.text}: expected a text, got {text!r:.80}")
    sample = Sample(
        key=key if own is None else str(own),
        where=where,
        image=_image(look_up(record, fields.image), images, where),
        captions=_captions(look_up(record, fields.caption), where),
        conversations=_conversations(record, fields, where),
        text=text,
    )
    said = [each for turns in sample.conversations for turn in turns for each in turn]
    try:
        "".join([sample.key, text or "", *sample.captions, *said]).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: no tokenizer takes it, no file holds it
        raise SampleError(where, f"a text of it is no Unicode ({error.reason})") from error
    return sample


def _image(value: Any, images: Path | None, where: str) -> Path | bytes | None:
    if isinstance(value, Mapping):  # as `datasets` keeps an image
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise SampleError(where, f"image: expected a file name or bytes, got {value!r:.80}")
    return (images or Path()) / value


def _captions(value: Any, where: str) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) for each in given):
        raise SampleError(where, f"caption: expected a text or a list of them, got {value!r:.80}")
    return tuple(each.strip() for each in given if each.strip())


def _conversations(record: Mapping[str, Any], fields: FieldMap, where: str) -> tuple[Conversation, ...]:
    value = look_up(record, fields.conversations)
    question, answer = look_up(record, fields.question), look_up(record, fields.answer)
    if isinstance(question, str) and isinstance(answer, str):
        return (((_clean(question), answer.strip()),),)
    if isinstance(value, str):
        with parsing(lambda why: SampleError(where, f"conversations: not JSON ({why})")):
            value = json.loads(value)
    if not value:
        return ()
    if isinstance(value, (list, tuple)) and isinstance(value[0], (list, tuple)):
        return tuple(each for turns in value if (each := _turns(turns, where)))
    return (turns,) if (turns := _turns(value, where)) else ()


def _turns(messages: Any, where: str) -> Conversation:
    """Turns of [{from, value}], [{role, content}] or [{question, answer}]; a system's words lead the first question."""
    if not isinstance(messages, (list, tuple)):
        raise SampleError(where, f"conversations: expected a list of turns, got {messages!r:.80}")
    turns: list[tuple[str, str]] = []
    lead, asked = "", None
    for each in messages:
        if not isinstance(each, Mapping):
            raise SampleError(where, f"conversations: expected a turn with its fields, got {each!r:.80}")
        if "question" in each:
            turns.append((_clean(_text(each["question"], where)), _text(each.get("answer"), where)))
            continue
        role, said = each.get("from", each.get("role")), _text(each.get("value", each.get("content")), where)
        if role == "system" and not turns and asked is None:
            lead = said
        elif role in _ASKS and asked is None:
            asked = " ".join(filter(None, [lead, _clean(said)]))
            lead = ""
        elif role in _ANSWERS and asked is not None:
            turns.append((asked, said))
            asked = None
        else:
            raise SampleError(where, f"conversations: {role!r} speaks out of turn")
    return tuple(turns)  # a last question that has no answer teaches nothing


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise SampleError(where, f"conversations: expected a text, got {value!r:.80}")
    return value.strip()


def _clean(question: str) -> str:
    """Without LLaVA's mark of where the image stands: ours stands always first."""
    return question.replace("<image>", " ").strip()
