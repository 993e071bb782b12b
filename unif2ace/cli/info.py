"""`unif2ace info`: a model's parameters by part, in all and used by a token, its vocabulary and its config."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from unif2ace.configs import TASKS, UniF2aceConfig
from unif2ace.importers.parts import model_config
from unif2ace.planning.parameters import Part, added, parameters


def info(parsed: argparse.Namespace) -> None:
    """Print what the config of a checkpoint comes to; `base` is the 1.8B shape. No weights are read."""
    config = UniF2aceConfig.base() if parsed.checkpoint == "base" else model_config(Path(parsed.checkpoint))
    found = parameters(config)
    print("\n".join([*table(found), "", made_of(found), *vocabulary(config), "", json.dumps(config.to_dict())]))


def table(parts: list[Part]) -> list[str]:
    """Lines of a Markdown table with its sum."""
    rows = [*parts, added("all", parts)]
    lines = [f"| part | parameters | {' | '.join(f'used by a {task} token' for task in TASKS)} |", "|---|---|---|---|"]
    return lines + [f"| {name} | {total:,} | {used[0]:,} | {used[1]:,} |" for name, total, used in rows]


def made_of(parts: list[Part]) -> str:
    """The table in three: the backbone as a model without experts has it, and what each level of experts adds."""
    sums = {"backbone": 0, "token-level experts": 0, "sequence-level experts": 0}
    for part in parts:
        sequence = part.name.startswith("sequence-level") or part.name.endswith("resampler")
        token = part.name in ("token-level routers", "routed experts", "shared experts")
        sums["sequence-level experts" if sequence else "token-level experts" if token else "backbone"] += part.total
    whole = sum(sums.values())
    return f"{whole / 1e9:.2f} B = " + " + ".join(f"{each / 1e9:.2f} B {name}" for name, each in sums.items())


def vocabulary(config: UniF2aceConfig) -> list[str]:
    """Which ids are what."""
    words = config.vocabulary
    first, stop = words.code_range
    return [
        f"vocabulary: {words.size} = {words.text} text [0, {words.text}) + 10 special [{words.text}, {first}) "
        f"+ {words.codes} image codes [{first}, {stop}) + mask {words.mask}"
    ]
