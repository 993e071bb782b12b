"""Counter-based random numbers: the same bits on every device (see README.md)."""

from .._philox import NOISE_STREAM, REMASK_STREAM, TOKEN_STREAM
from .ops import gumbel

__all__ = ["NOISE_STREAM", "REMASK_STREAM", "TOKEN_STREAM", "gumbel"]
