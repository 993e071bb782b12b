"""Asks an endpoint: from the cache if it was answered before, else once, and again while it is not answered rightly.

What becomes of a request:

    answered      read, valid: kept in answers.jsonl, never asked again
    quarantined   answered, never rightly, or refused by an endpoint that answers others: kept in quarantine.jsonl with
                  its reason
    put off       not answered at all in all its tries: nothing is kept, the next run asks again

Every reply that was paid for is counted in requests.jsonl, the wrong ones too: a budget is over all runs in a folder.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.limits import Budget, Pace, Stopped
from unif2ace.endpoint.prompts import BadAnswer, Prompt
from unif2ace.endpoint.transport import Refused, Reply, Transport, TryAgain
from unif2ace.errors import UserError
from unif2ace.files import digest
from unif2ace.journal import Journal

ANSWERS, QUARANTINE, REQUESTS = "answers.jsonl", "quarantine.jsonl", "requests.jsonl"
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_LONGEST_ASKED = 600.0  # a Retry-After beyond this is another day's work
_ANOTHER = 7919  # between the seeds of one request's answers: those of its repetitions follow one another
_IMAGE_TOKENS = 1500  # at most, of a picture: for the budget, before it is known


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        name: of what it is about, for messages and the quarantine.
        prompt, values: what is said.
        image: the picture [H, W, 3] uint8 RGB that goes with it.
        check: of a value that has the right shape: what is wrong with it, or None.
        seed: beside the endpoint's: the same words with another seed are another request.
    """

    name: str
    prompt: Prompt
    values: Mapping[str, str]
    image: np.ndarray | None = field(default=None, repr=False)
    check: Callable[[Any], str | None] = lambda value: None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a question: a value, or why there is none (`kind` is answered, quarantined or put off)."""

    question: Question
    kind: str
    value: Any = None
    reason: str = ""
    cached: bool = False


class Endpoint:
    """A client of one endpoint, with a folder for what it was answered.

    Args:
        folder: holds answers, quarantine and counts; may be shared by several runs, one at a time.
        now, wait: time, for tests; `wait` returns true when the run is stopped.

    Raises:
        UserError: the config is not possible, the API key is not set, or the folder cannot be used.
    """

    def __init__(
        self,
        config: EndpointConfig,
        folder: Path,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool | None] | None = None,
    ) -> None:
        self.config = config.check()
        self._stop = threading.Event()
        self._wait = wait or self._stop.wait
        with contextlib.ExitStack() as opening:
            self.transport = Transport(config)
            opening.callback(self.transport.close)
            self.answers = opening.enter_context(Journal(Path(folder) / ANSWERS))
            self.quarantine = opening.enter_context(Journal(Path(folder) / QUARANTINE))
            self.requests = opening.enter_context(Journal(Path(folder) / REQUESTS))
            self._open = opening.pop_all()
        spent = dict(self.requests.items())
        earlier = sum(each["tokens_in"] for each in spent.values()), sum(each["tokens_out"] for each in spent.values())
        self.budget = Budget(config.budget_tokens, config.budget_cost, config.price_in, config.price_out, earlier)
        self.pace = Pace(config.requests_per_minute, config.tokens_per_minute, now, self._wait)
        self.retries = 0
        self._lost = 0  # requests in a row that were put off
        self._refused: dict[str, dict[str, Any]] = {}  # likewise refused: for the quarantine, if it answers others
        self._numbers = itertools.count(max((int(each) for each in spent), default=-1) + 1)
        self._jitter = random.Random(config.seed)
        self._lock = threading.Lock()

    def close(self) -> None:
        self._stop.set()
        if len(self._refused) <= self.config.give_up:
            self._quarantine_refused()
        self._open.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, question: Question) -> Outcome:
        """Ask one question.

        Raises:
            UserError: nothing can be asked: key, address, budget (`BudgetSpent`), or an endpoint that does not answer.
            ValueError: the prompt and the question do not go together.
        """
        body = self._body(question)
        key = self._key(question, body)
        if (known := self._known(question, key)) is not None:
            return known
        messages, reason, said = list(body["messages"]), "", ""
        for number in range(self.config.answers):
            sent = {**body, "messages": messages, "seed": (body["seed"] + number * _ANOTHER) % 2**31}
            try:
                reply = self._answered(question, sent)
                said = reply.text or reply.refusal
                value = self._valid(question, reply)
            except Refused as error:
                return self._turned_away(question, key, str(error), said)
            except TryAgain as error:
                return self._put_off(question, str(error))
            except BadAnswer as error:
                reason = str(error)
                if not self.config.mend or not said.strip():  # endpoints refuse a turn without words
                    continue
                mend = f"That is not right: {reason}. Answer again, in the form that was asked for."
                messages = [
                    *body["messages"],
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": mend},
                ]
                continue
            self.answers.put(key, {**self._about(question), "value": value})
            return Outcome(question, "answered", value)
        self.quarantine.put(key, {**self._about(question), "reason": reason, "said": said})
        return Outcome(question, "quarantined", reason=reason)

    def ask_all(self, questions: Iterable[Question]) -> Iterator[Outcome]:
        """Outcomes of many questions, several at once, in the order in which they come.

        Whatever ends it, the requests that are under way are ended and what was answered is kept.

        A reader that ends it early ends the endpoint with it.

        Raises:
            UserError, ValueError: as `ask`.
        """
        waiting = iter(questions)
        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="endpoint") as pool:
            running: set[Future[Outcome]] = set()
            try:
                while True:
                    room = 2 * self.config.concurrency - len(running)
                    running |= {pool.submit(self.ask, each) for each in itertools.islice(waiting, room)}
                    if not running:
                        return
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    for each in ready:
                        yield each.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                for each in running:
                    each.cancel()

    def counts(self) -> dict[str, Any]:
        """What was asked and what it cost, over all runs in the folder."""
        return {
            "requests": len(self.requests),
            "answered": len(self.answers),
            "quarantined": len(self.quarantine) + len(self._refused),
            "retries_of_this_run": self.retries,
            "tokens_in": self.budget.tokens_in,
            "tokens_out": self.budget.tokens_out,
            "cost": round(self.budget.spent, 6),
        }

    def _known(self, question: Question, key: str) -> Outcome | None:
        kept = self.answers.get(key)
        if kept is not None and question.check(kept["value"]) is None:  # checks may have become stricter
            return Outcome(question, "answered", kept["value"], cached=True)
        kept = self.quarantine.get(key)
        return None if kept is None else Outcome(question, "quarantined", reason=kept["reason"], cached=True)

    def _about(self, question: Question) -> dict[str, Any]:
        prompt = question.prompt
        return {"name": question.name, "prompt": prompt.name, "version": prompt.version, "model": self.config.model}

    def _body(self, question: Question) -> dict[str, Any]:
        prompt, config = question.prompt, self.config
        messages = prompt.messages(question.values)
        if prompt.image != (question.image is not None):
            raise ValueError(f"prompt {prompt.name}: expected {'a' if prompt.image else 'no'} picture with it")
        if question.image is not None:
            if not config.vision:
                raise UserError(f"prompt {prompt.name} shows a picture, but endpoint.vision of {config.model} is false")
            url = data_url(question.image, config.image_side)
            text = messages[-1]["content"]
            shown = {"type": "image_url", "image_url": {"url": url}}
            messages[-1]["content"] = [shown, {"type": "text", "text": text}]
        body = {"model": config.model, "messages": messages, **config.sampling()}
        body["seed"] = (config.seed + question.seed) % 2**31
        if config.structured and prompt.form == "json":
            schema = {"name": prompt.name.replace("-", "_"), "schema": prompt.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _key(self, question: Question, body: Mapping[str, Any]) -> str:
        """By the prompt, the model and its address, the sampling, and the picture's digest (its bytes are in body)."""
        where = self.config.known_as or self.config.url.rstrip("/")
        told = json.dumps([question.prompt.version, where, body], sort_keys=True)
        return digest(told.encode())

    def _valid(self, question: Question, reply: Reply) -> Any:
        if reply.refusal:
            raise BadAnswer(f"the model declines: {reply.refusal}")
        if reply.cut:
            raise BadAnswer(f"the answer is longer than {self.config.max_tokens} tokens")
        if not reply.text.strip():
            raise BadAnswer("the answer is empty")
        value = question.prompt.read(reply.text)
        if (wrong := question.check(value)) is not None:
            raise BadAnswer(wrong)
        return value

    def _answered(self, question: Question, body: dict[str, Any]) -> Reply:
        """The reply to a request, tried again while there is none."""
        held = _estimate(body), self.config.max_tokens
        for number in range(self.config.tries):
            entry = self.pace.enter(sum(held))
            self.budget.hold(*held)
            used = 0, 0
            try:
                reply = self.transport.send(body)
                counted = reply.tokens_in is not None and reply.tokens_out is not None
                used = (reply.tokens_in or 0, reply.tokens_out or 0) if counted else (held[0], len(reply.text) // 3 + 1)
                told = {**self._about(question), "tokens_in": used[0], "tokens_out": used[1], "counted": counted}
                self.requests.put(str(next(self._numbers)), told)
                self._lost = 0
                self._quarantine_refused()
                return reply
            except TryAgain as error:
                if number + 1 == self.config.tries:
                    raise
                self._back_off(number, error.after)
            finally:
                self.budget.settle(held, used)
                self.pace.settle(entry, sum(used))
        raise AssertionError("tries is at least 1")

    def _back_off(self, number: int, asked: float | None) -> None:
        """Wait as long as was asked for, else a random part of a time that doubles with each try."""
        with self._lock:
            self.retries += 1
            drawn = self._jitter.uniform(0.5, 1.0) * min(_FIRST_WAIT * 2**number, _LONGEST_WAIT)
        if asked is not None and asked > _LONGEST_ASKED:
            raise UserError(f"{self.config.url} asks to wait for {asked:.0f} s: run it again then to go on")
        if asked is not None:
            self.pace.pause(asked)
        if self._wait(max(drawn, asked or 0.0)):
            raise Stopped

    def _turned_away(self, question: Question, key: str, reason: str, said: str) -> Outcome:
        """A refused request, while it can be the request's own fault; when it is the endpoint's, none is kept."""
        with self._lock:
            self._refused[key] = {**self._about(question), "reason": reason, "said": said}
            if len(self._refused) > self.config.give_up:
                count = len(self._refused)
                raise UserError(f"{self.config.url} refused {count} requests in a row; the last: {reason}")
        return Outcome(question, "quarantined", reason=reason)

    def _quarantine_refused(self) -> None:
        with self._lock:
            refused = dict(self._refused)
            self._refused.clear()
        for key, record in refused.items():
            self.quarantine.put(key, record)

    def _put_off(self, question: Question, reason: str) -> Outcome:
        with self._lock:
            self._lost += 1
            if self._lost >= self.config.give_up:
                raise UserError(
                    f"{self.config.url} did not answer {self._lost} requests in a row, {self.config.tries} tries each; "
                    f"the last: {reason}; what is done is kept: run it again to go on"
                )
        return Outcome(question, "put off", reason=reason)


def data_url(image: np.ndarray, side: int) -> str:
    """A picture [H, W, 3] uint8 RGB as a data URL, at most `side` pixels a side.

    It is written anew from its pixels: no name, place or time of the file that it came from is in it.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    scale = min(1.0, side / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, content = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 95])
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()


def _estimate(body: Mapping[str, Any]) -> int:
    """Tokens of a request, rather too many: three characters each, and a picture's."""
    total = 0
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            total += len(part["text"].encode()) // 3 + 8 if part["type"] == "text" else _IMAGE_TOKENS
    return total


@contextlib.contextmanager
def opened(configs: Mapping[str, EndpointConfig], folder: Path) -> Iterator[dict[str, Endpoint]]:
    """An endpoint of each config, in a folder of its name; equal configs share one."""
    with contextlib.ExitStack() as stack:
        made: dict[EndpointConfig, Endpoint] = {}
        for name, config in configs.items():
            if config not in made:
                made[config] = stack.enter_context(Endpoint(config, Path(folder) / name))
        yield {name: made[config] for name, config in configs.items()}
