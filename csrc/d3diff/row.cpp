// loss_row of each type, made for each instruction set.
#include "common/simd.h"
#include "d3diff/rows.h"

namespace unif2ace {

#define UNIF2ACE_DEFINE(T)                                                                         \
  UNIF2ACE_SIMD_CLONES UNIF2ACE_LOSS_ROW(T) {                                                      \
    return loss_row(logits, bias, columns, target, weight, scratch, gradient, column_sum);         \
  }
UNIF2ACE_DEFINE(double)
UNIF2ACE_DEFINE(float)
UNIF2ACE_DEFINE(BFloat16Bits)
UNIF2ACE_DEFINE(HalfBits)

}  // namespace unif2ace
