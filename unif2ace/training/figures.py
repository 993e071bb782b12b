"""The figures of a run's report: curves over the steps, loads of the experts over time, samples one under the other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from unif2ace.errors import UserError
from unif2ace.pictures import read_png
from unif2ace.training.history import Key, Loads, Run, Sample

WIDTH = 13.0  # inches of every figure
POINTS, MOMENTS = 1200, 200  # most that a curve, a heat map is drawn with
LINE, RAW, MARK, INK = "#2f6db5", "#bcd2ea", "#8a8f98", "#333333"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#444444", "#999999")
LOAD = LinearSegmentedColormap.from_list("load", ["#16335f", "#6f97c4", "#f4f1ea", "#e59a5d", "#a33c0d"])
TITLES = {
    "mask": "masked codes: cross-entropy (nats)",
    "score": "masked codes: score term (nats a sample)",
    "mmu": "answers: next token (nats)",
    "lm": "plain text: next token (nats)",
    "balance": "balance loss of all routers",
}


def losses(run: Run) -> Figure:
    """The loss, each of its terms, and the shares of targets that are ranked first."""
    terms = run.parts("terms")
    shares = {name.removesuffix("_accuracy"): terms.pop(name) for name in list(terms) if name.endswith("_accuracy")}
    panels = {"loss": run.column("loss")}
    # A task without rows in a step has a term of exactly zero.
    panels |= {TITLES.get(name, name): np.where(values == 0, np.nan, values) for name, values in terms.items()}
    panels = {title: values for title, values in panels.items() if np.isfinite(values).any()}
    figure, axes = _panels(run, len(panels) + bool(shares))
    for axis, (title, values) in zip(axes, panels.items()):
        _curve(axis, run.steps, values)
        _tidy(axis, title)
        if _spans(values, 8):
            _log(axis)
    if shares:
        _lines(axes[-1], run.steps, shares, "targets ranked first")
        axes[-1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def rates(run: Run, clip: float | None) -> Figure:
    """Learning rate, norm of the gradient, and its norms by part of the model."""
    parts = run.parts("grad_norms")
    figure, axes = _panels(run, 2 + bool(parts))
    _curve(axes[0], run.steps, run.column("lr"), smooth=False)
    _tidy(axes[0], "learning rate")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes[0].set_ylim(0, 1.15 * np.nanmax(run.column("lr"), initial=1e-12))
    _curve(axes[1], run.steps, run.column("grad_norm"))
    _tidy(axes[1], "norm of the gradient" + (" (dashed: clipped to)" if clip else ""))
    if clip:
        axes[1].axhline(clip, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    if _spans(run.column("grad_norm"), 8):
        _log(axes[1])
    if parts:
        _lines(axes[2], run.steps, parts, "norm of the gradient by part")
        if all(_spans(each, 1) for each in parts.values()):
            _log(axes[2])
    return figure


def speed(run: Run) -> Figure:
    """Tokens a second, share of the device's peak, waiting for data, memory, and what went wrong so far."""
    percent = PercentFormatter(1, decimals=0)
    panels = [
        ("tokens a second", run.column("tokens_per_second"), FuncFormatter(_short)),
        ("MFU: model FLOPs against the device's peak", run.column("mfu"), percent),
        ("share of a step that waits for data", run.column("data_wait"), percent),
        ("seconds a step", run.column("step_seconds"), None),
        ("memory of rank 0 (GiB)", run.column("memory_bytes") / 2**30, None),
    ]
    panels = [each for each in panels if np.isfinite(each[1]).any()]
    counted = {name: run.column(name) for name in ("skipped", "corrupt") if np.nanmax(run.column(name), initial=0) > 0}
    figure, axes = _panels(run, len(panels) + bool(counted))
    for axis, (title, values, formatter) in zip(axes, panels):
        _curve(axis, run.steps, values)
        _tidy(axis, title)
        top = np.nanquantile(values, 0.999) * 1.15
        axis.set_ylim(0, top if top > 0 else 1)
        if formatter is not None:
            axis.yaxis.set_major_formatter(formatter)
    if counted:
        names = {"skipped": "steps skipped", "corrupt": "samples unreadable"}
        _lines(axes[-1], run.steps, {names[name]: values for name, values in counted.items()}, "so far", smooth=False)
        axes[-1].yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[-1].set_ylim(0, 1.15 * max(float(np.nanmax(each)) for each in counted.values()))
    return figure


