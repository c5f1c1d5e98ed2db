// Areas in the shared memory of a node, through which operations by name go between nodes. They take turns there in the
// order of their construction, which is the same on all ranks: turn t is in area t mod kAreas, and begins on a rank when
// turn t - kAreas has ended there. So kAreas pieces are in flight at a time, of one operation or of several.
//
// limits:  16 MiB of each rank's memory, for every group of ranks that spans nodes, from its making on
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "node/allreduce_bucket_node.h"

namespace collective {

class NodesLane {
 public:
  // Of an area: so long that the chunks of several nodes and owners are long messages, so short that stages overlap.
  static constexpr size_t kAreaBytes = size_t{4} << 20;
  static constexpr uint64_t kAreas = 4;

  // The bytes that it takes of each rank's part of the memory.
  static constexpr size_t nbytes() { return kAreas * NodeBucket::nbytes(DType::kUInt8, kAreaBytes); }
  // From the beginning of every part. The memory must outlive it, and serve nothing else there.
  explicit NodesLane(const SharedMemory& memory) {
    for (size_t i = 0; i < kAreas; ++i)
      areas_.push_back(std::make_unique<NodeBucket>(memory, i * NodeBucket::nbytes(DType::kUInt8, kAreaBytes),
                                                    DType::kUInt8, kAreaBytes));
  }

  // The first of `count` turns.
  uint64_t reserve(uint64_t count) {
    const uint64_t first = reserved_;
    reserved_ += count;
    return first;
  }
  bool is_free(uint64_t turn) const { return ended_[turn % kAreas] == turn / kAreas; }
  NodeBucket& area(uint64_t turn) { return *areas_[turn % kAreas]; }
  // The tag of the turn's messages: that of its area, for a rank that is late there takes messages in order.
  static int tag(uint64_t turn) { return static_cast<int>(turn % kAreas); }
  void end(uint64_t turn) { ++ended_[turn % kAreas]; }

 private:
  std::vector<std::unique_ptr<NodeBucket>> areas_;
  std::array<uint64_t, kAreas> ended_{};  // turns
  uint64_t reserved_ = 0;
};

}  // namespace collective
