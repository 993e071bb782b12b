"""A local endpoint that behaves as a script says: well, late, wrongly, with errors, or not at all."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
KEY = "sk-very-secret-0123456789"
WORD = """
user: "Say a word on {thing}."
form: json
schema: {type: object, properties: {word: {type: string, maxLength: 8}}, required: [word], additionalProperties: false}
"""
GOOD = '{"word": "oak"}'


class Clock:
    """Time that passes when someone waits, and in no other way."""

    def __init__(self):
        self.time, self.waits = 0.0, []

    def now(self):
        return self.time

    def wait(self, seconds):
        self.waits.append(seconds)
        self.time += seconds


def said(text: str, tokens: tuple[int, int] | None = (10, 5), **choice: Any) -> bytes:
    """A chat completion."""
    told: Body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]}
    if tokens is not None:
        told["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return json.dumps(told).encode()


class Server:
    """Attributes:
    url: of the endpoint, up to /v1.
    seen: requests as they came: (headers, body).
    answer: what to do with one: text to say, or bytes of a body, or (status, headers, bytes), or a function of the
        handler that does something else and gives None.
    """

    def __init__(self, answer: Callable[[Body], Any]) -> None:
        self.answer, self.seen = answer, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                body = json.loads(content)
                outer.seen.append((dict(self.headers), body, self.path))
                does = outer.answer(body)
                if callable(does):
                    does(self)
                    self.close_connection = True
                    return
                status, headers, out = does if isinstance(does, tuple) else (200, {}, does)
                out = said(out) if isinstance(out, str) else out
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    for name, value in {"content-length": str(len(out)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(out)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, address: Any) -> None:
                if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that has gone is part of the play
                    super().handle_error(request, address)

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def script(*steps: Any) -> Callable[[Body], Any]:
    """The n-th request gets the n-th answer, and all after the last one the last."""
    lock, count = threading.Lock(), iter(range(10**9))

    def answer(body: Body) -> Any:
        with lock:
            number = next(count)
        return steps[min(number, len(steps) - 1)]

    return answer


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Break the connection without a word."""
    handler.connection.shutdown(2)


def half(handler: BaseHTTPRequestHandler) -> None:
    """Promise more than is sent."""
    out = said("whole")
    handler.send_response(200)
    handler.send_header("content-length", str(len(out)))
    handler.end_headers()
    handler.wfile.write(out[: len(out) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(2)


@contextlib.contextmanager
def serving(*steps: Any) -> Iterator[Server]:
    with Server(steps[0] if len(steps) == 1 and callable(steps[0]) else script(*steps)) as server:
        yield server
