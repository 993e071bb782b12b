"""Result files as pages: docs/results with tables and pictures, and the parts of the READMEs that state figures.

    python -m benchmarks.report [--check]

Every sentence and table with a figure in it is made here from the committed files; --check writes nothing and exits
with 1 where a page says something else than they do.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .cpu import SUITES
from .environment import ROOT
from .results import Device, devices
from .tables import (
    OTHERS,
    absences,
    by_op,
    cases,
    ceilings,
    growth,
    growth_in_words,
    in_short,
    losses,
    machine,
    overview,
    sources,
    verdict,
)

PAGES = Path("docs") / "results"
README, BENCHMARKS, KERNELS = Path("README.md"), Path("benchmarks") / "README.md", Path("kernels") / "README.md"
PICTURES = ("ratio", "time", "floor", "roofline", "memory", "scaling", "training")


def marked(text: str, marker: str, part: str) -> str:
    """`text` with `part` between <!-- marker --> and <!-- /marker -->."""
    found = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.S)
    if not found.search(text):
        raise ValueError(f"no part between <!-- {marker} --> and <!-- /{marker} -->")
    return found.sub(lambda match: f"{match[1]}{part.strip()}\n{match[2]}", text)


def _picture(device: Device, name: str, words: str) -> str:
    return f"![{words}]({device.name}-{name}.svg)"


def device_page(device: Device) -> str:
    """All figures of one device."""
    titles = {suite.name: suite.title for suite in SUITES}
    parts = [
        f"# Results: {device.name}",
        f"{machine(device)}. {ceilings(device) if device.ceilings else ''}",
        "Made by `make report` from the files below. A ratio is the other's time over ours, taken round "
        "by round, with its quartiles: below 1, ours is slower. A contender with a * does other work of the same kind "
        "(a yardstick) and was not compared. The floor of a case is the larger of its FLOPs over the matrix rate and "
        "its bytes over the copy rate, both measured in the same run.",
        sources(device),
    ]
    if by_op(device):
        parts += [
            "## Against the fastest other way", verdict(device), overview(device),
            _picture(device, "ratio", "the best peer's time over ours, every case"), "### Where ours is slower",
            losses(device), "## Time, share of the floor, memory",
            _picture(device, "time", "time of ours and of the best peer"),
            _picture(device, "floor", "share of the floor"), _picture(device, "roofline", "roofline"),
            _picture(device, "memory", "the best peer's memory over ours"),
        ]  # fmt: skip
    if device.series:
        parts += ["## How cost grows", growth_in_words(device), growth(device),
                  _picture(device, "scaling", "time along every axis")]  # fmt: skip
    for name, (title, words) in OTHERS.items():
        if records := device.others.get(name):
            parts += [f"## {title}", words(records)]
            if name in PICTURES:
                parts.append(_picture(device, name, "what computes and what is exchanged in a step"))
    parts.append("## Every case")
    for name, results in device.files.items():
        plain = [result for result in results if result.measured and not result.axis and not result.is_sweep]
        if plain:
            parts += [f"### {titles.get(name, name)}", cases(plain)]
    sweeps = [result for results in device.files.values() for result in results if result.is_sweep and result.measured]
    if sweeps:
        parts += ["## Launch choices against ours", cases(sweeps)]
    parts += ["## Who did not run", absences(device)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _no_gpu(found: Sequence[Device]) -> str:
    return "" if any(each.head["device"] == "cuda" for each in found) else "GPU: not yet measured."


def index_page(found: Sequence[Device]) -> str:
    parts = ["# Results", "Made by `make report` from `benchmarks/results`."]
    for device in found:
        parts += [f"## [{device.name}]({device.name}.md)", machine(device) + "."]
        if by_op(device):
            parts += [verdict(device), overview(device), _picture(device, "ratio", "the best peer's time over ours")]
        if device.series:
            parts += [growth_in_words(device), _picture(device, "scaling", "time along every axis")]
    return "\n\n".join([*parts, _no_gpu(found)]).strip() + "\n"


def readme_part(found: Sequence[Device]) -> str:
    """The README's result section: an overview a device, and a picture."""
    parts = []
    for device in found:
        if not by_op(device):
            continue
        parts += [
            f"{machine(device)}: the time of the fastest other way that gives the same, over ours (below 1: ours is "
            "slower).",
            overview(device),
            verdict(device) + (f" {growth_in_words(device)}" if device.series else ""),
            f"![the best peer's time over ours, every case]({PAGES / device.name}-ratio.svg)",
        ]
    words = f"Every case, with memory, share of the floor, growth and the losses: [{PAGES}]({PAGES}/README.md)."
    return "\n\n".join([*parts, f"{words} {_no_gpu(found)}".strip()])


