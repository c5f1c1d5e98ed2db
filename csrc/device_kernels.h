// The kernels of collective/kernels, as the engine queues them on a stream of the device that they run on. Memory of
// other devices must be mapped there; page-locked host memory may be read and written, too.
#pragma once

#include <vector>

#include "../collective/kernels/launch.h"
#include "arithmetic.h"
#include "device.h"

namespace collective {

// Of every piece, to[i] = from[i] * scale in the type `to_type`, rounded once; the identity of `op` where `from` is null. One
// launch for every kMostPieces. The pairs of types are those of convert() in reduce.h.
struct Conversion {
  const void* from;
  void* to;
  size_t count;
};
void queue_convert(Device& device, DeviceStream& stream, DType to_type, DType from_type,
                   const std::vector<Conversion>& pieces, double scale, ReduceOp op);

// Each of targets = the finished reduction of the sources, in their order, `count` elements each. A target may be one of
// the sources. kMostRanks of either at most.
void queue_reduce(Device& device, DeviceStream& stream, const Arithmetic& arithmetic,
                  const std::vector<const void*>& sources, const std::vector<void*>& targets, size_t count);

}  // namespace collective
