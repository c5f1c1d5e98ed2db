// Areas in the shared memory of a node, through which operations by name go between nodes, piece by piece. They take turns
// there in the order of their construction, which is the same on all ranks: turn t is in area t mod n, where n is how many
// there are, and begins on a rank when turn t - n has ended there. So at most n pieces are in flight at a time, of one
// operation or of several.
//
// limits:  17 MiB of each rank's memory, for every group of ranks that spans nodes, from its making on
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "node/allreduce_bucket_node.h"

namespace collective {

class NodesLane {
 public:
  // The bytes that it takes of each rank's part of the memory.
  static constexpr size_t nbytes() { return kMostAreas * NodeBucket::nbytes(DType::kUInt8, kShortestPiece); }
  // From the beginning of every part. nodes, owners: of the group (nodes.h). The memory must outlive it, and serve nothing
  // else there.
  NodesLane(const SharedMemory& memory, int nodes, int owners)
      : piece_bytes_(std::clamp(static_cast<size_t>(nodes) * static_cast<size_t>(owners) * kMessageBytes,
                                kShortestPiece, kLongestPiece) /
                     kShortestPiece * kShortestPiece) {
    const size_t area = NodeBucket::nbytes(DType::kUInt8, piece_bytes_);
    for (size_t offset = 0; offset + area <= nbytes(); offset += area)
      areas_.push_back(std::make_unique<NodeBucket>(memory, offset, DType::kUInt8, piece_bytes_));
    ended_.resize(areas_.size());
  }

  // Of a piece: long enough that what an owner sends of it to the next is a long message, as far as there is room; and
  // short, because nothing crosses the network while the first one is packed and the last one unpacked.
  size_t piece_bytes() const { return piece_bytes_; }
  // How many pieces of one operation may cross the network at a time: while one waits for its last messages, others must
  // keep it busy. If all did, all would finish together, and be unpacked when nothing crosses any more. Measured, 2 nodes
  // of 2 ranks, 16 MiB over 1 Gbit/s, share of the link: with pieces of 4 MiB 0.80 if 4 cross and 0.86 to 0.89 if 2 do;
  // with pieces of 1 MiB, of which 8 cross, 0.92; with pieces of 512 KiB 0.87.
  size_t crossing() const { return areas_.size() / 2; }

  // The first of `count` turns.
  uint64_t reserve(uint64_t count) {
    const uint64_t first = reserved_;
    reserved_ += count;
    return first;
  }
  bool is_free(uint64_t turn) const { return ended_[turn % areas_.size()] == turn / areas_.size(); }
  NodeBucket& area(uint64_t turn) { return *areas_[turn % areas_.size()]; }
  // The tag of the turn's messages: that of its area, for a rank that is late there takes messages in order. Operations
  // of different digests have different ones, as far as there are so many up to `highest`.
  int tag(uint64_t turn, uint64_t digest, int highest) const {
    const uint64_t kinds = static_cast<uint64_t>(highest) / kMostAreas;
    return static_cast<int>(turn % areas_.size() + kMostAreas * (digest % kinds));
  }
  void end(uint64_t turn) { ++ended_[turn % areas_.size()]; }

 private:
  static constexpr size_t kMessageBytes = size_t{128} << 10;
  static constexpr size_t kShortestPiece = size_t{1} << 20, kLongestPiece = size_t{4} << 20;
  static constexpr size_t kMostAreas = 16;

  size_t piece_bytes_;
  std::vector<std::unique_ptr<NodeBucket>> areas_;
  std::vector<uint64_t> ended_;  // turns, by area
  uint64_t reserved_ = 0;
};

}  // namespace collective