def load(run: Run, level: str, group: str) -> Figure:
    """Heat map: a row an expert, layer by layer, a column a moment; 1 is an even share."""
    layers = {key: each.fewer(MOMENTS) for key, each in sorted(run.experts.items()) if key[:2] == (level, group)}
    rows = sum(each.counts[0].size for each in layers.values())
    most = max(2.0, *(float(np.nanmax(each.share(), initial=0)) for each in layers.values()))
    figure = Figure(figsize=(WIDTH, 1.1 + min(12, max(1.6, 0.17 * rows))), layout="constrained")
    axis = figure.subplots()
    norm, first, labels, shown = TwoSlopeNorm(1, 0, most), 0, [], None
    for (_, _, layer), each in layers.items():
        share = each.share().T
        edges = np.array([*each.steps, max(run.steps[-1] + 1, each.steps[-1] + 1)])
        shown = axis.pcolormesh(
            edges, np.arange(first, first + len(share) + 1), share, norm=norm, cmap=LOAD, rasterized=True
        )
        labels.append((first + len(share) / 2, f"layer {layer + 1}"))
        first += len(share)
        axis.axhline(first, color="white", linewidth=2.5 if rows <= 120 else 0.8)
    every = -(-len(labels) // 30)
    axis.set_yticks([at for at, _ in labels[::every]], [name for _, name in labels[::every]])
    if rows <= 64:
        numbers = [str(index + 1) for each in layers.values() for index in range(each.counts[0].size)]
        axis.set_yticks(np.arange(rows) + 0.5, numbers, minor=True)
    axis.set_ylim(first, 0)
    axis.spines[:].set_visible(False)
    _tidy(axis, f"{level}-level experts of {group}: share of each against an even load", grid=False)
    axis.tick_params(axis="y", length=0, pad=16 if rows <= 64 else 3)
    axis.tick_params(axis="y", which="minor", length=0, labelsize=6, labelcolor=MARK)
    _marks(axis, run, names=False)
    bar = figure.colorbar(shown, ax=axis, pad=0.01, aspect=25)  # type: ignore[arg-type]
    bar.set_ticks([0, 0.5, 1, *(most * np.array([0.5, 1]) if most >= 3 else [most])])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}x"))
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def entropy(run: Run) -> Figure:
    """Entropy of the load over that of an even one, a line a layer, a panel a level and group."""
    groups = groups_of(run.experts)
    figure, axes = _panels(run, len(groups), names=False)
    for axis, (level, group) in zip(axes, groups):
        layers = {key[2]: each for key, each in sorted(run.experts.items()) if key[:2] == (level, group)}
        shades = np.linspace(0.25, 1, len(layers))
        for shade, (layer, each) in zip(shades, layers.items()):
            edge = layer in (min(layers), max(layers))
            axis.plot(
                each.steps, _smoothed(entropies(each)), color=LOAD(0.5 - 0.5 * shade), linewidth=1.3,
                label=f"layer {layer + 1}" if edge else None,
            )  # fmt: skip
        _tidy(axis, f"evenness: {level} level, {group}")
        axis.set_ylim(min(0.6, axis.get_ylim()[0]), 1.01)
        axis.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
    return figure


def entropies(each: Loads) -> np.ndarray:
    """[M] of the load at each moment, over that of an even one; NaN where there was none."""
    part = each.share() / each.counts[0].size
    terms = part * np.log(np.where(part > 0, part, 1.0))
    return -terms.sum(1) / math.log(max(2, part.shape[1]))


def groups_of(experts: Mapping[Key, Loads]) -> list[tuple[str, str]]:
    """Levels and groups, the token level first."""
    return sorted({key[:2] for key in experts}, key=lambda each: (each[0] != "token", each[0], each[1] != "t2i"))


def sheet(samples: Sequence[Sample], side: int = 144) -> Image.Image | None:
    """Paintings of each step in a row, `side` pixels high; None where there are none."""
    rows: list[tuple[int, Image.Image]] = []
    for each in samples:
        with contextlib.suppress(UserError):  # damaged: left out, as what is not whole yet
            rows += [(each.step, Image.fromarray(read_png(each.paintings)))] if each.paintings is not None else []
    if not rows:
        return None
    rows = [(step, image.resize((round(image.width * side / image.height), side))) for step, image in rows]
    margin, font = 96, ImageFont.load_default(15)
    whole = Image.new("RGB", (margin + max(image.width for _, image in rows), side * len(rows)), "white")
    draw = ImageDraw.Draw(whole)
    for row, (step, image) in enumerate(rows):
        whole.paste(image, (margin, row * side))
        draw.text((margin - 10, (row + 0.5) * side), f"{step:,}", fill=INK, font=font, anchor="rm")
    return whole


