"""Several runs side by side, and the paper's ablation tables made of them: a run's config says which row it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from unif2ace.evaluation.rows import MEASURES

Result = Mapping[str, Any]  # of result.json

TABLES = ("loss", "experts", "top-K", "features")
FULL = "full"


def variant(config: Mapping[str, Any]) -> tuple[str, str]:
    """The (table, row) that a model's config stands in; table "all" for the paper's own, which is in every one.

    A config that differs from the paper's in more than one part is named by all of them, in the table "other".
    """
    loss, token, sequence = config["loss"], config["token_moe"], config["sequence_moe"]
    parts: list[tuple[str, str]] = []
    if loss["mask"] == 0:
        parts.append(("loss", "score only"))
    elif loss["alpha"] == 0:
        parts.append(("loss", "mask only (alpha 0)"))
    elif loss["alpha"] != 0.01:
        parts.append(("loss", f"alpha {loss['alpha']:g}"))
    if token is None or sequence is None:
        left = [name for name, each in (("token", token), ("sequence", sequence)) if each is not None]
        parts.append(("experts", f"{left[0]} level only" if left else "no experts"))
    if token is not None and token["top_k"] != 2:
        parts.append(("top-K", f"token top-{token['top_k']}"))
    if sequence is not None:
        if sequence["top_k"] != 2:
            parts.append(("top-K", f"sequence top-{sequence['top_k']}"))
        for name, title in (("face", "without face"), ("clip", "without CLIP slot")):
            if not sequence[name]:
                parts.append(("features", title))
    if not parts:
        return "all", FULL
    return parts[0] if len(parts) == 1 else ("other", ", ".join(name for _, name in parts))


def columns(results: Sequence[Result]) -> list[str]:
    """The measures that some run has a value of, in the suite's order."""
    have = {row["name"] for each in results for row in each["rows"] if row["value"] is not None}
    return [name for name in MEASURES if name in have]


def value(result: Result, name: str) -> float | None:
    return next((row["value"] for row in result["rows"] if row["name"] == name), None)


def comparable(results: Sequence[Result]) -> bool:
    """Whether all runs were measured on the same faces, in the same frame, in the same way."""
    keys = ("suite", "fingerprint", "seed")
    return all(each[key] == results[0][key] for each in results for key in keys)


def ablations(results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    """The paper's tables: of each variant its runs, and of each measure (mean, standard deviation or None, runs).

    The paper's own config is the first row of every table. Runs of one variant (seeds) are pooled.
    """
    names = columns(results)
    pooled: dict[tuple[str, str], list[Result]] = {}
    for each in results:
        pooled.setdefault(variant(each["config"]), []).append(each)

    def row(name: str, runs: list[Result]) -> dict[str, Any]:
        measured = {}
        for column in names:
            values = [number for each in runs if (number := value(each, column)) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                measured[column] = (statistics.fmean(values), spread, len(values))
        return {"variant": name, "runs": [each["run"] for each in runs], "measures": measured}

    full = [row(FULL, runs) for (table, _), runs in pooled.items() if table == "all"]
    tables = {}
    for table in (*TABLES, "other"):
        own = [row(name, runs) for (place, name), runs in pooled.items() if place == table]
        if own:
            tables[table] = full + own
    return tables
