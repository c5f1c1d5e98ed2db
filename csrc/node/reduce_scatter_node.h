// Reduce-scatter between the ranks of one node, through their lane: the first half of allreduce_node, with its slices
// laid out so that each rank reduces what it keeps.
//
// Every part is cut into as many pieces as there are chunks, and chunk k of a rank holds piece k of all parts but its
// own:
//
//      rank 0                    rank 1                    rank 2           chunk k, p = 3; a0 = piece k of part a of
//    [ b0 c0 ]                 [ a1 c1 ]                 [ a2 b2 ]          rank 0      pack   -> counter `packed`
//      a0+a1+a2 -> out           b0+b1+b2 -> out           c0+c1+c2 -> out  reduce, when all have packed
//                                                                             -> counters `reduced`, `unpacked`
//
// steps:           1 synchronisation per chunk, overlapped with other chunks
// memory traffic:  per rank (3p-1)/p N of loads and stores, 5/2 N at p = 2, of which N loads and N/p stores leave the
//                  cache (pack: (p-1)/p N loads and stores; reduce: N loads, N/p stores)
// sums:            in rank order, as those of allreduce_node
#pragma once

#include <string>
#include <vector>

#include "base/operation.h"
#include "node/lane.h"
#include "node/slices.h"
#include "node/slots.h"

namespace collective {

class ReduceScatterNode final : public Operation {
 public:
  // offsets: p+1 element offsets of the parts. in: all of them, or null for the identity. out: this rank's part, or
  // null.
  ReduceScatterNode(Lane& lane, const AllreduceSpec& spec, const std::vector<size_t>& offsets, const void* in,
                    void* out);

  Step step() override;
  std::string describe() const override;

 private:
  bool pack();
  bool reduce();
  Range piece_of(int rank, uint64_t chunk) const;
  // Where rank `source` has the piece of another rank's part.
  std::byte* staging(int source, int rank, uint64_t chunk) const;

  Lane* lane_;
  Arithmetic arithmetic_;
  size_t element_size_;  // of the wire's type
  std::vector<size_t> offsets_;
  Slots slots_;           // a part each
  uint64_t first_, end_;  // chunks of the lane
  size_t piece_count_;    // elements per piece
};

}  // namespace collective