def _panels(run: Run, count: int, names: bool = True) -> tuple[Figure, list[Axes]]:
    columns = 4 if count in (4, 7, 8) else min(3, max(1, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(WIDTH, 2.7 * rows + 0.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis in axes[count:]:
        axis.remove()
    for index, axis in enumerate(axes[:count]):
        axis.set_xlim(run.steps[0], max(run.steps[-1], run.steps[0] + 1))
        _marks(axis, run, names=names and index < columns)
    return figure, axes[:count]


def _marks(axis: Axes, run: Run, names: bool) -> None:
    """Where stages begin, and where the run was gone on with."""
    for index, (name, step) in enumerate(run.stages):
        if index:
            axis.axvline(step, color=MARK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        if names and len(run.stages) > 1:
            axis.annotate(
                name, (step, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7.5,
                color=MARK, va="top", annotation_clip=True,
            )  # fmt: skip
    for step in run.resumed:
        axis.plot(step, 0, marker="^", color=MARK, markersize=4, transform=axis.get_xaxis_transform(), clip_on=False)


def _tidy(axis: Axes, title: str, grid: bool = True) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c8ccd2")
    axis.tick_params(labelsize=8, colors="#555b66", length=2)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    )
    if grid:
        axis.grid(axis="y", color="#eceef1", linewidth=0.8)
        axis.set_axisbelow(True)


def _short(value: float, _: object = None) -> str:
    """A number on an axis: 12500 as 12.5k."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"


def _log(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axis.get_ylim()
    named = (2, 5) if high < 50 * low else ()  # over more decades there is no room
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _leading(value) in named else ""))
    axis.tick_params(axis="y", which="minor", labelsize=7, colors="#555b66", length=1)


def _leading(value: float) -> int:
    return round(value / 10 ** math.floor(math.log10(value) + 1e-9)) if value > 0 else 0


def _spans(values: np.ndarray, factor: float) -> bool:
    """Whether positive values reach over more than `factor`, strays apart."""
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0:
        return False
    low, high = np.quantile(values, [0.005, 0.995])
    return bool(high >= factor * low)


def _curve(axis: Axes, steps: np.ndarray, values: np.ndarray, smooth: bool = True) -> None:
    at, mean, low, high = binned(steps, values)
    if smooth and len(at) > 30:
        axis.fill_between(at, low, high, color=RAW, alpha=0.45, linewidth=0)
        axis.plot(at, mean, color=RAW, linewidth=0.8)
        axis.plot(at, _smoothed(mean), color=LINE, linewidth=1.6)
    else:
        axis.plot(at, mean, color=LINE, linewidth=1.4, marker="o" if len(at) < 10 else None, markersize=3)


def _lines(axis: Axes, steps: np.ndarray, named: Mapping[str, np.ndarray], title: str, smooth: bool = True) -> None:
    for color, (name, values) in zip(COLORS * -(-len(named) // len(COLORS)), named.items()):
        at, mean, _, high = binned(steps, values)
        drawn = _smoothed(mean) if smooth else high
        axis.plot(at, drawn, color=color, linewidth=1.3, label=name, drawstyle="default" if smooth else "steps-post")
    _tidy(axis, title)
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(named) > 4 else {"loc": "best"}
    axis.legend(frameon=False, fontsize=8, handlelength=1.2, labelspacing=0.3, **beside)


def binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most `POINTS` points: first step, mean, least and largest of as many neighbours; what is not finite is out."""
    there = np.isfinite(values)
    steps, values = steps[there], values[there]
    size = max(1, -(-len(steps) // POINTS))
    starts = np.arange(0, len(steps), size)
    if not len(starts):
        return steps, values, values, values
    counts = np.diff([*starts, len(steps)])
    mean = np.add.reduceat(values, starts) / counts
    return steps[starts], mean, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Gaussian mean over a hundredth of the values to both sides; what is not finite counts for nothing."""
    reach = max(1, len(values) // 100)
    kernel = np.exp(-(np.linspace(-2.5, 2.5, 2 * reach + 1) ** 2) / 2)
    there = np.isfinite(values)
    weight = np.convolve(there.astype(float), kernel)[reach:-reach]
    total = np.convolve(np.where(there, values, 0.0), kernel)[reach:-reach]
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)
