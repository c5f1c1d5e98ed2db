// Places in the shared memory of a node, through which operations by name go between nodes. They take turns there in
// the order of their construction, which is the same on all ranks: turn t is in place t mod kPlaces, and begins on a rank
// when turn t - kPlaces has ended there. So kPlaces pieces are in flight at a time, of one operation or of several.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "node/allreduce_bucket_node.h"

namespace collective {

class Places {
 public:
  // Bytes of a place: so long that the chunks of several nodes and owners are long messages, so short that stages overlap.
  static constexpr size_t kPieceBytes = size_t{4} << 20;
  static constexpr uint64_t kPlaces = 4;

  // The bytes that it takes of each rank's part of the memory.
  static constexpr size_t nbytes() { return kPlaces * NodeBucket::nbytes(DType::kUInt8, kPieceBytes); }
  // From `offset` (of whole lines) of every part. The memory must outlive it, and serve nothing else there.
  Places(const SharedMemory& memory, size_t offset) {
    for (size_t i = 0; i < kPlaces; ++i)
      places_.push_back(std::make_unique<NodeBucket>(
          memory, offset + i * NodeBucket::nbytes(DType::kUInt8, kPieceBytes), DType::kUInt8, kPieceBytes));
  }

  // The first of `count` turns.
  uint64_t reserve(uint64_t count) {
    const uint64_t first = reserved_;
    reserved_ += count;
    return first;
  }
  bool is_free(uint64_t turn) const { return ended_[turn % kPlaces] == turn / kPlaces; }
  NodeBucket& place(uint64_t turn) { return *places_[turn % kPlaces]; }
  // The tag of the turn's messages: that of its place, for a rank that is late there takes messages in order.
  static int tag(uint64_t turn) { return static_cast<int>(turn % kPlaces); }
  void end(uint64_t turn) { ++ended_[turn % kPlaces]; }

 private:
  std::vector<std::unique_ptr<NodeBucket>> places_;
  std::array<uint64_t, kPlaces> ended_{};  // turns
  uint64_t reserved_ = 0;
};

}  // namespace collective
