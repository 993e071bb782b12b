"""One page of one or several results: the paper's rows beside the runs', intervals, galleries, failures, tables.

The page is one file with its pictures in it. The paper's numbers are of other faces: they stand there as what is
published, and the page says so wherever they stand.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unif2ace.evaluation import paper, tables
from unif2ace.evaluation.rows import MEASURES
from unif2ace.files import replacing

Result = Mapping[str, Any]

_STYLE = """
:root { --line: #d9dde3; --soft: #667; --mark: #2458a6 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1d2330 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; margin: .6rem 0; width: 100% }
td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
td:first-child, th:first-child, .left { text-align: left }
.note, .absent { color: var(--soft); font-size: .9em }
.absent { text-align: left }
.scroll { overflow-x: auto }
.gallery { display: flex; flex-wrap: wrap; gap: .6rem } figure { width: 7.4rem; margin: 0; font-size: .78em }
figure img { width: 100%; image-rendering: auto; border-radius: 3px; display: block }
.wrong { color: #a02020 }
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
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(_title(results))}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


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


def _main_table(results: Sequence[Result]) -> str:
    """A row a measure, a column a run; the paper's own value last, where there is one."""
    head = "".join(f"<th>{html.escape(each['run'])}</th>" for each in results)
    rows = [f"<tr><th>measure</th>{head}<th>95 % interval</th><th>paper&#8224;</th></tr>"]
    one = results[0] if len(results) == 1 else None
    names = [name for name in MEASURES if any(row["name"] == name for each in results for row in each["rows"])]
    for name in names:
        found = [next((row for row in each["rows"] if row["name"] == name), None) for each in results]
        arrow = "&#8593;" if MEASURES[name].higher else "&#8595;"
        title = f'<td title="{html.escape(MEASURES[name].what)}">{html.escape(MEASURES[name].title)} {arrow}'
        title += f'<div class="note">{html.escape(MEASURES[name].what)}</div></td>'
        published = number(name, paper.published(name))
        if all(row is None or row["value"] is None for row in found):
            reason = next((row["reason"] for row in found if row), "")
            rows.append(
                f'<tr>{title}<td class="absent" colspan="{len(results) + 1}">not measured: {html.escape(reason)}</td>'
                f"<td>{published}</td></tr>"
            )
            continue
        cells = "".join(
            f"<td>{number(name, row['value'])}</td>" if row and row["value"] is not None else
            f'<td class="absent" title="{html.escape(row["reason"] if row else "")}">not measured</td>'
            for row in found
        )  # fmt: skip
        how = f'<div class="note">{html.escape(one_row["how"])}</div>' if one and (one_row := found[0]) else ""
        rows.append(f"<tr>{title}{cells}<td>{_intervals(name, found)}{how}</td><td>{published}</td></tr>")
    note = (
        f"&#8224; As published for UniF2ace ({html.escape(paper.SOURCE)}): other faces, other judges, another number of"
        " them. It is there to be read beside, and no row here is comparable with it."
    )
    return f'<h2>Measures</h2><div class="scroll"><table>{"".join(rows)}</table></div><p class="note">{note}</p>'


def _intervals(name: str, found: Sequence[Any]) -> str:
    """A bar a run, on one scale."""
    spans = [row if row and row["low"] is not None else None for row in found]
    known = [each for each in spans if each]
    if not known:
        return '<span class="note">none</span>'
    low, high = min(each["low"] for each in known), max(each["high"] for each in known)
    if len(known) == 1:
        return f"{number(name, known[0]['low'])} to {number(name, known[0]['high'])}"
    width, scale = 180, 172 / ((high - low) or 1)
    bars = []
    for line, each in enumerate(spans):
        if each:
            y, left, right, middle = 8 + 14 * line, *(4 + scale * (each[key] - low) for key in ("low", "high", "value"))
            bars.append(
                f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="#2458a6" stroke-width="3"/>'
                f'<circle cx="{middle:.1f}" cy="{y}" r="4" fill="#2458a6"/>'
            )
    text = f'<div class="note">{number(name, low)} to {number(name, high)}, runs from the top</div>'
    label = f"{MEASURES[name].title}: intervals of the runs"
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" width="{width}" height="{16 + 14 * (len(spans) - 1)}">'
        f"{''.join(bars)}</svg>{text}"
    )


