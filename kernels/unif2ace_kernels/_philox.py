"""Philox4x32-10, counter-based random numbers, in plain torch: the truth that the C++, CUDA and Triton ones meet.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). One call maps a 64-bit
key and a 128-bit counter to four 32-bit words; nothing is carried from call to call, so a value depends on what it
is for (row, column, step), never on how the work was tiled or batched.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

# The last counter word: draws for different ends never share a word.
TOKEN_STREAM, REMASK_STREAM, NOISE_STREAM = 0, 1, 2


def _multiply_high_low(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b: the int64 product wraps to the 64 bits of the unsigned one."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(
    key: tuple[torch.Tensor | int, torch.Tensor | int],
    counter: tuple[torch.Tensor | int, torch.Tensor | int, torch.Tensor | int, torch.Tensor | int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four words of Philox4x32-10 for each counter.

    Args:
        key: (k0, k1), 32-bit words in int64 tensors or ints, broadcast against the counter.
        counter: (c0, c1, c2, c3), likewise.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    tensors = [each for each in (*key, *counter) if isinstance(each, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    words = [_on(device, each) & _MASK for each in (*key, *counter)]
    k0, k1, c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    for _ in range(10):
        high0, low0 = _multiply_high_low(_M0, c0)
        high1, low1 = _multiply_high_low(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def split_seed(seed: torch.Tensor | int) -> tuple[torch.Tensor | int, torch.Tensor | int]:
    """The (low, high) 32-bit words of a 64-bit seed, as a Philox key."""
    return seed & _MASK, (seed >> 32) & _MASK


def _on(device: torch.device, value: torch.Tensor | int) -> torch.Tensor:
    """`value` there as int64; an int by a fill, since a copy from the host would wait for a GPU."""
    return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=torch.int64, device=device)


def _scalar(value: torch.Tensor | int) -> torch.Tensor | int:
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def words_at(
    seed: torch.Tensor | int,
    offset: torch.Tensor | int,
    row: torch.Tensor | int,
    column: torch.Tensor | int,
    stream: int,
) -> torch.Tensor:
    """The 32-bit word that belongs to each (row, column), the arguments broadcast against each other.

    One Philox call serves four neighbouring columns: key = `split_seed(seed)`, counter =
    (column // 4, row, offset, stream), and the column takes word column % 4. So a value depends on the seed, the
    offset (the step), its global row and column and its stream, and on nothing else.

    Args:
        seed: 64 bits, an int64 tensor of one element or an int.
        offset: the step, an int64 tensor of one element or an int; its low 32 bits count.
        row, column: int64 tensors or ints in [0, 2**32).
        stream: `TOKEN_STREAM`, `REMASK_STREAM` or `NOISE_STREAM`.

    Returns:
        int64 tensor of the broadcast shape with values in [0, 2**32).
    """
    words = torch.stack(philox(split_seed(_scalar(seed)), (column >> 2, row, _scalar(offset), stream)), -1)
    lane = _on(words.device, column) & 3
    return words.gather(-1, lane.expand(words.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def random_words(
    seed: torch.Tensor | int,
    offset: torch.Tensor | int,
    rows: torch.Tensor | int,
    columns: int,
    stream: int,
) -> torch.Tensor:
    """The words of `words_at` for whole rows, at a quarter of its cost.

    Args:
        seed, offset, stream: as in `words_at`; seed and offset tensors have one element.
        rows: the number of rows, or the global row indices, int64 [R] (rows that were compacted keep their words).
        columns: the number of columns C, from column 0.

    Returns:
        int64 [R, C] with values in [0, 2**32), on the device of the tensors among the arguments.
    """
    tensors = [each for each in (seed, offset, rows) if isinstance(each, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    row = rows if isinstance(rows, torch.Tensor) else torch.arange(rows, device=device)
    group = torch.arange((columns + 3) // 4, device=device)
    words = philox(split_seed(_scalar(seed)), (group, row[:, None], _scalar(offset), stream))
    return torch.stack(words, -1).flatten(1)[:, :columns]


def uniform(words: torch.Tensor) -> torch.Tensor:
    """Float64 in the open interval (0, 1) from 32-bit words: (word + 1/2) / 2**32, never 0 and never 1."""
    return (words.to(torch.float64) + 0.5) * 2.0**-32


def uniform32(words: torch.Tensor) -> torch.Tensor:
    """`uniform` in float32, in [2**-33, 1 - 2**-24]: relative error 2**-23 at most, bit-identical everywhere."""
    return ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


# The float32 logarithm below is made of operations that IEEE 754 defines to the last bit (no libm, no fused
# multiply-add), in one fixed order, so that torch, C++, CUDA C++ and Triton give the same bits: one seed, one image.
LN2_HIGH = float.fromhex("0x1.62E4p-1")  # 16 bits: a product with an exponent in [-64, 64] is exact
LN2_LOW = float.fromhex("0x1.7F7D1Cp-20")  # ln 2 - LN2_HIGH
# (log1p(f) - f + f**2 / 2) / f**3 on [sqrt(1/2) - 1, sqrt(2) - 1], lowest power first. Minimax in the relative
# error of log1p (2**-27.2), fitted by reweighted least squares and rounded to float32.
LOG1P_COEFFICIENTS = (
    float.fromhex("0x1.555554p-2"),
    float.fromhex("-0x1.000226p-2"),
    float.fromhex("0x1.99A008p-3"),
    float.fromhex("-0x1.547244p-3"),
    float.fromhex("0x1.22DA1Ep-3"),
    float.fromhex("-0x1.0D8548p-3"),
    float.fromhex("0x1.055B5Ep-3"),
    float.fromhex("-0x1.38B544p-4"),
)
SQRT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) in float32: mantissas are taken from [sqrt(1/2), sqrt(2))
ONE_BITS = 0x3F800000
LOG1P_BELOW = 0x4AFB0CCC  # (1 - sqrt(1/2)) * 2**32: smaller words take log1p(-u) without a rounding of 1 - u


def _minus_log_of(exponent: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """-(exponent * ln 2 + log1p(fraction)) in float32."""
    polynomial = torch.full_like(fraction, LOG1P_COEFFICIENTS[-1])
    for coefficient in reversed(LOG1P_COEFFICIENTS[:-1]):
        polynomial = polynomial * fraction + coefficient
    log1p = fraction + (fraction * fraction) * (fraction * polynomial - 0.5)
    minus_exponent = (0 - exponent).to(torch.float32)
    return minus_exponent * LN2_HIGH - (log1p - minus_exponent * LN2_LOW)


def _split_float(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(exponent, fraction) with x = 2**exponent * (1 + fraction), 1 + fraction in [sqrt(1/2), sqrt(2))."""
    shifted = x.view(torch.int32) + (ONE_BITS - SQRT_HALF_BITS)
    mantissa = (shifted & 0x7FFFFF) + SQRT_HALF_BITS
    return (shifted >> 23) - 127, mantissa.view(torch.float32) - 1.0


def exponential(words: torch.Tensor) -> torch.Tensor:
    """Standard exponential -log1p(-u), u = (word + 1/2) / 2**32, in float32, to a relative 2e-7."""
    is_small = words < LOG1P_BELOW
    u = (torch.where(is_small, words, words ^ _MASK).to(torch.float32) + 0.5) * 2.0**-32
    exponent, fraction = _split_float(u)
    return _minus_log_of(torch.where(is_small, 0, exponent), torch.where(is_small, 0.0 - u, fraction))


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel -log(-log1p(-u)), u = (word + 1/2) / 2**32, the same bits on every device and backend.

    The winners of a Gumbel-max draw come from small u, where this keeps full relative accuracy in u. Finite for
    all 2**32 words: from -3.13 (word 2**32 - 1) to 22.87 (word 0).

    Args:
        words: int64 of any shape with values in [0, 2**32).

    Returns:
        float32 of the same shape, within 3e-7 * max(1, |gumbel|) of the exact value.
    """
    return _minus_log_of(*_split_float(exponential(words)))
