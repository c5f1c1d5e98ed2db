#include "messages/arrangement.h"

#include <algorithm>

#include "base/ranges.h"
#include "base/thresholds.h"

namespace collective {

bool is_short(const AllreduceSpec& spec, size_t count) {
  return count * size_of(spec.wire) < thresholds::kRing || spec.op == ReduceOp::kAdasum;
}

Arrangement arrange(const AllreduceSpec& spec, std::vector<Slot> slots, int members) {
  Arrangement made;
  const auto long_ones =
      std::stable_partition(slots.begin(), slots.end(), [&](const Slot& slot) { return is_short(spec, slot.count); });
  made.slots.assign(slots.begin(), long_ones);
  for (const Slot& slot : made.slots) made.short_count += slot.count;
  if (long_ones == slots.end()) return made;
  std::vector<std::vector<size_t>> ends;
  for (auto slot = long_ones; slot != slots.end(); ++slot) ends.push_back(even_offsets(slot->count, 1, members));
  made.chunks.push_back(0);
  for (size_t member = 0; member < static_cast<size_t>(members); ++member) {
    made.chunks.push_back(made.chunks.back());
    for (size_t i = 0; i < ends.size(); ++i) {
      const Slot& slot = *(long_ones + static_cast<std::ptrdiff_t>(i));
      const size_t skip = ends[i][member] * size_of(spec.dtype), count = ends[i][member + 1] - ends[i][member];
      made.slots.push_back({slot.in == nullptr ? nullptr : static_cast<const std::byte*>(slot.in) + skip,
                            slot.out == nullptr ? nullptr : static_cast<std::byte*>(slot.out) + skip, count});
      made.chunks.back() += count;
    }
  }
  return made;
}

}  // namespace collective
