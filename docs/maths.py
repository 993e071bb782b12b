"""Formulas of the pages as MathML, which browsers set themselves: no script, nothing fetched when a page is read."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves: <span class="arithmatex">\(...\)</span>, <div class="arithmatex">\[...\]</div>.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, /, **_: object) -> str:
    """mkdocs calls this with the HTML of each page."""

    def set_formula(found: re.Match[str]) -> str:
        tag, formula = found[1], html.unescape(found[2]).strip()
        maths = convert(formula, display="block" if tag == "div" else "inline")
        return f'<{tag} class="maths">{maths}</{tag}>'

    return FORMULA.sub(set_formula, content)
