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

#include <cstddef>

#include "base/types.h"

namespace collective {

// One combination, in pieces, so that a long one holds up nothing else. dst may be a or b. Floating-point types; others
// throw kInternal. Symmetric in a and b.
class Adasum {
 public:
  Adasum(DType dtype, void* dst, const void* a, const void* b, size_t count);
  // Does a piece; true when dst is complete.
  bool step();

 private:
  static constexpr size_t kPieceBytes = size_t{1} << 20;
  struct Dots {
    double ab = 0, aa = 0, bb = 0;
  };
  template <typename T>
  void add_dots(const T* a, const T* b, size_t count);
  template <typename T>
  void combine(T* dst, const T* a, const T* b, size_t count) const;
  // Calls use(first element, its address in a, in b, in dst, count), in float32 for 16-bit types; `stores` back to dst.
  template <typename Use>
  void for_blocks(size_t begin, size_t end, bool stores, const Use& use);

  DType dtype_;
  std::byte* dst_;
  const std::byte *a_, *b_;
  size_t count_, position_ = 0;  // elements
  Dots dots_;
  bool combining_ = false;
  double weight_a_ = 1, weight_b_ = 1;
};

inline void adasum(DType dtype, void* dst, const void* a, const void* b, size_t count) {
  Adasum whole(dtype, dst, a, b, count);
  while (!whole.step()) continue;
}

}  // namespace collective
