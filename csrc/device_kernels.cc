#include "device_kernels.h"

#include <algorithm>
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

void queue_convert(Device& device, DeviceStream& stream, DType to_type, DType from_type,
                   const std::vector<Conversion>& pieces, double scale, ReduceOp op) {
  const size_t wider = std::max(size_of(to_type), size_of(from_type));
  Launch what{};
  what.scale = scale;
  fill_identity(to_type, op, what.identity, 1);
  const auto launch = [&] {
    if (what.piece_count == 0) return;
    stream.launch(device.kernel(std::string("convert_") + name_of(from_type) + "_" + name_of(to_type)), what,
                  blocks_for(device, what.tile_count), kThreads);
    what.piece_count = 0;
    what.tile_count = 0;
  };
  for (const Conversion& piece : pieces) {
    if (piece.count == 0) continue;
    add_piece(what, piece.from, piece.to, piece.count, wider);
    if (what.piece_count == kMostPieces) launch();
  }
  launch();
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
                what, blocks_for(device, (bytes + kTileBytes - 1) / kTileBytes), kThreads);
}

}  // namespace collective
