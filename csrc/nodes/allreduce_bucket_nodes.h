// All-reduce of a bucket by ranks of several nodes, several of them on each: each byte crosses the network once per node
// and direction, and several ranks of a node drive the network together.
//
// The bucket lies in the shared memory of each node, as in allreduce_bucket_node.h, and is cut into a slice for each of
// the first L ranks of every node, where L is how many the smallest node has. 2 nodes of 2 ranks; a0 = slice a of rank 0:
//
//        node 0                        node 1
//     rank 0     rank 1             rank 2     rank 3
//     a0 b0      a1 b1              a2 b2      a3 b3        pack: counter `packed`
//     a01 b0     a1 b01             a23 b2     a3 b23       each owner reduces its slice, in its own bucket
//     a   b0     a1 b               a   b2     a3 b         owners of one slice reduce it between the nodes: a ring
//     a   b      a  b               a   b      a  b         each owner copies it to all buckets of its node: `pushed`
//
// steps:              2 synchronisations on the node, 2 (n-1) messages between n nodes (or log2(n), if short)
// bytes on the wire:  2(n-1)/n N per node each way (the lower bound), divided among its owners
// memory traffic:     per node of m ranks: m N loads and N stores to reduce, m N of both to copy
// sums:               on a node in rank order, between nodes in the order of the ring or of doubling: the same bits on all
//                     ranks and in every run
// limits:             a slice crosses the network only when all of it is reduced on the node, so overlap comes from having
//                     several buckets in flight; where nodes differ in size, the ranks beyond the first L only pack
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "messages/comm.h"
#include "node/allreduce_bucket_node.h"
#include "node/slots.h"

namespace collective {

// How the ranks of a group are spread over nodes.
struct Nodes {
  Comm local;  // the ranks of this node
  Comm cross;  // the owners of this rank's slice, one on each node; none beyond the first `owners` ranks
  int owners;  // on each node, the same number everywhere
};

class AllreduceBucketNodes final : public Operation {
 public:
  // bucket: in the memory of this node. size: ranks of the group. tag: this bucket's. Slots as for AllreduceBucketNode.
  AllreduceBucketNodes(NodeBucket& bucket, const Nodes& nodes, int size, BufferPool& pool, int tag,
                       const AllreduceSpec& spec, std::vector<Slot> slots);

  Step step() override;
  std::string describe() const override;

 private:
  // Bytes that one step packs, reduces or copies.
  static constexpr size_t kPieceBytes = size_t{512} << 10;
  enum class Phase { kPack, kReduce, kCross, kPush, kWait };

  bool owns() const { return nodes_->local.rank() < nodes_->owners; }
  std::byte* at(int rank, size_t element) const;
  bool pack();
  bool reduce();
  void start_crossing();
  bool push();

  NodeBucket* bucket_;
  const Nodes* nodes_;
  BufferPool* pool_;
  int tag_;
  Scaling scaling_;
  Slots slots_;
  size_t element_size_, piece_count_;
  Range own_{0, 0};
  uint64_t run_;
  Phase phase_ = Phase::kPack;
  size_t slot_ = 0;      // where packing continues
  size_t position_ = 0;  // elements done in this phase, from where its range begins
  std::unique_ptr<Operation> crossing_;
};

}  // namespace collective
