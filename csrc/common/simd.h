// UNIF2ACE_SIMD_CLONES before a function: the compiler makes one version per instruction set, picked when the library
// loads, so that one binary is fast on new processors and runs on old ones (x86-64-v4 is AVX-512 of any maker;
// arch=skylake-avx512 would be Intel's alone; GCC has it since 12). Contraction is off, so all give one result.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define UNIF2ACE_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define UNIF2ACE_SIMD_CLONES
#endif
