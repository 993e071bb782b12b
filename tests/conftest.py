"""What every test gets: one thread, fixed seeds, NaN in memory that nothing wrote; and Triton's CPU interpreter."""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("unif2ace_kernels") is None:  # not installed: test the source tree
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """For fixtures of modules too, which are made before a test's own: sums over two threads are rounded otherwise."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """One thread and fixed seeds, so that a test's result hangs on nothing else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give NaN (or the dtype's largest value), so that an element nobody wrote shows."""

    def filling(create):
        def filled(*args, **kwargs):
            out = create(*args, **kwargs)
            if type(out) is torch.Tensor and out.device.type in ("cpu", "cuda") and not out.is_quantized:
                with torch.no_grad():
                    if out.is_floating_point() or out.is_complex():
                        out.fill_(float("nan"))
                    elif out.dtype != torch.bool:
                        out.fill_(torch.iinfo(out.dtype).max)
            return out

        return filled

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, filling(getattr(owner, name)))


@pytest.fixture
def no_wait() -> Callable[[], AbstractContextManager[None]]:
    """``with no_wait():`` whatever makes the host wait for the GPU is an error, but for what was launched before."""

    @contextmanager
    def within() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return within


@pytest.fixture
def triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the test, ``kernel[grid](...)`` is interpreted by Triton on CPU tensors, without a GPU, and watched.

    Triton decides between compiler and interpreter when a kernel is defined. Here it is decided when one is called,
    so that the kernels that the same process compiles ahead of time stay what they are. What the interpreter
    replaces in triton.language is put back afterwards.
    """
    pytest.importorskip("triton", reason="needs Triton")
    import triton.language as tl
    import watched_memory
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor, *scope):
        """Triton 3.6 takes int() of an array with one element, which numpy 2.4 refuses, to count a loop."""
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_with_index)

    convert = interpreter._implicit_cvt

    def convert_to_its_type(arg):
        """An int from 2**31 to 2**32 - 1 is int64 to the compiler; here it is held in 32 bits, whose >> 32 is wrong."""
        converted = convert(arg)
        if type(arg) is int and 2**31 <= arg < 2**32:
            converted.handle.data = converted.handle.data.astype("int64")
        return converted

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_to_its_type)
    watched_memory.watch(monkeypatch)

    interpreted: dict[object, InterpretedFunction] = {}

    def of(kernel: JITFunction) -> InterpretedFunction:
        return interpreted.setdefault(kernel.fn, InterpretedFunction(kernel.fn))

    def call(self, *args, **kwargs):
        return of(self)(*args, **kwargs)

    def run(self, *args, grid, warmup, **kwargs):
        return of(self).run(*args, grid=grid, warmup=warmup, **kwargs)

    def bind(self, instance, owner=None):  # x.sum() is tl.sum, a JIT function that is an attribute of tl.tensor
        return self if instance is None else functools.partial(self, instance)

    owners = [tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base]
    before = [dict(vars(owner)) for owner in owners]
    monkeypatch.setattr(JITFunction, "__call__", call)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(JITFunction, "__get__", bind, raising=False)
    yield
    for owner, names in zip(owners, before, strict=True):
        for name in set(vars(owner)) - set(names):
            delattr(owner, name)
        for name, value in names.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)
