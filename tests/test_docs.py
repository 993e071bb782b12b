"""The pages of the public functions: built from the docstrings without a warning, mathematics set, nothing fetched."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unif2ace_kernels

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "api"
ROOMS = ("moe", "d3diff", "sampling", "random")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (it is in the docs extra)")


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(config), "-d", str(site)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_every_public_name_has_its_entry(site):
    for room in ROOMS:
        page = (site / room / "index.html").read_text()
        module = importlib.import_module(f"unif2ace_kernels.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and not name.isupper():
                assert f'id="unif2ace_kernels.{room}.{name}"' in page, f"{room}.{name}"
        assert "doc-module" not in page, f"{room}: a file under the name of a function"
    library = (site / "library" / "index.html").read_text()
    assert all(f'id="unif2ace_kernels.{name}"' in library for name in ("explain", "Explanation", "registered_ops"))
    assert set(unif2ace_kernels.__all__) == {"Explanation", "explain", "registered_ops", *ROOMS}


def test_docstrings_and_formulas_are_set(site):
    for room in ROOMS:
        page = (site / room / "index.html").read_text()
        formulas = len(re.findall(r"\$\$.*?\$\$", (PAGES / f"{room}.md").read_text(), re.DOTALL))
        assert formulas and page.count('<div class="maths"><math') == formulas
        assert "arithmatex" not in page and "\\frac" not in html.unescape(page) and "Parameters" in page
        assert not re.search(r"\w<strong>", page), "a power in a docstring became bold: set it in backticks"


def test_nothing_is_fetched_when_a_page_is_read(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(http[^"]+)"|<link[^>]+stylesheet[^>]+"(http[^"]+)"', page.read_text()
        )
        assert fetched == [], page


@pytest.mark.slow  # builds again
def test_a_wrong_reference_is_an_error(tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("# A\n\n::: unif2ace_kernels.moe.no_such_function\n")
    config = (ROOT / "mkdocs.yml").read_text().partition("nav:")[0]
    config = config.replace("docs/api", str(tmp_path / "pages")).replace("[kernels]", f"[{ROOT / 'kernels'}]")
    (tmp_path / "mkdocs.yml").write_text(config.replace("docs/maths.py", str(ROOT / "docs" / "maths.py")))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "no_such_function" in done.stderr
