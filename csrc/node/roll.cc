#include "node/roll.h"

#include <algorithm>

namespace collective {

Roll::Roll(const SharedMemory& memory, size_t offset) : rank_(memory.rank()), shown_(memory, offset) {
  for (int rank = 0; rank < memory.size(); ++rank) {
    std::byte* const first = memory.part(rank) + offset + kLineBytes;
    entries_.push_back({reinterpret_cast<Entry*>(first), reinterpret_cast<Entry*>(first + kEntryBytes)});
  }
}

void Roll::show(uint64_t digest, int64_t rows, std::string_view description) {
  const uint64_t turn = shown_.own() + 1;
  Entry& own = *entries_[static_cast<size_t>(rank_)][turn % 2];
  own.digest = digest;
  own.rows = rows;
  own.nbytes = std::min(description.size(), kLongest);
  description.copy(own.description, own.nbytes);
  shown_.publish(turn);
}

bool Roll::all_alike() const {
  const uint64_t digest = entry(rank_).digest;
  for (size_t rank = 0; rank < entries_.size(); ++rank)
    if (entry(static_cast<int>(rank)).digest != digest) return false;
  return true;
}

std::vector<int64_t> Roll::rows() const {
  std::vector<int64_t> rows;
  for (size_t rank = 0; rank < entries_.size(); ++rank) rows.push_back(entry(static_cast<int>(rank)).rows);
  return rows;
}

std::vector<std::string> Roll::descriptions() const {
  std::vector<std::string> descriptions;
  for (size_t rank = 0; rank < entries_.size(); ++rank) {
    const Entry& shown = entry(static_cast<int>(rank));
    descriptions.emplace_back(shown.description, shown.nbytes);
  }
  return descriptions;
}

}  // namespace collective
