"""Every benchmark case of the package."""

from ..case import Case
from . import d3diff, generation, moe, random, sampling

CASES: list[Case] = [*moe.CASES, *d3diff.CASES, *sampling.CASES, *generation.CASES, *random.CASES]
