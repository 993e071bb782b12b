"""Every benchmark case of the package."""

from ..case import Case
from . import d3diff, moe, random, sampling

CASES: list[Case] = [*moe.CASES, *d3diff.CASES, *sampling.CASES, *random.CASES]
