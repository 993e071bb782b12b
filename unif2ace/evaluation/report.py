"""A run as one HTML page with its pictures beside it, and as a few lines on the terminal."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from unif2ace.configs import TASKS
from unif2ace.evaluation.quality import Results
from unif2ace.files import replacing
from unif2ace.model.sequence_moe import EXPERTS
from unif2ace.pages import page, save, table
from unif2ace.pictures import sheet

GRID_COLUMNS = 12
P_GENERATION, P_UNDERSTANDING = 0.001, 0.01


def _grid(images: np.ndarray) -> Image.Image:
    """A sheet of images [n, H, W, 3] uint8, twice as large."""
    small = Image.fromarray(sheet(images, GRID_COLUMNS))
    return small.resize((2 * small.width, 2 * small.height), Image.Resampling.BICUBIC)


def write(folder: Path, results: Results, logs: dict[str, list[dict]], seconds: dict[str, float]) -> None:
    """Write report.html and its pictures into `folder`."""
    pairs = np.stack([results.held_out, results.reconstructed], axis=1)
    repainted = np.stack(
        [results.held_out[: len(results.repainted)], results.repainted[: len(results.held_out)]], axis=1
    )
    pictures = {
        "painted": _grid(results.painted),
        "reconstructed": _grid(_row_pairs(pairs)),
        "repainted": _grid(_row_pairs(repainted)),
    }
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as partial:
            picture.save(partial, format="PNG")
    save(folder / "losses.png", _draw_losses(logs))
    save(folder / "experts.png", _draw_experts(results.numbers["experts"]))
    with replacing(folder / "report.html") as partial:
        partial.write_text(_page(results, seconds))


def summary(results: Results, seconds: dict[str, float], elapsed: float) -> str:
    """What the run shows, for the terminal."""
    generation, understanding = (results.numbers[key] for key in ("generation", "understanding"))
    lines = ["", f"{'attribute':<12}{'painted':>9}{'chance':>8}{'p':>9}   {'answered':>9}{'majority':>9}{'p':>9}"]
    for name, painted in generation["attributes"].items():
        answered = understanding["attributes"][name]
        lines.append(
            f"{name:<12}{painted['match']:>9.2f}{painted['chance']:>8.2f}{painted['p']:>9.0e}   "
            f"{answered['accuracy']:>9.2f}{answered['majority']:>9.2f}{answered['p']:>9.0e}"
        )
    controlled, understood = passed(results)
    lines += [
        "",
        f"painted as prompted (p < {P_GENERATION}, {generation['prompts']} random prompts): {controlled} attributes",
        f"answered above the majority answer (p < {P_UNDERSTANDING}, {understanding['faces']} held-out faces): "
        f"{understood} attributes",
        f"a face detector fires in {generation['face_found']:.0%} of the paintings, "
        f"{results.numbers['tokenizer']['face_found']:.0%} of the reconstructions",
        "seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()),
        f"sum {sum(seconds.values()):.0f} s; this call {elapsed:.0f} s",
    ]
    return "\n".join(lines)


def passed(results: Results) -> tuple[int, int]:
    """How many attributes are painted as prompted, and how many are answered, beyond their thresholds."""
    generation, understanding = (results.numbers[key]["attributes"] for key in ("generation", "understanding"))
    return (
        sum(bool(each["p"] < P_GENERATION) for each in generation.values()),
        sum(bool(each["p"] < P_UNDERSTANDING) for each in understanding.values()),
    )


def _row_pairs(pairs: np.ndarray) -> np.ndarray:
    """[n, 2, H, W, 3] so that a grid shows a row of firsts above a row of seconds."""
    usable = len(pairs) // GRID_COLUMNS * GRID_COLUMNS or len(pairs)
    columns = min(GRID_COLUMNS, len(pairs))
    rows = pairs[:usable].reshape(-1, columns, *pairs.shape[1:])
    return rows.swapaxes(1, 2).reshape(-1, *pairs.shape[2:])


def _draw_losses(logs: dict[str, list[dict]]) -> Figure:
    panels = [
        ("tokenizer", ["pixels", "edges"], "log", "image tokenizer: squared error"),
        ("model", ["mask"], "linear", "masked codes (nats)"),
        ("model", ["score"], "linear", "score term, sum over a sample (nats)"),
        ("model", ["mmu"], "log", "next token of answers (nats)"),
        ("model", ["balance"], "linear", "balance losses, all routers"),
    ]
    figure = Figure(figsize=(18, 3.4), layout="constrained")
    for axis, (log, terms, scale, title) in zip(figure.subplots(1, len(panels)), panels):
        for term in terms:
            steps, values = zip(*((row["step"], row[term]) for row in logs[log] if term in row))
            axis.plot(steps, values, label=term, linewidth=1)
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.legend()
    return figure


def _draw_experts(use: dict[str, list]) -> Figure:
    """Heat maps of expert use, a layer a row, a task's experts the columns."""
    figure = Figure(figsize=(3.2 * len(use), 3.4), layout="constrained")
    for axis, (name, layers) in zip(figure.subplots(1, len(use), squeeze=False)[0], use.items()):
        values = np.array(layers)
        shown = axis.imshow(values, vmin=0, vmax=max(0.5, values.max()), cmap="viridis", aspect="auto")
        level, task = name.split("_")
        labels = EXPERTS[TASKS.index(task)] if level == "sequence" else [f"{i + 1}" for i in range(values.shape[1])]
        axis.set(title=f"{level} level, {task}", xlabel="expert", ylabel="layer")
        axis.set_xticks(range(len(labels)), labels)
        axis.set_yticks(range(len(values)), [str(i + 1) for i in range(len(values))])
        for (row, column), value in np.ndenumerate(values):
            dark = value < shown.norm.vmax / 2
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    return figure


