"""How fast and how much: requests and tokens a minute, a pause that the endpoint asked for, a budget."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

from unif2ace.errors import UserError

_MINUTE = 60.0


class Stopped(Exception):
    """Another thread has ended the run; what was waited for is not done."""


class Pace:
    """Holds requests back until the last minute has room for them.

    Args:
        requests, tokens: most of a minute; 0: no limit.
        now: seconds that only grow.
        wait: sleeps for at most so many seconds; true: the run was stopped.
    """

    def __init__(
        self,
        requests: float,
        tokens: float,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool | None] = time.sleep,
    ) -> None:
        self.requests, self.tokens, self.now, self.wait = requests, tokens, now, wait
        self._lock = threading.Lock()
        self._sent: collections.deque[list[float]] = collections.deque()  # [time, tokens]
        self._not_before = 0.0

    def enter(self, tokens: float) -> list[float]:
        """Wait for room for a request of about `tokens`; what comes back goes to `settle` once they are known.

        One that is larger than a minute's tokens goes out alone.
        """
        while True:
            with self._lock:
                delay = self._delay(tokens)
                if delay <= 0:
                    entry = [self.now(), float(tokens)]
                    self._sent.append(entry)
                    return entry
            if self.wait(delay):
                raise Stopped

    def _delay(self, tokens: float) -> float:
        now = self.now()
        while self._sent and self._sent[0][0] <= now - _MINUTE:
            self._sent.popleft()
        delay = self._not_before - now
        if self.requests and len(self._sent) + 1 > max(self.requests, 1):
            delay = max(delay, self._sent[0][0] + _MINUTE - now)
        if self.tokens and self._sent and sum(each[1] for each in self._sent) + tokens > self.tokens:
            delay = max(delay, self._sent[0][0] + _MINUTE - now)
        return delay

    def settle(self, entry: list[float], tokens: float) -> None:
        """A request's tokens as they turned out."""
        with self._lock:
            entry[1] = float(tokens)

    def pause(self, seconds: float) -> None:
        """No request goes out for so long, from any thread: the endpoint said so."""
        with self._lock:
            self._not_before = max(self._not_before, self.now() + seconds)


class BudgetSpent(UserError):
    """The next request could pass the budget; everything before it is kept."""


class Budget:
    """Counts tokens and money, and lets no request out that could pass the caps.

    Args:
        most_tokens, most_cost: caps; 0: none.
        price_in, price_out: of a million tokens.
        spent: tokens in, tokens out of earlier runs.
    """

    def __init__(
        self, most_tokens: int, most_cost: float, price_in: float, price_out: float, spent: tuple[int, int] = (0, 0)
    ) -> None:
        self.most_tokens, self.most_cost = most_tokens, most_cost
        self.price_in, self.price_out = price_in, price_out
        self.tokens_in, self.tokens_out = spent
        self._held = [0, 0]
        self._lock = threading.Lock()

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """In the unit of the prices."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    @property
    def spent(self) -> float:
        return self.cost(self.tokens_in, self.tokens_out)

    def hold(self, tokens_in: int, tokens_out: int) -> None:
        """Set aside what a request may take at most.

        Raises:
            BudgetSpent: there is not so much left.
        """
        with self._lock:
            total_in = self.tokens_in + self._held[0] + tokens_in
            total_out = self.tokens_out + self._held[1] + tokens_out
            over_tokens = self.most_tokens and total_in + total_out > self.most_tokens
            over_cost = self.most_cost and self.cost(total_in, total_out) > self.most_cost
            if over_tokens or over_cost:
                which = "budget_tokens" if over_tokens else "budget_cost"
                raise BudgetSpent(
                    f"{which} is spent: {self.tokens_in + self.tokens_out} tokens, {self.spent:.4g} in money, and the "
                    "next request could pass it; what is done is kept: raise it and run it again to go on"
                )
            self._held[0] += tokens_in
            self._held[1] += tokens_out

    def settle(self, held: tuple[int, int], used: tuple[int, int]) -> None:
        """Give back what was set aside for a request, and count what it took."""
        with self._lock:
            self._held[0] -= held[0]
            self._held[1] -= held[1]
            self.tokens_in += used[0]
            self.tokens_out += used[1]
