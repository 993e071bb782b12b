"""The page on clusters: what a training step costs on up to 1,024 GPUs by the model of unif2ace.planning.cluster.

    python -m benchmarks.cluster [--check]

Writes docs/results/cluster.md and its picture, from no measurement; --check writes nothing and exits with 1 where they
say something else than the model does.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from unif2ace.cli.plan import SHARES, cluster_assumptions, cluster_table
from unif2ace.configs import TokenMoEConfig, UniF2aceConfig
from unif2ace.planning.cluster import Cluster, Layout, efficiency
from unif2ace.planning.plan import Training, counts, scaled

from .environment import ROOT

PAGE, PICTURE = Path("docs/results/cluster.md"), Path("docs/results/cluster.svg")
SIZES = [8, 16, 32, 64, 128, 256, 512, 1024]
ROWS = 16
_MANY = TokenMoEConfig(experts=(32, 32), top_k=4, width=384, shared_width=0, dense=True)
MODELS = {
    "the 1.8B shape, 4 + 4 experts a layer": UniF2aceConfig.base(),
    "the same with 32 + 32 experts, K = 4": UniF2aceConfig.base(token_moe=_MANY),
}
LAYOUTS = [(False, 1), (True, 1), (False, 8), (True, 8)]  # within a node, ranks that share experts


def training(config: UniF2aceConfig) -> Training:
    return Training(config, scaled(SHARES._replace(length=392), ROWS))


def curves(config: UniF2aceConfig) -> dict[str, list[float]]:
    """Efficiency by number of GPUs, of each layout."""
    found = {}
    for within_node, ranks in LAYOUTS:
        layouts = [Layout(gpus, within_node, ranks) for gpus in SIZES]
        found[str(layouts[0])] = [efficiency(Cluster(), training(config), layout) for layout in layouts]
    return found


def in_words() -> str:
    """What the curves of the first model say."""
    kept = curves(next(iter(MODELS.values())))
    whole, node = kept["FSDP"], kept["HSDP"]
    spread = kept["FSDP, experts over 8"]
    at_64 = SIZES.index(64)
    return (
        f"By the model, sharding over all GPUs keeps {whole[at_64]:.0%} of a GPU's rate at 64 and {whole[-1]:.0%} at "
        "1,024, where each collective's ring takes over a thousand steps; sharding within a node keeps "
        f"{node[-1]:.0%} there. Spreading these few experts over a node's GPUs leaves {spread[at_64]:.0%} at 64: it is "
        "for experts that do not fit otherwise."
    )


def page() -> str:
    rows = training(UniF2aceConfig.base()).step
    parts = [
        "# A training step on 64 and on 1,024 GPUs: a model",
        "**Nothing here was measured.** Made by `python -m benchmarks.cluster` from the cost model in "
        "`unif2ace/planning/cluster.py`; `unif2ace plan CONFIG --cluster 64 1024` prints it for another model, batch "
        "or precision. Its byte counts are those of the collectives of a run of two processes "
        "(`tests/unif2ace/test_cluster.py`); its times are assumptions.",
        f"![efficiency by number of GPUs, a model]({PICTURE.name})",
        in_words(),
        f"{rows.rows} rows a GPU ({rows.tokens:,} tokens: {rows.t2i} t2i, {rows.mmu} mmu, {rows.lm} text), bfloat16 "
        "with float32 masters, no checkpointing.",
        "\n".join(cluster_assumptions(Cluster())),
    ]
    for name, config in MODELS.items():
        words = f"## {name[0].upper()}{name[1:]}: {counts(config).all / 1e9:.1f} billion parameters"
        parts += [words, "\n".join(cluster_table(Cluster(), training(config), [64, 1024]))]
    return "\n\n".join(parts) + "\n"


def drawn_from() -> str:
    """What the picture carries to say which figures it shows."""
    figures = repr({name: curves(config) for name, config in MODELS.items()})
    return f"<!-- model {hashlib.sha256(figures.encode()).hexdigest()[:16]} -->"


def draw(path: Path) -> None:
    import matplotlib  # for the picture alone
    from matplotlib.figure import Figure

    from .plots import FAINT, GRID, INK, OURS, PEER, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (name, config) in zip(axes, MODELS.items()):
            for (label, values), (within, ranks) in zip(curves(config).items(), LAYOUTS):
                style = "--" if ranks > 1 else "-"
                ax.plot(SIZES, values, style, marker="o", markersize=3, color=PEER if within else OURS, label=label)
            ax.set_xscale("log", base=2)
            ax.set_xticks(SIZES, [f"{each:,}" for each in SIZES])
            ax.minorticks_off()
            ax.set_ylim(0, 1)
            ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
            ax.grid(axis="y", color=GRID, linewidth=0.8)
            ax.set_title(name)
            ax.set_xlabel("GPUs, 8 a node")
        axes[0].set_ylabel("a GPU's rate, of one alone")
        axes[0].legend(fontsize=8, loc="lower left")
        figure.suptitle(f"A model, not a measurement: {ROWS} rows a GPU", fontsize=9, x=0.01, ha="left", color=INK)
        axes[1].tick_params(axis="y", color=FAINT)
        figure.savefig(path, format="svg", metadata={"Date": None})
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    path.write_text("\n".join([*lines, drawn_from()]) + "\n")


def stale(root: Path = ROOT) -> list[str]:
    """Of the page and the picture, those that say something else than the model."""
    wrong = [] if (root / PAGE).exists() and (root / PAGE).read_text() == page() else [str(PAGE)]
    if not (root / PICTURE).exists() or drawn_from() not in (root / PICTURE).read_text():
        wrong.append(str(PICTURE))
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a file is not what it should be"
    )
    options = parser.parse_args(arguments)
    if options.check:
        wrong = stale()
        print("\n".join(f"stale: {each}" for each in wrong) or "page and picture say what the model says")
        return 1 if wrong else 0
    (ROOT / PAGE).write_text(page())
    draw(ROOT / PICTURE)
    print(PAGE, PICTURE, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
