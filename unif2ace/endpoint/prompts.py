"""Prompts as files: what is said, what shape the answer has. A prompt's version is the digest of its content.

A file is YAML:

    system: who is asked                      # optional
    shots:                                    # optional, turns shown before the question
      - {user: ..., assistant: ...}
    user: "Facts: {facts}. Write ..."         # {name} is filled in
    image: true                               # a picture goes with it
    form: json | text | lines                 # how the answer is read
    line: "Q: (?P<question>.+?) A: (?P<answer>.+)"   # of form lines: each line that matches is one object
    schema: {type: object, ...}               # JSON schema of what was read

Of `json` the first value in the answer counts, within a code fence or after words of politeness as models have it.
What a model says to itself before, up to ``</think>``, is no part of its answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from unif2ace.errors import UserError
from unif2ace.files import digest
from unif2ace.parsing import parsing

FORMS = ("json", "text", "lines")
_SHOWN = 300  # characters of a complaint


class BadAnswer(ValueError):
    """An answer that is not what was asked for; the message says why, to the model and to the reader."""


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    name: of the file, without its ending.
    version: digest of its content: answers to another version are not taken for answers to this.
    """

    name: str
    version: str
    user: str
    schema: Mapping[str, Any]
    system: str = ""
    shots: tuple[Mapping[str, str], ...] = ()
    image: bool = False
    form: str = "json"
    line: str = ""
    _fields: frozenset[str] = field(default=frozenset(), compare=False)

    def messages(self, values: Mapping[str, str]) -> list[dict[str, Any]]:
        """What is sent, without a picture.

        Raises:
            ValueError: `values` has not exactly the names that the prompt asks for, or one is no text: features of a
                face are never sent.
        """
        if set(values) != self._fields:
            raise ValueError(f"prompt {self.name}: expected values of {sorted(self._fields)}, got {sorted(values)}")
        for name, value in values.items():
            if not isinstance(value, str):
                raise ValueError(f"prompt {self.name}: {name}: expected a text, got {type(value).__name__}")
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for shot in self.shots:
            turns += [{"role": role, "content": shot[role].strip()} for role in ("user", "assistant")]
        filled = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], self.user)
        return [*turns, {"role": "user", "content": filled.strip()}]

    def read(self, text: str) -> Any:
        """The value that an answer holds.

        Raises:
            BadAnswer: it has another shape.
        """
        value: Any = text.rpartition("</think>")[2].strip()
        if self.form == "json":
            value = _first_json(value)
        elif self.form == "lines":
            found = (re.fullmatch(self.line, each.strip()) for each in value.splitlines())
            value = [{name: part.strip() for name, part in match.groupdict().items()} for match in found if match]
        error = jsonschema.Draft202012Validator(self.schema).iter_errors(value)
        worst = jsonschema.exceptions.best_match(error)
        if worst is not None:
            where = "".join(f"[{each!r}]" for each in worst.absolute_path)
            raise BadAnswer(f"{where or 'the answer'}: {worst.message}"[:_SHOWN])
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:  # not a number, half a character: no schema looks for them
            raise BadAnswer(f"the answer holds what cannot be kept: {error}"[:_SHOWN]) from None
        return value


def _first_json(text: str) -> Any:
    decoder, reason = json.JSONDecoder(), "no JSON in it"
    for start in (match.start() for match in re.finditer(r"[\[{]", text)):
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError) as error:
            # the outermost value is meant: one that was cut off must not pass as a part of itself
            reason = str(error)
            break
    raise BadAnswer(f"the answer is not JSON: {reason}"[:_SHOWN])


def load_prompt(where: str | Path, package: str | None = None) -> Prompt:
    """A prompt's file; a name without an ending is one that comes with `package`, in its folder prompts.

    Raises:
        UserError: it is missing or is no prompt; the message names the file and the key.
    """
    path = Path(where)
    with parsing(lambda why: UserError(f"cannot read the prompt {where}: {why}")):
        if package is not None and path.suffix == "" and len(path.parts) == 1:
            content = (resources.files(package) / "prompts" / f"{path}.yaml").read_bytes()
        else:
            content = path.read_bytes()
        told = yaml.safe_load(content)
    return _prompt(told, path.stem, digest(content), str(where))


def _prompt(told: Any, name: str, version: str, where: str) -> Prompt:
    expected = {"system": str, "shots": list, "user": str, "image": bool, "form": str, "line": str, "schema": dict}
    if not isinstance(told, dict):
        raise UserError(f"{where}: expected a prompt's keys and values, got {told!r:.80}")
    for key, value in told.items():
        if key not in expected or not isinstance(value, expected[key]):
            raise UserError(f"{where}: {key}: expected one of {', '.join(expected)} with a value of its kind")
    for key in ("user", "schema"):
        if key not in told:
            raise UserError(f"{where}: {key}: it is missing")
    for shot in told.get("shots", []):
        if not isinstance(shot, dict) or set(shot) != {"user", "assistant"}:
            raise UserError(f"{where}: shots: expected turns of user and assistant, got {shot!r:.80}")
    form = told.get("form", "json")
    if form not in FORMS or (form == "lines") != bool(told.get("line")):
        raise UserError(f"{where}: form: expected one of {', '.join(FORMS)}, and line beside lines alone")
    try:
        re.compile(told.get("line", ""))
        jsonschema.Draft202012Validator.check_schema(told["schema"])
    except (re.error, jsonschema.SchemaError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from error
    fields = frozenset(re.findall(r"\{(\w+)\}", told["user"]))
    told = {**told, "shots": tuple(told.get("shots", ()))}
    return Prompt(name=name, version=version, _fields=fields, **told)
