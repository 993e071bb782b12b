"""How evenly the experts of a group are used, from the counts that a step's record has of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

GROUPS = ("t2i", "mmu")  # configs.TASKS, whose module takes seconds to import
EMPTY, CROWDED = 0.1, 1.5  # of the even share: below the one hardly used, above the other crowded


@dataclass(frozen=True)
class Load:
    """One layer's group of experts.

    Attributes:
        level: "token" or "sequence". group: the task. layer: from 0.
        counts: choices of each expert of the group.
    """

    level: str
    group: str
    layer: int
    counts: tuple[int, ...]

    @property
    def share(self) -> list[float]:
        """Of each expert against an even load: 1 where it has its part, 0 where it has nothing."""
        total = sum(self.counts)
        return [count * len(self.counts) / total if total else 0.0 for count in self.counts]

    @property
    def entropy(self) -> float:
        """Of the load over log N: 1 where it is even, 0 where one expert does everything (or none anything)."""
        parts = [count / sum(self.counts) for count in self.counts if count]
        if len(self.counts) < 2:
            return 1.0
        return -sum(part * math.log(part) for part in parts) / math.log(len(self.counts))

    @property
    def empty(self) -> list[int]:
        """Experts that hardly anything goes to: less than `EMPTY` of the even share."""
        return [index for index, share in enumerate(self.share) if share < EMPTY] if any(self.counts) else []

    @property
    def crowded(self) -> list[int]:
        """Experts with more than `CROWDED` times the even share."""
        return [index for index, share in enumerate(self.share) if share > CROWDED]


def loads(experts: Sequence[dict[str, Any]] | None) -> Iterator[Load]:
    """The groups of a record's `experts`; what is no such entry is passed over."""
    for each in experts or ():
        counts, sizes = each.get("counts") or [], each.get("groups") or []
        first = 0
        for index, size in enumerate(sizes):
            part = counts[first : first + size]
            first += size
            if len(part) == size > 0:
                name = GROUPS[index] if index < len(GROUPS) else str(index)
                yield Load(str(each.get("level")), name, int(each.get("layer", 0)), tuple(part))
