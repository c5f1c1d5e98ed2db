// The neutral element of a reduction: the contribution of a rank that has none of its own.
#pragma once

#include "base/types.h"

namespace collective {

// Fills count elements with e such that e op x == x: zero for sums, averages and Adasum.
void fill_identity(DType dtype, ReduceOp op, void* target, size_t count);

}  // namespace collective
