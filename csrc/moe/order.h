// Slots sorted by expert: what routing ends with, and all that a choice made elsewhere needs.
#pragma once

#include <algorithm>
#include <vector>

#include "common/torch_stable.h"

namespace unif2ace {

// A function of chunks [begin, end) of `chunk` things each.
template <class Run>
void for_chunks_of(int64_t chunk, int64_t count, const Run& run) {
  torch::stable::parallel_for(0, (count + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) { run(begin, end); });
}

// From the expert of each slot and `places` [chunks, experts], an expert's slots in each chunk of slots: count
// [experts], offset [experts + 1], and order [rows], slot numbers by expert and, of one, ascending. Spends `places`.
inline void place_slots(const int64_t* expert, int64_t rows, int64_t chunk, int64_t experts,
                        std::vector<int64_t>& places, int64_t* count, int64_t* offset, int64_t* order) {
  std::fill(count, count + experts, int64_t{0});
  const int64_t cells = static_cast<int64_t>(places.size());
  for (int64_t i = 0; i < cells; ++i) count[i % experts] += places[i];
  offset[0] = 0;
  for (int64_t e = 0; e < experts; ++e) offset[e + 1] = offset[e] + count[e];
  std::vector<int64_t> next(offset, offset + experts);
  for (int64_t i = 0; i < cells; ++i) {
    const int64_t in_chunk = places[i];
    places[i] = next[i % experts];
    next[i % experts] += in_chunk;
  }
  for_chunks_of(chunk, rows, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int64_t* const place = places.data() + c * experts;
      const int64_t last = std::min(rows, (c + 1) * chunk);
      for (int64_t slot = c * chunk; slot < last; ++slot) order[place[expert[slot]]++] = slot;
    }
  });
}

}  // namespace unif2ace
