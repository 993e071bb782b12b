"""The namespace of the ops; Hugging Face's kernel builder puts a file of its own here, with a name for every build."""

import torch

ops = torch.ops.unif2ace


def add_op_namespace_prefix(op_name: str) -> str:
    """``"gumbel"`` -> ``"unif2ace::gumbel"``."""
    return f"unif2ace::{op_name}"
