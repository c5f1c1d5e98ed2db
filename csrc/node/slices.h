// What the algorithms inside a node share: how a range is cut into slices, and how a block is reduced.
#pragma once

#include <algorithm>
#include <cstddef>

#include "base/ranges.h"
#include "node/shared_memory.h"
#include "reduce/arithmetic.h"

namespace collective {

// Results are computed and copied in blocks of this size, so that a copy finds them in the L1 cache. Copies to and from
// staging areas are at least this long where possible, since from some 2 KiB on memcpy uses string instructions. These
// take over a line without reading it, where a vector store first fetches it from the peer that holds it: 1 MiB, 2
// ranks, packing half of it 8.7 us against 10.8, and 11.5 against 62 where the cores do not share their L3.
inline constexpr size_t kBlockBytes = size_t{16} << 10;

// The slice of elements [begin, end) that `rank` of `size` reduces: whole lines (except the last), so that no two ranks
// write to one.
inline Range slice_of(Range range, int rank, int size, size_t element_size) {
  const auto r = static_cast<size_t>(rank), p = static_cast<size_t>(size);
  const size_t slice = round_up((range.end - range.begin + p - 1) / p, kLineBytes / element_size);
  return {std::min(range.end, range.begin + r * slice), std::min(range.end, range.begin + (r + 1) * slice)};
}

// Each of m dsts = the finished reduction of all ranks' elements, in rank order. A dst may be one of the sources.
// Storing a result twice from registers beats copying it from the L1 cache, whether by memcpy or in pieces so short
// that memcpy uses vector stores: a bucket of 1, 4, 16 MiB, 2 ranks, takes 9, 40, 215-300 us this way, against 16, 118,
// 510-545 and 13, 60, 280-470. Non-temporal stores gain nothing in a training step, where the optimizer is the next to
// read (ResNet-50, added ms with and without: 8.1 and 8.0, 12.2 and 10.5, 13.0 and 12.5), and lose what a loop would
// find in the cache.
inline void reduce_ranks(const Arithmetic& arithmetic, void* const* dsts, int m, const void* const* sources, int size,
                         size_t count) {
  reduce_to_many(arithmetic.dtype, arithmetic.op, dsts, m, sources, size, count, arithmetic.scale, arithmetic.divisor);
}

inline void reduce_ranks(const Arithmetic& arithmetic, void* dst, const void* const* sources, int size, size_t count) {
  reduce_ranks(arithmetic, &dst, 1, sources, size, count);
}

}  // namespace collective
