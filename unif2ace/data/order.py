"""The order of samples in an epoch: a permutation of [0, N) by (seed, epoch) of which any place is known at once.

A Feistel network over the least power of two that holds N, walked until it is below N (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). Nothing is stored and nothing shuffled, so a run that goes on at any step, on any
number of ranks and workers, reads the same order without a look at what came before.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 8
_WORD = (1 << 64) - 1


class Order:
    """`order[place]` is the index of the sample at `place` of the epoch.

    Args:
        count: samples, at least 1.
        name, seed, epoch: what the order hangs on; name keeps orders of one seed apart.
    """

    def __init__(self, count: int, name: str, seed: int, epoch: int) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        bits = max(2, (count - 1).bit_length())
        self.count, self._low = count, bits // 2
        self._high = bits - self._low
        self._keys = [
            int.from_bytes(hashlib.sha256(f"{name} {seed} {epoch} {i}".encode()).digest()[:8], "little")
            for i in range(_ROUNDS)
        ]

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.count:
            raise IndexError(f"place: expected 0 to {self.count - 1}, got {place}")
        index = self._encipher(place)
        while index >= self.count:
            index = self._encipher(index)
        return index

    def _encipher(self, value: int) -> int:
        """One pass over all 2^bits values: halves that take turns, each xored with a hash of the other."""
        high, low = value >> self._low, value & ((1 << self._low) - 1)
        high_mask, low_mask = (1 << self._high) - 1, (1 << self._low) - 1
        for i in range(0, _ROUNDS, 2):
            high ^= _hash(low + self._keys[i]) & high_mask
            low ^= _hash(high + self._keys[i + 1]) & low_mask
        return high << self._low | low


def _hash(value: int) -> int:
    """The finaliser of splitmix64, whose every output bit hangs on every input bit."""
    value &= _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31
