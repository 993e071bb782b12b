// Runs CUDA kernels on the CPU, for tests only: it finds wrong indices, missing barriers and wrong masks without a GPU.
//
// Every block runs to its end before the next begins. Every CUDA thread is a fiber (ucontext), and fibers change over
// only where threads wait for each other: barriers and warp collectives. Which fiber goes next, and which block, comes
// from a seed: 0 is in order, odd ones shuffle, other even ones let a warp run as far ahead of the next as barriers let
// it, in an order that is another in every block. The .cu file is compiled unchanged by g++ under the address and
// undefined-behaviour sanitizers; kernels are launched by UNIF2ACE_LAUNCH, dynamic shared memory is named by
// UNIF2ACE_DYNAMIC_SHARED (csrc/common/launch.cuh).
//
// What it finds
//   - out of bounds in global memory (DeviceArray, cuda_on_cpu_python.h) and in shared memory: the sanitizer;
//   - a barrier that some threads do not reach, or reach at another line: "deadlock" or "divergent barrier";
//   - a warp collective whose mask names a lane that does not come, or leaves out the caller, or a shuffle that reads
//     a lane outside the mask;
//   - results that hang on the order of threads (a missing barrier, a race): compare several seeds;
//   - reads of dynamic shared memory that was never written: it is filled with 0xFF (NaN) before each block.
// What it does not model
//   - tensor cores, asynchronous copies (cp.async, TMA, mbarrier), clusters, cooperative groups, streams;
//   - the memory model: a fiber runs alone between two waits, so atomics are plain operations and a race inside
//     one such stretch shows only if the order of whole stretches matters; spinning on another thread never ends;
//   - threads of a block that has other blocks in flight: no grid-wide synchronisation;
//   - static __shared__ arrays begin as zeros and keep what the block before left: test with more than one block;
//   - approximate intrinsics (__expf, rsqrtf, ...) are the exact functions here.
// It is stricter than the hardware in two points: threads that left early do not count as having reached a barrier,
// and lanes that do not exist must not be named in a mask.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define UNIF2ACE_CUDA_ON_CPU

#include "cuda_on_cpu_types.h"

inline dim3 gridDim, blockDim;
inline uint3 blockIdx, threadIdx;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 128 * 1024, kMaxSharedBytes = 227 * 1024;

enum class State { runnable, at_barrier, at_collective, exited };

// Where a thread waits and what it brought there.
struct Site {
  const char* what = "";
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && !std::strcmp(what, other.what) && !std::strcmp(file, other.file);
  }
  std::string text() const { return std::string(what) + " (" + file + ":" + std::to_string(line) + ")"; }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  uint3 index;
  unsigned number = 0;  // in the block
  State state = State::runnable;
  Site site;
  unsigned mask = 0;
  uint64_t value = 0;
  std::array<uint64_t, 32> gathered{};  // after a collective: the values of the lanes; after a barrier: [0] = count
};

class Block {
 public:
  unsigned seed = 0;

  void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    const uint64_t count = uint64_t{block.x} * block.y * block.z;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (count == 0 || count > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 ||
        grid.z > 65535 || shared_bytes > kMaxSharedBytes)
      throw std::runtime_error("invalid launch configuration: grid " + text(grid) + ", block " + text(block) + ", " +
                               std::to_string(shared_bytes) + " bytes of shared memory");
    gridDim = grid;
    blockDim = block;
    kernel_ = &kernel;
    random_.seed(seed);
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    count_ = static_cast<unsigned>(count);
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    if (seed) std::shuffle(order.begin(), order.end(), random_);
    for (const uint64_t i : order) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      // Exactly as many bytes as asked for, so that one more is out of bounds.
      shared_.reset(new (std::align_val_t{16}) unsigned char[shared_bytes]);
      std::memset(shared_.get(), 0xFF, shared_bytes);
      run_block();
    }
  }

  void* dynamic_shared() { return shared_.get(); }
  Thread& current() { return *current_; }

  // Number of threads with a predicate that is not zero.
  unsigned barrier(bool predicate, Site site) {
    wait(State::at_barrier, site, 0, predicate);
    return static_cast<unsigned>(current_->gathered[0]);
  }

  // The values that the lanes of the mask brought, by lane.
  const std::array<uint64_t, 32>& collective(unsigned mask, uint64_t value, Site site) {
    if (!(mask >> (current_->number % 32) & 1)) fail(site.text() + ": the mask leaves out the calling lane");
    wait(State::at_collective, site, mask, value);
    return current_->gathered;
  }

  unsigned lanes_alive() {
    unsigned alive = 0;
    for_warp([&](Thread& each) { alive |= unsigned{each.state != State::exited} << (each.number % 32); });
    return alive;
  }

  [[noreturn]] void fail(const std::string& message) { throw std::runtime_error(describe(*current_) + message); }

 private:
  struct AlignedDelete {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t{16}); }
  };

  static std::string text(dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  }

  std::string describe(const Thread& thread) const {
    return "block " + text({blockIdx.x, blockIdx.y, blockIdx.z}) + " thread " +
           text({thread.index.x, thread.index.y, thread.index.z}) + ": ";
  }

  template <class Visit>
  void for_warp(Visit visit) {
    const unsigned first = current_->number / 32 * 32;
    for (unsigned i = first; i < std::min(first + 32, count_); ++i) visit(*threads_[i]);
  }

  void run_block() {
    ready_.clear();
    turn_.resize((count_ + 31) / 32);
    for (unsigned i = 0; i < turn_.size(); ++i) turn_[i] = i;
    if (seed) std::shuffle(turn_.begin(), turn_.end(), random_);
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = *threads_[i];
      thread.number = i;
      thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      thread.state = State::runnable;
      thread.fake_stack = nullptr;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::fiber_entry, 0);
      ready_.push_back(i);
    }
    unsigned exited = 0;
    size_t head = 0;
    while (head < ready_.size()) {
      if (seed) std::swap(ready_[head], ready_[next_of(head)]);
      current_ = threads_[ready_[head++]].get();
      if (head > 4096) ready_.erase(ready_.begin(), ready_.begin() + static_cast<long>(head)), head = 0;
      threadIdx = current_->index;
      enter_fiber();
      if (!error_.empty()) throw std::runtime_error(std::exchange(error_, {}));
      exited += current_->state == State::exited;
    }
    if (exited != count_) throw std::runtime_error(deadlock_report());
  }

  // Of the threads that are ready, from `head` on: any; or any of the warp whose turn is first.
  size_t next_of(size_t head) {
    const size_t count = ready_.size() - head, from = random_() % count;
    size_t next = head + from;
    if (seed % 2) return next;
    for (size_t i = 1; i < count; ++i) {
      const size_t other = head + (from + i) % count;
      if (turn_[ready_[other] / 32] < turn_[ready_[next] / 32]) next = other;
    }
    return next;
  }

  // The sanitizer has to be told of every change of stack.
  void enter_fiber() {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, current_->stack.get(), kStackBytes);
