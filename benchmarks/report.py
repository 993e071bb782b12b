"""Result files as pages: docs/results with tables and pictures, and the parts of the READMEs that state figures.

    python -m benchmarks.report [--check]

Every sentence and table with a figure in it is made here from the committed files; --check writes nothing and exits
with 1 where a page says something else than they do.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .case import FORWARD, TRAINING
from .cpu import SUITES
from .environment import ROOT
from .results import Device, Record, Result, devices, exponent, geometric_mean

PAGES = Path("docs") / "results"
README, BENCHMARKS, KERNELS = Path("README.md"), Path("benchmarks") / "README.md", Path("kernels") / "README.md"
ROOMS = ("moe.", "transformers.", "d3diff.", "sampling.", "random.")  # of the kernels, as ops begin
PICTURES = ("ratio", "time", "floor", "roofline", "memory", "scaling", "training")
OTHER_TITLES = {
    "dispatch": "What expert parallelism sends over two processes (`python -m benchmarks.dispatch`)",
    "plan": "Memory as planned and as measured (`python -m benchmarks.planned`)",
    "profiles": "A training step and a generation by part (`python -m benchmarks.profiles`)",
    "training": "A training step over two processes (`python -m benchmarks.training`)",
}


def marked(text: str, marker: str, part: str) -> str:
    """`text` with `part` between <!-- marker --> and <!-- /marker -->."""
    found = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.S)
    if not found.search(text):
        raise ValueError(f"no part between <!-- {marker} --> and <!-- /{marker} -->")
    return found.sub(lambda match: f"{match[1]}{part.strip()}\n{match[2]}", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mib(record: Record, key: str) -> str:
    value = record.get(key)
    return "" if value is None else f"{value / 2**20:.1f}"


def machine(device: Device) -> str:
    """What it was, in a line."""
    head = device.head
    threads = f", {head['threads']} threads" if head["device"] == "cpu" else ""
    return f"{head['device_name']}{threads}, torch {head['versions']['torch']}, Python {head['versions']['python']}"


def by_op(device: Device) -> dict[tuple[str, str], list[Result]]:
    """(op, mode) -> results that have a peer."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in device.results:
        if result.peers:
            found.setdefault((result["op"], result["mode"]), []).append(result)
    return dict(sorted(found.items()))


def overview(device: Device) -> str:
    """A row an op: how its cases compare with the fastest other way that gives the same."""
    rows = []
    for (op, mode), results in by_op(device).items():
        ratios = [result.ratio for result in results]
        share = statistics.median(result["share_of_floor"] for result in results)
        worst = min(results, key=lambda result: result.ratio)
        rows.append(
            [f"`{op}`", mode, str(len(results)), f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}",
             f"{max(ratios):.2f}", f"{100 * share:.0f} %", f"{worst.peers[0]['contender']} at {worst['shape']}"]
        )  # fmt: skip
    head = ["op", "mode", "cases", "geometric mean", "least", "most", "median share of the floor", "nearest rival"]
    return table(head, rows)


def verdict(device: Device) -> str:
    """How often ours is the fastest, and where it is not."""
    compared = [result for result in device.results if result.peers]
    slower = [result for result in compared if result.ratio < 1]
    clear = [result for result in slower if result.peers[0]["times_ours_quartiles"][1] < 1]
    text = f"Ours is the fastest in {len(compared) - len(slower)} of {len(compared)} cases"
    return text + f"; it is slower in {len(slower)}, in {len(clear)} of them beyond the spread of the rounds."


def in_short(device: Device) -> str:
    """A row an op of the kernels: its cases' range against the fastest other way, by mode."""
    found = by_op(device)
    rows = []
    for room in ROOMS:
        for op in dict.fromkeys(op for op, _ in found if op.startswith(room)):
            cells = []
            for mode in (FORWARD, TRAINING):
                ratios = [result.ratio for result in found.get((op, mode), [])]
                ends = list(dict.fromkeys(f"{end:.2f}" for end in (min(ratios), max(ratios)))) if ratios else []
                cells.append(" to ".join(ends))
            rows.append([f"`{op}`", *cells])
    return table(["op", FORWARD, TRAINING], rows)


def losses(device: Device) -> str:
    rows = [
        [f"`{result['op']}`", result["shape"], result["dtype"], result["mode"], result.peers[0]["contender"],
         f"{result.ratio:.2f}", "yes" if result.peers[0]["times_ours_quartiles"][1] < 1 else "no"]
        for result in sorted(device.results, key=lambda one: one.ratio or 9)
        if result.peers and result.ratio < 1
    ]  # fmt: skip
    head = ["op", "shape", "dtype", "mode", "faster", "its time over ours", "beyond the spread"]
    return table(head, rows) if rows else "None."


def _contender(record: Record) -> str:
    low, high = record["times_ours_quartiles"]
    mark = "" if record["compared"] else "*"
    return f"{record['contender']}{mark} {record['times_ours']:.2f} [{low:.2f}, {high:.2f}]"


def cases(results: Sequence[Result]) -> str:
    """A row a case: time with quartiles, share of the floor, memory, and everybody else's time over ours."""
    rows = []
    for result in results:
        low, high = result["quartiles_ms"]
        saved = f" ({_mib(result.ours, 'saved_bytes')})" if "saved_bytes" in result.ours else ""
        rows.append(
            [f"`{result['op']}`", result["shape"], result["dtype"], result["mode"],
             f"{_ms(result['median_ms'])} [{_ms(low)}, {_ms(high)}]", f"{100 * result['share_of_floor']:.0f} %",
             _mib(result.ours, "peak_bytes") + saved, "; ".join(map(_contender, result.others))]
        )  # fmt: skip
    head = ["op", "shape", "dtype", "mode", "ours, ms [quartiles]", "of the floor", "peak (saved), MiB",
            "the others' time over ours [quartiles]"]  # fmt: skip
    return table(head, rows)


