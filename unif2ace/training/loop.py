"""The training loop that the image tokenizer and the model share: schedule, clipping, progress, log, resume.

A step's batch depends on (seed, step) alone, so a run that was stopped goes on from its last saved state to the same
weights as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from unif2ace.errors import UserError
from unif2ace.files import replacing
from unif2ace.parsing import Whole, reading

Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """A factor on every learning rate: linear warm-up, then a cosine from 1 down to `floor`.

    Attributes:
        steps: length of the run.
        warmup: steps of warm-up.
        floor: the factor at the end.
    """

    steps: int
    warmup: int = 50
    floor: float = 0.02

    def at(self, step: int) -> float:
        """The factor at `step`."""
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * fall)


def fit(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of_step: Callable[[int], tuple[torch.Tensor, Terms]],
    schedule: Schedule,
    state_path: Path,
    *,
    name: str,
    fingerprint: str,
    clip: float = 1.0,
    ema: nn.Module | None = None,
    ema_decay: float = 0.99,
    log_every: int = 5,
    save_seconds: float = 60.0,
) -> list[dict[str, float]]:
    """Train `model` for `schedule.steps` steps and return the log.

    Args:
        optimizers: their learning rates are scaled by the schedule from the rates that they come with.
        loss_of_step: step -> (loss, terms to log); must depend on nothing but the step and the model.
        state_path: where the state goes every `save_seconds` and on Ctrl-C, and where a stopped run is taken up.
        fingerprint: of everything that shapes the run; a state with another one is not taken up.
        ema: a copy of the model to keep the exponential average of its weights in.

    Returns:
        A dict a logged step: ``step``, ``seconds`` of training so far, ``loss``, and the terms.

    Raises:
        KeyboardInterrupt: after the state was saved.
    """
    start, log, spent = 0, [], 0.0
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if state_path.exists():
        state = _read_state(state_path)
        if state["fingerprint"] == fingerprint:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            if ema is not None:
                ema.load_state_dict(state["ema"])
            start, log, spent = state["step"], state["log"], state["seconds"]

    def save(step: int) -> None:
        state = {
            "fingerprint": fingerprint,
            "step": step,
            "seconds": spent,
            "log": log,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "ema": ema.state_dict() if ema is not None else None,
        }
        with replacing(state_path) as partial:
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # what torch's writer makes of a full disk
                raise OSError(f"torch.save failed ({str(error).splitlines()[0]})") from error

    model.train()
    saved_at = began = time.monotonic()
    bar = tqdm(total=schedule.steps, initial=start, desc=name, unit="step", mininterval=1.0, dynamic_ncols=True)
    with bar, _interrupts() as interrupts:
        for step in range(start, schedule.steps):
            factor = schedule.at(step)
            for optimizer, each in zip(optimizers, peaks):
                for group, peak in zip(optimizer.param_groups, each):
                    group["lr"] = peak * factor
                optimizer.zero_grad(set_to_none=True)
            loss, terms = loss_of_step(step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
            if ema is not None:
                _average(ema, model, min(ema_decay, (step + 1) / (step + 10)))
            now = time.monotonic()
            spent, began = spent + now - began, now
            if step % log_every == 0 or step == schedule.steps - 1:
                values = {"loss": loss.item(), "grad_norm": norm.item()}
                values |= {key: value.item() for key, value in terms.items()}
                if not math.isfinite(values["loss"]):
                    raise UserError(f"{name}: the loss is {values['loss']} at step {step}; lower the learning rate")
                log.append({"step": step, "seconds": round(spent, 2), **values})
                bar.set_postfix(
                    {key: f"{value:.3g}" for key, value in values.items() if key != "grad_norm"}, refresh=False
                )
            bar.update()
            if interrupts or now - saved_at > save_seconds or step == schedule.steps - 1:
                save(step + 1)
                saved_at = now
            if interrupts:
                raise KeyboardInterrupt
    return log


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it, so that a step is never cut in two; a second one raises at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        pairs = zip(ema.parameters(), model.parameters())
        averaged, current = zip(*pairs)
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)


def _read_state(path: Path) -> dict:
    mend = "delete it to train from the start"
    with reading(path, "state of a training", mend), Whole(path) as file:
        state = torch.load(file, weights_only=True)
    if not isinstance(state, dict) or "fingerprint" not in state:
        raise UserError(f"{path} is no state of a training: {mend}")
    return state
