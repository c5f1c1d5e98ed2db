// Memory of a device, of equal size for every rank of a node, mapped by all of them: kernels of one rank read and write
// another's, on one device or between two (CUDA IPC).
//
// Whether that works cannot be known beforehand (other PID namespaces, partitions of a device, devices that cannot
// reach each other, a system that forbids it), so it is probed, in two messages to every peer as in
// shared_memory_creation.h:
//
//     offer:    handle, a random cookie         each rank has the memory and has written its cookie there
//     verdict:  could I read every cookie?      each rank has mapped the others' memory and has looked
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/operation.h"
#include "device/device.h"
#include "messages/reports.h"

namespace collective {

class DeviceMemory {
 public:
  // own: lent by `device`. parts: by rank; the own one, and what is mapped of the others', null where nothing is.
  // places: of the ranks' devices in the machine.
  DeviceMemory(Device& device, int rank, const Device::Block& own, std::vector<std::byte*> parts,
               std::vector<std::string> places);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  // Only when all ranks have finished what they do there.
  ~DeviceMemory();

  // Of this rank's part.
  Device& device() const { return *device_; }
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(parts_.size()); }
  std::byte* part(int rank) const { return parts_[static_cast<size_t>(rank)]; }
  // Where the ranks' devices are in the machine, alike on all ranks.
  const std::vector<std::string>& places() const { return places_; }

 private:
  Device* device_;
  int rank_;
  int pid_;  // a forked child has no driver
  Device::Block own_;
  std::vector<std::byte*> parts_;
  std::vector<std::string> places_;
};

// Makes it, without blocking. `tag` belongs to this creation alone while it lasts.
class DeviceMemoryCreation final : public Operation {
 public:
  // device: this rank's; null where it cannot take part, and `why_not`, which is empty if it has no array on a device
  // yet. nbytes: of each part, the same on all ranks.
  DeviceMemoryCreation(const Comm& comm, int tag, Device* device, std::string why_not, size_t nbytes);
  ~DeviceMemoryCreation() override;

  Step step() override;
  std::string describe() const override;

  // Once done: the memory, or why no rank has it.
  std::unique_ptr<DeviceMemory> take() { return std::move(memory_); }
  const std::string& why() const { return why_; }
  // Whether that is only because some rank has no array on a device yet.
  bool not_yet() const { return not_yet_; }

 private:
  static constexpr size_t kCookieBytes = 16;
  struct Report {
    CudaMemoryHandle handle;
    std::byte cookie[kCookieBytes];
    char place[32];     // of its device
    bool absent;        // has no device yet
    char failure[300];  // empty: all is well so far
  };
  enum class Phase { kReserve, kWrite, kOffers, kRead, kVerdicts, kDone };

  void reserve();
  void map();
  void compare();
  void give_back() noexcept;

  const Comm* comm_;
  Device* device_;
  std::string why_not_;
  size_t nbytes_;
  Phase phase_ = Phase::kReserve;
  Reports<Report> reports_;
  Device::Block own_;
  std::vector<std::byte*> parts_;  // by rank; null where it is not mapped
  PinnedMemory cookies_;           // by rank
  std::shared_ptr<DeviceMark> copied_;
  std::unique_ptr<DeviceMemory> memory_;
  std::string why_;
  bool not_yet_ = false;
};

}  // namespace collective