def absences(device: Device) -> str:
    """Who did not run, in how many cases, and why."""
    found: dict[tuple[str, str, str], int] = {}
    for result in [*device.results, *(each for series in device.series.values() for each in series)]:
        for record in result.absent:
            reason = re.sub(r"\s+", " ", str(record.get("reason", ""))).strip()
            reason = reason if len(reason) < 140 else reason[:137] + "..."
            key = (record["contender"], record["status"], reason.replace("|", "\\|"))
            found[key] = found.get(key, 0) + 1
    rows = [[*key, str(count)] for key, count in sorted(found.items())]
    return table(["contender", "status", "reason", "cases"], rows) if rows else "Everybody ran."


def growth(device: Device) -> str:
    """Fitted exponents along every axis: ours over the whole range and over its last step, and the plain code's."""
    rows = []
    for (op, axis), series in device.series.items():
        sizes = [each["at"] for each in series]
        times = [each["median_ms"] for each in series]
        plain = []
        for name in dict.fromkeys(record["contender"] for each in series for record in each.others):
            points = [(each["at"], record["median_ms"])
                      for each in series for record in each.others if record["contender"] == name]  # fmt: skip
            if len(points) == len(series):
                plain.append(f"{name} {exponent(*zip(*points)):.2f}, {exponent(*zip(*points[-2:])):.2f}")
        rows.append(
            [f"`{op}`", axis, f"{sizes[0]:,} to {sizes[-1]:,}", f"{_ms(times[0])} to {_ms(times[-1])}",
             f"{exponent(sizes, times):.2f}", f"{exponent(sizes[-2:], times[-2:]):.2f}", "; ".join(plain)]
        )  # fmt: skip
    head = [
        "op",
        "axis",
        "from, to",
        "ours, ms",
        "exponent",
        "of the last step",
        "plain code: exponent, of the last step",
    ]
    return table(head, rows)


def growth_in_words(device: Device) -> str:
    def steepest(first: int) -> str:
        slopes = {
            f"`{op}` in {axis}": exponent(
                [each["at"] for each in series[first:]], [each["median_ms"] for each in series[first:]]
            )
            for (op, axis), series in device.series.items()
        }
        most = max(slopes, key=slopes.__getitem__)
        return f"{slopes[most]:.2f} ({most})"

    most = f"the fitted exponent of ours is at most {steepest(0)}; of the last step alone, {steepest(-2)}"
    return f"Along {len(device.series)} axes {most}."


def ceilings(device: Device) -> str:
    rates = ", ".join(
        f"{device.ceiling(dtype) / 1e12:.3g} TFLOP/s in {dtype}" for dtype in device.ceilings[0]["matmul_flops_per_s"]
    )
    return (
        f"Measured ceilings: copy {device.ceiling('copy') / 1e9:.3g} GB/s (read and written), matrix product {rates}."
    )


def training(records: Sequence[Record]) -> str:
    """A row a variant of benchmarks.training, and what the profiles say."""
    rows = []
    for each in records:
        least = f" ({each['bytes'] / each['bytes_least']:.2f} of the least)" if each["bytes_least"] else ""
        rows.append(
            [each["variant"], _ms(each["step_ms"]), f"{each['tokens_per_second']:,.0f}", f"{each['efficiency']:.2f}",
             f"{each['bytes'] / 1e6:.1f}{least}", _ms(each["exchanging_ms"]),
             f"{each['hidden']:.0%}" if each["processes"] > 1 else ""]
        )  # fmt: skip
    head = ["processes", "step, ms", "tokens/s", "efficiency", "received, MB", "exchanging, ms", "behind computing"]
    words = (
        f"Medians of {records[0]['rounds']} runs of {records[0]['steps']} steps, a thread a process. Efficiency: one "
        "process's time over that of two, halved. Exchanging: how long collectives are under way in a profiled step, "
        "waiting for the other process included; behind computing: the share of it in which rank 0 computes."
    )
    return f"{words}\n\n{table(head, rows)}"


def sources(device: Device) -> str:
    """The result files, and how each was made."""
    titles = {**{suite.name: suite.title for suite in SUITES}, **OTHER_TITLES}
    files = {name: (len(results), results[0].ours) for name, results in device.files.items()}
    files |= {name: (len(records), records[0]) for name, records in device.others.items()}
    rows = []
    for name, (count, first) in sorted(files.items()):
        dirty = " with changes" if first["dirty"] else ""
        rows.append(
            [f"[{name}.jsonl](../../benchmarks/results/{device.name}/{name}.jsonl)", titles.get(name, ""),
             str(count), f"{str(first['commit'])[:10]}{dirty}", first["date"][:10],
             f"`{first['command'].partition(' --json')[0]}`"]
        )  # fmt: skip
    return table(["file", "what", "cases", "commit", "date", "command"], rows)


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
    if records := device.others.get("training"):
        parts += [f"## {OTHER_TITLES['training']}", training(records),
                  _picture(device, "training", "what computes and what is exchanged in a step")]  # fmt: skip
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
    """What there is to know before anything else, in two sentences a device."""
    words = "Every op against what one would run otherwise, on"
    told = [f"{words} {machine(each)}: {verdict(each).replace('Ours', 'ours', 1)}" for each in found if by_op(each)]
    return " ".join([*told, _no_gpu(found)]).strip()


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
