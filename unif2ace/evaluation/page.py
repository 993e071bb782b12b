"""One page of one or several results: the paper's rows beside the runs', intervals, galleries, failures, tables.

The page is one file with its pictures in it. The paper's numbers are of other faces: they stand there as what is
published, and the page says so wherever they stand.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unif2ace import pages
from unif2ace.errors import UserError
from unif2ace.evaluation import paper, tables
from unif2ace.evaluation.rows import MEASURES
from unif2ace.files import replacing
from unif2ace.pictures import read_png

Result = Mapping[str, Any]

_STYLE = """
body { max-width: 80rem }
.gallery { display: flex; flex-wrap: wrap; gap: .6rem } figure { width: 7.4rem; margin: 0; font-size: .78em }
figure img { width: 100%; margin: 0; border-radius: 3px }
svg { display: block; margin-left: auto }
"""


def write(results: Sequence[Result], folders: Sequence[Path], path: Path) -> None:
    """Write the page of `results`, whose paintings lie in `folders`, in the same order."""
    parts = [f"<h1>{html.escape(_title(results))}</h1>", _about(results)]
    parts.append(_main_table(results))
    parts.append(_published(results))
    if len(results) > 1:
        parts.append(_ablations(results))
    for result, folder in zip(results, folders):
        parts.append(_of_one(result, folder, alone=len(results) == 1))
    with replacing(path) as partial:
        partial.write_text(pages.page(_title(results), "\n".join(parts), _STYLE), encoding="utf-8")


def _title(results: Sequence[Result]) -> str:
    return f"Evaluation of {', '.join(each['run'] for each in results)}"


def _about(results: Sequence[Result]) -> str:
    lines = []
    for each in results:
        left = f", {each['left_out_count']} left out" if each["left_out_count"] else ""
        lines.append(
            f"{html.escape(each['run'])}: suite {each['suite']}, {each['faces']} faces of "
            f"{html.escape(each['data'])}{left}, seed {each['seed']}"
        )
    same = "" if tables.comparable(results) else (
        '<p class="wrong">These runs were not measured on the same faces in the same way: their rows are not to be '
        "compared.</p>"
    )  # fmt: skip
    return f"<p>{'<br>'.join(lines)}</p>{same}"


def number(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{MEASURES[name].digits}f}"


def _table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    return f'<div class="wide">{pages.table(rows, kind)}</div>'


def _note(text: str) -> str:
    return f'<span class="note">{text}</span>'


def _main_table(results: Sequence[Result]) -> str:
    """A row a measure, a column a run; the paper's own value last, where there is one."""
    rows = [["measure", *(html.escape(each["run"]) for each in results), "95 % interval", "paper&#8224;"]]
    one = results[0] if len(results) == 1 else None
    names = [name for name in MEASURES if any(row["name"] == name for each in results for row in each["rows"])]
    for name in names:
        found = [next((row for row in each["rows"] if row["name"] == name), None) for each in results]
        arrow = "&#8593;" if MEASURES[name].higher else "&#8595;"
        title = f"{html.escape(MEASURES[name].title)} {arrow}<br>{_note(html.escape(MEASURES[name].what))}"
        published = number(name, paper.published(name))
        if all(row is None or row["value"] is None for row in found):
            reason = next((row["reason"] for row in found if row), "")
            absent = f'<td class="note" style="text-align: left" colspan="{len(results) + 1}">'
            rows.append([title, f"{absent}not measured: {html.escape(reason)}</td>", published])
            continue
        cells = [
            number(name, row["value"]) if row and row["value"] is not None else
            f'<td class="note" title="{html.escape(row["reason"] if row else "")}">not measured</td>'
            for row in found
        ]  # fmt: skip
        how = f"<br>{_note(html.escape(one_row['how']))}" if one and (one_row := found[0]) else ""
        rows.append([title, *cells, _intervals(name, found) + how, published])
    note = (
        f"&#8224; As published for UniF2ace ({html.escape(paper.SOURCE)}): other faces, other judges, another number of"
        " them. It is there to be read beside, and no row here is comparable with it."
    )
    return f'<h2>Measures</h2>{_table(rows)}<p class="note">{note}</p>'


def _intervals(name: str, found: Sequence[Any]) -> str:
    """A bar a run, on one scale."""
    spans = [row if row and row["low"] is not None else None for row in found]
    known = [each for each in spans if each]
    if not known:
        return _note("none")
    low, high = min(each["low"] for each in known), max(each["high"] for each in known)
    if len(known) == 1:
        return f"{number(name, known[0]['low'])} to {number(name, known[0]['high'])}"
    width, scale = 180, 172 / ((high - low) or 1)
    bars = []
    for line, each in enumerate(spans):
        if each:
            y, left, right, middle = 8 + 14 * line, *(4 + scale * (each[key] - low) for key in ("low", "high", "value"))
            bars.append(
                f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="#1f77b4" stroke-width="3"/>'
                f'<circle cx="{middle:.1f}" cy="{y}" r="4" fill="#1f77b4"/>'
            )
    text = _note(f"{number(name, low)} to {number(name, high)}, runs from the top")
    label = f"{MEASURES[name].title}: intervals of the runs"
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" width="{width}" height="{16 + 14 * (len(spans) - 1)}">'
        f"{''.join(bars)}</svg>{text}"
    )


