"""A training run as one page that needs no other file, RUN/report.html, and its pictures once more in RUN/report."""

from __future__ import annotations

import hashlib
import html
import io
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image

from unif2ace import pages
from unif2ace.errors import UserError
from unif2ace.files import replacing
from unif2ace.pictures import read_png
from unif2ace.training import figures
from unif2ace.training.findings import clip_of, findings, headline, last_loads, window
from unif2ace.training.history import CONFIG, Run, Sample

PAGE, FOLDER = "report.html", "report"
SHOWN = 8  # steps of which samples are shown: the first, the last, and between
ROWS = 60  # most rows of a table of events

_STYLE = """
body { max-width: 80rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
.tile { border: 1px solid #e2e5ea; border-radius: 6px; padding: .5rem .8rem }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; white-space: nowrap }
.tile span { color: #667; font-size: .85rem }
.look { background: #fdf5e8; border-left: 4px solid #d9822b; padding: .5rem 1rem .5rem 2rem; margin: 1rem 0 }
.well { background: #eef6ef; border-left: 4px solid #3d8b4f; padding: .5rem 1rem; margin: 1rem 0 }
td.face img { width: 4rem; margin: 0; border-radius: 3px }
pre { background: #f6f7f9; padding: 1rem; overflow-x: auto; font-size: .85rem }
"""


def write(folder: Path) -> Path:
    """Draw the run in `folder`; the path of the page.

    Raises:
        UserError: there is no log, nothing in it, or the page cannot be written.
    """
    run = Run.read(folder)
    shown = _spread(run.samples)
    for name, figure in _figures(run):
        pages.save(run.folder / FOLDER / f"{name}.png", figure)
    sheet = figures.sheet(shown)
    if sheet is not None:
        with replacing(run.folder / FOLDER / "paintings.png") as partial:
            sheet.save(partial, format="PNG")
    path = run.folder / PAGE
    with replacing(path) as partial:
        partial.write_text(_page(run, shown), encoding="utf-8")
    return path


def _figures(run: Run) -> Iterator[tuple[str, Any]]:
    yield "losses", figures.losses(run)
    yield "rates", figures.rates(run, clip_of(run))
    yield "speed", figures.speed(run)
    if run.experts:
        yield "evenness", figures.entropy(run)
        for level, group in figures.groups_of(run.experts):
            yield _load_name(level, group), figures.load(run, level, group)


def _load_name(level: str, group: str) -> str:
    return "load_" + "".join(each if each.isalnum() else "-" for each in f"{level}_{group}")


def _page(run: Run, shown: Sequence[Sample]) -> str:
    name = run.folder.resolve().name
    parts = [
        f"<h1>Training run {html.escape(name)}</h1>",
        _tiles(run),
        _findings(run),
        "<h2>Losses</h2>",
        _image(run, "losses", "the loss and its terms over the steps"),
        '<p class="note">Light: every step (of a long run the range of neighbours); dark: smoothed to both sides. '
        "Dotted: a stage begins. Triangles: the run was resumed.</p>",
        "<h2>Learning rate and gradients</h2>",
        _image(run, "rates", "learning rate, gradient norm, gradient norms by part"),
        "<h2>Speed</h2>",
        _image(run, "speed", "tokens a second, MFU, waiting for data, memory, what was passed over"),
        _experts(run),
        _samples(run, shown),
        "<h2>Events</h2>",
        _events(run),
        _config(run),
        f'<p class="note">Written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by unif2ace report.</p>',
    ]
    return pages.page(f"Run {name}", "\n".join(parts), _STYLE)


def _tiles(run: Run) -> str:
    tiles = [
        f'<div class="tile"><span>{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f"<span>{html.escape(remark)}</span></div>"
        for name, value, remark in headline(run)
    ]
    count = min(window(run), len(run.steps))
    note = f'<p class="note">What is now is the mean of the last {count} steps; of speeds, the median.</p>'
    return f'<div class="tiles">{"".join(tiles)}</div>{note}'


def _findings(run: Run) -> str:
    found = findings(run)
    if not found:
        return '<p class="well">Nothing stands out.</p>'
    return '<ul class="look">' + "".join(f"<li>{html.escape(each)}</li>" for each in found) + "</ul>"


def _image(run: Run, name: str, words: str) -> str:
    return f'<img src="{pages.embedded(run.folder / FOLDER / f"{name}.png")}" alt="{html.escape(words)}">'


def _experts(run: Run) -> str:
    if not run.experts:
        return ""
    rows = [["level", "group", "layers", "evenness", "least even", "hardly used", "crowded"]]
    loads = last_loads(run)
    for level, group in figures.groups_of(run.experts):
        own = [each for each in loads if (each.level, each.group) == (level, group)]
        worst = min(own, key=lambda each: each.entropy)
        mean = sum(each.entropy for each in own) / len(own)
        least = f"{worst.entropy:.3f} in layer {worst.layer + 1}"
        unusual = [_named(own, what) for what in ("empty", "crowded")]
        rows.append([html.escape(level), html.escape(group), str(len(own)), f"{mean:.3f}", least, *unusual])
    groups = figures.groups_of(run.experts)
    heat = [_image(run, _load_name(*each), f"load of the {' '.join(each)} experts") for each in groups]
    return "\n".join(
        [
            "<h2>Experts</h2>",
            "<p>Which experts the last steps went to. Evenness is the entropy of the load over that of an even one. "
            "Sequence level, t2i: copy, zero, noise, copy; mmu: CLIP, face, copy, copy (a copy stands in for what the "
            "config leaves out).</p>",
            f'<div class="wide">{pages.table(rows, "words")}</div>',
            _image(run, "evenness", "evenness of the load by layer over the steps"),
            *heat,
        ]
    )


