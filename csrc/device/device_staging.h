// What allreduce_device sends its data through: places in the memory of a device on every rank, mapped by all ranks of
// the node, and counters in their shared memory on the host, by which they take turns there.
#pragma once

#include <memory>
#include <string>

#include "../../collective/kernels/launch.h"
#include "device/device_memory.h"
#include "device/nccl.h"
#include "node/shared_memory.h"

namespace collective {

// Why so many ranks use none: the kernels take no more sources.
inline std::string why_of_too_many_ranks() { return "more than " + std::to_string(kMostRanks) + " ranks on a node"; }

class DeviceStaging {
 public:
  // What the counters take of each part of the host's memory.
  static constexpr size_t kCounterBytes = 2 * kLineBytes;
  // `depth` places of `place_nbytes` (at least one element) each, at byte `offset` of every part of `memory`; the
  // counters at `counters_at` of `counters`, which must be zero and outlive this. Both serve nothing else there.
  DeviceStaging(std::shared_ptr<DeviceMemory> memory, size_t offset, size_t place_nbytes, size_t depth,
                const SharedMemory& counters, size_t counters_at)
      : memory_(std::move(memory)),
        offset_(offset),
        place_nbytes_(place_nbytes),
        depth_(depth),
        packed_(counters, counters_at),
        reduced_(counters, counters_at + kLineBytes) {}

  // Of this rank's memory.
  Device& device() const { return memory_->device(); }
  int size() const { return memory_->size(); }
  // From now on NCCL sums, where it can; to be called before the first operation. number: of this staging among those
  // of the communicator, the same on all ranks.
  void use(std::shared_ptr<NcclComm> nccl, uint32_t number) {
    nccl_ = std::move(nccl);
    number_ = number;
  }
  // Of the first place of this rank.
  std::byte* own() const { return place(memory_->rank(), 0); }

 private:
  friend class AllreduceDevice;
  std::byte* place(int rank, uint64_t piece) const {
    return memory_->part(rank) + offset_ + piece % depth_ * place_nbytes_;
  }

  std::shared_ptr<DeviceMemory> memory_;
  size_t offset_, place_nbytes_, depth_;
  // Pieces that the rank's device has packed (they may be read), and whose slices it has reduced into all places.
  Counters packed_, reduced_;
  // Pieces that belong to the operations so far, and those for which this rank has queued each of the three stages.
  uint64_t reserved_ = 0, packs_ = 0, reductions_ = 0, unpacks_ = 0;
  std::shared_ptr<NcclComm> nccl_;
  uint32_t number_ = 0;
};

}  // namespace collective
