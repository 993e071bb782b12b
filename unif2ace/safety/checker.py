"""The hook of a safety checker: a callable of yours that sees prompts and pictures, and may refuse or blank them.

    def check(prompts, images):                 # unif2ace generate --safety my_module:check
        return ["no famous people" if "president" in prompt else None for prompt in prompts]

It is called before the model runs, with the prompts (or questions) and the pictures that were given, and after it,
with the prompts and the pictures that were painted. One item a prompt: None to go on, or a reason. A reason before the
model runs refuses the whole call; after, the painting is blanked, and the reason shown. This project ships no checker:
what is to be refused is for whoever runs the model to say.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np

from unif2ace.errors import UserError

Images = Sequence[np.ndarray] | np.ndarray | None  # one a prompt, [H, W, 3] uint8 each
SafetyChecker = Callable[[Sequence[str], Images], Sequence[str | None]]
BLANK = 127


def load_checker(name: str) -> SafetyChecker:
    """The callable `module:function`; modules of the current folder are found as well.

    Raises:
        UserError: there is none.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"--safety: expected module:function, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        checker = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise
        raise UserError(f"--safety: there is no module {module_name}: install it, or call from its folder") from error
    except AttributeError as error:
        raise UserError(f"--safety: {module_name} has no {attribute}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(checker):
        raise UserError(f"--safety: {name} is a {type(checker).__name__}, expected a function")
    return checker


def allow(checker: SafetyChecker | None, prompts: Sequence[str], images: Images = None) -> None:
    """Let the checker see what the model is asked.

    Args:
        prompts: texts, one a row.
        images: the pictures that were given, one a row; None where there are none.

    Raises:
        UserError: it refuses one of them.
    """
    for prompt, reason in zip(prompts, _verdicts(checker, prompts, images)):
        if reason is not None:
            raise UserError(f"refused by the safety checker: {reason} ({prompt!r})")


def blank(
    checker: SafetyChecker | None, prompts: Sequence[str], images: np.ndarray
) -> tuple[np.ndarray, list[str | None]]:
    """Let the checker see what was painted, `images` [B, H, W, 3]: the same with refused ones grey, and reasons."""
    reasons = _verdicts(checker, prompts, images)
    refused = [reason is not None for reason in reasons]
    if any(refused):
        images = images.copy()
        images[refused] = BLANK
    return images, reasons


def _verdicts(checker: SafetyChecker | None, prompts: Sequence[str], images: Images) -> list[str | None]:
    if checker is None:
        return [None] * len(prompts)
    verdicts = checker(prompts, images)
    if isinstance(verdicts, str) or len(verdicts) != len(prompts):
        raise UserError(
            f"the safety checker has to return one reason or None for each of {len(prompts)} prompts, "
            f"it returned {verdicts!r}"
        )
    if wrong := [each for each in verdicts if not (each is None or isinstance(each, str))]:
        raise UserError(f"the safety checker has to return reasons (text) or None, it returned {wrong[0]!r}")
    return list(verdicts)
