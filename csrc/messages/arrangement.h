// Where the tensors of one all-reduce lie in its bucket, so that the value of an element follows from its own tensor.
//
// Short tensors come first: they are added in the order of allreduce_doubling, however many are sent together. Each long
// one is cut into a chunk for each member of the ring, and a chunk of the ring holds that chunk of every long tensor:
//
//      [ short tensors | x0 y0 z0 | x1 y1 z1 | x2 y2 z2 ]        3 members; x0 = chunk 0 of the long tensor x
#pragma once

#include <cstddef>
#include <vector>

#include "reduce/spec.h"

namespace collective {

struct Arrangement {
  std::vector<Slot> slots;     // in the bucket's order, where long tensors are in pieces
  size_t short_count = 0;      // elements of the short tensors
  std::vector<size_t> chunks;  // offsets of the ring's chunks behind them, in elements; empty: there is no long tensor
};

// Whether a tensor of `count` elements is short: below thresholds::kRing, or for Adasum, which needs whole tensors.
bool is_short(const AllreduceSpec& spec, size_t count);

// members: of the ring.
Arrangement arrange(const AllreduceSpec& spec, std::vector<Slot> slots, int members);

}  // namespace collective
