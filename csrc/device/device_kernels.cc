#include "device/device_kernels.h"

#include <algorithm>
#include <string>

#include "reduce/identity.h"

namespace collective {
namespace {

constexpr DType kFloats[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};
constexpr ReduceOp kOps[] = {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMin, ReduceOp::kMax};

std::string convert_name(DType from, DType to) { return std::string("convert_") + name_of(from) + "_" + name_of(to); }

std::string reduce_name(DType dtype, ReduceOp op) {
  const char* name = "sum";  // averages are, too
  if (op == ReduceOp::kMin) name = "min";
  if (op == ReduceOp::kMax) name = "max";
  if (op == ReduceOp::kProduct) name = "product";
  return std::string("reduce_") + name_of(dtype) + "_" + name;
}

unsigned blocks_for(const Device& device, size_t most) {
  return static_cast<unsigned>(
      std::clamp(most, size_t{1}, static_cast<size_t>(device.multiprocessors()) * kBlocksPerMultiprocessor));
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    names.push_back(convert_name(dtype, dtype));
    const bool is_complex = dtype == DType::kComplex64 || dtype == DType::kComplex128;
    for (const ReduceOp op : kOps)
      if (!is_complex || op == ReduceOp::kSum || op == ReduceOp::kProduct) names.push_back(reduce_name(dtype, op));
  }
  for (const DType from : kFloats)
    for (const DType to : kFloats)
      if (from != to) names.push_back(convert_name(from, to));
  return names;
}

void queue_convert(Device& device, DeviceStream& stream, DType to_type, DType from_type,
                   const std::vector<Conversion>& pieces, double scale, ReduceOp op) {
  const size_t wider = std::max(size_of(to_type), size_of(from_type));
  Launch what{};
  what.scale = scale;
  fill_identity(to_type, op, what.identity, 1);
  const auto launch = [&] {
    if (what.piece_count == 0) return;
    stream.launch(device.kernel(convert_name(from_type, to_type)), what, blocks_for(device, what.tile_count), kThreads);
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

std::vector<Conversion> conversions(const Slots& slots, const AllreduceSpec& spec, Range range, std::byte* place,
                                    bool packs) {
  std::vector<Conversion> result;
  for (size_t i = slots.find(range.begin), at = range.begin; at < range.end; ++i) {
    const size_t count = std::min(range.end, slots.offset(i + 1)) - at;
    const Slot& slot = slots.list()[i];
    std::byte* const inside = place + (at - range.begin) * size_of(spec.wire);
    const size_t skip = (at - slots.offset(i)) * size_of(spec.dtype);
    const std::byte* const in = slot.in == nullptr ? nullptr : static_cast<const std::byte*>(slot.in) + skip;
    if (packs && (in != inside || !slots.unchanged()))
      result.push_back({in, inside, count});
    else if (!packs && slot.out != nullptr)
      result.push_back({inside, static_cast<std::byte*>(slot.out) + skip, count});
    at += count;
  }
  return result;
}

void queue_reduce(Device& device, DeviceStream& stream, const Arithmetic& arithmetic,
                  const std::vector<const void*>& sources, const std::vector<void*>& targets, size_t count,
                  size_t most_blocks) {
  if (count == 0) return;
  if (std::max(sources.size(), targets.size()) > static_cast<size_t>(kMostRanks))
    throw Error(ErrorCode::kInternal, "a kernel reduces at most " + std::to_string(kMostRanks) + " arrays");
  Launch what{};
  std::copy(sources.begin(), sources.end(), what.sources);
  std::copy(targets.begin(), targets.end(), what.targets);
  what.source_count = static_cast<int>(sources.size());
  what.target_count = static_cast<int>(targets.size());
  what.count = count;
  what.scale = arithmetic.scale;
  what.divisor = arithmetic.divisor;
  const size_t bytes = count * size_of(arithmetic.dtype);
  unsigned blocks = blocks_for(device, (bytes + kTileBytes - 1) / kTileBytes);
  if (most_blocks > 0) blocks = std::min(blocks, static_cast<unsigned>(most_blocks));
  stream.launch(device.kernel(reduce_name(arithmetic.dtype, arithmetic.op)), what, blocks, kThreads);
}

}  // namespace collective
