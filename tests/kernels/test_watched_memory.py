"""What watches the interpreted kernels' memory finds what a GPU would trip over, and nothing else."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from watched_memory import MemoryFault  # noqa: E402


@triton.jit
def copy_kernel(p_from, p_to, first, size, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_to + o, tl.load(p_from + first + o, mask=o < size, other=0.0), mask=o < size)


@triton.jit
def shift_kernel(p_x, CACHED: tl.constexpr, BLOCK: tl.constexpr):
    """x[i] = x[i + BLOCK - 1] in place: the next program's, but for the first."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o + BLOCK - 1, cache_modifier="" if CACHED else ".cg"))


@triton.jit
def count_kernel(p_count, at):
    tl.atomic_add(p_count + at, 1)


def test_accesses_inside_are_let_through(triton_interpreter):
    x, y = torch.arange(11.0), torch.zeros(11)
    copy_kernel[(3,)](x, y, 0, 11, BLOCK=4)
    assert torch.equal(x, y)
    copy_kernel[(2,)](x, x, 0, 8, BLOCK=4)  # each program what it reads itself
    count_kernel[(5,)](counts := torch.zeros(2, dtype=torch.int32), 1)
    assert counts.tolist() == [0, 5]


@pytest.mark.parametrize(("first", "size"), [(1, 11), (-1, 3), (0, 12), (2**20, 5)])
def test_an_access_outside_of_its_tensor_is_a_fault(triton_interpreter, first, size):
    with pytest.raises(InterpreterError, match="copy_kernel, program .*leaves its tensor"):
        copy_kernel[(3,)](torch.arange(11.0), torch.zeros(11), first, size, BLOCK=4)


def test_an_atomic_outside_of_its_tensor_is_a_fault(triton_interpreter):
    with pytest.raises(InterpreterError, match="leaves its tensor"):
        count_kernel[(1,)](torch.zeros(2, dtype=torch.int32), 2)


def test_programs_that_write_to_one_place_are_a_fault(triton_interpreter):
    y = torch.zeros(12)
    with pytest.raises(MemoryFault, match="two programs write"):
        copy_kernel[(2, 2)](torch.arange(12.0), y, 0, 8, BLOCK=4)


def test_reading_what_another_program_writes_is_a_fault_unless_it_is_meant(triton_interpreter):
    with pytest.raises(MemoryFault, match="program 0 reads what another one writes"):
        shift_kernel[(2,)](torch.arange(11.0), CACHED=True, BLOCK=4)
    shift_kernel[(2,)](torch.arange(11.0), CACHED=False, BLOCK=4)
    shift_kernel[(1,)](torch.arange(11.0), CACHED=True, BLOCK=4)