#endif
    swapcontext(&main_, &current_->context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void leave_fiber() {
    Thread& self = *current_;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(self.state == State::exited ? nullptr : &self.fake_stack, main_stack_, main_size_);
#endif
    swapcontext(&self.context, &main_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(self.fake_stack, &main_stack_, &main_size_);
#endif
  }

  static void fiber_entry();

  void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &main_stack_, &main_size_);
#endif
    try {
      (*kernel_)();
    } catch (const std::exception& error) {
      error_ = error.what();
    }
    current_->state = State::exited;
    leave_fiber();
  }

  void wait(State state, Site site, unsigned mask, uint64_t value) {
    Thread& self = *current_;
    self.state = state;
    self.site = site;
    self.mask = mask;
    self.value = value;
    if (state == State::at_barrier)
      release_barrier();
    else
      release_collective(mask);
    leave_fiber();
  }

  void release_barrier() {
    uint64_t count = 0;
    for (unsigned i = 0; i < count_; ++i) {
      if (threads_[i]->state != State::at_barrier) return;
      count += threads_[i]->value;
    }
    for (unsigned i = 0; i < count_; ++i)
      if (!(threads_[i]->site == current_->site))
        fail("divergent barrier: " + current_->site.text() + ", but thread " + std::to_string(i) + " waits at " +
             threads_[i]->site.text());
    for (unsigned i = 0; i < count_; ++i) {
      threads_[i]->gathered[0] = count;
      resume(*threads_[i]);
    }
  }

  void release_collective(unsigned mask) {
    std::array<uint64_t, 32> values{};
    unsigned arrived = 0;
    for_warp([&](Thread& each) {
      if (each.state != State::at_collective || each.mask != mask || !(each.site == current_->site)) return;
      arrived |= 1u << (each.number % 32);
      values[each.number % 32] = each.value;
    });
    if ((arrived & mask) != mask) return;
    for_warp([&](Thread& each) {
      if (!(mask >> (each.number % 32) & 1)) return;
      each.gathered = values;
      resume(each);
    });
  }

  void resume(Thread& thread) {
    thread.state = State::runnable;
    ready_.push_back(thread.number);
  }

  std::string deadlock_report() const {
    std::string report = "deadlock in block " + text({blockIdx.x, blockIdx.y, blockIdx.z}) + ":";
    unsigned shown = 0;
    for (unsigned i = 0; i < count_; ++i) {
      const Thread& thread = *threads_[i];
      // One line for each run of threads in the same place.
      if (i && thread.state == threads_[i - 1]->state &&
          (thread.state == State::exited || thread.site == threads_[i - 1]->site))
        continue;
      if (++shown > 8) return report + "\n  ...";
      report += "\n  from thread " + std::to_string(i) + ": ";
      if (thread.state == State::exited) {
        report += "exited";
      } else {
        report += "waits at " + thread.site.text();
        if (thread.state == State::at_collective) report += " with mask " + std::to_string(thread.mask);
      }
    }
    return report;
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<unsigned> ready_, turn_;
  std::unique_ptr<unsigned char[], AlignedDelete> shared_;
  std::mt19937 random_;
  const std::function<void()>* kernel_ = nullptr;
  Thread* current_ = nullptr;
  unsigned count_ = 0;
  std::string error_;
  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
};

inline Block block;

inline void Block::fiber_entry() { cuda_on_cpu::block.run_fiber(); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  block.run_grid(grid, threads, shared_bytes, [&] { std::apply(kernel, parameters); });
}

}  // namespace cuda_on_cpu

#define UNIF2ACE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))
#define UNIF2ACE_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::block.dynamic_shared())

#include "cuda_on_cpu_intrinsics.h"
