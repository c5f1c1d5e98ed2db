// All-reduce between the ranks of one node, through a small piece of shared memory that stays in the cache: a lane.
//
// Every rank has a staging area in the lane. The data goes through it chunk by chunk; of each chunk a rank reduces its
// own slice, so it packs only the slices that others reduce, and takes its own operand from where it lies:
//
//      rank 0                    rank 1                    rank 2           one chunk, p = 3; a0 = slice a of rank 0
//    [ .. b0 c0 ]              [ a1 .. c1 ]              [ a2 b2 .. ]       pack      -> counter `packed`
//      a0+a1+a2 -> out           b0+b1+b2 -> out           c0+c1+c2 -> out  reduce, when all have packed:
//    [ a  b0 c0 ]              [ a1 b  c1 ]              [ a2 b2 c  ]         ... and a copy  -> counter `reduced`
//      b, c -> out               a, c -> out               a, b -> out      unpack, when all have reduced
//                                                                             -> counter `unpacked`
//
// A staging area holds kDepth chunks, so the three stages of different chunks overlap; a chunk's place is packed again
// when all have unpacked what was there. Counters only grow, from operation to operation too, and a chunk's number is
// what they count: the next operation may begin on one rank while another still unpacks the last one.
//
// A short message is packed whole and every rank reduces all of it, from all staging areas straight to its outputs:
// one synchronisation in place of two.
//
// steps:           2 synchronisations per chunk, overlapped with other chunks; 1 for a short message
// memory traffic:  per rank (5p-2)/p N of loads and stores, 4N at p = 2, of which N loads and N stores leave the cache
//                  (pack, reduce: (p-1)/p N loads and stores, N loads, N/p + N/p stores; unpack: 2(p-1)/p N);
//                  short: (p+3) N
// sums:            in rank order, so the same bits on all ranks, in every run, whatever the chunks
// limits:          the slices of a chunk get short with many ranks (256 KiB / p at the least)
// source:          slices of shared memory: Bayatpour et al., Scalable reduction collectives with data
//                  partitioning-based multi-leader design, SC 2017; counters for barriers: Open MPI's coll/xhc
#pragma once

#include <string>
#include <vector>

#include "base/operation.h"
#include "node/lane.h"
#include "node/slices.h"
#include "node/slots.h"

namespace collective {

class AllreduceNode final : public Operation {
 public:
  AllreduceNode(Lane& lane, const AllreduceSpec& spec, std::vector<Slot> slots);

  Step step() override;
  std::string describe() const override;

 private:
  bool pack();
  bool reduce_own();
  bool reduce_all();
  bool unpack();
  Range range_of(uint64_t chunk) const;
  void reduce_range(uint64_t chunk, Range range, bool keep);

  Lane* lane_;
  Arithmetic arithmetic_;
  Slots slots_;
  size_t element_size_;  // of the wire's type
  bool short_;
  size_t chunk_count_;    // elements per chunk
  uint64_t first_, end_;  // chunks of the lane
};

}  // namespace collective
