"""What result files say, as tables and sentences in Markdown; `report` puts them into pages."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence

from .case import FORWARD, TRAINING
from .cpu import SUITES
from .results import Device, Record, Result, exponent, geometric_mean

ROOMS = ("moe.", "transformers.", "d3diff.", "sampling.", "random.")  # of the kernels, as ops begin


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
    head = ["op", "axis", "from, to", "ours, ms", "exponent", "of the last step",
            "plain code: exponent, of the last step"]  # fmt: skip
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


def dispatch(records: Sequence[Record]) -> str:
    """A row a mixture of benchmarks.dispatch."""
    point = records[0]["point"]
    rows = []
    for each in records:
        ours, least = each["bytes"]["ours"], each["bytes_least"]
        naive = each["bytes"]["a row for each token and expert"]
        rows.append([each["point"]["name"], f"{least / 1e6:.2f}", f"{ours / least:.3f}", f"{naive / least:.2f}",
                     f"{each['naive_time_over_ours']:.2f}"])  # fmt: skip
    words = (
        "Bytes that two processes send each other in a training step of a mixture, counted; "
        f"{point['tokens']:,} tokens each, D {point['hidden']}, float32. The least: each row once to where it is "
        "needed and once back, both again for the gradients, and the weights of slots. Naive: a row for each token "
        "and expert, weights at home. Time: naive over ours, gloo on one machine."
    )
    return f"{words}\n\n{table(['experts', 'least, MB', 'ours over it', 'naive over it', 'time'], rows)}"


def plan(records: Sequence[Record]) -> str:
    """A row a training step of benchmarks.planned."""
    rows = [
        [each["size"], each["precision"], f"{sum(each['kept'].values()) / 2**20:.1f}", f"{each['kept_ratio']:.3f}",
         _mib(each, "peak"), f"{each['peak_ratio']:.3f}"] for each in records
    ]  # fmt: skip
    words = "What a training step keeps for its backward (under checkpointing no hook sees all of it) and its peak."
    head = ["step", "precision", "kept, MiB", "plan over it", "peak, MiB", "plan over it"]
    return f"{words}\n\n{table(head, rows)}"


def profiles(records: Sequence[Record]) -> str:
    """A row a training step or generation of benchmarks.profiles, then the parts of each."""
    found: dict[tuple[str, str], list[Record]] = {}
    for each in records:
        found.setdefault((each["size"], each["mode"]), []).append(each)
    rows, parts = [], []
    for (size, mode), (ours, *others) in found.items():
        times = "; ".join(f"{each['contender']} {each['times_ours']:.2f}" for each in others)
        rows.append([size, mode, f"{ours['median_ms']:.1f}", f"{times} ({ours['experts']})"])
        parts.append(f"{size}, {mode}: ms forward + backward in a profiled call")
        names = dict.fromkeys(part for each in (ours, *others) for part in each["parts_ms"])
        parts.append(table(
            ["part", *(each["contender"] for each in (ours, *others))],
            [[name, *(_both(each["parts_ms"].get(name, (0.0, 0.0))) for each in (ours, *others))]
             for name in sorted(names, key=lambda name: -sum(ours["parts_ms"].get(name, ())))],
        ))  # fmt: skip
    return "\n\n".join([table(["size", "what", "ours, ms", "the others' time over ours"], rows), *parts])


def _both(ms: Sequence[float]) -> str:
    """Of the forward and, where there is one, the backward."""
    return " + ".join(f"{each:.1f}" for each in (ms if ms[1] else ms[:1]))


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


# Result files that hold no cases -> title and words.
OTHERS: dict[str, tuple[str, Callable[[Sequence[Record]], str]]] = {
    "dispatch": ("What expert parallelism sends over two processes (`python -m benchmarks.dispatch`)", dispatch),
    "plan": ("Memory as planned and as measured (`python -m benchmarks.planned`)", plan),
    "profiles": ("A training step and a generation by part (`python -m benchmarks.profiles`)", profiles),
    "training": ("A training step over two processes (`python -m benchmarks.training`)", training),
}


def sources(device: Device) -> str:
    """The result files, and how each was made."""
    titles = {suite.name: suite.title for suite in SUITES} | {name: title for name, (title, _) in OTHERS.items()}
    files = {name: (len(results), results[0].ours) for name, results in device.files.items()}
    files |= {name: (len(records), records[0]) for name, records in device.others.items()}
    rows = []
    for name, (count, first) in sorted(files.items()):
        dirty = " with changes" if first["dirty"] else ""
        other = "" if first["device_name"] == device.head["device_name"] else f" (on {first['device_name']})"
        rows.append(
            [f"[{name}.jsonl](../../benchmarks/results/{device.name}/{name}.jsonl)", titles.get(name, "") + other,
             str(count), f"{str(first['commit'])[:10]}{dirty}", first["date"][:10],
             f"`{first['command'].partition(' --json')[0]}`"]
        )  # fmt: skip
    return table(["file", "what", "cases", "commit", "date", "command"], rows)
