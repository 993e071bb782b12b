"""The report of a training run: what the log says is on the page, whatever the log lacks; what is odd is told."""

import base64
import json
import re

import believable
import numpy as np
import pytest
from PIL import Image
from test_report import Page

from unif2ace.cli import main
from unif2ace.errors import UserError
from unif2ace.training import figures, history, report
from unif2ace.training.findings import duration, findings, headline, last_loads, short, window
from unif2ace.training.history import Loads, Run, Sample

NASTY = "<script>alert('x')</script> & \"quotes\""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = believable.write_run(tmp_path_factory.mktemp("runs") / "faces", steps=600, layers=3)
    words = folder / "samples" / "step-00000600" / "samples.json"
    words.write_text(words.read_text().replace("a bald man with a beard", json.dumps(NASTY)[1:-1]))
    with open(folder / "config.yaml", "a") as file:
        file.write(f"note: {json.dumps(NASTY)}\noptimizer: {{clip: 1.5}}\n")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def run(folder):
    return Run.read(folder)


def logged(folder, records, **config) -> Run:
    """A run with this log."""
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "config.yaml").write_text(json.dumps(config))
    return Run.read(folder)


def steps(count, **values):
    """Records; a value may be a function of the step."""
    return [
        {"step": step, **{name: value(step) if callable(value) else value for name, value in values.items()}}
        for step in range(count)
    ]


def test_the_page_needs_no_other_file(page, folder):
    assert page.open == [] and "script" not in page.seen and "link" not in page.seen
    assert all(each.startswith("data:image/png;base64,") for each in page.images)
    for each in page.images:
        assert base64.b64decode(each.partition(",")[2]).startswith(b"\x89PNG")
    names = {"losses", "rates", "speed", "evenness", "paintings"}
    names |= {f"load_{level}_{group}" for level in ("token", "sequence") for group in ("t2i", "mmu")}
    found = {path.stem for path in (folder / "report").iterdir()}
    assert found == {name.replace("load_token_", "load_token-").replace("sequence_", "sequence-") for name in names}
    assert len(page.images) == len(names) + 2, "and two faces"
    for path in (folder / "report").iterdir():
        Image.open(path).verify()


def test_what_was_typed_stands_there_as_text(page, folder):
    assert page.text.count(NASTY) == 1, "the prompt"
    assert json.dumps(NASTY) in page.text and "name: a <b>" in page.text, "the config"
    assert "<b>," not in (folder / "report.html").read_text()


def test_the_page_says_what_the_run_did(page):
    for words in ("Training run faces", "of 600; finished, resumed 2 times", "106 M", "64.0 GiB", "pretraining"):
        assert words in page.text, words
    assert "2 steps were passed over, without a finite gradient; the last: 330, 331." in page.text
    assert "Experts with under 10% of an even load: t2i token level, layer 3, expert 2." in page.text
    assert "11 states saved, 1.5 to 1.5 s each; the last at step 550." in page.text
    assert page.text.count("is the mouth open ?") == 2 and "step 600" in page.text


def test_the_log_is_read_into_columns(run):
    assert run.steps.tolist() == list(range(600)) and run.total == 600
    assert run.stages == [("pretraining", 0), ("joint", 240), ("fine", 480)] and run.resumed == [168, 402]
    assert np.isnan(run.column("loss")[[330, 331]]).all() and np.isfinite(run.column("loss")).sum() == 598
    assert np.isfinite(run.column("grad_norms.head")).sum() == 60 and np.isnan(run.column("nothing")).all()
    assert set(run.parts("grad_norms")) == set(believable.PARTS) and len(run.experts) == 3 * 2 * 2
    assert [each.step for each in run.samples] == [120, 240, 360, 480, 600]


