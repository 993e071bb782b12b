"""What an ablation study's runs come to: spread over seeds, differences to the full model seed by seed, and a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from unif2ace.evaluation.intervals import Estimate, mean
from unif2ace.evaluation.tables import FULL, TABLES

Run = Mapping[str, Any]  # a result of `ablation.run`

# Measure -> whether more is better, title, digits. Losses are in nats: of a masked code, a face, a token of an answer.
MEASURES: dict[str, tuple[bool, str, int]] = {
    "masked_loss": (False, "masked loss", 3),
    "score_bound": (False, "score term", 1),
    "answer_loss": (False, "answer loss", 3),
    "answered": (True, "answered", 3),
    "painted": (True, "painted as told", 3),
    "painted_distance": (False, "distance of paintings", 2),
}


SURE = 0.99


@dataclass(frozen=True)
class Cell:
    """A measure of a variant.

    Attributes:
        mean, spread: over its seeds; spread is the standard deviation, None of one seed.
        difference: to the full model's, seed by seed, with its bootstrap interval over seeds; None for the full model.
        wins: seeds in which it is better than the full model.
        gain: the difference, above zero where the variant is better. noise: half of that difference's 99 % interval by
            Student's t with the spread of all variants' differences pooled; None where no variant has two seeds.
    """

    mean: float
    spread: float | None
    difference: Estimate | None = None
    wins: int = 0
    gain: float = 0.0
    noise: float | None = None

    @property
    def verdict(self) -> str:
        """better or worse where the difference is beyond the noise, else an empty text."""
        if self.noise is None or abs(self.gain) <= self.noise:
            return ""
        return "better" if self.gain > 0 else "worse"


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

    def apart(name: str, own: dict[int, Run]) -> list[float]:
        """Differences to the full model with the same seed."""
        if own is full:
            return []
        return [own[seed]["measures"][name] - full[seed]["measures"][name] for seed in sorted(own.keys() & full.keys())]

    def noise(name: str) -> float | None:
        """Half-width of one seed's 99 % interval."""
        found = [each for own in by_variant.values() if len(each := apart(name, own)) > 1]
        freedom = sum(len(each) - 1 for each in found)
        if not freedom:
            return None
        squares = sum((len(each) - 1) * statistics.variance(each) for each in found)
        return float(student.ppf(1 - (1 - SURE) / 2, freedom)) * (squares / freedom) ** 0.5

    noises = {name: noise(name) for name in MEASURES}

    def cell(name: str, own: dict[int, Run]) -> Cell:
        values = [each["measures"][name] for each in own.values()]
        spread = statistics.stdev(values) if len(values) > 1 else None
        differences, one = apart(name, own), noises[name]
        if not differences:
            return Cell(statistics.fmean(values), spread)
        sign = 1 if MEASURES[name][0] else -1
        wins = sum(sign * each > 0 for each in differences)
        width = one / len(differences) ** 0.5 if one is not None else None
        gain = sign * statistics.fmean(differences)
        return Cell(statistics.fmean(values), spread, mean(differences), wins, gain, width)

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
        "variant is better. With few seeds that interval is hardly more than the least and the largest difference, so "
        "**bold** goes by another: Student's 99 % interval with the spread of all variants pooled does not hold zero. "
        f"Of {len(found[1:]) * len(MEASURES)} differences one or so is bold by chance.", "",
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
    """What each variant is better and worse in, beyond the noise."""
    return "\n".join(f"- {each.name}: {told(each)}" for each in found[1:])


def told(each: Summary) -> str:
    """What a variant is better and worse in, with the differences."""
    parts = []
    for verdict in ("better", "worse"):
        names = [
            f"{MEASURES[name][1]} ({_number(name, cell.difference.value, True)})"
            for name, cell in each.cells.items()
            if cell.verdict == verdict and cell.difference is not None
        ]
        if names:
            parts.append(f"{verdict} in {', '.join(names)}")
    return "; ".join(parts) if parts else "no difference beyond the noise"


def answers(found: Sequence[Summary]) -> str:
    """The two questions that the study was made for, and what it could not have seen."""
    by_name = {each.name: told(each) for each in found[1:]}
    lines = [
        f"{asked} {'; '.join(f'{name}: {by_name[name]}' for name in names if name in by_name)}."
        for asked, names in (
            ("Does D3Diff's score term help here? Without it,", ("mask only (alpha 0)",)),
            ("Do the experts? Without them,", ("no experts", "token level only", "sequence level only")),
        )
    ]
    least = {
        name: min(each.cells[name].noise or 0.0 for each in found[1:])
        for name in MEASURES
        if all(each.cells[name].noise is not None for each in found[1:])
    }
    if least:
        smallest = ", ".join(f"{MEASURES[name][1]} {_number(name, value)}" for name, value in least.items())
        lines.append(f"Differences smaller than these would not have shown: {smallest}.")
    return "\n\n".join(lines)
