"""Grouped mixture of experts: `route` or `arrange`, `experts`, `mix`, and the module `GroupedMoE`."""

from .modules import GroupedMoE
from .ops import Routing, arrange, experts, mix, route

__all__ = ["GroupedMoE", "Routing", "arrange", "experts", "mix", "route"]
