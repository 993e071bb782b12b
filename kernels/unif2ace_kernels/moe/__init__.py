"""Grouped mixture of experts: `route` or `arrange`, `experts`, `mix`, `GroupedMoE`; experts over many ranks."""

from .modules import GroupedMoE
from .ops import Routing, arrange, experts, mix, route
from .parallel import local_experts, parallel_experts

__all__ = ["GroupedMoE", "Routing", "arrange", "experts", "local_experts", "mix", "parallel_experts", "route"]