def test_a_step_that_stands_twice_counts_once_as_the_last(tmp_path):
    run = logged(
        tmp_path, [{"step": 0, "loss": 1}, {"step": 1, "loss": 2}, {"step": 1, "loss": 3}, {"step": 2, "lr": 4}]
    )
    assert run.steps.tolist() == [0, 1, 2] and run.column("loss")[:2].tolist() == [1, 3]
    assert np.isnan(run.column("loss")[2]) and run.column("lr")[2] == 4 and np.isnan(run.column("lr")[:2]).all()


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 5}],
        [{"step": 0, "loss": None, "terms": None, "experts": None, "stage": None}],
        [{"step": 0, "loss": "x", "terms": {"mask": []}, "experts": [1], "stage": 3, "grad_norms": 2, "lr": True}],
        steps(3, loss=0.0, lr=0.0, grad_norm=0.0, step_seconds=0.0, data_seconds=0.0, tokens_per_second=0.0),
        steps(2, loss=10**400, experts=[{"level": "token", "layer": 0, "counts": [0, 0], "groups": [2]}]),
        [{"step": 0, "experts": [{"level": "x/y", "layer": 0, "counts": [1, 2], "groups": [1, 1]}]},
         {"step": 1, "experts": [{"level": "x/y", "layer": 0, "counts": [1, 2, 3], "groups": [3]}]}],
        [{"event": "skipped"}, {"event": "resumed", "step": "x"}, {"event": 3, "time": "x", "y": {"a": [1]}},
         {"step": 1}],
        steps(40, loss=float("nan"), terms={"mask": 0.0, "mask_accuracy": 0.5}, skipped=0, memory_bytes=0),
    ],
)  # fmt: skip
def test_whatever_is_missing_or_odd_the_page_is_drawn(tmp_path, records):
    logged(tmp_path, records)
    (tmp_path / "config.yaml").write_text("a: [")
    for number, text in (("1", "{"), ("2", "{}"), ("x", "{}"), ("3", '{"answers": [{"image": "q"}]}'), ("4", "[]")):
        (tmp_path / "samples" / f"step-{number}").mkdir(parents=True)
        (tmp_path / "samples" / f"step-{number}" / "samples.json").write_text(text)
    page = Page(report.write(tmp_path).read_text())
    assert page.open == [] and len(page.images) >= 3