def _published(results: Sequence[Result]) -> str:
    """The paper's tables, the runs' rows under the paper's."""
    parts = ["<h2>The paper's tables, with these runs below</h2>"]
    for title, names, published in paper.TABLES:
        rows = [["model", *(MEASURES[name].title for name in names)]]
        for model, values in published.items():
            cells = (number(name, value) for name, value in zip(names, values))
            rows.append([f"{html.escape(model)} {_note('published')}", *cells])
        for each in results:
            found = ((name, tables.value(each, name)) for name in names)
            cells = (_note("not measured") if value is None else number(name, value) for name, value in found)
            rows.append([f"<b>{html.escape(each['run'])}</b> {_note('other faces')}", *cells])
        parts.append(f"<h3>{title}</h3>{_table(rows)}")
    parts.append(
        '<p class="note">Published rows and these were measured on different faces: by this table none is better than '
        "another.</p>"
    )
    return "".join(parts)


def _ablations(results: Sequence[Result]) -> str:
    found = tables.ablations(results)
    if not found:
        return ""
    parts = ["<h2>Ablations</h2>"]
    measured = tables.columns(results)
    for table, variants in found.items():
        published = paper.LOSS if table == "loss" else {}
        names = list(dict.fromkeys([*(paper.LOSS_COLUMNS if published else ()), *measured]))
        rows = [["variant", *(MEASURES[name].title for name in names)]]
        for each in variants:
            count = _note(f"{len(each['runs'])} run{'s' if len(each['runs']) > 1 else ''}")
            cells = (_pooled(name, each["measures"].get(name)) for name in names)
            rows.append([f"{html.escape(each['variant'])} {count}", *cells])
        for variant, values in published.items():
            known = dict(zip(paper.LOSS_COLUMNS, values))
            cells = (number(name, known.get(name)) for name in names)
            rows.append([f"{html.escape(variant)} {_note('published')}", *cells])
        parts.append(f"<h3>{table}</h3>{_table(rows)}")
    parts.append(
        '<p class="note">Mean over a variant\'s runs, &#177; their standard deviation where there are several. '
        "Published rows are of other faces.</p>"
    )
    return "".join(parts)


def _pooled(name: str, found: tuple[float, float | None, int] | None) -> str:
    if found is None:
        return ""
    spread = f" &#177; {number(name, found[1])}" if found[1] is not None else ""
    return number(name, found[0]) + spread


def _of_one(result: Result, folder: Path, alone: bool) -> str:
    title = "" if alone else f"<h2>{html.escape(result['run'])}</h2>"
    return title + _breakdown(result) + _gallery(result, folder) + _failures(result, folder) + _left_out(result)


def _breakdown(result: Result) -> str:
    parts = []
    for row in result["rows"]:
        for key, groups in row["by"].items():
            rows = [[key, "value", "number"]]
            for name, (value, count) in groups.items():
                rows.append([html.escape(name), number(row["name"], value), str(count)])
            parts.append(f"<h3>{row['title']}, by {key}</h3>{pages.table(rows)}")
    return f"<details><summary>By attribute and by kind</summary>{''.join(parts)}</details>" if parts else ""


def _picture(path: Path) -> str:
    """The address of a picture, small enough for a page; empty where its file is gone or damaged."""
    try:
        small = Image.fromarray(read_png(path))  # without the file's own texts
    except UserError:
        return ""
    small.thumbnail((192, 192))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=88)
    return pages.address(file.getvalue(), "jpeg")


def _figure(folder: Path, record: Mapping[str, Any], more: str = "") -> str:
    prompt = html.escape(record["prompt"])
    return (
        f'<figure><img src="{_picture(folder / record["file"])}" alt="painted from: {prompt}">'
        f"<figcaption>{more or prompt}</figcaption></figure>"
    )


def _gallery(result: Result, folder: Path) -> str:
    shown = result["shown"]["paintings"]
    if not shown:
        return ""
    figures = "".join(_figure(folder, each) for each in shown)
    return (
        f"<h2>Paintings</h2><p class='note'>The first of the set, not chosen.</p><div class='gallery'>{figures}</div>"
    )


def _failures(result: Result, folder: Path) -> str:
    shown, parts = result["shown"], []
    if shown["missed"]:
        figures = "".join(
            _figure(folder, each, f"missed: {html.escape(', '.join(each['missed']))}") for each in shown["missed"]
        )
        parts.append(f"<h3>Paintings that miss most of their prompt</h3><div class='gallery'>{figures}</div>")
    if shown["wrong"]:
        rows = [["face", "question", "answer", "right"]]
        for each in shown["wrong"]:
            face, question, given = (html.escape(each[key]) for key in ("face", "question", "given"))
            right = html.escape(" / ".join(each["references"]))
            rows.append([face, question, f'<span class="wrong">{given}</span>', right])
        parts.append(
            f"<h3>Wrong answers: {len(shown['wrong'])} of {shown['wrong_count']}, evenly spaced</h3>"
            f"{_table(rows, 'words')}"
        )
    return f"<h2>Failures</h2>{''.join(parts)}" if parts else ""


def _left_out(result: Result) -> str:
    if not result["left_out"]:
        return ""
    rows = "".join(f"<li>{html.escape(each)}</li>" for each in result["left_out"])
    return f"<h2>Left out: {result['left_out_count']}</h2><ul class='note'>{rows}</ul>"
