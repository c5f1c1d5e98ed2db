// One pass of an all-reduce, or of a reduce-scatter, through an area in the memory of every node: a bucket, or a piece of
// an operation by name.
//
// 2 nodes of 2 ranks; a0 = slice a of rank 0, of a chunk of the ring between the nodes:
//
//        node 0                        node 1
//     rank 0     rank 1             rank 2     rank 3
//     a0 b0      a1 b1              a2 b2      a3 b3        pack: counter `packed`
//     a01 b0     a1 b01             a23 b2     a3 b23       owners reduce their slice on the node ...
//     a   b0     a1 b               a   b2     a3 b         ... and with the owners of that slice on the other nodes ...
//     a   b      a  b               a   b      a  b         ... and store it for all ranks of the node: `pushed`
//
// The last three go on at the same time, by the segments of the ring (ring.h): what a node adds to a segment is reduced
// from all its ranks' memory in the very pass that adds it to what has been received, and a segment that is complete is
// stored for all. Short slices are reduced, exchanged by recursive doubling or directly, and copied, one after the other.
//
// steps:              2 synchronisations on the node; between n nodes 2 (n-1) messages, or log2(n), or 2, if short
// bytes on the wire:  2(n-1)/n N per node each way (the lower bound), divided among its owners; of a reduce-scatter, which
//                     ends after the first half of the ring, (n-1)/n N
// memory traffic:     per node of m ranks, m N loads to reduce and m N stores; what crosses is also sent and received
// sums:               what has come from other nodes, then this node's ranks in their order; 16-bit types in float32,
//                     rounded once per node; short slices also between nodes. The same bits on all ranks and in every run
// limits:             reducing begins when all ranks of the node have packed everything; where nodes differ in size, the
//                     ranks that own nothing only pack and unpack
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "base/ranges.h"
#include "messages/ring.h"
#include "node/allreduce_bucket_node.h"
#include "node/slots.h"
#include "nodes/nodes.h"

namespace collective {

class NodesPass final : public Operation, private RingData {
 public:
  struct Part {
    Range elements;  // of the slots
    size_t at;       // where they go in the area, in elements
  };
  // What goes through the area, alike on all ranks.
  struct Load {
    std::vector<Part> parts;    // in the order of the slots
    std::vector<Range> chunks;  // of the area: one for each node, for the ring; a single one is short
    bool unpacks;               // to where the slots want it; otherwise the area is the result
    bool scatters = false;      // node i of the ring gets chunk i alone, in the area of each of its ranks
  };

  // tag: of messages in nodes.cross, this area's alone. The slots must outlive it.
  NodesPass(NodeBucket& area, const Nodes& nodes, BufferPool& pool, int tag, const Arithmetic& arithmetic,
            const Slots& slots, Load load);

  Step step() override;
  std::string describe() const override;
  // Whether this rank still packs; whether its messages are done.
  bool packs() const { return phase_ == Phase::kPack; }
  bool has_crossed() const { return phase_ > Phase::kCross; }

 private:
  // Bytes that one step packs, reduces, copies or unpacks.
  static constexpr size_t kPieceBytes = size_t{512} << 10;
  // Owners take at least this much of a chunk: it goes in few messages rather than in many.
  static constexpr size_t kShortestSlice = size_t{4} << 10;
  enum class Phase { kPack, kReduce, kCross, kPush, kWait, kUnpack };

  bool is_short() const { return load_.chunks.size() == 1; }
  Range own_slice(Range chunk) const;
  std::byte* at(int rank, size_t element) const { return area_->storage_of(rank) + element * element_size_; }
  std::byte* own(size_t element) const { return at(nodes_->local.rank(), element); }
  void reduce(const void* received, Range elements, bool last);
  // RingData:
  void store(Range elements) override { reduce(nullptr, elements, false); }
  void combine(const void* received, Range elements, bool last) override { reduce(received, elements, last); }
  void take(Range elements) override;

  // A piece; true at the end.
  template <typename Visit>
  bool walk(const Visit& visit);
  bool pack();
  bool unpack();
  bool reduce_short();
  bool push_short();
  void start_crossing();

  NodeBucket* area_;
  const Nodes* nodes_;
  BufferPool* pool_;
  int tag_;
  Arithmetic arithmetic_;
  const Slots* slots_;
  Load load_;
  std::vector<Range> own_;  // of the chunks, this rank's slices; empty ones where it owns nothing
  size_t element_size_, piece_count_;
  uint64_t run_;
  Phase phase_ = Phase::kPack;
  size_t part_ = 0, position_ = 0;  // of the walk; of the short slice, elements done
  std::unique_ptr<Operation> crossing_;
  std::vector<const void*> sources_;  // kept for their capacity
  std::vector<void*> results_;
};

}  // namespace collective
