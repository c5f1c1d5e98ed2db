// Adasum: the sum of two gradients, less what they have in common, so that many ranks do not overshoot.
//
//   adasum(a, b) = (1 - a.b / (2 a.a)) a + (1 - a.b / (2 b.b)) b
//
// Orthogonal gradients are added, parallel ones averaged. Combined over ranks by recursive doubling: pairs, then pairs
// of pairs (allreduce_doubling).
//
// memory traffic:  two passes over a and b: dot products in double precision, then the combination
// source:          Maleki et al., Scaling Distributed Training with Adaptive Summation, arXiv 2006.02924
#pragma once

#include "base/types.h"

namespace collective {

// dst may be a or b. Floating-point types; others throw kInternal. Symmetric in a and b.
void adasum(DType dtype, void* dst, const void* a, const void* b, size_t count);

}  // namespace collective
