// CUDA's device functions on top of the fibers of cuda_on_cpu.h. Barriers and collectives take their caller's file and
// line by default arguments, for the messages and to tell one barrier from another.
#pragma once

#include "cuda_on_cpu.h"

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- block barriers

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block.barrier(false, {"__syncthreads", file, line}); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return static_cast<int>(cuda_on_cpu::block.barrier(predicate != 0, {"__syncthreads_count", file, line}));
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block.barrier(predicate != 0, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block.barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warp collectives

namespace cuda_on_cpu {

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(static_cast<void*>(&value), &word, sizeof value);
  return value;
}

inline int lane() { return static_cast<int>(block.current().number % 32); }

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  const auto& gathered = block.collective(mask, to_word(value), site);
  if (!(mask >> source & 1)) block.fail(site.text() + ": reads lane " + std::to_string(source) + " outside the mask");
  return from_word<T>(gathered[static_cast<size_t>(source)]);
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, Site site) {
  const auto& gathered = block.collective(mask, to_word(value), site);
  T result = value;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && i != lane()) result = combine(result, from_word<T>(gathered[static_cast<size_t>(i)]));
  return result;
}

inline unsigned ballot(unsigned mask, int predicate, Site site) {
  const auto& gathered = block.collective(mask, predicate != 0, site);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= (mask >> i & 1) && gathered[i] ? 1u << i : 0;
  return bits;
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const int from = (cuda_on_cpu::lane() & ~(width - 1)) | (source & (width - 1));
  return cuda_on_cpu::shuffle(mask, value, from, {"__shfl_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::lane(), from = lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, from < (lane & ~(width - 1)) ? lane : from, {"__shfl_up_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::lane(), from = lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from,
                              {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::lane(), from = lane ^ bits;
  return cuda_on_cpu::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, {"__shfl_xor_sync", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, predicate, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, predicate, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, predicate, {"__all_sync", file, line}) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  const auto& gathered =
      cuda_on_cpu::block.collective(mask, cuda_on_cpu::to_word(value), {"__match_any_sync", file, line});
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i)
    bits |= (mask >> i & 1) && gathered[i] == cuda_on_cpu::to_word(value) ? 1u << i : 0;
  return bits;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  const auto add = [](T a, T b) { return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)); };
  return cuda_on_cpu::reduce(mask, value, add, {"__reduce_add_sync", file, line});
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return b < a ? b : a; }, {"__reduce_min_sync", file, line});
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return a < b ? b : a; }, {"__reduce_max_sync", file, line});
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::block.collective(mask, 0, {"__syncwarp", file, line});
}
// The lanes that have not exited; the hardware may give fewer.
inline unsigned __activemask() { return cuda_on_cpu::block.lanes_alive(); }

// ---- atomics: plain operations, since a fiber runs alone between two waits

template <class T, class Update>
T cuda_on_cpu_atomic(T* address, Update update) {
  const T old = *address;
  *address = update(old);
  return old;
}
// The second parameter is not deduced, so that atomicAdd(&count, 1) works for an unsigned count, as in CUDA.
template <class T>
using Same = std::enable_if_t<true, T>;
template <class T>
T atomicAdd(T* address, Same<T> value) {
  return cuda_on_cpu_atomic(address, [&](T old) {
    if constexpr (std::is_integral_v<T>) {  // wraps, as on the device
      using Unsigned = std::make_unsigned_t<T>;
      return static_cast<T>(static_cast<Unsigned>(old) + static_cast<Unsigned>(value));
    } else {
      return static_cast<T>(old + value);
    }
  });
}
template <class T>
T atomicSub(T* address, Same<T> value) {
  return atomicAdd(address, static_cast<T>(0 - value));
}
template <class T>
T atomicMax(T* address, Same<T> value) {
  return cuda_on_cpu_atomic(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, Same<T> value) {
  return cuda_on_cpu_atomic(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, Same<T> value) {
  return cuda_on_cpu_atomic(address, [&](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* address, Same<T> value) {
  return cuda_on_cpu_atomic(address, [&](T old) { return old & value; });
}
template <class T>
T atomicExch(T* address, Same<T> value) {
  return cuda_on_cpu_atomic(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, Same<T> expected, Same<T> value) {
  return cuda_on_cpu_atomic(address, [&](T old) { return old == expected ? value : old; });
}

// ---- arithmetic

using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::from_word<unsigned>(cuda_on_cpu::to_word(x)); }
inline int __float_as_int(float x) { return cuda_on_cpu::from_word<int>(cuda_on_cpu::to_word(x)); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::from_word<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::from_word<float>(cuda_on_cpu::to_word(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }

#undef CUDA_ON_CPU_SITE
