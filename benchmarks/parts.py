"""Where a call's time goes, by part of the model, forward and backward told apart.

A part is a list of functions or methods; their calls are marked, and each op of the profile is put to the innermost
mark around it. An op of the backward belongs to the part of the forward's op whose gradient it is: autograd gives both
the same number.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from unif2ace.model import sequence_moe
from unif2ace.model.attention import Attention
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace_kernels import d3diff, moe
from unif2ace_kernels.moe import modules

from . import plain
from .case import Run

Places = Sequence[tuple[object, str]]
MARK, OTHER = "part: ", "the rest"
_NODE = "autograd::engine::evaluate_function: "


def shares(run: Run, parts: Mapping[str, Places]) -> dict[str, tuple[float, float]]:
    """Seconds of one call of `run` on the CPU, (forward, backward) by part, `OTHER` for what has no mark.

    Args:
        parts: name -> (owner, attribute) of the functions that it is made of.
    """
    with marked(parts), profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return by_part(seen.events())


def model_parts(model: UniF2aceForConditionalGeneration) -> dict[str, Places]:
    """What each part of the model is, on our ops and on plain ones."""
    return {
        "attention": [(Attention, "forward")],
        "LayerNorms": [(nn.LayerNorm, "forward")],
        "dense FFN": [(kind, "forward") for kind in {type(block.ffn) for block in model.blocks} - {type(None)}],
        "routers": [(moe, "route"), (modules, "route"), (plain, "route")],
        "experts": [(modules, "experts"), (plain, "loop_experts"), (plain, "grouped_experts")],
        "sequence experts": [(sequence_moe.SequenceMoE, "forward"), (sequence_moe.Injection, "forward")],
        "embedding": [(model.embedding, "forward")],
        "head and loss": [(d3diff, "joint_loss"), (plain, "full_logits_loss"), (plain, "labelled_rows_loss")],
        "optimizer": [(torch.optim.AdamW, "step")],
    }


@contextlib.contextmanager
def marked(parts: Mapping[str, Places]) -> Iterator[None]:
    """Inside, a call of a part's function leaves its mark in a profile."""
    with contextlib.ExitStack() as stack:
        for name, places in parts.items():
            for owner, attribute in places:
                stack.enter_context(
                    mock.patch.object(owner, attribute, _marking(getattr(owner, attribute), MARK + name))
                )
        yield


def _marking(function: Callable, label: str) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(label):
            return function(*args, **kwargs)

    return call


def by_part(events: Sequence[FunctionEvent]) -> dict[str, tuple[float, float]]:
    """Seconds by part of a profile's events, each second counted once."""
    part_of_number: dict[int, str] = {}
    forward, backward = defaultdict(float), defaultdict(float)
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda event: event.time_range.start)  # of ops with one number the last made the node
    nodes = {id(event): _node_of(event) for event in events}
    for event in events:
        if nodes[id(event)] is None:
            part = _part_of(event)
            if event.sequence_nr >= 0:
                part_of_number[event.sequence_nr] = part
            forward[part] += event.self_cpu_time_total * 1e-6
    for event in events:
        node = nodes[id(event)]
        if node is not None:
            backward[part_of_number.get(node.sequence_nr, OTHER)] += event.self_cpu_time_total * 1e-6
    names = dict.fromkeys([*forward, *backward])
    return {name: (forward[name], backward[name]) for name in names}


def _node_of(event: FunctionEvent | None) -> FunctionEvent | None:
    """The node of the backward that an event is or lies in."""
    while event is not None:
        if event.name.startswith(_NODE):
            return event
        event = event.cpu_parent
    return None


def _part_of(event: FunctionEvent | None) -> str:
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        event = event.cpu_parent
    return OTHER
