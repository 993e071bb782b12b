"""A client of any OpenAI-compatible endpoint: cached, paced, budgeted, validated, resumable to the single request."""
