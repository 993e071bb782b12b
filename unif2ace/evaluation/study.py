"""What an ablation study's runs come to: spread over seeds, differences to the full model seed by seed, and a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unif2ace.evaluation.intervals import Estimate, mean
from unif2ace.evaluation.tables import FULL, TABLES

Run = Mapping[str, Any]  # a result of `ablation.run`

# Measure -> whether more is better, title, digits.
MEASURES: dict[str, tuple[bool, str, int]] = {
    "masked_loss": (False, "masked code, nats", 3),
    "score_bound": (False, "score term, nats a face", 1),
    "answer_loss": (False, "answer token, nats", 3),
    "answered": (True, "answered", 3),
    "painted": (True, "painted as told", 3),
    "painted_distance": (False, "distance of paintings", 2),
}


@dataclass(frozen=True)
class Cell:
    """A measure of a variant.

    Attributes:
        mean, spread: over its seeds; spread is the standard deviation, None of one seed.
        difference: to the full model's, seed by seed, with its bootstrap interval over seeds; None for the full model.
        wins, losses: seeds in which it is better, and worse, than the full model.
    """

    mean: float
    spread: float | None
    difference: Estimate | None = None
    wins: int = 0
    losses: int = 0

    @property
    def verdict(self) -> str:
        """better or worse where every one of at least three seeds says so, else an empty text."""
        seeds = self.difference.size if self.difference else 0
        if seeds < 3 or (self.wins < seeds and self.losses < seeds):
            return ""
        return "better" if self.wins == seeds else "worse"


@dataclass(frozen=True)
class Summary:
    """A variant: its table, the seeds it was run with, its sizes and its measures."""

    name: str
    table: str
    seeds: tuple[int, ...]
    size: Mapping[str, Any]
    cells: Mapping[str, Cell]


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """Every variant of a study, the full model first, the others by table.

    Raises:
        ValueError: the full model is not among the runs, or runs of one study were not made alike.
    """
    studies = [each["study"] for each in runs]
    if any(each != studies[0] for each in studies):
        raise ValueError("runs: expected all of one study, got runs of different steps, rows or measures")
    by_variant: dict[str, dict[int, Run]] = {}
    for each in runs:
        by_variant.setdefault(each["variant"], {})[each["seed"]] = each
    if FULL not in by_variant:
        raise ValueError(f"runs: expected some of the variant {FULL!r}, which the others are held against")
    full = by_variant[FULL]

    def cell(name: str, own: dict[int, Run]) -> Cell:
        values = [each["measures"][name] for each in own.values()]
        spread = statistics.stdev(values) if len(values) > 1 else None
        shared = sorted(own.keys() & full.keys())
        if own is full or not shared:
            return Cell(statistics.fmean(values), spread)
        apart = [own[seed]["measures"][name] - full[seed]["measures"][name] for seed in shared]
        good = [each if MEASURES[name][0] else -each for each in apart]
        wins, losses = sum(each > 0 for each in good), sum(each < 0 for each in good)
        return Cell(statistics.fmean(values), spread, mean(apart), wins, losses)

    found = []
    for name, own in by_variant.items():
        first = next(iter(own.values()))
        cells = {measure: cell(measure, own) for measure in MEASURES}
        found.append(Summary(name, first["table"], tuple(sorted(own)), first["size"], cells))
    order = ["all", *TABLES]
    return sorted(found, key=lambda each: order.index(each.table))


def _number(name: str, value: float, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.{MEASURES[name][2]}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(found: Sequence[Summary], about: str) -> str:
    """A Markdown page: the measures of every variant with their spread, the differences to the full model, sizes."""
    full = found[0]
    heads = [f"{title} {'&#8593;' if higher else '&#8595;'}" for higher, title, _ in MEASURES.values()]
    lines = ["# Ablations", "", about, "", "## Means and standard deviations over seeds", ""]
    lines += [_row(["variant", "seeds", *heads]), _row(["---"] * (2 + len(heads)))]
    for each in found:
        cells = [
            _number(name, cell.mean) + (f" ± {_number(name, cell.spread)}" if cell.spread is not None else "")
            for name, cell in each.cells.items()
        ]
        lines.append(_row([each.name, str(len(each.seeds)), *cells]))
    lines += [
        "", "## Against the full model, seed by seed", "",
        "Mean difference of runs with the same seed [95 % bootstrap interval over seeds], and in how many seeds the "
        "variant is better. With three seeds the interval is hardly more than the least and the largest difference, "
        "and all three fall on one side by chance one time in four: **bold**, every seed on one side, is a hint and no "
        "proof.", "",
        _row(["variant", *heads]), _row(["---"] * (1 + len(heads))),
    ]  # fmt: skip
    for each in found[1:]:
        cells = []
        for name, cell in each.cells.items():
            if cell.difference is None:
                cells.append("")
                continue
            span = (
                ""
                if cell.difference.low is None or cell.difference.high is None
                else f" [{_number(name, cell.difference.low, True)}, {_number(name, cell.difference.high, True)}]"
            )
            text = f"{_number(name, cell.difference.value, True)}{span}, {cell.wins}/{cell.difference.size}"
            cells.append(f"**{text}**" if cell.verdict else text)
        lines.append(_row([each.name, *cells]))
    lines += [
        "", "## Sizes", "",
        "FLOPs are those of the matrix products of a training step, as `unif2ace plan` counts them. A variant without "
        "token-level experts has a dense FFN as wide as what a token uses of the experts: fewer parameters in all, and "
        "about the same FLOPs.", "",
        _row(["variant", "parameters", "of a t2i token", "of an mmu token", "GFLOPs a step", "of the full's"]),
        _row(["---"] * 6),
    ]  # fmt: skip
    for each in found:
        size = each.size
        lines.append(
            _row(
                [each.name, *(f"{size[key]:,}" for key in ("parameters", "active_t2i", "active_mmu")),
                 f"{size['step_flops'] / 1e9:.2f}", f"{size['step_flops'] / full.size['step_flops']:.3f}"]
            )
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def in_words(found: Sequence[Summary]) -> str:
    """What each variant is better and worse in, in every seed."""
    lines = []
    for each in found[1:]:
        told = {
            verdict: [MEASURES[name][1] for name, cell in each.cells.items() if cell.verdict == verdict]
            for verdict in ("better", "worse")
        }
        parts = [f"{verdict} in {', '.join(names)}" for verdict, names in told.items() if names]
        lines.append(f"- {each.name}: {'; '.join(parts) if parts else 'no difference that every seed shows'}")
    return "\n".join(lines)
