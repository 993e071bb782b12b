"""Result files as pages and pictures, and how cost grows, by counted work."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from benchmarks import cpu, report, run, tables
from benchmarks.cases import CASES, moe
from benchmarks.cases.moe_layer import Layer
from benchmarks.measure import counted
from benchmarks.results import Device, devices, exponent, load

CPU = torch.device("cpu")


def record(op: str, contender: str, median: float, ratio: float, **other) -> dict:
    head = {"device": "cpu", "device_name": "toy", "threads": 2, "versions": {"torch": "9", "python": "3"}}
    head |= {"commit": "0123456789", "dirty": False, "date": "2030-01-02T03:04:05", "command": "toy --json x"}
    measured = {"median_ms": median, "quartiles_ms": [0.9 * median, 1.1 * median], "times_ours": ratio,
                "times_ours_quartiles": [0.95 * ratio, 1.02 * ratio], "share_of_floor": 0.5, "peak_bytes": 3 << 20,
                "saved_bytes": 2 << 20, "rounds": 7, "floor_ms": 0.5 * median}  # fmt: skip
    case = {"op": op, "shape": "demo", "dtype": "float32", "mode": "forward", "flops": 1e9, "bytes": 1e6, "sizes": {}}
    return {**head, **measured, **case, "contender": contender, "status": "ok", "compared": True, **other}


@pytest.fixture
def device(tmp_path) -> Device:
    folder = tmp_path / "results" / "toy"
    folder.mkdir(parents=True)
    missing = {"op": "toy.a", "shape": "demo", "dtype": "float32", "mode": "forward", "contender": "absent"}
    lines = [
        record("toy.a", "ours", 2.0, 1.0), record("toy.a", "slow", 6.0, 3.0), record("toy.a", "quick", 3.0, 1.5),
        record("toy.a", "yardstick", 0.5, 0.25, compared=False), record("toy.a", "ours in torch", 1.0, 0.5),
        {**missing, "status": "missing", "reason": "not here"},
        record("toy.b", "ours", 2.0, 1.0), record("toy.b", "quick", 1.0, 0.5),
        *(record("toy.c", "ours", 3.0 * n**2, 1.0, shape=f"scaling N{n}", axis="N", at=n) for n in (1, 4, 2)),
        {"op": "ceilings", "copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 2e11, "bfloat16": 3e11}},
    ]  # fmt: skip
    planned = {"size": "toy", "precision": "bf16", "kept": {"head": 2 << 20, "norms": 1 << 20}, "peak": 5 << 20}
    planned |= {"kept_ratio": 1.01, "peak_ratio": 0.99}
    (folder / "plan.jsonl").write_text(json.dumps(record("plan", "ours", 1.0, 1.0) | planned))
    sent = {"point": {"name": "8, K 2", "tokens": 1024, "hidden": 32}, "bytes_least": 2e6, "naive_time_over_ours": 1.5}
    sent["bytes"] = {"ours": 2.1e6, "a row for each token and expert": 5e6}
    (folder / "dispatch.jsonl").write_text(json.dumps(record("dispatch", "", 0.0, 0.0) | sent))
    step = {"rounds": 2, "steps": 6, "step_ms": 120.0, "tokens_per_second": 4321.0, "bytes": 3e6, "exchanging_ms": 30.0}
    line = {"computing": [[0.0, 80.0], [90.0, 120.0]], "exchanging": [[70.0, 100.0]]}
    told = [
        {**step, "variant": "one process", "processes": 1, "bytes_least": 0.0, "efficiency": 1.0, "hidden": 1.0},
        {**step, "variant": "two, sharded", "processes": 2, "bytes_least": 2e6, "efficiency": 0.8, "hidden": 0.67},
    ]
    told = [record("training", "", 0.0, 0.0) | each | {"timeline_ms": line} for each in told]
    (folder / "training.jsonl").write_text("\n".join(map(json.dumps, told)))
    (folder / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load(folder)


def test_the_best_peer_gives_the_same_and_is_not_ours(device) -> None:
    a, b = device.results
    assert (a.peers[0]["contender"], a.ratio, b.ratio) == ("quick", 1.5, 0.5)
    assert [each["contender"] for each in a.absent] == ["absent"]
    assert tables.verdict(device).startswith("Ours is the fastest in 1 of 2 cases; it is slower in 1, in 1 of them")
    assert [line for line in tables.losses(device).splitlines() if "toy.b" in line and "| 0.50 | yes |" in line]
    assert "toy.a" not in tables.losses(device)
    rows = tables.overview(device).splitlines()[2:]
    assert rows[0].startswith("| `toy.a` | forward | 1 | 1.50 | 1.50 | 1.50 | 50 % | quick at demo |")
    assert "| absent | missing | not here | 1 |" in tables.absences(device)
    assert "plan.jsonl" in tables.sources(device) and "plan" not in device.files


def test_a_file_from_another_machine_is_told(device) -> None:
    assert "(on " not in tables.sources(device)
    device.others["plan"][0]["device_name"] = "another toy"
    [told] = [line for line in tables.sources(device).splitlines() if "(on another toy)" in line]
    assert "plan.jsonl" in told


def test_what_holds_no_cases_is_told_too(device) -> None:
    page = report.device_page(device)
    assert "| toy | bf16 | 3.0 | 1.010 | 5.0 | 0.990 |" in page and "1,024 tokens each, D 32" in page
    assert "| 8, K 2 | 2.00 | 1.050 | 2.50 | 1.50 |" in page
    assert "| two, sharded | 120 | 4,321 | 0.80 | 3.0 (1.50 of the least) | 30 | 67% |" in page
    assert "| one process | 120 | 4,321 | 1.00 | 3.0 | 30 |  |" in page
    assert "(toy-training.svg)" in page and "training" in report.names_of_pictures(device)


def test_series_are_fitted_in_order_and_are_no_results(device) -> None:
    ((key, series),) = device.series.items()
    assert key == ("toy.c", "N") and [each["at"] for each in series] == [1, 2, 4]
    assert "| `toy.c` | N | 1 to 4 | 3 to 48 | 2.00 | 2.00 |" in tables.growth(device)
    words = "Along 1 axes the fitted exponent of ours is at most 2.00 (`toy.c` in N); of the last step alone, 2.00"
    assert tables.growth_in_words(device).startswith(words)


def test_exponents() -> None:
    assert exponent([1, 2, 4, 8], [5, 10, 20, 40]) == pytest.approx(1)
    assert exponent([3, 9, 27], [2, 18, 162]) == pytest.approx(2)
    assert exponent([1, 10], [7, 7]) == pytest.approx(0)


def test_a_page_that_says_something_else_is_stale(device, tmp_path) -> None:
    part = "<!-- {0} -->\nold\n<!-- /{0} -->\n"
    for path in (report.README, report.BENCHMARKS, report.KERNELS):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"before\n{part.format('headline')}{part.format('results')}after\n")
    (tmp_path / report.PAGES).mkdir(parents=True)
    wrong = report.stale([device], tmp_path)
    assert len(wrong) == 5 + len(report.PICTURES)  # three READMEs, two pages, and every picture
    for path, text in report.pages([device], tmp_path).items():
        (tmp_path / path).write_text(text)
    for name in report.PICTURES:
        (tmp_path / report.PAGES / f"toy-{name}.svg").write_text(report.drawn_from(device))
    assert report.stale([device], tmp_path) == []
    readme = (tmp_path / report.README).read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "GPU: not yet measured." in readme
    (tmp_path / report.README).write_text(readme.replace("1.50", "1.60"))
    (tmp_path / report.PAGES / "toy-time.svg").write_text("of other results")
    assert report.stale([device], tmp_path) == ["README.md", "docs/results/toy-time.svg"]
    with pytest.raises(ValueError, match="no part between <!-- results -->"):
        report.marked("nothing", "results", "")


def test_pictures_are_the_same_bytes_for_the_same_figures(tmp_path) -> None:
    from benchmarks.plots import draw  # matplotlib: not for the other tests

    found = devices()[0]
    for name in report.names_of_pictures(found):
        for copy in ("a", "b"):
            draw(name, found, tmp_path / copy, "<!-- the end -->")
        first = (tmp_path / "a").read_bytes()
        assert first == (tmp_path / "b").read_bytes() and first.endswith(b"<!-- the end -->\n") and b"<svg" in first


def test_the_suites_ask_for_cases_that_exist_and_end_in_time(tmp_path) -> None:
    assert cpu.BUDGET < 15 * 60
    for stage in cpu.plan(tmp_path):
        options = dict(zip(stage.command[3:], stage.command[4:]))
        selected = run.select(
            CASES, op=options.get("--op", ""), shape=options.get("--shape", ""), device="cpu", smoke=False
        )
        assert selected, stage.name
        assert options["--json"] == str(tmp_path / f"{stage.name}.jsonl")


def test_a_dry_run_of_the_suites_lists_their_cases(tmp_path, capsys) -> None:
    kept = tmp_path / "scaling.jsonl"
    kept.write_text("of before\n")
    arguments = ["--out", str(tmp_path), "--budget", "900", "--suites", "scaling", "--dry-run"]
    assert cpu.main(arguments) == 0 and kept.read_text() == "of before\n"
    report = json.loads((tmp_path / "stages.json").read_text())
    assert [(stage["name"], stage["status"]) for stage in report["stages"]] == [("scaling", "ok")]
    assert "moe.layer scaling T512 float32 forward+backward" in (tmp_path / "stages.log").read_text()


def _series() -> dict[tuple[str, str], list]:
    found: dict[tuple[str, str], list] = {}
    for case in CASES:
        if case.axis and "cpu" in case.devices:
            found.setdefault((case.op, case.axis), []).append(case)
    return found


def _work(cases: list) -> tuple[float, float]:
    """Exponents of allocated bytes and of calls between two cases of a series."""
    work = [counted(case.build(CPU).ours) for case in cases]
    sizes = [case.at for case in cases]
    return tuple(exponent(sizes, [each[key] for each in work]) for key in ("allocated", "calls"))


@pytest.mark.parametrize("key", _series(), ids=" ".join)
def test_counted_work_grows_no_faster_than_its_axis(key) -> None:
    """On each axis the mathematics is linear: twice of it allocates at most twice, and calls at most twice."""
    allocated, calls = _work(_series()[key][:2])
    assert allocated < 1.1 and calls < 1.1
    if key not in (("moe.layer", "E"), ("sampling.run", "T")):
        assert calls < 0.5  # no call a token, image, code or slot; products may be made in a few more pieces


def test_counted_work_shows_what_grows_too_fast() -> None:
    layers = [Layer(256, 32, 32, N, 2, 0, compiles=False) for N in (4, 8)]
    work = [moe._layer_work(layer, torch.float32, "forward", CPU) for layer in layers]
    plain = [counted(each.baselines["every expert on every token"].run)["allocated"] for each in work]
    ours = [counted(each.ours)["allocated"] for each in work]
    assert exponent([4, 8], plain) > 0.9 > 0.3 > exponent([4, 8], ours)
    pairs = [counted(partial(lambda x: x[:, None] - x, torch.randn(n)))["allocated"] for n in (64, 128)]
    assert math.isclose(exponent([64, 128], pairs), 2, abs_tol=0.01)