def headline(found: Sequence[Device]) -> str:
    """What there is to know before anything else, a sentence a device."""
    told = [f"On {machine(each)}: {verdict(each).replace('Ours', 'ours', 1)}" for each in found if by_op(each)]
    return " ".join(["Every op against what one would run otherwise.", *told, _no_gpu(found)]).strip()


def kernels_part(found: Sequence[Device]) -> str:
    """The kernels' own page: each op's range, and who was not met."""
    parts = []
    for device in found:
        if by_op(device):
            parts += [
                "Time of the fastest other way that gives the same, over ours, the least and the most of its cases "
                f"(below 1: ours is slower). {machine(device)}.",
                in_short(device),
            ]
    words = f"Who was met, at which shapes, with memory and the losses: [docs/results](../{PAGES}/README.md)."
    return "\n\n".join([*parts, f"{words} {_no_gpu(found)}".strip()])


def benchmarks_part(found: Sequence[Device]) -> str:
    parts = []
    for device in found:
        parts += [f"**{device.name}** ({machine(device)}): [figures](../{PAGES}/{device.name}.md)",
                  sources(device).replace("(../../benchmarks/", "(")]  # fmt: skip
    return "\n\n".join([*parts, _no_gpu(found)]).strip()


def pages(found: Sequence[Device], root: Path = ROOT) -> dict[Path, str]:
    """Every text that states results -> what it should be."""
    return {
        README: marked(marked((root / README).read_text(), "results", readme_part(found)), "headline", headline(found)),
        KERNELS: marked((root / KERNELS).read_text(), "results", kernels_part(found)),
        BENCHMARKS: marked((root / BENCHMARKS).read_text(), "results", benchmarks_part(found)),
        PAGES / "README.md": index_page(found),
        **{PAGES / f"{device.name}.md": device_page(device) for device in found},
    }


def drawn_from(device: Device) -> str:
    """What a picture carries to say which figures it shows."""
    return f"<!-- results {device.digest} -->"


def names_of_pictures(device: Device) -> list[str]:
    wanted: dict[str, Callable[[Device], object]] = {name: by_op for name in PICTURES}
    wanted["scaling"] = lambda device: device.series
    wanted["training"] = lambda device: device.others.get("training")
    return [name for name in PICTURES if wanted[name](device)]


def stale(found: Sequence[Device], root: Path = ROOT) -> list[str]:
    """Pages and pictures that say something else than the result files."""
    wrong = [
        str(path) for path, text in pages(found, root).items()
        if not (root / path).exists() or (root / path).read_text() != text
    ]  # fmt: skip
    for device in found:
        for name in names_of_pictures(device):
            picture = root / PAGES / f"{device.name}-{name}.svg"
            if not picture.exists() or drawn_from(device) not in picture.read_text():
                wrong.append(str(picture.relative_to(root)))
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page is not what it should be"
    )
    options = parser.parse_args(arguments)
    found = devices()
    if options.check:
        wrong = stale(found)
        print("\n".join(f"stale: {each}" for each in wrong) or "every page says what the result files say")
        return 1 if wrong else 0
    from .plots import draw  # matplotlib is needed for pictures alone

    (ROOT / PAGES).mkdir(parents=True, exist_ok=True)
    for path, text in pages(found).items():
        (ROOT / path).write_text(text)
        print(path)
    for device in found:
        for name in names_of_pictures(device):
            path = PAGES / f"{device.name}-{name}.svg"
            draw(name, device, ROOT / path, drawn_from(device))
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
