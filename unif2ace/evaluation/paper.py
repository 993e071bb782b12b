"""The paper's tables (arXiv 2503.08120) as they are published: what a run's rows stand beside, never what it is
compared with where the data differ."""

from __future__ import annotations

SOURCE = "arXiv 2503.08120, on the test split of UniF2aceD-1M"
OURS = "UniF2ace"

GENERATION_COLUMNS = ("vqascore", "fid", "vlm_score")
GENERATION: dict[str, tuple[float, ...]] = {
    "Show-o": (0.855, 142.6, 75.6),
    "JanusFlow": (0.881, 72.8, 61.6),
    "Stable Diffusion 3": (0.903, 93.5, 75.9),
    "FLUX.1-dev": (0.893, 76.4, 84.5),
    OURS: (0.894, 66.0, 88.0),
}
UNDERSTANDING_COLUMNS = ("desc_gpt", "conv_gpt", "desc_ds", "conv_ds")
UNDERSTANDING: dict[str, tuple[float, ...]] = {
    "Show-o": (3.88, 4.17, 5.24, 4.90),
    "JanusFlow": (4.88, 6.06, 5.42, 6.77),
    "InternVL2.5-8B": (5.62, 5.89, 6.30, 6.55),
    OURS: (6.02, 6.53, 7.38, 7.29),
}
# Of the ablations the loss's is known in numbers; of the others, what is varied.
LOSS_COLUMNS = ("vqascore", "fid", "vlm_score")
LOSS: dict[str, tuple[float, ...]] = {
    "alpha 0.1": (0.887, 68.90, 86.38),
    "full": (0.894, 66.01, 88.05),
    "alpha 0.001": (0.884, 72.74, 89.22),
    "mask only (alpha 0)": (0.879, 77.46, 85.99),
    "score only": (0.886, 69.69, 87.95),
}
TABLES: tuple[tuple[str, tuple[str, ...], dict[str, tuple[float, ...]]], ...] = (
    ("Generation", GENERATION_COLUMNS, GENERATION),
    ("Understanding", UNDERSTANDING_COLUMNS, UNDERSTANDING),
)


def published(measure: str) -> float | None:
    """The paper's own value of a measure, None where it has none."""
    for _, columns, rows in TABLES:
        if measure in columns:
            return rows[OURS][columns.index(measure)]
    return None
