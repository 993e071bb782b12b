"""What is to be known of an endpoint: where it is, what it may cost, how it is asked."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from unif2ace import settings
from unif2ace.errors import UserError


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint.

    Attributes:
        url: its base, up to /v1. Requests go there and nowhere else: redirects are refused.
        model: as the endpoint names it.
        key: name of the environment variable that holds the API key (not the key); None: it takes none.
        vision: whether it sees pictures.
        insecure: allow plain http to another machine, where anyone on the way can read pictures and key.
        known_as: what answers are kept under in place of the URL, for a server whose address changes.
        proxy: a proxy's URL; those of the environment are not used.
        temperature, top_p, max_tokens, seed: of its sampling.
        structured: ask for answers of the prompt's JSON schema (`response_format`), where the server can.
        image_side: pixels of the longer side of a picture that is sent.
        concurrency: requests at once.
        timeout: seconds for one whole answer.
        tries: of one request, while it is not answered: too many requests, server errors, lost connections.
        answers: of one request, while what is answered is not valid; then it is quarantined.
        mend: an answer that is not valid is asked for again with what is wrong with it; false: asked afresh, as suits a
            model too small to be told.
        give_up: requests in a row whose tries all failed, after which the run stops.
        requests_per_minute, tokens_per_minute: limits; 0: none.
        budget_tokens: most tokens, in and out, of all runs in one folder; 0: no limit.
        budget_cost: most money likewise, in the unit of the prices; 0: no limit.
        price_in, price_out: of a million tokens.
    """

    url: str
    model: str
    key: str | None = None
    vision: bool = False
    insecure: bool = False
    known_as: str | None = None
    proxy: str | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    structured: bool = False
    image_side: int = 512
    concurrency: int = 4
    timeout: float = 120.0
    tries: int = 6
    answers: int = 3
    mend: bool = True
    give_up: int = 3
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    budget_tokens: int = 0
    budget_cost: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0

    def check(self, where: str = "endpoint") -> EndpointConfig:
        """The config itself.

        Raises:
            UserError: a value is not possible; the message names its key below `where`, and never holds a secret.
        """
        need = partial(settings.need, self, where=where)
        parts = _parts(self.url)
        if parts is None:
            raise UserError(f"{where}.url: expected http(s)://HOST[:PORT]/v1 without name, password, ? or #")
        if parts.scheme == "http" and not _is_here(parts.hostname or "") and not self.insecure:
            raise UserError(
                f"{where}.url: http to {parts.hostname} shows pictures and key to everyone on the way: use https, or "
                f"set {where}.insecure: true where the network is yours"
            )
        need(self.model != "", "model", "the name of a model")
        for name in ("max_tokens", "image_side", "concurrency", "tries", "answers", "give_up"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("requests_per_minute", "tokens_per_minute", "budget_tokens", "budget_cost", "price_in",
                     "price_out", "temperature", "seed"):  # fmt: skip
            need(0 <= getattr(self, name) < float("inf"), name, "at least 0")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 < self.timeout < float("inf"), "timeout", "seconds above 0")
        need(not self.budget_cost or self.price_in + self.price_out > 0, "budget_cost", "prices beside it (price_in)")
        return self

    def secret(self, where: str = "endpoint") -> str | None:
        """The API key, from the environment.

        Raises:
            UserError: the variable is not set; the message names it.
        """
        if self.key is None:
            return None
        value = os.environ.get(self.key, "").strip()
        if not value:
            raise UserError(f"{where}.key: the environment variable {self.key!r} is not set; put the API key there")
        if not value.isascii() or not value.isprintable():
            raise UserError(f"{where}.key: what the environment variable {self.key!r} holds is no API key")
        return value

    def sampling(self) -> dict[str, float]:
        """What an answer hangs on beside its prompt."""
        return {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens, "seed": self.seed}


def _parts(url: str):
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname and plain else None


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