def _named(loads: Sequence[Any], what: str) -> str:
    """Layer: expert (its share), of every expert that is `what`."""
    found = [
        f"layer {each.layer + 1}: "
        + ", ".join(f"{index + 1} ({each.share[index]:.2f}x)" for index in getattr(each, what))
        for each in loads
        if getattr(each, what)
    ]
    more = [f"and in {len(found) - 12} more layers"] if len(found) > 12 else []
    return "<br>".join(found[:12] + more) or "none"


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """At most `SHOWN` of them, evenly, the last among them."""
    count = len(samples)
    if count <= SHOWN:
        return list(samples)
    return [samples[round(index * (count - 1) / (SHOWN - 1))] for index in range(SHOWN)]


def _samples(run: Run, shown: Sequence[Sample]) -> str:
    if not shown:
        return ""
    parts = ["<h2>Samples</h2>"]
    if any(each.paintings is not None for each in shown):
        prompts = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in shown[-1].prompts)
        parts += [
            f"<p>A row a step, painted from the same noise; from left to right:</p><ol>{prompts}</ol>",
            _image(run, "paintings", "paintings of each prompt over the steps"),
        ]
    if any(each.answers for each in shown):
        parts += ["<h3>Answers</h3>", f'<div class="wide">{_answers(shown)}</div>']
    return "\n".join(parts)


def _answers(shown: Sequence[Sample]) -> str:
    """A row a question, a column a step, for the faces that the last step asked about."""
    last = [each for each in shown if each.answers][-1]
    same = [each for each in shown if each.answers and _sum(each) == _sum(last)]
    said = [{(each["image"], each["question"]): each["answer"] for each in sample.answers} for sample in same]
    faces = _crops(last)
    head = "".join(f"<th>{each}</th>" for each in ["face", "question", *(f"step {each.step:,}" for each in same)])
    rows = [f"<tr>{head}</tr>"]
    questions = [face for face, _ in said[-1]]
    for index, (face, question) in enumerate(said[-1]):
        cells = [question, *(each.get((face, question), "") for each in said)]
        row = "".join(f"<td>{html.escape(each)}</td>" for each in cells)
        if index == 0 or questions[index - 1] != face:  # once beside all of its questions
            shown_face = f'<img src="{faces[face]}" alt="face {face + 1}">' if face in faces else str(face + 1)
            row = f'<td class="face" rowspan="{questions.count(face)}">{shown_face}</td>{row}'
        rows.append(f"<tr>{row}</tr>")
    return f'<table class="words">{"".join(rows)}</table>'


def _sum(sample: Sample) -> str:
    return hashlib.sha256(sample.faces.read_bytes()).hexdigest() if sample.faces is not None else ""


def _crops(sample: Sample) -> dict[int, str]:
    """Each face of the row as the address of an image."""
    if sample.faces is None:
        return {}
    count = 1 + max(each["image"] for each in sample.answers)
    try:
        row = Image.fromarray(read_png(sample.faces))
    except UserError:
        return {}
    side = row.width // count
    found = {}
    for index in range(count):
        part = io.BytesIO()
        row.crop((index * side, 0, (index + 1) * side, row.height)).resize((128, 128)).save(part, format="PNG")
        found[index] = pages.address(part.getvalue())
    return found


def _events(run: Run) -> str:
    """Every event but states that were saved, which are told in one line."""
    saved = [each for each in run.events if each.get("event") == "state_saved"]
    others = [each for each in run.events if each.get("event") != "state_saved"]
    rows = [["step", "when (UTC)", "event", ""]]
    left = max(0, len(others) - ROWS)
    kept = others[: ROWS // 2] + others[len(others) - ROWS // 2 :] if left else others
    for index, each in enumerate(kept):
        if left and index == ROWS // 2:
            rows.append(["", "", f"... {left} more", ""])
        rest = {key: value for key, value in each.items() if key not in ("event", "step", "time")}
        rows.append([_value(each.get("step")), _when(each), _value(each.get("event")), _value(rest)])
    text = pages.table(rows, "words")
    if saved:
        took = [each["seconds"] for each in saved if isinstance(each.get("seconds"), (int, float))]
        seconds = f", {min(took):.1f} to {max(took):.1f} s each" if took else ""
        text += (
            f'<p class="note">{len(saved)} states saved{seconds}; the last at step {_value(saved[-1].get("step"))}.</p>'
        )
    return f'<div class="wide">{text}</div>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{html.escape(str(key))} {_value(each)}" for key, each in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "none" if value is None else html.escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _when(event: dict[str, Any]) -> str:
    try:
        return f"{datetime.fromtimestamp(event['time'], timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (KeyError, OSError, OverflowError, TypeError, ValueError):  # written by another
        return ""


def _config(run: Run) -> str:
    path = run.folder / CONFIG
    if not run.config:
        return ""
    text = path.read_text(encoding="utf-8")
    return f"<details><summary>{CONFIG}</summary><pre>{html.escape(text)}</pre></details>"
