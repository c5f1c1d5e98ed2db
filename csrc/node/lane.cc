#include "node/lane.h"

#include "base/types.h"

namespace collective {

Lane::Lane(const SharedMemory& memory, size_t offset)
    : rank_(memory.rank()),
      size_(memory.size()),
      packed_(memory, offset),
      reduced_(memory, offset + kLineBytes),
      unpacked_(memory, offset + 2 * kLineBytes),
      sources_(static_cast<size_t>(size_)) {
  if (offset % kLineBytes != 0 || offset + nbytes() > memory.nbytes())
    throw Error(ErrorCode::kInternal,
                "a lane at byte " + std::to_string(offset) + " of " + std::to_string(memory.nbytes()));
  for (int rank = 0; rank < size_; ++rank) parts_.push_back(memory.part(rank) + offset);
}

}  // namespace collective
