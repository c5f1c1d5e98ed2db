// CUDA devices, by way of their driver (libcuda), which is loaded when the first array on a device comes: building and
// importing need nothing of CUDA.
//
// The engine needs from a device: marks in a user's stream, which tell when what was queued there is complete; streams
// of its own, for copies and kernels; page-locked host memory, so that copies are asynchronous; and device memory that
// other ranks of the node can map. Nothing here waits for the device, except for what the driver does of its own accord
// when it allocates or locks memory.
//
// Errors of the driver are thrown as kInternal with its own words, those of the user's kernels among them: on a device
// that has failed, every later call fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/types.h"
#include "device/cuda_driver.h"

namespace collective {

class Device;
struct Launch;

// What was queued on a stream up to some moment.
class DeviceMark {
 public:
  DeviceMark(Device& device, void* event) : device_(&device), event_(event) {}
  DeviceMark(const DeviceMark&) = delete;
  DeviceMark& operator=(const DeviceMark&) = delete;
  ~DeviceMark();  // at any time

  // Whether it is complete.
  bool reached() const;
  void* event() const { return event_; }
  Device& device() const { return *device_; }

 private:
  Device* device_;
  void* event_;  // CUevent
};

// Page-locked host memory on loan from its device, which keeps it for the next loan.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(Device& device, std::byte* data, size_t nbytes) : device_(&device), data_(data), nbytes_(nbytes) {}
  PinnedMemory(PinnedMemory&& other) noexcept;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  ~PinnedMemory();
  std::byte* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }

 private:
  Device* device_ = nullptr;
  std::byte* data_ = nullptr;
  size_t nbytes_ = 0;
};

// Whole pages of host memory that are somebody else's, page-locked as long as this lives.
class PageLock {
 public:
  // Null where the system forbids it or can lock no more, with one warning; copies then take another way.
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

// A stream of the engine's own, unless it is a user's. What is queued there runs in order.
class DeviceStream {
 public:
  // urgent: ahead of what is queued on other streams, where the device can choose.
  DeviceStream(Device& device, bool urgent);
  // A user's, given as to Device::mark().
  DeviceStream(Device& device, uintptr_t stream) : device_(&device), stream_(reinterpret_cast<void*>(stream)) {}
  // Between page-locked host memory and the device, either way.
  void copy(void* to, const void* from, size_t nbytes);
  // Launches a kernel from Device::kernel().
  void launch(void* kernel, const Launch& what, unsigned blocks, unsigned threads);
  std::shared_ptr<DeviceMark> mark();
  void* handle() const { return stream_; }  // CUstream

 private:
  Device* device_;
  void* stream_ = nullptr;
};

class Device {
 public:
  // By its number, as CUDA_VISIBLE_DEVICES leaves it. Throws kInvalid, which says what is missing. Devices live as long
  // as the process: the driver shuts down before static objects are destroyed.
  static Device& get(int number);
  // How many there are; 0, and why, where there is no driver or no device.
  static int count(std::string& why);
  // What can be known of one without using it: its name, and where it is in the machine.
  static std::pair<std::string, std::string> look_up(int number);

  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Makes its context this thread's current one, as long as this lives; then the thread's own is restored. Meanwhile
  // calls are allowed that would otherwise fail, and invalidate the capture, while some thread of the user captures a
  // graph.
  class Current {
   public:
    explicit Current(const Device& device);
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    ~Current();

   private:
    const CudaDriver* driver_;
    int capture_mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED; then the thread's own
  };

  int number() const { return number_; }
  // For example {9, 0}.
  std::pair<int, int> compute_capability() const { return {attribute(75), attribute(76)}; }
  int multiprocessors() const { return multiprocessors_; }

  // Loads the kernels of these names, compiled for this device; or notes why there are none. Called once, before the
  // first array is submitted. Throws kInternal where the driver does not accept them.
  void load_kernels(const std::string& image, const std::vector<std::string>& names);
  void do_without_kernels(const std::string& why);
  // Why there are none; empty: there are.
  std::string why_no_kernels();
  // By its name, one of those loaded.
  void* kernel(const std::string& name);

  // Whether MPI sends memory of this device, and if not why, as far as this rank has tried.
  struct Messages {
    bool tried = false;
    std::string why_not{};
  };
  void set_messages(const Messages& found);
  Messages messages();

  // A mark behind what is queued on a user's stream by now; `stream` as in CUDA's array interface: a CUstream, or 0 or
  // 1 for the legacy default stream, 2 for that of the thread. From any thread. Throws kInvalid while the stream is
  // being captured.
  std::shared_ptr<DeviceMark> mark(uintptr_t stream);
  // From any thread.
  PinnedMemory pinned(size_t nbytes);
  // Keeps something until the mark has been reached.
  void keep(std::shared_ptr<DeviceMark> until, std::shared_ptr<void> what);
  // Lets go of what need not be kept any more, on all devices.
  static void let_go();
  // The marks for which something is kept, of all devices.
  static std::vector<std::shared_ptr<DeviceMark>> kept_marks();

  // Memory of the device on loan.
  struct Block {
    std::byte* data = nullptr;
    size_t nbytes = 0;
    // The handle by which other processes map it, and whether it has been sent by MPI, which may have such handles of
    // its own. With either, the memory is never freed but kept for the next loan: freeing it would have to wait for all
    // that map it, and nobody can know of a process that has died.
    std::optional<CudaMemoryHandle> handle{};
    bool sent = false;
  };
  Block lend(size_t nbytes);
  void take_back(const Block& block);
  // Makes the block's handle, unless it has one.
  void share(Block& block);
  // Maps that of another process.
  std::byte* map(const CudaMemoryHandle& handle);
  void unmap(std::byte* data);

  // One stream for each direction, since devices copy both ways at once; and one for kernels between ranks, which
  // others wait for.
  DeviceStream& loads() { return *loads_; }
  DeviceStream& stores() { return *stores_; }
  DeviceStream& work() { return *work_; }
  // And one for kernels that wait on the device for other ranks' kernels: nothing else may be queued behind them. Made
  // at first use.
  DeviceStream& waiting();

 private:
  friend class DeviceMark;
  friend class DeviceStream;
  friend class PageLock;
  friend class PinnedMemory;

  Device(const CudaDriver& driver, int number);
  void check(int result, const char* what) const;
  int attribute(int which) const;
  static std::vector<Device*> all();
  void let_go_own();
  void* take_event();
  std::shared_ptr<DeviceMark> record(void* stream);

  const CudaDriver* driver_;
  int number_;
  int multiprocessors_ = 0;
  void* context_ = nullptr;  // the primary one, which frameworks use
  std::unique_ptr<DeviceStream> loads_, stores_, work_, waiting_;
  std::once_flag waiting_made_;

  std::mutex kept_mutex_;  // guards the next; never taken together with the other one
  std::vector<std::pair<std::shared_ptr<DeviceMark>, std::shared_ptr<void>>> kept_;

  std::mutex mutex_;           // guards what follows
  std::vector<void*> events_;  // idle
  std::vector<Block> pinned_;  // page-locked and idle
  std::vector<Block> blocks_;  // of the device, idle
  std::string why_no_kernels_ = "they have not been loaded";
  Messages messages_;
  std::unordered_map<std::string, void*> kernels_;
};

}  // namespace collective
