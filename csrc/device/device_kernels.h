// The kernels of collective/kernels, as the engine queues them on a stream of the device that they run on. Memory of
// other devices must be mapped there; page-locked host memory may be read and written, too.
#pragma once

#include <string>
#include <vector>

#include "../../collective/kernels/launch.h"
#include "device/device.h"
#include "node/slices.h"
#include "node/slots.h"
#include "reduce/arithmetic.h"

namespace collective {

// The names of all of them.
std::vector<std::string> kernel_names();

struct Conversion {
  const void* from;  // null: the identity
  void* to;
  size_t count;
};

// For every piece, to[i] = from[i] * scale in the type `to_type`, rounded once; the identity of `op` where `from` is
// null. One launch for every kMostPieces. The pairs of types are those of convert() in reduce.h.
void queue_convert(Device& device, DeviceStream& stream, DType to_type, DType from_type,
                   const std::vector<Conversion>& pieces, double scale, ReduceOp op);

// The conversions that take elements `range` of the slots to a place, unless they are there already, or (not `packs`)
// from it.
std::vector<Conversion> conversions(const Slots& slots, const AllreduceSpec& spec, Range range, std::byte* place,
                                    bool packs);

// Each of targets = the finished reduction of the sources, in their order, `count` elements each. A target may be one
// of the sources. At most kMostRanks of either. most_blocks: how many to launch at most; 0: as many as the device has
// room for.
void queue_reduce(Device& device, DeviceStream& stream, const Arithmetic& arithmetic,
                  const std::vector<const void*>& sources, const std::vector<void*>& targets, size_t count,
                  size_t most_blocks = 0);

// While ranks reduce between devices, the limit is the link between these, which a few blocks fill, and a backward pass
// needs the rest. (Not measured on a device.)
inline constexpr size_t kBlocksBetweenDevices = 64;

}  // namespace collective
