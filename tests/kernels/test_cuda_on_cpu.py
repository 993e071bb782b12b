"""The fibers run right kernels to the right result, and find every deliberate fault."""

import pytest
import torch
from cuda_on_cpu import KernelFault, assert_bits_equal, execute, execute_each

np = pytest.importorskip("numpy", reason="needs numpy")
RANDOM = np.random.default_rng(0)


def test_block_sum_equals_numpy():
    x = RANDOM.integers(-1000, 1000, 5 * 128).astype(np.int32)
    assert_bits_equal(execute("toys.cpp", "block_sum", x, True), x.reshape(5, 128).sum(1, dtype=np.int32))


def test_histogram_equals_numpy():
    x = RANDOM.integers(0, 37, 1000).astype(np.int32)
    assert_bits_equal(execute("toys.cpp", "histogram", x, 37), np.bincount(x, minlength=37).astype(np.uint32))


def test_ballot_scan_equals_numpy():
    x = RANDOM.integers(0, 2, 256).astype(np.int32)
    expected = np.concatenate([[0], np.cumsum(x)[:-1]]).astype(np.int32)
    assert_bits_equal(execute("toys.cpp", "ballot_scan", x), expected)


def test_warp_collectives_as_the_programming_guide_defines_them():
    x = RANDOM.integers(-50, 50, 32).astype(np.int32)
    lane = np.arange(32)
    up, xor, broadcast, match, largest, votes, counts = execute("toys.cpp", "warp_lessons", x)
    np.testing.assert_array_equal(up, x[np.where(lane % 16 >= 3, lane - 3, lane)])
    np.testing.assert_array_equal(xor, x[lane ^ 5])
    np.testing.assert_array_equal(broadcast, x[lane // 8 * 8 + 2])
    remainder = np.fmod(x, 3)  # the sign of the dividend, as in C
    bits = (1 << lane.astype(np.uint64)).astype(np.uint64)
    expected = [(bits[remainder == each]).sum() for each in remainder]
    np.testing.assert_array_equal(match.view(np.uint32), np.array(expected).astype(np.uint32))
    np.testing.assert_array_equal(largest, np.full(32, x.max()))
    np.testing.assert_array_equal(votes, [1 + 2 * int((x[:8] == x[7]).all())] * 8 + [-1] * 24)
    np.testing.assert_array_equal(counts, np.full(32, (x > 0).sum() + 100 + 1000))


def test_bfloat16_rounds_as_torch():
    x = RANDOM.standard_normal(1000).astype(np.float32) * np.float32(1e3)
    assert_bits_equal(execute("toys.cpp", "bfloat16", x), torch.from_numpy(x).bfloat16().float().numpy())


def test_missing_barrier_hangs_on_the_order():
    x = RANDOM.integers(1, 1000, 5 * 128).astype(np.int32)
    with pytest.raises(KernelFault, match="a race"):
        execute("toys.cpp", "block_sum", x, False, seeds=(0, 1, 2, 3))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("reads_beyond_shared", "global-buffer-overflow|with insufficient space"),
        ("reads_beyond_dynamic", "heap-buffer-overflow"),
        ("writes_beyond_global", "heap-buffer-overflow"),
        ("overflows", "signed integer overflow"),
        ("barrier_in_branch", "divergent barrier: __syncthreads"),
        ("leaves_before_barrier", r"deadlock(.|\n)*from thread 7: exited"),
        ("mask_names_absent_lane", r"deadlock(.|\n)*__shfl_xor_sync(.|\n)*from thread 16: exited"),
        ("mask_leaves_out_caller", "the mask leaves out the calling lane"),
        ("reads_outside_mask", "reads lane 20 outside the mask"),
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_fault_is_found(kernel, message, seed):
    with pytest.raises(KernelFault, match=message):
        execute("toys.cpp", kernel, 32 * 4, seeds=(seed,))


def test_dynamic_shared_memory_starts_as_nan():
    assert np.isnan(execute("toys.cpp", "never_written_shared")).all()


@pytest.mark.parametrize("threads", [0, 1025])
def test_impossible_launch(threads):
    with pytest.raises(KernelFault, match="invalid launch configuration"):
        execute_each("toys.cpp", "launch_block_of", threads)
