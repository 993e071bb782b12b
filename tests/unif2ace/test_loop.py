"""The training loop: stopped and taken up again it ends at the same bits, and what can go wrong says what to do."""

import copy
import math
import os
import resource
import signal

import pytest
import tiny
import torch
from torch import nn

from unif2ace.errors import UserError
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.training import loop
from unif2ace.training.loop import Schedule, fit
from unif2ace.training.optimizers import OptimizerConfig, build

STEPS = 7
SCHEDULE = Schedule(STEPS, warmup=3)


class Run:
    """A tiny model with both optimizers and an average, all from one seed."""

    def __init__(self, folder, **options):
        torch.manual_seed(0)
        self.model = UniF2aceForConditionalGeneration(tiny.CONFIG)
        self.ema = copy.deepcopy(self.model)
        self.optimizers = build(self.model, OptimizerConfig())
        self.path = folder / "state.pt"
        self.seen: list[int] = []
        self.stop_at = None
        self.options = {"name": "model", "fingerprint": "a", "log_every": 2, "ema": self.ema, **options}

    def loss(self, step):
        self.seen.append(step)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return tiny.loss(self.model, tiny.single(tiny.mixed(seed=step)))

    def fit(self):
        return fit(self.model, self.optimizers, self.loss, SCHEDULE, self.path, **self.options)

    def state(self):
        memory = [each.state_dict()["state"] for each in self.optimizers]
        return [self.model.state_dict(), self.ema.state_dict(), *memory]


def flat(state, path=""):
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, value in items for k, v in flat(value, f"{path}/{name}").items()}
    return {path: state}


def assert_bit_equal(run, other):
    a, b = flat(run.state()), flat(other.state())
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])]
    assert different == []


def without_time(log):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in log]


@pytest.mark.parametrize("stops", [[0], [3], [2, 3, 5], [STEPS - 1]])
def test_a_stopped_run_ends_at_the_same_bits(tmp_path, stops):
    whole = Run(tmp_path / "whole")
    log = whole.fit()
    for stop in stops:
        run = Run(tmp_path / "stopped")
        run.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            run.fit()
        assert run.seen[-1] == stop, "the step in which Ctrl-C came is finished, none after it begun"
        assert torch.load(run.path, weights_only=True)["step"] == stop + 1
        assert os.listdir(run.path.parent) == ["state.pt"]
    last = Run(tmp_path / "stopped")
    resumed_log = last.fit()
    assert last.seen == list(range(stops[-1] + 1, STEPS))
    assert_bit_equal(last, whole)
    assert without_time(resumed_log) == without_time(log)
    seconds = [row["seconds"] for row in resumed_log]
    assert seconds == sorted(seconds)


