// What a reduction does to its elements, as the algorithms see it: combine in order, and finish once.
#pragma once

#include "base/types.h"
#include "reduce/adasum.h"
#include "reduce/reduce.h"

namespace collective {

struct Arithmetic {
  DType dtype;
  ReduceOp op;
  // Applied to the finished result, in the same pass: x / divisor * scale, as reduce() has it.
  double scale = 1.0;
  int64_t divisor = 1;

  // dst = a op b; `last` when this completes the reduction of these elements. dst may be a or b.
  void combine(void* dst, const void* a, const void* b, size_t count, bool last) const {
    const void* sources[] = {a, b};
    if (op == ReduceOp::kAdasum) {
      adasum(dtype, dst, a, b, count);
      if (last && scale != 1.0) convert(dtype, dst, dtype, dst, count, scale);
    } else {
      reduce(dtype, op, dst, sources, 2, count, last ? scale : 1.0, last ? divisor : 1);
    }
  }
};

}  // namespace collective
