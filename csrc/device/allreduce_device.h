// All-reduce between the ranks of one node by kernels of their devices, in memory of the devices that all of them map.
// The data never leaves the devices; ranks tell each other when a stage is complete, through counters in the host's
// memory.
//
// It goes through places in that memory, piece by piece. p = 2, one piece of slices a and b; a0 = slice a of rank 0:
//
//     place of rank 0     of rank 1
//         a0 b0             a1 b1         pack: tensors are gathered, cast and scaled; one kernel  -> counter `packed`
//         a  b0             a  b1         reduce: each rank its slice, from all places into all
//         a  b              a  b              places; one kernel                                   -> counter `reduced`
//                                         unpack, when all have reduced: one kernel
//
// Kernels of a rank are queued on one stream of the engine's own, so a place is packed again only after it is unpacked;
// a rank reads and writes in others' places only between their two counters. With two places or more a piece is packed
// while the one before is on its way between the ranks.
//
// Where ranks have an NCCL communicator it reduces whole places, if it can, on a stream of its own, and its kernels are
// the second synchronisation; the average's factor is then applied when packing.
//
// steps:           2 synchronisations by the hosts
// memory traffic:  per rank 3 N loads and 3 N stores of device memory, of those (p-1)/p N each way between devices; a
//                  bucket, whose result stays in its place, 2 N and 2 N
// sums:            in rank order, so the same bits on all ranks and in every run
// limits:          the hosts poll, so a piece takes tens of microseconds however short it is; at most kMostRanks ranks
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/operation.h"
#include "device/device_kernels.h"
#include "device/device_staging.h"
#include "node/slices.h"
#include "node/slots.h"
#include "reduce/arithmetic.h"

namespace collective {

class AllreduceDevice final : public Operation {
 public:
  // Slots of memory of the staging's device, or of page-locked memory of the host. A null `in` counts as the identity;
  // where `out` is null the result stays in its place. after: marks behind what comes before on other streams.
  // Operations take turns in a staging in the order of their construction, which must be the same on all ranks.
  AllreduceDevice(DeviceStaging& staging, const AllreduceSpec& spec, std::vector<Slot> slots,
                  std::vector<std::shared_ptr<DeviceMark>> after);

  Step step() override;
  std::string describe() const override;
  void give_up() noexcept override;

 private:
  using Queued = std::deque<std::shared_ptr<DeviceMark>>;  // perhaps not complete; null: there was nothing to do
  // Drops those that are complete, in order; returns how many.
  static uint64_t count_over(Queued& queued);
  Range range_of(uint64_t piece) const;
  bool look();
  bool pack();
  bool reduce();
  bool reduce_by_nccl(uint64_t piece);
  bool unpack();

  DeviceStaging* staging_;
  AllreduceSpec spec_;
  NcclComm* nccl_;  // null: kernels reduce
  Scaling scaling_;
  Slots slots_;
  std::vector<std::shared_ptr<DeviceMark>> after_;
  size_t element_size_;   // of the wire's type
  size_t piece_count_;    // elements of a piece
  uint64_t first_, end_;  // pieces of the staging
  uint64_t over_ = 0;     // pieces that are complete
  bool calling_ = false;  // NCCL has not yet accepted the last call
  Queued packing_, reducing_, unpacking_;
};

}  // namespace collective
