"""The page on a trained head: a table of its categories and a picture of how honest its probabilities are."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from unif2ace.files import replacing
from unif2ace.pages import page, save, table

PAGE, PICTURE, LOSSES = "report.html", "reliability.png", "losses.png"
_COLUMNS = 5


def write(folder: Path, report: dict[str, Any]) -> None:
    """report.html, reliability.png and losses.png of what `train_attributes` returned."""
    save(folder / PICTURE, _reliability(report["categories"]))
    save(folder / LOSSES, _losses(report))
    with replacing(folder / PAGE) as partial:
        partial.write_text(_page(report), encoding="utf-8")


def lines(report: dict[str, Any]) -> list[str]:
    """The table for a terminal."""
    rows = [["category", "accuracy", "majority", "balanced", "chance", "AP", "ECE", "answered", "right of these"]]
    for name, each in report["categories"].items():
        answered = each["accuracy_answered"]
        numbers = (each[key] for key in ("accuracy", "majority", "balanced", "chance", "average_precision"))
        rows.append(
            [name + ("" if each["told"] else " *"), *(f"{number:.3f}" for number in numbers)]
            + [f"{each['calibration_error']:.3f}", f"{each['answered']:.2f}"]
            + ["" if answered is None else f"{answered:.3f}"]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    out = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]
    if not all(each["told"] for each in report["categories"].values()):
        out.append("* not better than chance by two standard errors: never answered")
    return out


def _page(report: dict[str, Any]) -> str:
    config, faces, people = report["config"], report["faces"], report["people"]
    head = ["category", "values: faces tested", "accuracy", "95 %", "majority", "balanced", "chance"]
    rows = [[*head, "average precision", "calibration error", "before", "answered", "right of these"]]
    for name, each in report["categories"].items():
        counts = ", ".join(
            f"{html.escape(value)}:&nbsp;{count}" for value, count in zip(each["values"], each["counts"])
        )
        answered = each["accuracy_answered"]
        rows.append(
            [
                html.escape(name) + ("" if each["told"] else " <span class='wrong'>*</span>"),
                counts,
                f"{each['accuracy']:.3f}",
                "&nbsp;to&nbsp;".join(f"{bound:.3f}" for bound in each["interval"]),
                f"{each['majority']:.3f}",
                f"{each['balanced']:.3f}",
                f"{each['chance']:.3f}",
                f"{each['average_precision']:.3f}",
                f"{each['calibration_error']:.3f}",
                f"{each['calibration_error_before']:.3f}",
                f"{each['answered']:.0%}",
                "" if answered is None else f"{answered:.3f}",
            ]
        )
    noticed = "".join(f"<li>{html.escape(line)}</li>" for line in report["noticed"])
    sides = ", ".join(f"{count} faces to {part}" for part, count in faces.items())
    several = sum(people.values()) < sum(faces.values())
    whose = f"{sum(people.values())} people, nobody on two sides" if several else "each counted as a person of its own"
    return page(
        "Attribute head",
        f"<h1>Attribute head</h1><p>Features: {html.escape(config['features'])}. Labels: "
        f"{html.escape(Path(config['labels']['path']).name)}. {sides}; {whose}. "
        f"Best epoch: {report['best_epoch'] + 1} of {report['epochs']}.</p>{table(rows)}"
        f"<p>Measured on the faces to test with. Balanced: the mean of each value's recall. An answer is given where "
        f"it is at least {config['confidence']:.0%} likely. * not better than chance by two standard errors: never "
        f"answered.</p>{f'<ul>{noticed}</ul>' if noticed else ''}<h2>Are the probabilities honest?</h2>"
        f'<img src="{PICTURE}" alt="Share right against probability, of each category">'
        "<p>Filled: calibrated; hollow: before. On the line a probability is the share that is right; a dot's size is "
        f'its faces.</p><h2>Training</h2><img src="{LOSSES}" alt="Loss of each epoch">',
        "body { max-width: 80rem }",
    )


def _reliability(categories: dict[str, Any]) -> Figure:
    rows = -(-len(categories) // _COLUMNS)
    columns = min(len(categories), _COLUMNS)
    figure = Figure(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, each) in zip(axes, categories.items()):
        axis.plot([0, 1], [0, 1], color="#bbb", linewidth=1)
        for bins, filled in ((each["bins_before"], False), (each["bins"], True)):
            axis.scatter(
                [one["confidence"] for one in bins],
                [one["accuracy"] for one in bins],
                [8 + 150 * one["faces"] / each["faces"] for one in bins],
                facecolors="#1f77b4" if filled else "none",
                edgecolors="#1f77b4" if filled else "#d62728",
                alpha=0.7 if filled else 0.6,
            )
        axis.set(title=f"{name}\nECE {each['calibration_error']:.3f}", xlim=(0, 1.02), ylim=(0, 1.02))
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=7)
    for axis in axes[len(categories) :]:
        axis.set_axis_off()
    figure.supxlabel("probability", fontsize=9)
    figure.supylabel("share right", fontsize=9)
    return figure


def _losses(report: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axis = figure.subplots()
    for name, values in zip(("train", "validation"), zip(*report["losses"])):
        axis.plot(values, label=name)
    axis.axvline(report["best_epoch"], color="#bbb", linewidth=1)
    axis.set(xlabel="epoch", ylabel="loss")
    axis.legend(fontsize=8)
    return figure
