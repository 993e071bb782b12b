// What routing is made of on the host and on the device alike: the order in which experts are chosen.
#pragma once

#include "common/exact.cuh"

namespace unif2ace {

constexpr double kTiny = 1e-20;  // guards divisions by sums of scores that may all underflow, as in route_torch.py
constexpr int32_t kNotThere = INT32_MIN;

// Sorts as the numbers do, -0 as 0, NaN above all; never kNotThere.
UNIF2ACE_HOST_DEVICE int32_t order_key(float x) {
  const int32_t bits = float_bits(x + 0.0f), key = bits ^ ((bits >> 31) & INT32_MAX);
  return x == x ? key : INT32_MAX;
}

}  // namespace unif2ace
