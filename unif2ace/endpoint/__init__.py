"""A client of any OpenAI-compatible endpoint: cached, paced, budgeted, validated, resumable to the single request."""

from unif2ace.endpoint.client import Endpoint, Outcome, Question, data_url, opened
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.limits import BudgetSpent
from unif2ace.endpoint.prompts import BadAnswer, Prompt, load_prompt

__all__ = [
    "BadAnswer",
    "BudgetSpent",
    "Endpoint",
    "EndpointConfig",
    "Outcome",
    "Prompt",
    "Question",
    "data_url",
    "load_prompt",
    "opened",
]
