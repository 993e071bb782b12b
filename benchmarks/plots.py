"""The pictures of the results pages: light, one question each, ours always in the same blue."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .results import Device, Record, Result, exponent, geometric_mean

OURS, PEER, FAINT, INK, GRID = "#1f5fa8", "#d9822b", "#b9bec6", "#30363d", "#e8eaed"
STYLE = {
    "font.size": 9, "axes.edgecolor": FAINT, "axes.linewidth": 0.8, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.major.width": 0.8, "ytick.major.size": 0, "svg.fonttype": "none", "svg.hashsalt": "results",
    "font.family": "DejaVu Sans", "axes.titlesize": 9.5, "axes.titlelocation": "left", "legend.frameon": False,
    "xtick.minor.size": 0, "ytick.minor.size": 0,
}  # fmt: skip
MARKS = {"float32": "o", "bfloat16": "D", "float16": "s"}


def _plain(value: float, _=None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _log_axis(axis, most_ticks: int = 8) -> None:
    """Logarithmic, with plain numbers at 1, 2, 5 where there is room for them."""
    low, high = axis.get_data_interval()
    axis.axes.set_xscale("log") if axis.axis_name == "x" else axis.axes.set_yscale("log")
    subs = (1, 2, 5) if math.log10(high / low) * 3 <= most_ticks else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(_plain))


def _rows(results: Sequence[Result]) -> dict[str, list[Result]]:
    """A row an op and mode."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda one: (one["op"], one["mode"])):
        mode = {"forward": "", "forward+backward": ", trained"}[result["mode"]]
        found.setdefault(result["op"] + mode, []).append(result)
    return found


def _label_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def _spread(row: int, index: int, count: int) -> float:
    """Points of a row beside each other, so that none hides another."""
    return row + 0.5 * ((index + 0.5) / count - 0.5)


def _of_dtype(ax: Axes, results: Sequence[Result], colour: str) -> None:
    """Which mark is which dtype."""
    for dtype in dict.fromkeys(result["dtype"] for result in results):
        ax.plot([], [], MARKS.get(dtype, "^"), color=colour, markersize=4, label=dtype)


