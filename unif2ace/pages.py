"""What the pages that this project writes share: their look, tables, pictures, figures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unif2ace.files import replacing

if TYPE_CHECKING:  # a page without figures is written without it
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin: 2.4rem 0 .4rem; font-size: 1.15rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
img { max-width: 100%; display: block; margin: .5rem 0 }
.pixels { image-rendering: auto; width: 100% }
table { border-collapse: collapse; margin: .5rem 0 }
td, th { padding: .2rem .8rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, .words td, .words th { text-align: left }
.wide { overflow-x: auto } .wide table { width: 100% }
.note { color: #667; font-size: .85rem }
.wrong { color: #a00 }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; `title` is a text, `body` is HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML, the first row its head; one that is a whole ``<td ...>`` stays as it is."""
    head, *body = [
        "".join(cell if cell.startswith("<td") else f"<{tag}>{cell}</{tag}>" for cell in row)
        for row, tag in zip(rows, ["th"] + ["td"] * len(rows))
    ]
    return f'<table class="{kind}"><tr>{head}</tr>' + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"


def address(content: bytes, kind: str = "png") -> str:
    """A picture's file as the address of an image, so that a page needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def embedded(path: Path) -> str:
    """The address of the PNG at `path`."""
    return address(path.read_bytes())


def save(path: Path, figure: Figure, dpi: int = 110) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)
