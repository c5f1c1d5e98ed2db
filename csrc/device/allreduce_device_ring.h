// All-reduce of arrays on devices by a ring of MPI messages from and to their memory, for an MPI that can send it: pack
// into a place on the device, a ring whose sums the devices compute, unpack; a long array piece by piece. Nothing
// passes through the host's memory, unless MPI itself takes it there.
//
// Only places that this package has allocated are sent, of the kind that was probed (see cuda_aware.py): an MPI keeps
// registrations of what it has sent, and a user's allocator may free that memory, or have made it in a way that MPI
// cannot send.
//
// steps:              2(p-1) per piece, as ring.h; a piece is as long as the place
// bytes on the wire:  2(p-1)/p N per rank each way
// memory traffic:     on the device, 3 N (p-1)/p of loads and stores to reduce, a load and a store of N to pack, and to
//                     unpack; a bucket, whose result stays in its place, is not unpacked
// limits:             the host polls for each segment; one piece of an operation at a time
// source:             ring.h
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/operation.h"
#include "device/device_kernels.h"
#include "messages/allreduce.h"
#include "messages/ring.h"

namespace collective {

// Where one ring at a time has its data on a device: a block of its own, whose last part is for what is received.
class DeviceRingPlace {
 public:
  // Throws where the device has no more memory.
  DeviceRingPlace(Device& device, size_t nbytes)
      : device_(&device), nbytes_(nbytes), block_(device.lend(nbytes + kScratchBytes)) {
    block_.sent = true;
  }
  DeviceRingPlace(const DeviceRingPlace&) = delete;
  DeviceRingPlace& operator=(const DeviceRingPlace&) = delete;
  ~DeviceRingPlace() { device_->take_back(block_); }

  Device& device() const { return *device_; }
  std::byte* data() const { return block_.data; }
  size_t nbytes() const { return nbytes_; }
  // Of kScratchBytes.
  std::byte* scratch() const { return block_.data + nbytes_; }

  // Segments long enough for a kernel, and for a network at its full rate. (Not measured on a device.)
  static constexpr size_t kSegmentBytes = size_t{512} << 10, kDepth = 4;
  static constexpr size_t kScratchBytes = kSegmentBytes * kDepth;

 private:
  friend class AllreduceDeviceRing;
  Device* device_;
  size_t nbytes_;
  Device::Block block_;
  uint64_t taken_ = 0, over_ = 0;  // operations so far that want the place, and those of them that are done
};

// The sums of a ring, by kernels of a device.
class DeviceReducer final : public RingReducer {
 public:
  explicit DeviceReducer(DeviceRingPlace& place) : place_(&place) {}
  void start(const Arithmetic& arithmetic, void* dst, const void* a, const void* b, size_t count, bool last) override;
  bool pop_over() override;
  size_t segment_bytes() const override { return DeviceRingPlace::kSegmentBytes; }
  size_t depth() const override { return DeviceRingPlace::kDepth; }
  std::byte* scratch() override { return place_->scratch(); }

 private:
  DeviceRingPlace* place_;
  std::deque<std::shared_ptr<DeviceMark>> marks_;
};

class AllreduceDeviceRing final : public Operation {
 public:
  // Slots of memory of the place's device, or of page-locked memory of the host. A null `in` counts as the identity;
  // where no slot has an `out` the result stays in the place, which it must fit. Operations take turns in a place in
  // the order of their construction, which must be the same on all ranks. after: marks behind what comes before on
  // other streams.
  AllreduceDeviceRing(const Comm& comm, BufferPool& pool, int tag, std::shared_ptr<DeviceRingPlace> place,
                      const AllreduceSpec& spec, std::vector<Slot> slots,
                      std::vector<std::shared_ptr<DeviceMark>> after);
  ~AllreduceDeviceRing() override;

  Step step() override;
  std::string describe() const override;

 private:
  enum class Phase { kStart, kPack, kRing, kUnpack };
  void pack();
  bool unpack();

  const Comm* comm_;
  BufferPool* pool_;
  int tag_;
  std::shared_ptr<DeviceRingPlace> place_;
  uint64_t turn_;
  AllreduceSpec spec_;
  Scaling scaling_;
  Slots slots_;
  std::vector<std::shared_ptr<DeviceMark>> after_;
  Range piece_{0, 0};  // elements
  Phase phase_ = Phase::kStart;
  std::shared_ptr<DeviceMark> mark_;  // behind the packing or the unpacking
  DeviceReducer reducer_;
  std::unique_ptr<Ring> ring_;
};

}  // namespace collective
