"""The card of a set (README.md, as Hugging Face's data sets have it) and its plots, from what the stages counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from unif2ace.attributes.lexicon import Lexicon
from unif2ace.curation import filters
from unif2ace.curation.config import CardConfig
from unif2ace.curation.writing import Record
from unif2ace.files import replacing

PAPER_ATTRIBUTES, PAPER_TOKENS = 17.7, 120  # of a caption of UniF2aceD-1M
PLOT = "statistics.png"

_TEMPLATE = """---
license: {license}
task_categories:
- text-to-image
- visual-question-answering
- image-to-text
language:
- en
tags:
- face
- synthetic-captions
pretty_name: {name}
size_categories:
- {size}
---

# {name}

{faces} pictures of faces, each with a caption and questions with answers, built by `unif2ace build-dataset`.

## Licence and consent

| | |
|---|---|
| licence of the set | {license} |
| where the pictures come from | {source} |
| consent of the people in them | {consent} |
| who wants to be taken out asks | {contact} |

## What is in it

`faces.json` is a list of records: `id`, `image` (below {folder}), `caption`, `conversations`
(`[{{from, value}}]`) and `attributes` (category: value). {shards}

| | this set | UniF2aceD-1M, as published |
|---|---|---|
| faces | {faces} | about 1,000,000 |
| attributes told in a caption, mean | {attributes:.1f} | {paper_attributes} |
| words and punctuation marks of a caption, mean | {tokens:.1f} | about {paper_tokens} tokens |
| questions on a face, mean | {pairs:.2f} | |
| different captions | {captions:.1%} | |
| different questions | {questions:.1%} | |
| categories of attributes | {categories} | 46 |

Attributes of a caption are counted by rules that find phrases and miss what is said otherwise: a lower bound.

![statistics]({plot})

## How it was made

{stages}

Captions by `{captioner}`{eyes}; questions by `{writer}`. Attributes from: {sources}. Prompts and their versions:
{prompts}.

What fell out, and why:

{dropped}

## What to know before using it

- Captions and answers were written by models. They were held against attributes where there were any; what no attribute
  speaks of is as right as the model that said it.
- Attributes name what a picture looks like, not what a person is. Classes that are rare here will be learnt poorly:
  see the balance above.
- Not for telling who somebody is, nor for judging people. No identity vector is part of this set{vectors}.
- `work` is no part of it either: what it was built with, identity vectors of made faces among it. Give the set away
  without.
"""


def statistics(records: Sequence[Record], lexicon: Lexicon) -> dict[str, Any]:
    """Figures of the records that made it."""
    told = [len(filters.told(each.caption, each.truth, lexicon)) for each in records]
    if not lexicon.categories:
        told = [0] * len(records)
    questions = [question for each in records for question, _ in each.pairs]
    balance: dict[str, Counter[str]] = {name: Counter() for name in lexicon.categories}
    for record in records:
        for category, value in record.truth.items():
            balance[category][value] += 1
    return {
        "faces": len(records),
        "attributes_per_caption": told,
        "tokens_per_caption": [filters.tokens(each.caption) for each in records],
        "pairs_per_face": [len(each.pairs) for each in records],
        "different_captions": len({each.caption for each in records}) / max(1, len(records)),
        "different_questions": len(set(questions)) / max(1, len(questions)),
        "balance": {
            name: {value: counts[value] for value in lexicon.categories[name] if counts[value]}
            for name, counts in balance.items()
            if counts
        },
    }


def write_card(out: Path, config: CardConfig, figures: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """README.md and its plots."""
    _plot(figures, out / PLOT)
    count = figures["faces"]
    sizes = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    dropped = [f"| {stage} | {reason} | {number} |" for stage, reason, number in report["dropped"]]
    text = _TEMPLATE.format(
        license=config.license,
        name=config.name,
        size=next((name for most, name in sizes if count < most), "1M<n<10M"),
        faces=count,
        source=_cell(config.source),
        consent=_cell(config.consent),
        contact=_cell(config.contact),
        folder="this folder" if report["whole"] else "the folder of pictures",
        shards="`shards` holds codes and features, read by training." if report["shards"] else "",
        attributes=mean(figures["attributes_per_caption"] or [0]),
        paper_attributes=PAPER_ATTRIBUTES,
        tokens=mean(figures["tokens_per_caption"] or [0]),
        paper_tokens=PAPER_TOKENS,
        pairs=mean(figures["pairs_per_face"] or [0]),
        captions=figures["different_captions"],
        questions=figures["different_questions"],
        categories=len(figures["balance"]),
        plot=PLOT,
        stages="\n".join(
            ["| stage | came in | went on |", "|---|---|---|"]
            + [f"| {name} | {before} | {after} |" for name, before, after in report["stages"]]
        ),
        captioner=report["captioner"],
        eyes="" if report["vision"] else ", which sees no picture and was told attributes in words",
        writer=report["writer"],
        sources=", ".join(report["sources"]) or "none",
        prompts=", ".join(f"`{name}` {version}" for name, version in report["prompts"].items()),
        dropped="\n".join(["| stage | reason | number |", "|---|---|---|", *dropped]) if dropped else "nothing",
        vectors="; its shards hold them, and are not to be given away" if report["identity_in_shards"] else "",
    )
    with replacing(out / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plot(figures: Mapping[str, Any], path: Path) -> None:
    """Tokens and attributes of captions, and the balance of attributes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    balance: dict[str, dict[str, int]] = figures["balance"]
    figure = Figure(figsize=(11, 3.4 + 0.32 * len(balance)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[3, max(1.0, 0.32 * len(balance))])
    for place, (name, paper, label) in enumerate(
        (
            ("tokens_per_caption", PAPER_TOKENS, "words and punctuation marks of a caption"),
            ("attributes_per_caption", PAPER_ATTRIBUTES, "attributes told in a caption"),
        )
    ):
        axes, values = figure.add_subplot(grid[0, place]), figures[name] or [0]
        width = max(1, (max(values) - min(values)) // 20)
        axes.hist(values, bins=range(min(values), max(values) + 2 * width, width), color="#4878a8", align="left")
        axes.axvline(mean(values), color="#1b3a57", label=f"mean {mean(values):.1f}")
        axes.axvline(paper, color="#b04a3a", linestyle="--", label=f"UniF2aceD-1M {paper}")
        axes.set(xlabel=label, ylabel="faces")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    axes = figure.add_subplot(grid[1, :])
    for row, counts in enumerate(balance.values()):
        total, left = sum(counts.values()), 0.0
        for number, (value, count) in enumerate(counts.items()):
            share = count / total
            colour = ("#4878a8", "#e0a458", "#7aa37a", "#b07aa1", "#9c755f", "#bab0ac")[number % 6]
            axes.barh(row, share, left=left, color=colour, edgecolor="white")
            if share > 0.06:
                axes.text(left + share / 2, row, f"{value} {share:.0%}", ha="center", va="center", fontsize=8)
            left += share
    axes.set(yticks=range(len(balance)), yticklabels=list(balance), xlim=(0, 1), xlabel="share of the faces")
    axes.invert_yaxis()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
