// CUDA devices, by way of their driver (libcuda), which is loaded when the first array of a device comes: to build and
// to import, nothing of CUDA is needed.
//
// The engine wants three things of a device: marks in a user's stream, which tell when what was queued there is over;
// streams of its own that copy; and host memory that is page-locked, so that copies run by themselves. Nothing here
// waits for the device, but for what the driver does of its own accord when it locks memory.
//
// Errors of the driver come as kInternal with its own words, among them those of the user's kernels: a device that has
// failed fails every call after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

namespace collective {

struct CudaDriver;
class Device;

// What was queued on a stream up to some moment.
class DeviceMark {
 public:
  DeviceMark(Device& device, void* event) : device_(&device), event_(event) {}
  DeviceMark(const DeviceMark&) = delete;
  DeviceMark& operator=(const DeviceMark&) = delete;
  ~DeviceMark();  // at any time

  // Whether it is over.
  bool reached() const;
  void* event() const { return event_; }
  Device& device() const { return *device_; }

 private:
  Device* device_;
  void* event_;  // CUevent
};

// Page-locked host memory on loan from its device, which keeps it for the next.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(Device& device, std::byte* data, size_t nbytes) : device_(&device), data_(data), nbytes_(nbytes) {}
  PinnedMemory(PinnedMemory&& other) noexcept;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  ~PinnedMemory();
  std::byte* data() const { return data_; }
  // Never to be used again, for the device may still copy there.
  void leak() { data_ = nullptr; }

 private:
  Device* device_ = nullptr;
  std::byte* data_ = nullptr;
  size_t nbytes_ = 0;
};

// The host's memory that somebody else has reserved, whole pages of it, page-locked as long as this lives.
class PageLock {
 public:
  // Where the system forbids it, or has no more to lock: nothing, with one warning, and copies take another way.
  static std::unique_ptr<PageLock> try_lock(Device& device, std::byte* data, size_t nbytes);
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;
  ~PageLock();

 private:
  PageLock(Device& device, std::byte* data);
  Device* device_;
  std::byte* data_;
  int pid_;  // a forked child has no driver
};

// A stream of the engine's own.
class DeviceStream {
 public:
  explicit DeviceStream(Device& device);
  // Between page-locked host memory and the device, either way.
  void copy(void* to, const void* from, size_t nbytes);
  std::shared_ptr<DeviceMark> mark();

 private:
  Device* device_;
  void* stream_ = nullptr;  // CUstream
};

class Device {
 public:
  // By its number, as CUDA_VISIBLE_DEVICES leaves it. Throws kInvalid that says what is missing. Devices live as long
  // as the process: the driver ends before static objects do.
  static Device& get(int number);
  // How many there are; 0, and why, where there is no driver or no device.
  static int count(std::string& why);
  // What is known of one without using it: its name, and where it is in the machine.
  static std::pair<std::string, std::string> look_up(int number);

  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int number() const { return number_; }

  // What is queued on a user's stream by now; `stream` as CUDA's array interface has it: a CUstream, or 0 or 1 for the
  // legacy default stream, 2 for that of the thread. From any thread. Throws kInvalid while the stream is captured.
  std::shared_ptr<DeviceMark> mark(uintptr_t stream);
  // From any thread.
  PinnedMemory pinned(size_t nbytes);

  // One for each way, since devices copy both ways at once.
  DeviceStream& loads() { return *loads_; }
  DeviceStream& stores() { return *stores_; }

 private:
  friend class DeviceMark;
  friend class DeviceStream;
  friend class PageLock;
  friend class PinnedMemory;
  class Current;

  Device(const CudaDriver& driver, int number);
  void check(int result, const char* what) const;
  void* take_event();
  std::shared_ptr<DeviceMark> record(void* stream);

  const CudaDriver* driver_;
  int number_;
  void* context_ = nullptr;  // the primary one, which frameworks use
  std::unique_ptr<DeviceStream> loads_, stores_;

  std::mutex mutex_;           // guards what follows
  std::vector<void*> events_;  // idle
  struct Block {
    std::byte* data;
    size_t nbytes;
  };
  std::vector<Block> blocks_;  // page-locked and idle
};

}  // namespace collective
