"""The log and what shows it: no line lost, none twice, whatever ends the process or fills the disk."""

import errno
import importlib.machinery
import json
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unif2ace import configs
from unif2ace.errors import UserError
from unif2ace.training import journal, watch
from unif2ace.training.load import GROUPS, Load, loads
from unif2ace.training.watch import Watch, WatchConfig

QUIET = WatchConfig(progress=False)
FULL_RECORD = {
    "step": 7, "stage": "joint", "seconds": 9.5, "step_seconds": 2.0, "data_seconds": 0.5, "loss": 5.25,
    "terms": {"mask": 4.0, "mmu": 1.25, "mask_accuracy": 0.5}, "lr": 1e-3, "grad_norm": 2.5,
    "grad_norms": {"head": 1.5}, "rows": {"t2i": 24, "mmu": 20, "lm": 0}, "tokens": 4000, "tokens_per_second": 2000.0,
    "mfu": 0.41, "memory_bytes": 3 * 2**29, "skipped": 0, "corrupt": 2,
    "experts": [{"level": "token", "layer": 1, "counts": [8, 0, 1, 1, 1, 9], "groups": [2, 4], "frequency": [1.0] * 6}],
}  # fmt: skip


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps(folder):
    return [each["step"] for each in lines(folder) if "event" not in each]


def events(folder):
    return [(each["event"], each["step"]) for each in lines(folder) if "event" in each]


def train(folder, start, stop, total=100, config=QUIET, **values):
    """A run from `start` that is killed after step `stop` - 1."""
    run = Watch(folder, config, total, start, {"parameters": 12})
    for step in range(start, stop):
        run.step({"step": step, "loss": 10.0 - step, **values})
    return run


def test_a_line_is_on_file_when_its_step_is_over(tmp_path):
    run = train(tmp_path, 0, 3)
    run.event("checkpoint", 3, seconds=0.5)
    assert lines(tmp_path)[0]["parameters"] == 12 and steps(tmp_path) == [0, 1, 2]
    assert events(tmp_path) == [("started", 0), ("checkpoint", 3)]
    assert abs(lines(tmp_path)[-1]["time"] - time.time()) < 60


def test_a_run_that_goes_on_has_no_step_twice_and_forgets_no_event(tmp_path):
    run = train(tmp_path, 0, 5)
    for name, step in [("stage", 0), ("checkpoint", 5), ("stage", 5), ("skipped", 6), ("rank_died", 7)]:
        run.event(name, step)
    for step in range(5, 8):
        run.step({"step": step, "loss": 1.0})
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"step": 8, "loss": 3.')  # killed here
    train(tmp_path, 5, 7)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert events(tmp_path) == [("started", 0), ("stage", 0), ("checkpoint", 5), ("rank_died", 7), ("resumed", 5)]
    assert [each["dropped"] for each in lines(tmp_path) if each.get("event") == "resumed"] == [3 + 2 + 1]
    assert [each["loss"] for each in lines(tmp_path) if each["step"] in (5, 6) and "loss" in each] == [5.0, 4.0]


def test_lines_that_are_no_record_are_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        b'{"step": 0}\n\0\0\0\0\n[1]\n{"step": "x"}\n{"other": 1}\n{"step": 1}\n' + b"[" * 99999 + b'\n{"st'
    )
    assert [each.get("step") for each in journal.read(path)] == [0, "x", None, 1]
    assert journal.take_up(path, 2) == 6
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'
    path.write_bytes(b'{"step": 0}\n{"step": 1}')  # whole, but for its end
    train(tmp_path, 2, 3)
    assert steps(tmp_path) == [0, 1, 2]


def test_a_log_with_nothing_to_leave_out_is_not_written_anew(tmp_path):
    train(tmp_path, 0, 4)
    before = (tmp_path / "log.jsonl").stat().st_ino
    train(tmp_path, 4, 5)
    assert (tmp_path / "log.jsonl").stat().st_ino == before and steps(tmp_path) == [0, 1, 2, 3, 4]
    train(tmp_path, 3, 4)
    assert (tmp_path / "log.jsonl").stat().st_ino != before and steps(tmp_path) == [0, 1, 2, 3]
    assert [each.name for each in tmp_path.iterdir()] == ["log.jsonl"]


WRITER = """
import sys
from pathlib import Path
from unif2ace.training.journal import Journal, take_up
path, start = Path(sys.argv[1]), int(sys.argv[2])
if start:
    take_up(path, start)
log = Journal(path)
print("ready", flush=True)
for step in range(start, 10**9):
    log.append({"step": step, "padding": "x" * 3000})
"""


