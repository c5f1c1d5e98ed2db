// All-reduce of arrays of devices by a ring of MPI messages from and to their memory, for an MPI that can send that: pack
// into a bucket on the device, a ring whose sums the devices make, unpack. Nothing passes through the host's memory,
// unless MPI itself takes it there.
//
// One tensor that goes as it is needs neither packing nor unpacking.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "allreduce.h"
#include "device_kernels.h"
#include "operation.h"
#include "ring.h"

namespace collective {

// Memory of a device on loan.
class DeviceBlock {
 public:
  DeviceBlock(Device& device, size_t nbytes) : device_(&device), memory_(device.lend(nbytes)) {}
  DeviceBlock(const DeviceBlock&) = delete;
  DeviceBlock& operator=(const DeviceBlock&) = delete;
  ~DeviceBlock() { device_->take_back(memory_); }
  std::byte* data() const { return memory_.data; }

 private:
  Device* device_;
  Device::Shared memory_;
};

// The sums of a ring, as kernels of a device.
class DeviceReducer final : public RingReducer {
 public:
  explicit DeviceReducer(Device& device) : device_(&device) {}
  void start(const Arithmetic& arithmetic, void* dst, const void* a, const void* b, size_t count, bool last) override;
  bool pop_over() override;
  // Long enough for a kernel and for a network's full rate. (Not measured on a device.)
  size_t segment_bytes() const override { return size_t{1} << 20; }
  size_t depth() const override { return 8; }
  std::byte* scratch(size_t nbytes) override;
  bool idle() const { return marks_.empty(); }

 private:
  Device* device_;
  std::deque<std::shared_ptr<DeviceMark>> marks_;
  std::shared_ptr<DeviceBlock> scratch_;
};

class AllreduceDeviceRing final : public Operation {
 public:
  // Slots of memory of `device`, or of page-locked memory of the host. A null `in` counts as the identity. storage: the
  // bucket, of at least the slots' total in the wire's type; where it is given the results stay there. Null: a bucket of
  // its own. after: what comes before on other streams.
  AllreduceDeviceRing(const Comm& comm, BufferPool& pool, int tag, Device& device, const AllreduceSpec& spec,
                      std::vector<Slot> slots, std::byte* storage, std::vector<std::shared_ptr<DeviceMark>> after);
  ~AllreduceDeviceRing() override;

  Step step() override;
  std::string describe() const override;

 private:
  enum class Phase { kStart, kPack, kRing, kUnpack };
  std::vector<Conversion> cut(bool packs) const;

  const Comm* comm_;
  BufferPool* pool_;
  int tag_;
  Device* device_;
  AllreduceSpec spec_;
  Scaling scaling_;
  std::vector<Slot> slots_;
  std::vector<std::shared_ptr<DeviceMark>> after_;
  size_t total_ = 0;  // elements
  std::byte* bucket_;
  const void* reduce_in_;
  bool packs_;
  std::shared_ptr<DeviceBlock> own_;
  Phase phase_ = Phase::kStart;
  std::shared_ptr<DeviceMark> mark_;  // behind the packing or the unpacking
  DeviceReducer reducer_;
  std::unique_ptr<Ring> ring_;
};

}  // namespace collective
