"""Fused ops for grouped mixtures of experts and masked discrete diffusion, as torch ops.

    moe        grouped top-K routing with per-group balance loss, the grouped FFN, the sequence-level mixture
    d3diff     the forward masking process, the D3Diff loss fused with the head, the next-token loss
    sampling   draws from hidden states or logits, re-masking, the sampling loop
    random     counter-based Gumbel noise with the same bits on every device

`explain` says which implementation of an op runs for given tensors, and why. Importing needs torch alone and touches
no device.
"""

from . import d3diff, moe, random, sampling
from ._library import Explanation, explain, registered_ops

__version__ = "0.1.0"
__all__ = ["Explanation", "d3diff", "explain", "moe", "random", "registered_ops", "sampling"]
