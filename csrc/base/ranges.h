// Parts of an array, and how it is divided among ranks.
#pragma once

#include <cstddef>
#include <vector>

namespace collective {

// Elements, or bytes, from `begin` to before `end`.
struct Range {
  size_t begin, end;
  size_t count() const { return end - begin; }
};

// p+1 offsets that cut `rows` rows of row_elements elements into p nearly equal chunks, the first ones longer.
std::vector<size_t> even_offsets(size_t rows, size_t row_elements, int p);

// The ranges between p+1 offsets.
std::vector<Range> ranges_of(const std::vector<size_t>& offsets);

}  // namespace collective
