"""One request to the endpoint, and nothing to anywhere else: no redirects, no proxies of the environment, no netrc.

The API key goes into one header. It is in no exception, log, or record: what a server says is cleared of it first.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from unif2ace.endpoint.config import EndpointConfig
from unif2ace.errors import UserError

_LARGEST = 8_000_000  # bytes of an answer
_MOST_TOKENS = 2**31  # of an answer: a count beyond is none
_SHOWN = 200


class TryAgain(Exception):
    """The endpoint did not answer this time; `after` is how many seconds it asked to wait, if it did."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Refused(Exception):
    """The endpoint answered that this very request is wrong: to send it again is of no use."""


@dataclass(frozen=True)
class Reply:
    """Attributes:
    text: what the model said.
    cut: it was ended by the limit of tokens.
    tokens_in, tokens_out: as the endpoint counted them, or None.
    refusal: why the model declines, where it does.
    """

    text: str
    cut: bool
    tokens_in: int | None
    tokens_out: int | None
    refusal: str = ""


class Transport:
    """Sends chat completions to the one endpoint of `config`.

    Raises:
        UserError: the API key is not in the environment, or the proxy is none.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._secret = config.secret()
        self._url = config.url.rstrip("/") + "/chat/completions"
        try:
            self._http = httpx.Client(
                trust_env=False,  # or proxies, netrc and certificates of the environment would be used unasked
                follow_redirects=False,
                proxy=config.proxy,
                timeout=httpx.Timeout(config.timeout, connect=min(config.timeout, 20.0)),
                headers={"authorization": f"Bearer {self._secret}"} if self._secret else None,
                limits=httpx.Limits(max_connections=config.concurrency),
            )
        except (httpx.InvalidURL, ImportError, ValueError):  # its own words may hold the proxy's password
            raise UserError("proxy: expected http(s)://HOST:PORT of a proxy") from None

    def close(self) -> None:
        self._http.close()

    def send(self, body: Mapping[str, Any]) -> Reply:
        """Post `body` and read the reply.

        Raises:
            TryAgain: no answer, or none that can be read.
            Refused: this request is wrong.
            UserError: any request would be: wrong key, wrong model, wrong address, a redirect.
        """
        deadline = time.monotonic() + self.config.timeout
        content = b""
        try:
            with self._http.stream("POST", self._url, json=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > _LARGEST:
                        raise TryAgain(f"an answer of more than {_LARGEST} bytes")
                    if time.monotonic() > deadline:
                        raise TryAgain(f"no whole answer within {self.config.timeout:g} s")
        except httpx.TimeoutException:
            raise TryAgain(f"no answer within {self.config.timeout:g} s") from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UserError(f"{self.config.url} is no address that can be asked: {error}") from None
        except httpx.HTTPError as error:
            raise TryAgain(self._clear(f"{type(error).__name__}: {error}")) from None
        if response.status_code != 200:
            raise self._fault(response, content)
        return self._reply(content)

    def _fault(self, response: httpx.Response, content: bytes) -> Exception:
        status, said = response.status_code, self._clear(content.decode("utf-8", "replace"))
        if 300 <= status < 400:
            target = httpx.URL(self._url).join(response.headers.get("location", "")).copy_with(query=None)
            return UserError(
                f"{self.config.url} sends its requests on to {self._clear(str(target))}: they go only where you said; "
                "if that is right, give its address as url"
            )
        if status in (401, 403):
            return UserError(f"{self.config.url} refuses ({status}): is the API key right? It says: {said}")
        if status == 402:
            return UserError(f"{self.config.url} wants to be paid first. It says: {said}")
        if status == 404:
            return UserError(f"{self.config.url} knows no such address or model {self.config.model!r}. It says: {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            return TryAgain(f"status {status}: {said}", _seconds(response.headers))
        return Refused(f"status {status}: {said}")

    def _reply(self, content: bytes) -> Reply:
        try:
            told = json.loads(content)
            choice = told["choices"][0]
            refusal = choice["message"].get("refusal") or ""
            text = choice["message"]["content"]
            if text is None:  # it declines, or all its tokens went into thinking: it answered, and that was paid for
                text = ""
            if not isinstance(text, str) or not isinstance(refusal, str):
                raise TypeError
            usage = told.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            known = [each if type(each) is int and 0 <= each < _MOST_TOKENS else None for each in counts]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise TryAgain(f"no chat completion: {self._clear(content.decode('utf-8', 'replace'))!r}") from None
        cut = choice.get("finish_reason") == "length"
        return Reply(self._clear(text, None), cut, known[0], known[1], self._clear(refusal))

    def _clear(self, said: str, shown: int | None = _SHOWN) -> str:
        """What a server said, without the API key, on one line where it is to be shown.

        Half a character (a lone surrogate, which JSON can hold and UTF-8 cannot) becomes a question mark.
        """
        said = said.encode("utf-8", "replace").decode()
        if self._secret:
            said = said.replace(self._secret, "[API key]")
        return said if shown is None else " ".join(said.split())[:shown]


def _seconds(headers: httpx.Headers) -> float | None:
    """Retry-After: seconds, or a date."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