def ratio(device: Device) -> Figure:
    """Every other way's time over ours; the fastest that gives the same stands out."""
    results = [result for result in device.results if result.peers]
    rows = _rows(results)
    figure = Figure(figsize=(8.2, 1.3 + 0.34 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for row, group in enumerate(rows.values()):
        for index, result in enumerate(group):
            y = _spread(row, index, len(group))
            rest = [peer["times_ours"] for peer in result.peers[1:]]
            ax.plot(rest, [y] * len(rest), "|", color=FAINT, markersize=5)
            ax.plot([result.ratio], [y], MARKS.get(result["dtype"], "^"), color=OURS, markersize=4, alpha=0.85)
        mean = geometric_mean([result.ratio for result in group])
        ax.plot([mean, mean], [row - 0.38, row + 0.38], color=PEER, linewidth=2.2, zorder=3)
    ax.axvline(1, color=INK, linewidth=1)
    _of_dtype(ax, results, OURS)
    ax.plot([], [], color=PEER, linewidth=2.2, label="geometric mean")
    ax.plot([], [], "|", color=FAINT, markersize=6, linewidth=0, label="the others")
    _log_axis(ax.xaxis)
    _label_rows(ax, list(rows))
    ax.set_xlabel("time of the fastest other way over ours (right of 1: ours is faster)")
    figure.legend(loc="outside upper right", ncols=5, handletextpad=0.4, columnspacing=1.2)
    return figure


def time(device: Device) -> Figure:
    """Time of ours and of the fastest other way, at the shapes that have a name."""
    results = [each for each in device.results if each.peers and " T" not in each["shape"]]
    results.sort(key=lambda one: (one["op"], one["mode"], one["shape"]))
    names = [
        f"{each['op']} {each['shape']}{', trained' if each['mode'] != 'forward' else ''}, "
        f"{each['dtype'].replace('bfloat', 'bf').replace('float', 'fp')}" for each in results
    ]  # fmt: skip
    figure = Figure(figsize=(8.2, 1.1 + 0.19 * len(results)), layout="constrained")
    ax = figure.subplots()
    for row, result in enumerate(results):
        ours, best = result["median_ms"], result.peers[0]["median_ms"]
        ax.plot([ours, best], [row, row], color=FAINT, linewidth=1.4, zorder=1)
        ax.plot([best], [row], "o", color=PEER, markersize=4.2)
        ax.plot([ours], [row], "o", color=OURS, markersize=4.2)
    ax.plot([], [], "o", color=OURS, markersize=4.2, label="ours")
    ax.plot([], [], "o", color=PEER, markersize=4.2, label="the fastest other way")
    _log_axis(ax.xaxis)
    _label_rows(ax, names)
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set_xlabel("milliseconds")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def floor(device: Device) -> Figure:
    """Share of the floor, ours and the fastest other way."""
    results = [result for result in device.results if result.peers]
    rows = _rows(results)
    figure = Figure(figsize=(8.2, 1.3 + 0.34 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for row, group in enumerate(rows.values()):
        for index, result in enumerate(group):
            y = _spread(row, index, len(group))
            mark = MARKS.get(result["dtype"], "^")
            ax.plot([100 * result.peers[0]["share_of_floor"]], [y], mark, color=PEER, markersize=3.4, alpha=0.7)
            ax.plot([100 * result["share_of_floor"]], [y], mark, color=OURS, markersize=4, alpha=0.85)
    ax.axvline(100, color=INK, linewidth=1)
    ax.set_xlim(left=0)
    _label_rows(ax, list(rows))
    _of_dtype(ax, results, OURS)
    ax.plot([], [], "o", color=PEER, markersize=4, label="the fastest other way")
    ax.set_xlabel("% of the floor: the least time by FLOPs and bytes at the rates that the device was seen to reach")
    figure.legend(loc="outside upper right", ncols=4, handletextpad=0.4)
    return figure


def roofline(device: Device) -> Figure:
    """FLOP/s against FLOP per byte, under the measured ceilings."""
    results = [result for result in device.results if result["flops"]]
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    ax = figure.subplots()
    ops = list(dict.fromkeys(result["op"] for result in results))
    colours = dict(zip(ops, matplotlib.colormaps["tab10"].colors, strict=False))
    for result in results:
        ax.plot(
            [result["flops"] / result["bytes"]], [result["flops"] / result["median_ms"] * 1e-6],
            MARKS.get(result["dtype"], "^"), color=colours[result["op"]], markersize=4.5, alpha=0.8,
        )  # fmt: skip
    low, high = (f(result["flops"] / result["bytes"] for result in results) for f in (min, max))
    high *= 1.6
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    for dtype, dash in zip(dtypes, ("-", "--", ":")):
        best, copied = device.ceiling(dtype) / 1e9, device.ceiling("copy") / 1e9
        knee = best / copied
        low = min(low, knee / 8)
        line = [(x, min(best, copied * x)) for x in (low, knee, max(high, knee))]
        ax.plot(*zip(*line), dash, color=INK, linewidth=1.2)
        # At the line's end, past every point.
        ax.annotate(f"{dtype}\n{best:,.0f}", (max(high, knee), best), (3, 0), textcoords="offset points", va="center",
                    fontsize=8)  # fmt: skip
    ax.annotate(f"copy: {copied:,.0f} GB/s", (low, copied * low), (12, -2), textcoords="offset points", fontsize=8)
    for op in ops:
        ax.plot([], [], "s", color=colours[op], markersize=5, label=op)
    for dtype in dtypes:
        ax.plot([], [], MARKS.get(dtype, "^"), color=INK, markersize=4, label=dtype)
    _log_axis(ax.xaxis)
    _log_axis(ax.yaxis)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("FLOP per byte, at the least of both that the case needs")
    ax.set_ylabel("GFLOP/s reached by ours")
    figure.legend(loc="outside right upper", handletextpad=0.3)
    return figure


def memory(device: Device) -> Figure:
    """The fastest other way's memory over ours: peak, and kept for the backward."""
    kinds = {"peak_bytes": "peak of one call", "saved_bytes": "kept for the backward"}
    least = 1 << 20  # a peak below a MiB is the allocator's

    def shown(key: str) -> list[tuple[Result, Record]]:
        return [
            (result, result.peers[0]) for result in device.results
            if result.peers and min(result.ours.get(key) or 0, result.peers[0].get(key) or 0) > least
        ]  # fmt: skip

    kinds = {key: title for key, title in kinds.items() if shown(key)}
    heights = [1 + len(_rows([result for result, _ in shown(key)])) for key in kinds]
    figure = Figure(figsize=(8.2, 1.1 + 0.36 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for ax, (key, title) in zip(axes, kinds.items()):
        rows = _rows([result for result, _ in shown(key)])
        for row, group in enumerate(rows.values()):
            for index, result in enumerate(group):
                times = result.peers[0][key] / result.ours[key]
                mark = MARKS.get(result["dtype"], "^")
                ax.plot([times], [_spread(row, index, len(group))], mark, color=OURS, markersize=4, alpha=0.85)
        ax.axvline(1, color=INK, linewidth=1)
        _log_axis(ax.xaxis)
        _label_rows(ax, list(rows))
        ax.set_title(title)
    _of_dtype(axes[0], [result for key in kinds for result, _ in shown(key)], OURS)
    axes[0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, handletextpad=0.4)
    axes[-1].set_xlabel(
        "memory of the fastest other way over ours (right of 1: ours needs less), where both pass a MiB"
    )
    return figure


def scaling(device: Device) -> Figure:
    """Time along every axis, logarithmic both ways, with the fitted exponent of ours."""
    series = device.series
    columns = 4
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(9.6, 2.15 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    names = dict.fromkeys(
        record["contender"] for results in series.values() for one in results for record in one.others
    )
    colours = dict(zip(names, itertools.cycle((PEER, "#8a6fb0", "#5b9a68", "#b5527a"))))
    for ax, ((op, axis), results) in zip(axes, series.items()):
        sizes, times = [each["at"] for each in results], [each["median_ms"] for each in results]
        plain: dict[str, list[tuple[float, float]]] = {}
        for result in results:
            for record in result.others:
                plain.setdefault(record["contender"], []).append((result["at"], record["median_ms"]))
        for name, points in plain.items():
            ax.plot(*zip(*points), "-o", color=colours[name], linewidth=1, markersize=2.4)
        ax.plot(sizes, times, "-o", color=OURS, linewidth=2, markersize=3.4)
        guide = [times[0] * size / sizes[0] for size in sizes]
        ax.plot(sizes, guide, ":", color=INK, linewidth=0.9)
        ax.set_title(f"{op.removeprefix('sampling.')} in {axis}: {exponent(sizes, times):.2f}", fontsize=8)
        for one in (ax.xaxis, ax.yaxis):
            _log_axis(one, 4)
        ax.set_xticks([sizes[0], sizes[-1]], [f"{sizes[0]:,}", f"{sizes[-1]:,}"])
        ax.tick_params(labelsize=7.5)
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        for line, name in zip(ax.get_lines(), plain):
            line.set_label(name)
        if plain:
            ax.legend(fontsize=6, loc="upper left", handlelength=1.2, borderaxespad=0.1, labelspacing=0.2)
    for ax in list(axes)[len(series) :]:
        ax.set_visible(False)
    figure.supylabel("milliseconds", fontsize=9)
    figure.suptitle("Ours in blue, with its fitted exponent; dotted: in proportion to the axis", fontsize=9, x=0.01,
                    ha="left")  # fmt: skip
    return figure


def training(device: Device) -> Figure:
    """A profiled step of rank 0 a variant: when it computes, when collectives are under way."""
    records = [each for each in device.others["training"] if each["processes"] > 1]
    figure = Figure(figsize=(9.6, 0.75 * len(records) + 1.1), layout="constrained")
    ax = figure.subplots()
    for row, record in enumerate(records):
        for height, kind, colour in ((-0.17, "computing", OURS), (0.17, "exchanging", PEER)):
            spans = [(start, end - start) for start, end in record["timeline_ms"][kind]]
            ax.broken_barh(spans, (row + height - 0.14, 0.28), color=colour, label=None if row else kind)
    _label_rows(ax, [f"{each['variant'].removeprefix('two, ')}\n{each['hidden']:.0%} hidden" for each in records])
    ax.set_xlabel("milliseconds of a profiled step, which takes longer than others")
    ax.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    ax.set_title("Two processes, rank 0")
    return figure


DRAWN: dict[str, Callable[[Device], Figure]] = {
    "ratio": ratio, "time": time, "floor": floor, "roofline": roofline, "memory": memory, "scaling": scaling,
    "training": training,
}  # fmt: skip


def draw(name: str, device: Device, path: Path, comment: str) -> None:
    """Write a picture as SVG that ends with `comment`, the same bytes for the same figures."""
    with matplotlib.rc_context(STYLE):
        figure = DRAWN[name](device)
        figure.savefig(path, format="svg", metadata={"Date": None})
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    path.write_text("\n".join([*lines, comment]) + "\n")
