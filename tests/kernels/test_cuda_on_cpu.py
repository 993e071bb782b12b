"""The fibers run right kernels to the right result, and find every deliberate fault."""

import shutil
import subprocess

import pytest
import torch
from cuda_on_cpu import ROOT, KernelFault, assert_bits_equal, execute, execute_each

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


def test_missing_barrier_before_memory_is_used_again_shows_when_a_warp_runs_ahead():
    x = RANDOM.integers(1, 1000, 5 * 128).astype(np.int32)
    sums = np.repeat(x.reshape(5, 128).sum(1, dtype=np.int32)[:, None], 4, 1)
    assert_bits_equal(execute("toys.cpp", "sums_in_turns", x, True, seeds=(0, 1, 2, 4)), sums)
    for seed in (2, 4, 6):
        with pytest.raises(KernelFault, match="a race"):
            execute("toys.cpp", "sums_in_turns", x, False, seeds=(0, seed))


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


FAKE_RUNTIME = """
#pragma once
#include <cstddef>
#include <cstdio>
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  std::printf("%d ", bytes);
  return cudaSuccess;
}
"""
ASKS = """
#include "common/launch.cuh"
void kernel() {}
int main() {
  for (int bytes : {1024, 48 * 1024 - 512, 48 * 1024, 96 * 1024}) unif2ace::allow_shared_bytes(&kernel, bytes);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_memory_is_asked_for_where_static_memory_takes_it_beyond_48_kib(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(FAKE_RUNTIME)
    (tmp_path / "asks.cpp").write_text(ASKS)
    include = [f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        ["g++", "-std=c++17", *include, str(tmp_path / "asks.cpp"), "-o", str(tmp_path / "asks")], check=True
    )
    said = subprocess.run([str(tmp_path / "asks")], check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(48 * 1024 - 512), str(48 * 1024), str(96 * 1024)]
