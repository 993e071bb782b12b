"""Grouped mixture of experts: `route`, `experts`, `mix`, and the module `GroupedMoE`."""

from .modules import GroupedMoE
from .ops import Routing, experts, mix, route

__all__ = ["GroupedMoE", "Routing", "experts", "mix", "route"]
