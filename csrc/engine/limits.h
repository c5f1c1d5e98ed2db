// The settings of an engine.
#pragma once

#include <chrono>
#include <cstddef>

namespace collective {

using Clock = std::chrono::steady_clock;

struct Limits {
  size_t fusion_threshold;                      // bytes: tensors below it share buckets of up to this size
  std::chrono::duration<double> stall_warning;  // name the missing ranks after this long
  std::chrono::duration<double> timeout;        // give up after this long
  bool shared_memory;                           // use it between the ranks of a node, where they can have it
  bool nccl;                                    // it sums between their devices, where it can
};

}  // namespace collective
