#include "base/ranges.h"

#include <algorithm>

namespace collective {

std::vector<size_t> even_offsets(size_t rows, size_t row_elements, int p) {
  const auto parts = static_cast<size_t>(p);
  std::vector<size_t> offsets(parts + 1);
  for (size_t i = 0; i <= parts; ++i) offsets[i] = (rows / parts * i + std::min(i, rows % parts)) * row_elements;
  return offsets;
}

std::vector<Range> ranges_of(const std::vector<size_t>& offsets) {
  std::vector<Range> ranges;
  for (size_t i = 0; i + 1 < offsets.size(); ++i) ranges.push_back({offsets[i], offsets[i + 1]});
  return ranges;
}

}  // namespace collective
