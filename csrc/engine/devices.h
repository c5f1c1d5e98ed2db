// What the ranks of a group can do with their devices together: on a node they share device memory; where they cannot,
// MPI may send it. The ranks find out, and agree, when an operation first needs to know: by then every rank has named its
// device.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/descriptor.h"
#include "base/operation.h"
#include "device/allreduce_device_ring.h"
#include "device/device_staging.h"
#include "device/nccl.h"
#include "messages/comm.h"

namespace collective {

// Whether there are kernels to do this operation between devices.
bool has_kernels(const Descriptor& descriptor);

class Devices {
 public:
  // What it takes of each part of the node's memory.
  static constexpr size_t kHostBytes = DeviceStaging::kCounterBytes + NcclCreation::kBytes;
  // wants_nccl: alike on all ranks.
  Devices(const Comm& comm, bool wants_nccl) : comm_(&comm), wants_nccl_(wants_nccl) {}
  // The memory that the ranks share on their node, from byte `offset` on. Call it before the first operation.
  void use(const SharedMemory& memory, size_t offset) {
    memory_ = &memory;
    offset_ = offset;
  }

  // Whether the operation can be done between devices, so that look() must come first, or be done already.
  bool is_wanted_by(const Descriptor& descriptor) const;
  bool is_looking() const { return state_ == State::kLooking; }
  // Finds out; collective. device: this rank's, null where it has none yet. The operation must not outlive this object.
  std::unique_ptr<Operation> look(int tag, Device* device);
  // Collective, when no operation is left.
  void release() {
    if (nccl_ != nullptr) nccl_->close();
  }
  // An operation has been made: a rank that had no device for it may have one for the next.
  void forget_absence() {
    if (state_ == State::kNotYet) state_ = State::kUnknown;
  }

  // What has been found out, in words.
  const std::string& way() const { return way_; }
  // The memory that the ranks share of their devices, or null.
  DeviceStaging* staging() const { return staging_.get(); }
  // What sums there, if not kernels of this package; or null.
  const std::shared_ptr<NcclComm>& nccl() const { return nccl_; }
  // The device whose memory this rank sends and receives, as the others do theirs; or null.
  Device* messages() const { return places_.empty() ? nullptr : &places_[0]->device(); }
  // Where the next agreed operation has its data there.
  std::shared_ptr<DeviceRingPlace> next_place() { return places_[next_place_++ % places_.size()]; }
  // That of any group: while there is one, its context must be current where MPI is called.
  static Device* whose_memory_is_sent();

 private:
  enum class State { kUnknown, kLooking, kNotYet, kKnown };
  class Sharing;
  class Messages;
  // Why the ranks' devices do not work together.
  void know_host_way(const std::string& why_not);
  // What sums between them, or why NCCL does not.
  void know_nccl(std::shared_ptr<NcclComm> nccl, const std::string& why_not);
  void warn_of_nccl(const std::string& why_not) const;

  const Comm* comm_;
  bool wants_nccl_;
  const SharedMemory* memory_ = nullptr;
  size_t offset_ = 0;
  State state_ = State::kUnknown;
  Buffer alone_;  // in the place of the node's memory, of a group of one rank
  std::unique_ptr<DeviceStaging> staging_;
  std::shared_ptr<NcclComm> nccl_;
  std::vector<std::shared_ptr<DeviceRingPlace>> places_;
  size_t next_place_ = 0;
  std::string way_ = "not determined yet: no device array has been reduced";
};

}  // namespace collective