def _published(results: Sequence[Result]) -> str:
    """The paper's tables, the runs' rows under the paper's."""
    parts = ["<h2>The paper's tables, with these runs below</h2>"]
    for title, names, rows in paper.TABLES[:2]:
        head = "".join(f"<th>{MEASURES[name].title}</th>" for name in names)
        body = "".join(
            f"<tr><td>{html.escape(model)} <span class='note'>published</span></td>"
            + "".join(f"<td>{number(name, value)}</td>" for name, value in zip(names, values)) + "</tr>"
            for model, values in rows.items()
        )  # fmt: skip
        for each in results:
            cells = "".join(
                f"<td>{number(name, found)}</td>" if (found := tables.value(each, name)) is not None else
                '<td class="note">not measured</td>' for name in names
            )  # fmt: skip
            body += f"<tr><td><b>{html.escape(each['run'])}</b> <span class='note'>other faces</span></td>{cells}</tr>"
        parts.append(f"<h3>{title}</h3><table><tr><th>model</th>{head}</tr>{body}</table>")
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
    for table, rows in found.items():
        published = paper.LOSS if table == "loss" else {}
        names = list(dict.fromkeys([*(paper.LOSS_COLUMNS if published else ()), *measured]))
        head = "".join(f"<th>{MEASURES[name].title}</th>" for name in names)
        body = "".join(
            f"<tr><td>{html.escape(row['variant'])} <span class='note'>{len(row['runs'])} run"
            f"{'s' if len(row['runs']) > 1 else ''}</span></td>"
            + "".join(f"<td>{_pooled(name, row['measures'].get(name))}</td>" for name in names) + "</tr>"
            for row in rows
        )  # fmt: skip
        for variant, values in published.items():
            known = dict(zip(paper.LOSS_COLUMNS, values))
            cells = "".join(f"<td>{number(name, known.get(name))}</td>" for name in names)
            body += f"<tr><td>{html.escape(variant)} <span class='note'>published</span></td>{cells}</tr>"
        parts.append(f'<h3>{table}</h3><div class="scroll"><table><tr><th>variant</th>{head}</tr>{body}</table></div>')
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
            cells = "".join(
                f"<tr><td>{html.escape(name)}</td><td>{number(row['name'], value)}</td><td>{count}</td></tr>"
                for name, (value, count) in groups.items()
            )
            title = f"{row['title']}, by {key}"
            parts.append(f"<h3>{title}</h3><table><tr><th>{key}</th><th>value</th><th>number</th></tr>{cells}</table>")
    return f"<details><summary>By attribute and by kind</summary>{''.join(parts)}</details>" if parts else ""


def _picture(path: Path) -> str:
    """A picture's file as a data URL, small enough for a page; empty where it is gone."""
    try:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
            small.thumbnail((192, 192))
            file = io.BytesIO()
            Image.fromarray(np.asarray(small)).save(file, format="JPEG", quality=88)  # without the file's own texts
    except OSError:
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


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
        rows = "".join(
            f"<tr><td>{html.escape(each['face'])}</td><td class='left'>{html.escape(each['question'])}</td>"
            f"<td class='left wrong'>{html.escape(each['given'])}</td>"
            f"<td class='left'>{html.escape(' / '.join(each['references']))}</td></tr>"
            for each in shown["wrong"]
        )
        parts.append(
            f"<h3>Wrong answers: {len(shown['wrong'])} of {shown['wrong_count']}, evenly spaced</h3><table><tr>"
            "<th>face</th><th class='left'>question</th><th class='left'>answer</th><th class='left'>right</th></tr>"
            f"{rows}</table>"
        )
    return f"<h2>Failures</h2>{''.join(parts)}" if parts else ""


def _left_out(result: Result) -> str:
    if not result["left_out"]:
        return ""
    rows = "".join(f"<li>{html.escape(each)}</li>" for each in result["left_out"])
    return f"<h2>Left out: {result['left_out_count']}</h2><ul class='note'>{rows}</ul>"
