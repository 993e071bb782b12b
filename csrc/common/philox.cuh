// Philox4x32-10 (Salmon et al., SC 2011) for host and device; kernels/unif2ace_kernels/_philox.py is the truth.
#pragma once

#include "common/exact.cuh"

namespace unif2ace {

// The last counter word: draws for different ends never share a word.
constexpr uint32_t kTokenStream = 0, kRemaskStream = 1, kNoiseStream = 2;

struct Words {
  uint32_t w[4];
};

UNIF2ACE_HOST_DEVICE Words philox(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of columns 4 * group .. 4 * group + 3 of a row.
UNIF2ACE_HOST_DEVICE Words words_of_group(int64_t seed, int64_t offset, uint32_t row, uint32_t group,
                                          uint32_t stream) {
  const uint64_t key = static_cast<uint64_t>(seed);
  return philox(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), group, row,
                static_cast<uint32_t>(static_cast<uint64_t>(offset)), stream);
}

}  // namespace unif2ace
