"""One step of the sampling loop as a CUDA graph: captured once, replayed for every step of every call.

What differs from step to step and from call to call lies in tensors that the graph reads: the ids, the step's number,
the seed, the offset, the global rows, the tokens masked at the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
_WARM_UP = 3  # calls before the capture: libraries load and kernels compile in them, which a capture does not allow


class StepGraph:
    """A captured step.

    Args:
        advance: ``advance(ids, step, run)`` gives (ids for the next step, sample, confidence); `step` is an int64
            tensor without dimensions. It must not wait for the device.
        ids: [B, N] on a CUDA device. run: the sampler's `Run`, a named tuple of tensors there.

    Raises:
        ValueError: `advance` cannot be captured.
    """

    def __init__(
        self, advance: Callable[[Tensor, Any, Any], tuple[Tensor, Tensor, Tensor]], ids: Tensor, run: Any
    ) -> None:
        self._ids = ids.clone()
        self._run = type(run)(*(each.clone() for each in run))
        self._step = torch.zeros((), dtype=torch.int64, device=ids.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(ids.device), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    advance(self._ids, self._step, self._run)
            torch.cuda.current_stream().wait_stream(stream)
            pool = torch.cuda.graph_pool_handle()
            try:
                # A capture that fails leaves its stream the current one: the outer context puts ours back.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
                ):
                    self._out = advance(self._ids, self._step, self._run)
                    self._ids.copy_(self._out[0])
                    self._step += 1
            except RuntimeError as error:
                # It also leaves torch's own generator and its allocator in the belief that it is still under way: the
                # allocator would refuse the next capture.
                generator = torch.cuda.default_generators[ids.device.index]
                generator.graphsafe_set_state(generator.clone_state())
                with contextlib.suppress(RuntimeError):  # not what step_fn raised itself: that capture was ended
                    torch._C._cuda_endAllocateToPool(ids.device.index, pool)
                    torch._C._cuda_releasePool(ids.device.index, pool)
                what = str(error).strip().splitlines()[0]
                raise ValueError(f"step_fn: expected one that a CUDA graph can hold, got {what}") from error

    def begin(self, ids: Tensor, run: Any) -> None:
        """Put a call's tensors where the graph reads them; the next replay is step 0."""
        self._ids.copy_(ids)
        for held, given in zip(self._run, run, strict=True):
            held.copy_(given)
        self._step.zero_()

    def replay(self, ids: Tensor, step: int, run: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The next step, with `advance`'s results; the arguments are where the graph has them already.

        The tensors are the graph's own: the next replay writes over them.
        """
        self._graph.replay()
        return self._out
