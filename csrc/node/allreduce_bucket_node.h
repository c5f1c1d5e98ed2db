// All-reduce of a bucket that lies in the shared memory of a node: every rank reduces its slices from all ranks'
// buckets and stores the result into all of them. What a rank's gradients leave in its bucket is replaced by their sum;
// nothing is staged, nothing unpacked, and where the tensors are views of the bucket nothing is packed. Where they are
// not, a rank packs only the slices that others reduce, and takes its own from where they lie.
//
//      bucket of rank 0     of rank 1                          one tile, p = 2; a0 = slice a of rank 0
//          .. b0              a1 ..        pack, or it is there already: counter `packed`
//          a  b0              a  ..        rank 0 reduces slice a into both buckets   }  then counter `pushed`
//          a  b               a  b         rank 1 reduces slice b into both buckets   }
//
// The bucket is cut into tiles, and each tile into slices, so that tiles are reduced while later ones are being packed.
//
// A run is over on a rank when all ranks have pushed: then its bucket is complete, and nobody reads it or writes to it
// any more, for a rank pushes into a bucket only after its owner has packed. So the owner may pack the next run at
// once, while a peer has not yet noticed that this one is over; the peer's own bucket is left alone until it has
// packed, too.
//
// steps:           2 synchronisations
// memory traffic:  per rank N loads and N stores (the lower bound), and where tensors are packed (p-1)/p N more of both
// sums:            in rank order, so the same bits on all ranks and in every run
// limits:          the reduction takes as long as the slowest rank takes for its slices
#pragma once

#include <string>
#include <vector>

#include "base/operation.h"
#include "node/slices.h"
#include "node/slots.h"

namespace collective {

// A bucket's storage and counters, at the same place of every rank's part of shared memory.
class NodeBucket {
 public:
  // The bytes it takes of each part: whole pages even where these are of 64 KiB, so that they may be page-locked for a
  // device.
  static constexpr size_t kPageBytes = size_t{64} << 10;
  static constexpr size_t nbytes(DType wire, size_t count) {
    return round_up(2 * kLineBytes + round_up(count * size_of(wire), kLineBytes), kPageBytes);
  }
  // count: elements of `wire`. offset: a multiple of kLineBytes. The memory must outlive it, and serve nothing else
  // there.
  NodeBucket(const SharedMemory& memory, size_t offset, DType wire, size_t count);

  size_t count() const { return count_; }
  DType wire() const { return wire_; }
  // This rank's, on a line's boundary (on a huge page's where offset is 0). It may be written while no run is in flight
  // here, and holds the results after one.
  std::byte* storage() const { return storage_[static_cast<size_t>(rank_)]; }

  std::byte* storage_of(int rank) const { return storage_[static_cast<size_t>(rank)]; }

  // For the operations on it. Begins a run of `count` elements of `wire`, and returns its number, from 0.
  uint64_t begin_run(DType wire, size_t count);
  // The same for whatever fits into it.
  uint64_t begin_run();
  // Copies elements [begin, end) of the slots to their place in this rank's bucket, unless they are there already; returns
  // how many it copied. slot: where to look for `begin`, or before; it moves on.
  size_t pack(const Slots& slots, size_t& slot, size_t begin, size_t end);
  // How much this rank has packed, in all runs, so that it may be read; whether all ranks have. In elements, or in runs:
  // whatever the operations on this bucket count.
  void publish_packed(uint64_t count) { packed_.publish(count); }
  bool all_packed(uint64_t count) { return packed_.all_reached(count); }
  int missing_to_pack() const { return packed_.missing(); }
  // How many runs' slices this rank has pushed to all buckets; whether all ranks have.
  void publish_pushed(uint64_t runs) { pushed_.publish(runs); }
  bool all_pushed(uint64_t runs) { return pushed_.all_reached(runs); }
  int missing_to_push() const { return pushed_.missing(); }

 private:
  friend class AllreduceBucketNode;
  int rank_, size_;
  DType wire_;
  size_t count_;
  std::vector<std::byte*> storage_;   // of each rank
  Counters packed_;                   // see publish_packed()
  Counters pushed_;                   // runs whose slices the rank has pushed to everybody
  uint64_t runs_ = 0;                 // started here
  std::vector<const void*> sources_;  // of each rank; kept for their capacity
  std::vector<void*> results_;
};

class AllreduceBucketNode final : public Operation {
 public:
  // Slots follow each other in the bucket and fill it. One whose `in` is its very place in the bucket is not copied; a
  // null `in` counts as the identity, as ever. No slot has an `out`: the result is the bucket. A bucket's previous run
  // must be done here; runs of different buckets may be in flight in any number and order.
  AllreduceBucketNode(NodeBucket& bucket, const AllreduceSpec& spec, std::vector<Slot> slots);

  Step step() override;
  std::string describe() const override;

 private:
  // All ranks' slices of a tile: what one step reduces, in all, at any number of ranks.
  static constexpr size_t kTileBytes = size_t{512} << 10;

  bool pack();
  bool reduce();
  Range tile_at(size_t begin) const;

  NodeBucket* bucket_;
  Arithmetic arithmetic_;
  Slots slots_;
  size_t element_size_;              // of the wire's type
  size_t tile_count_;                // elements
  uint64_t run_;                     // from 0
  size_t slot_ = 0;                  // where packing goes on
  size_t packed_ = 0, reduced_ = 0;  // elements of this run
  bool pushed_ = false;
};

}  // namespace collective