def test_killed_at_any_moment_the_log_goes_on(tmp_path):
    path, start = tmp_path / "log.jsonl", 0
    for pause in (0.05, 0.02, 0.01):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(start)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(pause)
            process.kill()
        done = [each["step"] for each in journal.read(path)]
        assert done == list(range(len(done))) and len(done) > start, "as many as were reached, none missing, none twice"
        start = len(done) - 1


@pytest.fixture
def small_files():
    """A function that limits how long files may grow: writes beyond are cut, then refused, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]) if size else before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, small_files, capsys):
    run = train(tmp_path, 0, 2)
    small_files((tmp_path / "log.jsonl").stat().st_size + 10)  # ten bytes of the next line still fit
    for step in range(2, 6):
        run.step({"step": step})
    assert run.failures == 4 and steps_of_whole_lines(tmp_path) == [0, 1]
    small_files(None)
    run.step({"step": 6})
    run.step({"step": 7})
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6, 7]
    (waited,) = (each for each in lines(tmp_path) if each.get("event") == "log_waited")
    assert (waited["step"], waited["lines"], waited["failures"]) == (2, 5, 4) and waited["error"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "log waits in memory" in told[0] and "5 lines that waited" in told[1]


def steps_of_whole_lines(folder):
    return [each["step"] for each in journal.read(folder / "log.jsonl") if "event" not in each]


def test_lines_that_are_lost_at_the_end_are_told(tmp_path, small_files, capsys):
    with train(tmp_path, 0, 1) as run:
        small_files(5)
        run.step({"step": 1})
    assert "2 lines could not be written and are lost" in capsys.readouterr().err


def test_stderr_on_the_full_disk_stops_nothing(tmp_path, small_files, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = isatty = write

    run = train(tmp_path, 0, 1)
    small_files(5)
    monkeypatch.setattr(sys, "stderr", Full())
    run.step({"step": 1})
    assert run.failures == 1


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: Is a directory"):
        train(tmp_path, 0, 1)


def test_what_json_has_no_number_for_is_null_and_named(tmp_path):
    run = Watch(tmp_path, QUIET, 9, 0, {})
    run.step({"step": 0, "loss": float("nan"), "terms": {"mask": float("-inf"), "mmu": 1.5}, "list": [float("inf")]})
    record = lines(tmp_path)[-1]
    assert record["loss"] is None and record["terms"] == {"mask": None, "mmu": 1.5}
    assert record["not_finite"] == {"loss": "nan", "terms.mask": "-inf", "list.0": "inf"}
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize(
    "stop, error, wanted",
    [(4, None, "finished"), (2, None, "stopped"), (2, ValueError("bad\nnews"), "stopped")],
)
def test_the_log_says_how_a_run_ended(tmp_path, stop, error, wanted):
    try:
        with train(tmp_path, 0, stop, total=4):
            if error is not None:
                raise error
    except ValueError as seen:
        assert seen is error
    last = lines(tmp_path)[-1]
    assert (last["event"], last["step"]) == (wanted, stop)
    assert last.get("reason") == (None if error is None else "ValueError: bad news")


def test_a_view_that_fails_is_left_out_and_named(tmp_path, monkeypatch, capfd):
    class Broken(watch.Bar):
        def step(self, record):
            raise RuntimeError("pipe burst")

    monkeypatch.setattr(watch, "Bar", Broken)
    run = train(tmp_path, 0, 3, config=WatchConfig())
    assert steps(tmp_path) == [0, 1, 2] and events(tmp_path) == [("started", 0), ("view_failed", 1)]
    assert lines(tmp_path)[2]["view"] == "Broken" and lines(tmp_path)[2]["error"] == "pipe burst"
    assert capfd.readouterr().err.count("pipe burst") == 1
    run.__exit__(None, None, None)


def test_the_bar_counts_on_and_names_what_matters(tmp_path, capfd):
    with Watch(tmp_path, WatchConfig(), 10, 7, {}) as run:
        run.step(FULL_RECORD)
    shown = capfd.readouterr().err
    assert "7/10" in shown and "8/10" in shown
    assert "loss 5.25, mask 4, mmu 1.25, 2,000 tok/s, MFU 41%, data 25%, 1.5 GiB, 2 corrupt" in shown
    assert watch.line({"step": 1}) == "" and watch.line({"step": 1, "loss": None, "mfu": None}) == ""


def test_scalars_have_a_name_each_and_nothing_that_is_not_finite():
    values = watch.scalars(FULL_RECORD)
    assert values["loss/mask"] == 4.0 and values["speed/data_wait"] == 0.25 and values["speed/memory_gib"] == 1.5
    assert values["experts_token_t2i/layer_1_most"] == 2 * 8 / 8 and values["experts_token_t2i/layer_1_empty"] == 1
    assert values["experts_token_mmu/layer_1_most"] == 4 * 9 / 12 and values["grad_norm/head"] == 1.5
    assert watch.scalars({"step": 0, "loss": None, "lr": float("nan")}) == {}


def test_loads_tell_even_from_uneven():
    assert GROUPS == configs.TASKS
    even, lone, none = (Load("token", "t2i", 0, counts) for counts in ((5, 5, 5, 5), (0, 8, 0, 0), (0, 0)))
    assert even.entropy == pytest.approx(1) and even.share == [1, 1, 1, 1] and not even.empty and not even.crowded
    assert lone.entropy == 0 and lone.empty == [0, 2, 3] and lone.crowded == [1]
    assert none.share == [0, 0] and none.entropy == 0 and none.empty == [] == none.crowded
    record = {"level": "sequence", "layer": 2, "counts": [1, 2, 3, 4, 99], "groups": [1, 3]}  # a shared expert after
    assert [(each.group, each.layer, each.counts) for each in loads([record])] == [
        ("t2i", 2, (1,)),
        ("mmu", 2, (2, 3, 4)),
    ]
    assert list(loads(None)) == [] == list(loads([{}])) == list(loads([{"groups": [2], "counts": [1]}]))


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"every": 0}, "watch.every"),
        ({"samples_every": -1}, "watch.samples_every"),
        ({"samples_every": 5}, "watch.samples_every"),
        ({"prompts": ("a", " ")}, r"watch.prompts\[1\]"),
        ({"questions": ("",)}, r"watch.questions\[0\]"),
        ({"wandb": ""}, "watch.wandb"),
    ],
)
def test_a_value_that_cannot_be_is_named(changes, key):
    with pytest.raises(UserError, match=key):
        WatchConfig(**changes).check("watch")


def test_when_the_costly_and_the_samples_are_due():
    config = WatchConfig(every=3, samples_every=4, questions=("who?",)).check("watch")
    assert [step for step in range(8) if config.costly(step)] == [0, 3, 6]
    assert [done for done in range(1, 9) if config.samples_after(done)] == [4, 8]
    assert not any(QUIET.samples_after(done) for done in range(9))


@pytest.mark.parametrize("name, value", [("tensorboard", True), ("wandb", "faces")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path, name, value):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"watch\.{name}: {name} is not installed: pip install 'unif2ace\[watch\]'"):
        Watch(tmp_path, WatchConfig(**{name: value}), 1, 0, {})


def painting(folder):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(folder / "paintings.png")
    return folder


def test_tensorboard_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = WatchConfig(progress=False, tensorboard=True)
    killed = train(tmp_path, 0, 6, config=config, lr=1.0)
    killed._views[0]._writer.flush()
    with train(tmp_path, 3, 5, total=5, config=config, lr=2.0) as run:
        run.samples(5, painting(tmp_path / "samples" / "step-00000005"))
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in shown.Scalars("lr")] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
    assert [each.value for each in shown.Scalars("loss")] == [10, 9, 8, 7, 6]
    (image,) = shown.Images("paintings")
    assert (image.step, image.width, image.height) == (5, 6, 4)


class FakeWandb(types.ModuleType):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls, self.logged, self.finished = [], [], 0
        self.Image = lambda path: ("image", path)

    def init(self, **options):
        self.calls.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = WatchConfig(progress=False, wandb="faces")
    train(tmp_path, 0, 2, config=config)
    with train(tmp_path, 1, 3, config=config) as run:
        run.samples(3, painting(tmp_path / "samples" / "step-00000003"))
    first, second = fake.calls
    assert first["id"] == second["id"] and len(first["id"]) == 8 and second["resume"] == "allow"
    assert first["project"] == "faces" and first["config"] == {"parameters": 12}
    assert [each["step"] for each in fake.logged] == [0, 1, 1, 2, 3] and fake.logged[0]["loss"] == 10.0
    assert fake.logged[-1]["paintings"][1].endswith("paintings.png") and fake.finished == 1
    train(tmp_path / "other", 0, 1, config=config)
    assert fake.calls[2]["id"] != first["id"]
