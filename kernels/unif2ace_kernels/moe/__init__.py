"""Grouped mixture of experts: `route` or `arrange`, `experts`, `mix`, `GroupedMoE`; experts over many ranks."""

from .functions import Routing, arrange, experts, mix, route
from .modules import GroupedMoE
from .parallel import local_experts, parallel_experts

__all__ = ["GroupedMoE", "Routing", "arrange", "experts", "local_experts", "mix", "parallel_experts", "route"]