def test_stopping_gives_ctrl_c_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = Run(tmp_path)
    run.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    run = Run(tmp_path)

    def loss(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    run.loss = loss
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert not run.path.exists()


def test_a_run_of_another_fingerprint_is_not_taken_up(tmp_path):
    first = Run(tmp_path)
    first.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    other = Run(tmp_path, fingerprint="b")
    other.fit()
    assert other.seen == list(range(STEPS))
    fresh = Run(tmp_path / "fresh")
    fresh.fit()
    assert_bit_equal(other, fresh)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, again = Run(tmp_path), Run(tmp_path)
    log = first.fit()
    assert without_time(again.fit()) == without_time(log) and again.seen == []
    assert_bit_equal(again, first)


def test_a_damaged_state_is_the_users_to_delete(tmp_path):
    run = Run(tmp_path)
    run.fit()
    content = run.path.read_bytes()
    truncated = [content[: int(len(content) * part)] for part in (0.01, 0.5, 0.99)]
    for each in [b"", b"not a state", b"\x00" * 1000, *truncated]:
        run.path.write_bytes(each)
        with pytest.raises(UserError, match=r"state\.pt is damaged or no state .*: delete it") as raised:
            Run(tmp_path).fit()
        assert "\n" not in str(raised.value)


def test_a_full_disk_is_the_users_to_mend_and_keeps_the_old_state(tmp_path, monkeypatch):
    """A real limit on the size of files, since torch's writer makes an error of its own of it."""
    run = Run(tmp_path)
    run.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    old = run.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = loop.torch.save
    for size in (100, len(old) // 2):

        def save(state, path, size=size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                usual(state, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        monkeypatch.setattr(loop.torch, "save", save)
        with pytest.raises(UserError, match=r"cannot write .*state\.pt.*free space") as raised:
            Run(tmp_path).fit()
        assert "\n" not in str(raised.value)
        assert run.path.read_bytes() == old and os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, value):
    run = Run(tmp_path, log_every=1)
    usual = run.loss
    run.loss = lambda step: (usual(step)[0] * (value if step == 4 else 1), {})
    with pytest.raises(UserError, match=f"model: the loss is {value} at step 4; lower the learning rate"):
        run.fit()
    assert not run.path.exists()


def test_the_log_is_of_the_steps_asked_for(tmp_path):
    run = Run(tmp_path)
    losses = {}
    usual = run.loss

    def loss(step):
        total, terms = usual(step)
        losses[step] = {"loss": total.item(), **{name: value.item() for name, value in terms.items()}}
        return total, terms

    run.loss = loss
    log = run.fit()
    assert [row["step"] for row in log] == [0, 2, 4, 6]
    for row in log:
        assert {k: v for k, v in row.items() if k not in ("step", "seconds", "grad_norm")} == losses[row["step"]]
        assert row["grad_norm"] > 0 and row["seconds"] >= 0


class Line(nn.Module):
    """loss = -w: a gradient of -1 at every step, so that a step of SGD is the learning rate."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def loss(self, step):
        return -self.w.sum() * self.slope, {}

    slope = 1.0


@pytest.mark.parametrize("slope,step_size", [(1.0, 1.0), (0.25, 0.25), (100.0, 1.0)])
def test_rates_follow_the_schedule_and_gradients_are_clipped(tmp_path, slope, step_size):
    model = Line()
    model.slope = slope
    positions = []

    def loss(step):
        positions.append(model.w.item())
        return model.loss(step)

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5)]
    fit(model, optimizers, loss, SCHEDULE, tmp_path / "s", name="line", fingerprint="a")
    positions.append(model.w.item())
    moves = torch.tensor(positions).diff()
    expected = torch.tensor([0.5 * SCHEDULE.at(step) * step_size for step in range(STEPS)])
    torch.testing.assert_close(moves, expected, rtol=1e-4, atol=1e-5)


def test_the_average_follows_the_weights(tmp_path):
    model, ema = Line(), Line()
    positions = []

    def loss(step):
        positions.append(model.w.item())
        return model.loss(step)

    fit(model, [torch.optim.SGD(model.parameters(), lr=0.5)], loss, SCHEDULE, tmp_path / "s", name="line",
        fingerprint="a", ema=ema, ema_decay=0.6)  # fmt: skip
    expected = 0.0
    for step, position in enumerate([*positions[1:], model.w.item()]):
        decay = min(0.6, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * position
    assert ema.w.item() == pytest.approx(expected, rel=1e-5)


def test_the_schedule_warms_up_then_falls_to_its_floor():
    schedule = Schedule(steps=1000, warmup=10, floor=0.1)
    factors = [schedule.at(step) for step in range(1000)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1, abs=1e-3)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3) and factors[500] == pytest.approx(0.55, abs=1e-3)


def test_a_state_is_saved_while_it_runs(tmp_path, monkeypatch):
    """Every `save_seconds`, so that a power cut costs no more."""
    run = Run(tmp_path, save_seconds=0.0)
    saved = []
    usual = loop.torch.save
    monkeypatch.setattr(loop.torch, "save", lambda state, path: (saved.append(state["step"]), usual(state, path)))
    run.fit()
    assert saved == list(range(1, STEPS + 1))
