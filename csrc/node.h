// What the algorithms inside a node share: how a range is cut into slices, and how a block is reduced.
#pragma once

#include <algorithm>
#include <cstddef>

#include "arithmetic.h"
#include "shared_memory.h"

namespace collective {

// Results are made and copied in blocks of this size, so that a copy finds them in the L1 cache. 16 KiB is also what
// memcpy moves by string instructions, which take over whole lines without reading them: to lines that a peer read last
// that is much faster than a kernel's vector stores. Measured with the bucket of 1 MiB, 2 ranks: 4 KiB 15.7 us,
// 16 KiB 11.6, 64 KiB 13.4.
inline constexpr size_t kBlockBytes = size_t{16} << 10;

struct Range {
  size_t begin, end;
};

// What `rank` of `size` reduces of elements [begin, end): whole lines (but the last), so that no two write into one.
inline Range slice_of(Range range, int rank, int size, size_t element_size) {
  const auto r = static_cast<size_t>(rank), p = static_cast<size_t>(size);
  const size_t slice = round_up((range.end - range.begin + p - 1) / p, kLineBytes / element_size);
  return {std::min(range.end, range.begin + r * slice), std::min(range.end, range.begin + (r + 1) * slice)};
}

// dst = the finished reduction of all ranks' elements, in rank order. dst may be one of the sources.
inline void reduce_ranks(const Arithmetic& arithmetic, void* dst, const void* const* sources, int size, size_t count) {
  if (arithmetic.divisor == 1) {
    reduce(arithmetic.dtype, arithmetic.op, dst, sources, size, count, arithmetic.scale);
    return;
  }
  reduce(arithmetic.dtype, arithmetic.op, dst, sources, size, count);
  divide(arithmetic.dtype, dst, dst, count, arithmetic.divisor);
  if (arithmetic.scale != 1.0) convert(arithmetic.dtype, dst, arithmetic.dtype, dst, count, arithmetic.scale);
}

}  // namespace collective
