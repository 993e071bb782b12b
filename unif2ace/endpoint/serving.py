"""A language model as an OpenAI-compatible endpoint of this machine: requests that wait are written together.

Any other server will do. `transformers serve` (5.23) does not load the packaged model, whose GGUF file names no
architecture, and on a CPU its continuous batching gave sixteen requests at temperature 0.7 the same text.
"""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from unif2ace.endpoint.language import Language, Order, Written
from unif2ace.errors import UserError

_GATHER = 0.05  # seconds that a batch waits for more rows
_LARGEST = 1_000_000  # bytes of a request


class _Waiting(NamedTuple):
    """A text that is waited for; `gone` says whether it still is, and `done` has None where it is not."""

    order: Order
    done: Future[Written | None]
    gone: Callable[[], bool]


class LanguageServer:
    """Serves `POST /v1/chat/completions`, `GET /v1/models` and `GET /health` on 127.0.0.1 until it is closed.

    Args:
        language: what writes.
        port: 0: any that is free.
        batch: most texts written at once.

    Attributes:
        url: of the endpoint, up to /v1.
        written: tokens written, texts, and seconds of writing.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, language: Language, port: int = 0, batch: int = 16) -> None:
        self.language, self.batch = language, batch
        self.written = {"tokens": 0, "read": 0, "texts": 0, "seconds": 0.0}
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue()
        try:
            self._http = _Http(("127.0.0.1", port), _handler(self))
        except OSError as error:
            raise UserError(f"port {port} cannot be listened on ({error.strerror}): name another") from error
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._threads = [
            threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True),
            threading.Thread(target=self._write, daemon=True),
        ]

    def __enter__(self) -> LanguageServer:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._waiting.put(None)
        for each in self._threads:
            each.join()
        self._http.server_close()

    def order(self, order: Order, gone: Callable[[], bool]) -> Written | None:
        """Wait for a text; None where `gone` said, when its turn came, that nobody waits for it any more."""
        done: Future[Written | None] = Future()
        self._waiting.put(_Waiting(order, done, gone))
        return done.result()

    def _write(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, ended = [first], False
            deadline = time.monotonic() + _GATHER
            while len(batch) < self.batch and not ended:
                try:
                    more = self._waiting.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                ended = more is None
                batch += [] if more is None else [more]
            self._serve(batch)
            if ended:
                return

    def _serve(self, waiting: list[_Waiting]) -> None:
        batch = []
        for each in waiting:  # a client that was killed and comes back is not to wait for what it asked before
            if each.gone():
                each.done.set_result(None)
            else:
                batch.append(each)
        if not batch:
            return
        start = time.perf_counter()
        try:
            texts = self.language.write([each.order for each in batch])
        except Exception as error:  # whatever it is, those who wait are told, and the next batch is another
            for each in batch:
                each.done.set_exception(error)
            return
        self.written["seconds"] += time.perf_counter() - start
        self.written["texts"] += len(texts)
        for each, text in zip(batch, texts):
            self.written["tokens"] += text.tokens_out
            self.written["read"] += text.tokens_in
            each.done.set_result(text)


class _Http(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


class _Wrong(Exception):
    """A request that cannot be served: its status and what is wrong with it."""


def _handler(server: LanguageServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version, timeout = "HTTP/1.1", 60

        def do_GET(self) -> None:
            if self.path == "/health":
                self._send(200, {"status": "ok"})
            elif self.path == "/v1/models":
                self._send(200, {"object": "list", "data": [{"id": server.language.name, "object": "model"}]})
            else:
                self._send(404, _error(f"there is no {self.path}"))

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("content-length") or 0)
                if not 0 < length <= _LARGEST:
                    self.close_connection = True
                    raise _Wrong(413, f"a request has between 1 and {_LARGEST} bytes")
                content = self.rfile.read(length)
                if self.path != "/v1/chat/completions":
                    raise _Wrong(404, f"there is no {self.path}")
                order = _order(content, server.language)
                written = server.order(order, lambda: _hung_up(self.connection))
                if written is None:
                    self.close_connection = True
                else:
                    self._send(200, _completion(written, server.language.name))
            except _Wrong as error:
                self._send(error.args[0], _error(error.args[1]))
            except Exception as error:  # a server says what went wrong and goes on
                self._send(500, _error(f"{type(error).__name__}: {error}"))

        def _send(self, status: int, told: dict[str, Any]) -> None:
            out = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_: Any) -> None:
            """Nothing: what is asked about faces is in no log."""

    return Handler


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other side of a connection has ended it."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def _order(content: bytes, language: Language) -> Order:
    try:
        told = json.loads(content)
        messages = [{"role": each["role"], "content": _words(each["content"])} for each in told["messages"]]
        order = Order(
            messages,
            temperature=float(told.get("temperature", 1.0)),
            top_p=float(told.get("top_p", 1.0)),
            max_tokens=int(told.get("max_tokens") or told.get("max_completion_tokens") or 256),
            seed=int(told.get("seed") or 0),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _Wrong(400, f"no chat completion is asked for: {error!r}") from error
    if told.get("model") != language.name:
        raise _Wrong(404, f"there is no model {told.get('model')!r}, but {language.name!r}")
    if told.get("stream"):
        raise _Wrong(400, "stream: answers come whole")
    if not messages or not 0 <= order.temperature < float("inf") or not 0 < order.top_p <= 1 or order.max_tokens < 1:
        raise _Wrong(400, "messages, temperature >= 0, 0 < top_p <= 1 and max_tokens >= 1 are needed")
    if not abs(order.seed) < 2**63:  # one that no generator takes would end the texts of all that are written with it
        raise _Wrong(400, "seed: expected a whole number of at most 63 bits")
    try:
        length = len(language.tokens(messages))
    except Exception as error:  # a template's own complaint on the order of roles
        raise _Wrong(400, f"messages: {error}") from error
    if length + order.max_tokens > language.context:
        raise _Wrong(400, f"{length} tokens and {order.max_tokens} to write are more than {language.context}")
    return order


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(each["type"] != "text" for each in content):
        raise ValueError("this model sees no pictures")
    return "".join(each["text"] for each in content)


def _completion(written: Written, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": written.text},
                "finish_reason": "length" if written.cut else "stop",
            }
        ],
        "usage": {
            "prompt_tokens": written.tokens_in,
            "completion_tokens": written.tokens_out,
            "total_tokens": written.tokens_in + written.tokens_out,
        },
    }


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}
