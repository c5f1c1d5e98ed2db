// Short messages that travel together as a long one: every rank sends each other rank its chunk, adds what it receives,
// and sends the result to all. The sums have the bits of allreduce_doubling, wherever in the bucket an element lies.
//
//        rank 0          rank 1          rank 2           p = 3; a0 = chunk a of rank 0
//      a0 b0 c0        a1 b1 c1        a2 b2 c2
//         b0 -> 1         a1 -> 0         a2 -> 0         scatter: all at once
//         c0 -> 2         c1 -> 2         b2 -> 1
//      (a0+a1)+a2      (b0+b1)+b2      (c0+c1)+c2         combine: in the order of allreduce_doubling
//      a b c           a b c           a b c              gather: each sends its chunk to all
//
// A ring's order of addition depends on the chunk, and so on what else happens to be in the bucket. Here it does not.
//
// steps:              2
// bytes on the wire:  2(p-1)/p N per rank each way, as a ring's
// memory traffic:     3 (p-1)/p N of loads and stores to combine, and a copy of N/p to where it is sent from
// limits:             2(p-1) messages per rank; all ranks of a node send to all others, where in a ring only one does
//
// Measured against the ring in its place, messages in one node's memory, 2 cores: 64 arrays of 8 KiB, 2 ranks 1.25-1.66
// ms (ring 1.35-1.63), 3 ranks 2.1-2.9 (2.5-2.6), 4 ranks 2.8-3.9 (3.4-3.7); 512 arrays 11.2 (10.5-11.3), 17.7-19.2
// (18.4-19.2), 23.8-25.9 (24.3-26.5).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "messages/comm.h"
#include "messages/exchange.h"
#include "reduce/arithmetic.h"

namespace collective {

class AllreduceDirect final : public Operation {
 public:
  // data: count elements, reduced in place. For two ranks or more.
  AllreduceDirect(const Comm& comm, BufferPool& pool, int tag, void* data, size_t count, const Arithmetic& arithmetic);

  Step step() override;
  std::string describe() const override;

 private:
  enum class Phase { kScatter, kCombine, kGather };
  std::byte* at(size_t element) const { return data_ + element * element_size_; }
  size_t nbytes(size_t rank) const { return (offsets_[rank + 1] - offsets_[rank]) * element_size_; }
  bool combine();
  void start_gather();

  const Comm* comm_;
  int tag_;
  std::byte* data_;
  Arithmetic arithmetic_;
  size_t element_size_;
  std::vector<size_t> offsets_;  // of the ranks' chunks
  PooledBuffer scratch_;
  std::vector<std::byte*> operands_;  // by rank: that rank's copy of this rank's chunk
  size_t combined_ = 0;               // elements
  Phase phase_ = Phase::kScatter;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace collective