@pytest.mark.parametrize(
    "text, words", [(None, "is missing: name the folder of a run"), ('{"event": "started"}\n{"st', "has no step yet")]
)
def test_without_a_step_there_is_one_line(tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        Run.read(tmp_path)
    assert main(["report", str(tmp_path)]) == 1
    assert words in capsys.readouterr().err


def test_the_command_says_where_the_page_is(tmp_path, capsys):
    logged(tmp_path, steps(3, loss=1.0))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert not list(tmp_path.glob("**/*.partial"))


def test_the_headline_is_of_the_last_steps(tmp_path):
    events = [
        {"event": "started", "step": 0, "total_steps": 4000},
        {"event": "resumed", "step": 9, "total_steps": 4000},
    ]
    records = steps(
        2000, loss=lambda step: 5.0 - step / 1000, tokens=1000, seconds=lambda step: 2.0 * (step + 1), step_seconds=2.0,
        data_seconds=lambda step: 0.5 if step >= 1900 else 0.0, memory_bytes=2**30, tokens_per_second=500.0,
        terms={"mask_accuracy": 0.25}, mfu=None, skipped=1, corrupt=1200,
    )  # fmt: skip
    run = logged(tmp_path, [*events, *records])
    shown = {name: (value, remark) for name, value, remark in headline(run)}
    assert window(run) == 100
    assert shown["steps"] == ("2,000", "of 4,000; running, or killed, resumed once")
    assert shown["loss"] == ("3.05", "lowest 3.001 at step 1,999")
    assert shown["codes ranked first"][0] == "25%" and "answers ranked first" not in shown and "MFU" not in shown
    assert shown["tokens"] == ("2 M", "1 k a step") and shown["tokens a second"] == ("500", "at best 500")
    assert shown["waits for data"][0] == "25.0%" and shown["memory"][0] == "1.0 GiB"
    assert shown["passed over"] == ("1 steps", "1,200 unreadable samples")
    assert shown["time"] == ("1 h 6 min", "1 h 6 min to go")


EXPERTS = [{"level": "token", "layer": 1, "counts": [90, 5, 5, 30, 30], "groups": [3, 2]}]
ODD = {
    "The run stopped at step 300: OSError: no.": ({}, [{"event": "stopped", "step": 300, "reason": "OSError: no"}]),
    "3 steps were passed over": ({"skipped": 3}, []),
    "1 step was passed over, without a finite gradient; the last: 7.": (
        {"skipped": 1},
        [{"event": "skipped", "step": 7}],
    ),
    "4 samples could not be read.": ({"corrupt": 4}, []),
    "1 states could not be written, the last at step 9.": ({}, [{"event": "state_failed", "step": 9}]),
    "The loss of the last 50 steps is 50% above the lowest": ({"loss": lambda step: 1.5 if step >= 250 else 1.0}, []),
    "100% of the last 50 steps were clipped to a norm of 2": ({"grad_norm": 3.0}, []),
    "waited for data 50% of their time": ({"data_seconds": 0.5}, []),
    "more than 10% of the time from step 100 to 149": ({"data_seconds": lambda step: 0.2 * (100 <= step < 150)}, []),
    "fell to 80, from 100": ({"tokens_per_second": lambda step: 100.0 if step < 100 else 80.0}, []),
    "Memory has grown by 100%": ({"memory_bytes": lambda step: 100 if step < 150 else 200}, []),
    "over 150% of an even load: t2i token level, layer 2, expert 1.": ({"experts": EXPERTS}, []),
}
EVEN = {
    "loss": 1.0, "grad_norm": 1.0, "data_seconds": 0.0, "step_seconds": 1.0, "tokens_per_second": 100.0, "skipped": 0,
    "corrupt": 0, "memory_bytes": 100, "experts": [{"level": "token", "layer": 0, "counts": [5, 5], "groups": [2]}],
}  # fmt: skip


@pytest.mark.parametrize("words", ODD)
def test_what_is_odd_is_told_and_nothing_else(tmp_path, words):
    changes, events = ODD[words]
    run = logged(tmp_path, [*steps(300, **{**EVEN, **changes}), *events], optimizer={"clip": 2.0})
    found = findings(run)
    assert len(found) == 1 and words in found[0]


def test_nothing_stands_out_where_nothing_does(tmp_path):
    run = logged(
        tmp_path, [{"event": "stopped", "step": 9, "reason": "old"}, *steps(300, **EVEN), {"event": "finished"}]
    )
    assert findings(run) == [] and "Nothing stands out." in Page(report.write(tmp_path).read_text()).text


def test_a_loss_of_another_stage_is_no_measure(tmp_path):
    first, second = steps(300, loss=1.0, stage="a"), steps(300, loss=2.0, stage="b")
    run = logged(tmp_path, [*first, *({**each, "step": each["step"] + 300} for each in second)])
    assert findings(run) == []


def test_loads_of_a_long_run_are_added_up_not_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_LOADS", 8)
    records = steps(100, experts=lambda step: [{"level": "token", "layer": 0, "counts": [step, 1], "groups": [2]}])
    kept = logged(tmp_path, records).experts["token", "t2i", 0]
    assert len(kept.steps) < 16 and np.sum(kept.counts, axis=0).tolist() == [sum(range(100)), 100]
    assert kept.steps[0] == 0 and (np.diff(kept.steps) > 0).all()
    fewer = kept.fewer(3)
    assert len(fewer.steps) <= 3 and np.sum(fewer.counts, axis=0).tolist() == [4950, 100] and fewer.steps[0] == 0


def test_shares_and_the_last_load():
    loads = Loads([0, 10, 20], [np.array(each) for each in ([4, 0], [1, 1], [0, 0])])
    np.testing.assert_array_equal(loads.share(), [[2, 0], [1, 1], [np.nan, np.nan]])
    assert loads.last("token", "mmu", 1, 2).counts == (1, 1) and loads.last("token", "mmu", 1, 9).counts == (5, 1)
    np.testing.assert_allclose(figures.entropies(loads), [0, 1, np.nan], atol=1e-12)


def test_last_loads_are_of_the_window(run):
    asleep = next(each for each in last_loads(run) if (each.level, each.group, each.layer) == ("token", "t2i", 2))
    assert asleep.empty == [1] and sum(asleep.counts) == 40000 * 5, "records of every tenth of the last 50 steps"


def test_binned_keeps_the_range_and_smoothing_the_place():
    at, mean, low, high = figures.binned(np.arange(5000), np.where(np.arange(5000) == 7, np.nan, np.arange(5000.0)))
    assert len(at) <= figures.POINTS and at[0] == 0 and low[0] == 0 and high[-1] == 4999
    assert (low <= mean).all() and (mean <= high).all()
    np.testing.assert_allclose(figures._smoothed(np.full(300, 2.5)), 2.5)
    bump = figures._smoothed(np.where(np.arange(501) == 250, 1.0, 0.0))
    assert bump.argmax() == 250 and np.allclose(bump, bump[::-1])
    gap = figures._smoothed(np.where(np.arange(300) % 7 == 0, np.nan, 1.0))
    np.testing.assert_allclose(gap, 1.0)
    assert len(figures._smoothed(np.array([3.0]))) == 1 and np.isnan(figures._smoothed(np.full(3, np.nan))).all()


def test_the_figures_show_the_log(run):
    titles = [axis.get_title(loc="left") for axis in figures.losses(run).axes]
    assert titles[0] == "loss" and "plain text: next token (nats)" in titles and titles[-1] == "targets ranked first"
    text = next(axis for axis in figures.losses(run).axes if "plain" in axis.get_title(loc="left"))
    drawn = np.concatenate([line.get_xdata() for line in text.lines if len(line.get_xdata()) > 50])
    assert drawn.min() == 240 and drawn.max() == 479, "only where there were rows of it"
    clip = [line.get_ydata()[0] for line in figures.rates(run, 1.5).axes[1].lines if len(set(line.get_ydata())) == 1]
    assert 1.5 in clip
    maps = figures.load(run, "token", "t2i").axes[0].collections
    shares = [each.get_array().reshape(4, -1) for each in maps if each.get_array() is not None]
    assert len(shares) == 3 and all(np.allclose(each.mean(0), 1) for each in shares)
    assert shares[2][1, -1] < 0.1 < shares[2][1, 0]


def test_a_sheet_has_a_row_a_step(run):
    sheet = figures.sheet(run.samples, side=64)
    assert sheet.height == 5 * 64 and sheet.width > 4 * 64 and figures.sheet([]) is None
    last = np.asarray(Image.open(run.samples[-1].paintings).convert("RGB"))
    assert np.array_equal(np.asarray(sheet)[-64:, -4 * 64 :], last)


def test_answers_are_compared_for_the_same_faces_only(tmp_path):
    folder = believable.write_run(tmp_path / "run", steps=50, layers=1)
    Image.new("RGB", (128, 64)).save(folder / "samples" / "step-00000010" / "faces.png")
    table = report._answers(Run.read(folder).samples)
    assert "step 10<" not in table and re.findall(r"step (\d+)<", table) == ["20", "30", "40", "50"]
    assert table.count("rowspan") == 2 and table.count("<img") == 2


def test_many_samples_are_shown_few_with_the_first_and_the_last():
    assert report._spread(range(5)) == [0, 1, 2, 3, 4]
    shown = report._spread(range(100))
    assert len(shown) == report.SHOWN and shown[0] == 0 and shown[-1] == 99


def test_many_events_are_shortened(tmp_path):
    run = logged(tmp_path, [*({"event": "skipped", "step": step} for step in range(500)), *steps(2, loss=1.0)])
    table = report._events(run)
    assert "... 440 more" in table and table.count("<tr>") == report.ROWS + 2 and ">499<" in table


@pytest.mark.parametrize("value, words", [(950, "950"), (12345, "12.3 k"), (2.5e6, "2.5 M"), (7e12, "7 T")])
def test_large_numbers_are_short(value, words):
    assert short(value) == words


@pytest.mark.parametrize("seconds, words", [(5, "5 s"), (65, "1 min 5 s"), (7320, "2 h 2 min"), (180000, "2 d 2 h")])
def test_durations_in_two_units(seconds, words):
    assert duration(seconds) == words


def test_a_painting_that_is_damaged_is_left_out(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    Image.new("RGB", (20, 10)).save(paths[0])
    paths[1].write_bytes(paths[0].read_bytes()[:50])
    samples = [Sample(step, [], [{"image": 0}], path, path) for step, path in enumerate(paths)]
    assert figures.sheet(samples, side=10).height == 10 and figures.sheet(samples[1:]) is None
    assert report._crops(samples[0]) and not report._crops(samples[1])