def _page(results: Results, seconds: dict[str, float]) -> str:
    numbers = results.numbers
    tokenizer, generation, understanding = (numbers[key] for key in ("tokenizer", "generation", "understanding"))
    painted = [["attribute", "match", "chance", "p"]] + [
        [name, f"{row['match']:.2f}", f"{row['chance']:.2f}", f"{row['p']:.1e}"]
        for name, row in generation["attributes"].items()
    ]
    answered = [["attribute", "accuracy", "best constant answer", "p"]] + [
        [name, f"{row['accuracy']:.2f}", f"{row['majority']:.2f}", f"{row['p']:.1e}"]
        for name, row in understanding["attributes"].items()
    ]
    words = [["face", "question", "answer", "right answer"]] + [
        [str(face), html.escape(question), html.escape(given) if given == truth else
         f'<span class="wrong">{html.escape(given)}</span>', html.escape(truth)]
        for face, question, given, truth in results.answers
    ]  # fmt: skip
    kept = ", ".join(f"{name} {value:.2f}" for name, value in tokenizer["label_kept"].items())
    prompts = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in results.prompts[:GRID_COLUMNS])
    took = [["stage", "seconds"]] + [[stage, f"{value:.0f}"] for stage, value in seconds.items()]
    took.append(["sum", f"{sum(seconds.values()):.0f}"])
    body = f"""<h1>UniF2ace demo</h1>
<p>A model of {numbers["parameters"] / 1e6:.1f} M parameters, trained from nothing on synthetic faces. Every picture
here is made by a network; none shows a person.</p>
<h2>Painted from random prompts</h2>
<img class="pixels" src="painted.png" alt="painted faces">
<p>Each prompt names every attribute, each drawn uniformly. The first row's prompts:</p><ol>{prompts}</ol>
<p>Attributes measured on the paintings against the prompts ({generation["prompts"]} prompts; test:
{generation["test"]}). A face detector fires on {generation["face_found"]:.0%} of them, a weak check: it
passes faces with misplaced patches.</p>
{table(painted)}
<h2>Questions on faces never trained on</h2>
<p>{understanding["faces"]} held-out faces, one question each an attribute (test: {understanding["test"]}).
In the second table face 0 is the first of the held-out faces pictured below, and so on.</p>
{table(answered)}
{table(words, "words")}
<h2>Painted from held-out captions</h2>
<p>A held-out face above, below it a face painted from its caption (the caption does not say who it is).</p>
<img class="pixels" src="repainted.png" alt="held-out faces and paintings from their captions">
<h2>Image tokenizer</h2>
<p>Held-out faces above, through the tokenizer below: {tokenizer["psnr_db"]:.1f} dB, {tokenizer["codes_used"]} codes
in use. Share of faces whose attribute class survives it: {kept}. The face detector fires on
{tokenizer["face_found"]:.0%} of the reconstructions and {tokenizer["face_found_before"]:.0%} of the originals.</p>
<img class="pixels" src="reconstructed.png" alt="held-out faces and reconstructions">
<h2>Losses</h2><img src="losses.png" alt="loss curves">
<h2>Which experts work</h2>
<p>Share of a task's choices that goes to each expert, on held-out faces.</p>
<img src="experts.png" alt="expert use by layer and task">
<h2>Time</h2>{table(took)}"""
    return page("UniF2ace demo", body)
