"""UniF²ace: one model that describes faces, answers questions about them and paints them from text.

The classes are imported on first use, and register themselves with transformers' Auto classes then.
"""

from typing import Any

__all__ = ["UniF2aceConfig", "UniF2aceForConditionalGeneration", "UniF2aceProcessor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from unif2ace import auto

        return getattr(auto, name)
    raise AttributeError(f"module 'unif2ace' has no attribute {name!r}")
