// What an all-reduce does: its types, operation and factors; and the tensors it works on.
#pragma once

#include <cstddef>

#include "base/types.h"
#include "reduce/arithmetic.h"

namespace collective {

// What all ranks agree on.
struct AllreduceSpec {
  DType dtype;  // of the tensors
  DType wire;   // of the bucket and of the messages: dtype, or float16/bfloat16 for float32/float64 tensors
  ReduceOp op;
  double prescale = 1.0, postscale = 1.0;
};

// One tensor. `in` may be null: this rank contributes the identity, zero for a sum. `out` may be null: nothing is
// unpacked. They may be equal.
struct Slot {
  const void* in;
  void* out;
  size_t count;
};

// How a spec's factors are applied at p ranks: once to each input, and once to the finished result.
struct Scaling {
  double before;
  Arithmetic arithmetic;
};
// kOnePass: the inputs of all ranks are combined in registers, at once. kSteps: partial sums have the wire's type.
enum class Passes { kOnePass, kSteps };
Scaling scaling_of(const AllreduceSpec& spec, int size, Passes passes);

}  // namespace collective
