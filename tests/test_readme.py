"""README.md states the committed results, its tree is the repository's, and the links of all pages lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.results import devices

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = json.loads((ROOT / "docs" / "demo" / "results.json").read_text())


def _rows(marker: str) -> list[list[str]]:
    """Cells of the table between <!-- marker --> and <!-- /marker -->, without its head."""
    block = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", README, re.S)
    assert block, f"README.md has no part {marker}"
    lines = [line for line in block[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_attribute_table_is_the_committed_result():
    painted, answered = (RESULTS[part]["attributes"] for part in ("generation", "understanding"))
    expected = [
        [
            name,
            f"{painted[name]['match']:.2f}",
            f"{painted[name]['chance']:.2f}",
            f"{painted[name]['p']:.0e}",
            f"{answered[name]['accuracy']:.2f}",
            f"{answered[name]['majority']:.2f}",
            f"{answered[name]['p']:.0e}",
        ]
        for name in painted
    ]
    assert _rows("attributes") == expected


def test_time_table_is_the_committed_result():
    seconds = RESULTS["seconds"]
    assert _rows("seconds") == [[*(f"{value:.0f}" for value in seconds.values()), f"{sum(seconds.values()):.0f}"]]


def test_pages_and_pictures_state_the_committed_results():
    assert report.stale(devices()) == [], "make report"


def _anchors(page: Path) -> set[str]:
    """What a heading is called behind a #: its letters, digits and hyphens, a hyphen for each space."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pages += [page for room in ("benchmarks", "docs", "kernels", "unif2ace") for page in (ROOT / room).rglob("*.md")]
    lost = []
    for page in pages:
        for link in re.findall(r"\]\((?!http)([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert lost == []


def test_file_tree_has_every_file_once():
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```\n<!-- /tree -->", README, re.S)
    assert tree, "README.md has no part tree"
    folders: list[str] = []
    listed = []
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, what = line.strip().partition(" ")
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            assert what.strip(), f"{name} has no words beside it"
            listed.append("".join(folders))
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: nothing says which files belong to it")
    assert sorted(listed) == sorted(set(done.stdout.split()))
