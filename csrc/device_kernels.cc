#include "device_kernels.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "identity.h"

namespace collective {
namespace {

const char* lower_name(ReduceOp op) {
  switch (op) {
    case ReduceOp::kMin: return "min";
    case ReduceOp::kMax: return "max";
    case ReduceOp::kProduct: return "product";
    default: return "sum";
  }
}

unsigned blocks_for(const Device& device, size_t most) {
  return static_cast<unsigned>(
      std::clamp(most, size_t{1}, static_cast<size_t>(device.multiprocessors()) * kBlocksPerMultiprocessor));
}

}  // namespace

PinnedMemory queue_convert(Device& device, DeviceStream& stream, DType to_type, DType from_type,
                           const std::vector<Piece>& pieces, double scale, ReduceOp op) {
  const size_t to_size = size_of(to_type), from_size = size_of(from_type);
  const size_t most = kPieceBytes / std::max(to_size, from_size);
  size_t number = 0;
  for (const Piece& piece : pieces) number += (piece.count + most - 1) / most;
  if (number == 0) return {};
  PinnedMemory memory = device.pinned(number * sizeof(Piece));
  auto* next = reinterpret_cast<Piece*>(memory.data());
  for (const Piece& piece : pieces)
    for (size_t at = 0; at < piece.count; at += most) {
      const auto* const from = static_cast<const std::byte*>(piece.from);
      *next++ = {from == nullptr ? nullptr : from + at * from_size, static_cast<std::byte*>(piece.to) + at * to_size,
                 std::min<unsigned long long>(most, piece.count - at)};
    }
  Launch what{};
  what.pieces = reinterpret_cast<const Piece*>(memory.data());
  what.piece_count = number;
  what.scale = scale;
  fill_identity(to_type, op, what.identity, 1);
  stream.launch(device.kernel(std::string("convert_") + name_of(from_type) + "_" + name_of(to_type)), what,
                blocks_for(device, number), kThreads);
  return memory;
}

void queue_reduce(Device& device, DeviceStream& stream, const Arithmetic& arithmetic,
                  const std::vector<const void*>& sources, const std::vector<void*>& targets, size_t count) {
  if (count == 0) return;
  Launch what{};
  std::copy(sources.begin(), sources.end(), what.sources);
  std::copy(targets.begin(), targets.end(), what.targets);
  what.source_count = static_cast<int>(sources.size());
  what.target_count = static_cast<int>(targets.size());
  what.count = count;
  what.scale = arithmetic.scale;
  what.divisor = arithmetic.divisor;
  const size_t bytes = count * size_of(arithmetic.dtype);
  stream.launch(device.kernel(std::string("reduce_") + name_of(arithmetic.dtype) + "_" + lower_name(arithmetic.op)),
                what, blocks_for(device, (bytes + kPieceBytes - 1) / kPieceBytes), kThreads);
}

}  // namespace collective
