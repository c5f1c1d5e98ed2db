// Reduce, and leave each rank its part (reduce-scatter), or bring all parts to one rank (reduce).
//
// The first half of the ring all-reduce (see the drawing there), over partial sums in scratch memory. For a root, the
// parts, each complete on its rank, are then sent to it, all at once.
//
// steps:              p-1; for a root 1 more
// bytes on the wire:  (p-1)/p N per rank each way; for a root, N/p more from each rank to it
// memory traffic:     3 (p-1)/p N of loads and stores to reduce, as a ring's; a load and a store of the part (root: of
//                     N) to fetch it; and of N beforehand where elements are cast or scaled
// limits:             N bytes of scratch, in the wire's type; parts longer than N/p make the ring wait for the longest;
//                     no variant with fewer steps for short messages; the cast and the fetch are one long step each
// source:             ring.h; MPI_Reduce_scatter and MPI_Reduce of the MPI standard
#pragma once

#include <memory>
#include <vector>

#include "messages/allreduce.h"

namespace collective {

class ReduceScatter final : public Operation {
 public:
  // offsets: p+1 element offsets of the parts. in: all of them, or null for the identity. out: rank r's part r, or
  // null.
  ReduceScatter(const Comm& comm, BufferPool& pool, int tag, const AllreduceSpec& spec, std::vector<size_t> offsets,
                const void* in, void* out);
  // out: on `root` all parts, unused elsewhere.
  static std::unique_ptr<ReduceScatter> to_root(const Comm& comm, BufferPool& pool, int tag, const AllreduceSpec& spec,
                                                size_t count, int root, const void* in, void* out);

  Step step() override;
  std::string describe() const override;

 private:
  enum class Phase { kPack, kReduce, kCollect, kFetch };
  // Of packing and fetching in one step.
  static constexpr size_t kPieceBytes = size_t{1} << 20;
  bool pack();  // a piece, from `in` to scratch; true at the end
  void start_reducing();
  void start_collecting();
  bool fetch();  // a piece, from scratch to `out`; true at the end
  std::byte* part(size_t rank) const { return scratch_.data() + offsets_[rank] * size_of(spec_.wire); }

  const Comm* comm_;
  int tag_;
  BufferPool* pool_;
  AllreduceSpec spec_;
  Scaling scaling_;
  std::vector<size_t> offsets_;
  const std::byte* in_;
  std::byte* out_;
  int root_ = -1;
  PooledBuffer scratch_;  // in the wire's type
  std::unique_ptr<Operation> current_;
  Phase phase_ = Phase::kPack;
  bool packs_;           // or the ring reads `in`
  size_t position_ = 0;  // elements that are packed, or fetched
};

}  // namespace collective
