"""The comparison of two results: what moved, what is gone, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.case import FORWARD


def line(median: float, spread: float = 0.1, **other) -> str:
    record = {"op": "toy", "shape": "s", "mode": FORWARD, "dtype": "float32", "device_name": "d", "threads": 1}
    record |= {"contender": "ours", "median_ms": median, "quartiles_ms": [median - spread, median + spread]}
    return json.dumps({**record, "versions": {"torch": "1"}, "device": "cpu", **other})


def compared(tmp_path: Path, old: list[str], new: list[str]) -> int:
    for name, lines in (("old", old), ("new", new)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return compare.main([str(tmp_path / "old.jsonl"), str(tmp_path / "new.jsonl")])


@pytest.mark.parametrize(
    ("after", "spread", "kind"),
    [(12.0, 0.1, "slower"), (12.0, 3.0, None), (10.3, 0.1, None), (8.0, 0.1, "faster"), (8.0, 3.0, None)],
    ids=["slower", "noise", "small", "faster", "noise down"],
)
def test_compare_names_what_moved_beyond_noise(tmp_path: Path, capsys, after, spread, kind) -> None:
    assert compared(tmp_path, [line(10.0)], [line(after, spread)]) == (kind == "slower")
    said = capsys.readouterr().out
    for each in ("slower", "faster"):
        assert f"{int(each == kind)} {each}" in said
    assert (f"toy s float32 forward: 10.000 -> {after:.3f} ms" in said) == (kind is not None)


@pytest.mark.parametrize(
    ("peer", "torch_after", "status"), [(12.0, "1", 0), (10.0, "1", 1), (12.0, "2", 1)],
    ids=["the machine was slower", "ours alone", "another torch tells nothing"],
)  # fmt: skip
def test_compare_asks_the_others_what_the_machine_did(tmp_path: Path, peer, torch_after, status) -> None:
    old = [line(10.0), line(10.0, contender="other"), line(9.0, contender="ours in torch")]
    version = {"versions": {"torch": torch_after}}
    new = [line(12.0, **version), line(peer, contender="other", **version), line(10.8, contender="ours in torch")]
    assert compared(tmp_path, old, new) == status


@pytest.mark.parametrize(("swing", "after", "slower"), [(1.0, 12.0, 1), (1.3, 13.0, 0), (1.3, 16.0, 1)])
def test_compare_learns_the_noise_between_runs_from_those_that_did_not_change(tmp_path, capsys, swing, after, slower):
    old, new = [], []
    for case in range(30):  # two others each; the second of every case moves one way or the other
        for name, ratio in (("ours", 1.0), ("a", 1.0), ("b", swing ** (-1) ** case)):
            old.append(line(10.0, shape=f"s{case}", contender=name))
            new.append(line(10.0 * ratio, shape=f"s{case}", contender=name))
    new.append(line(after, shape="s0"))
    assert compared(tmp_path, old, new) == slower
    said = capsys.readouterr().out
    assert f"hides changes under x{swing:.2f}\n{slower} slower" in said


def test_compare_names_cases_that_are_gone_broken_or_new(tmp_path: Path, capsys) -> None:
    broken = json.loads(line(1.0, shape="broken"))
    del broken["median_ms"]
    old = [line(1.0), line(1.0, shape="gone"), line(1.0, shape="broken")]
    new = [line(1.0), json.dumps({**broken, "status": "wrong"}), line(1.0, shape="born")]
    assert compared(tmp_path, old, new) == 1
    said = capsys.readouterr().out
    assert "2 gone\n  toy broken float32 forward: wrong\n  toy gone float32 forward: missing" in said
    assert "1 new\n  toy born float32 forward" in said
    assert compared(tmp_path, new, new) == 0


def test_compare_tells_memory_and_launches_on_a_gpu_only(tmp_path: Path, capsys) -> None:
    small, large = {"peak_bytes": 1000, "launches": 4}, {"peak_bytes": 2000, "launches": 5}
    for device, found in (("cuda", 2), ("cpu", 0)):
        old, new = ([line(1.0, device=device, **each)] for each in (small, large))
        assert compared(tmp_path, old, new) == (found > 0)
        assert f"{found} larger" in capsys.readouterr().out


def test_compare_refuses_other_devices_and_empty_files(tmp_path: Path, capsys) -> None:
    for old, new, said in (
        ([line(1.0)], [line(1.0, device_name="e")], "different devices"),
        ([line(1.0)], [line(1.0, threads=2)], "different devices"),
        ([line(1.0)], [line(1.0, contender="other")], "no results of ours in"),
        ([line(1.0)], ["{}, {}"], "new.jsonl is damaged"),
    ):
        with pytest.raises(SystemExit) as stopped:
            compared(tmp_path, old, new)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
