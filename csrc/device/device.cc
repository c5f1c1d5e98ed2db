#include "device/device.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <iterator>
#include <utility>

#include "../../collective/kernels/launch.h"
#include "base/log.h"

namespace collective {
namespace {

constexpr int kNotReady = 600;            // CUDA_ERROR_NOT_READY
constexpr int kCaptureImplicit = 906;     // CUDA_ERROR_STREAM_CAPTURE_IMPLICIT: of the default stream, by another one
constexpr unsigned kNonBlocking = 1;      // CU_STREAM_NON_BLOCKING: no implicit order with the legacy default stream
constexpr unsigned kDisableTiming = 2;    // CU_EVENT_DISABLE_TIMING
constexpr unsigned kPortable = 1;         // CU_MEMHOSTALLOC_PORTABLE: page-locked for all devices
constexpr unsigned kLazyPeerAccess = 1;   // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the one flag there is
constexpr int kMultiprocessorCount = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr size_t kLeastBlock = 64 << 10, kLargeBlock = 1 << 20;  // bytes

// The smallest of the idle blocks that fits, if it is at most twice as large.
std::optional<Device::Block> take_fitting(std::vector<Device::Block>& idle, size_t nbytes) {
  auto best = idle.end();
  for (auto block = idle.begin(); block != idle.end(); ++block)
    if (block->nbytes >= nbytes && block->nbytes / 2 <= nbytes && (best == idle.end() || block->nbytes < best->nbytes))
      best = block;
  if (best == idle.end()) return std::nullopt;
  const Device::Block block = *best;
  idle.erase(best);
  return block;
}

// The devices in use, by number.
struct AllDevices {
  std::mutex mutex;
  std::vector<Device*> list;
};

AllDevices& all_devices() {
  static auto* const all = new AllDevices;
  return *all;
}

}  // namespace

Device::Current::Current(const Device& device) : driver_(device.driver_) {
  device.check(driver_->cuCtxPushCurrent(device.context_), "cuCtxPushCurrent");
  driver_->cuThreadExchangeStreamCaptureMode(&capture_mode_);
}

Device::Current::~Current() {
  driver_->cuThreadExchangeStreamCaptureMode(&capture_mode_);
  void* context = nullptr;
  driver_->cuCtxPopCurrent(&context);
}

std::pair<std::string, std::string> Device::look_up(int number) {
  const CudaDriver& driver = cuda_driver();
  int handle = 0;
  char name[128] = {}, place[64] = {};
  if (!driver.missing.empty() || driver.cuDeviceGet(&handle, number) != 0 ||
      driver.cuDeviceGetName(name, sizeof name - 1, handle) != 0 ||
      driver.cuDeviceGetPCIBusId(place, sizeof place - 1, handle) != 0)
    throw Error(ErrorCode::kInvalid, "CUDA device " + std::to_string(number) + " cannot be queried");
  return {name, place};
}

int Device::count(std::string& why) {
  const CudaDriver& driver = cuda_driver();
  why = driver.missing;
  return why.empty() ? driver.devices : 0;
}

Device& Device::get(int number) {
  AllDevices& all = all_devices();
  const CudaDriver& driver = cuda_driver();
  if (!driver.missing.empty()) throw Error(ErrorCode::kInvalid, driver.missing);
  if (number < 0 || number >= driver.devices)
    throw Error(ErrorCode::kInvalid, "no CUDA device " + std::to_string(number) + ": there are " +
                                         std::to_string(driver.devices) + " (see CUDA_VISIBLE_DEVICES)");
  const std::lock_guard lock(all.mutex);
  all.list.resize(static_cast<size_t>(driver.devices));
  Device*& device = all.list[static_cast<size_t>(number)];
  if (device == nullptr) device = new Device(driver, number);
  return *device;
}

Device::Device(const CudaDriver& driver, int number) : driver_(&driver), number_(number) {
  int handle = 0;
  check(driver.cuDeviceGet(&handle, number), "cuDeviceGet");
  check(driver.cuDevicePrimaryCtxRetain(&context_, handle), "cuDevicePrimaryCtxRetain");
  multiprocessors_ = attribute(kMultiprocessorCount);
  loads_ = std::make_unique<DeviceStream>(*this, false);
  stores_ = std::make_unique<DeviceStream>(*this, false);
  work_ = std::make_unique<DeviceStream>(*this, true);
}

DeviceStream& Device::waiting() {
  std::call_once(waiting_made_, [this] { waiting_ = std::make_unique<DeviceStream>(*this, true); });
  return *waiting_;
}

int Device::attribute(int which) const {
  int handle = 0, value = 0;
  check(driver_->cuDeviceGet(&handle, number_), "cuDeviceGet");
  check(driver_->cuDeviceGetAttribute(&value, which, handle), "cuDeviceGetAttribute");
  return value;
}

void Device::load_kernels(const std::string& image, const std::vector<std::string>& names) {
  {
    const std::lock_guard lock(mutex_);
    if (!kernels_.empty()) return;
  }
  // All of them now, and not under the lock: otherwise each might wait, at its first use, for what the user has queued.
  const Current current(*this);
  void* module = nullptr;
  check(driver_->cuModuleLoadData(&module, image.data()), "cuModuleLoadData");
  std::unordered_map<std::string, void*> kernels;
  for (const std::string& name : names)
    check(driver_->cuModuleGetFunction(&kernels[name], module, name.c_str()), ("the kernel " + name).c_str());
  const std::lock_guard lock(mutex_);
  kernels_ = std::move(kernels);
  why_no_kernels_.clear();
}

void Device::do_without_kernels(const std::string& why) {
  const std::lock_guard lock(mutex_);
  why_no_kernels_ = why;
}

std::string Device::why_no_kernels() {
  const std::lock_guard lock(mutex_);
  return why_no_kernels_;
}

void Device::set_messages(const Messages& found) {
  const std::lock_guard lock(mutex_);
  messages_ = found;
}

Device::Messages Device::messages() {
  const std::lock_guard lock(mutex_);
  return messages_;
}

void* Device::kernel(const std::string& name) {
  const std::lock_guard lock(mutex_);
  return kernels_.at(name);
}

Device::Block Device::lend(size_t nbytes) {
  constexpr size_t kUnit = size_t{2} << 20;  // the driver's own granularity
  nbytes = (nbytes + kUnit - 1) / kUnit * kUnit;
  {
    const std::lock_guard lock(mutex_);
    if (const std::optional<Block> block = take_fitting(blocks_, nbytes)) return *block;
  }
  const Current current(*this);
  uintptr_t address = 0;
  int result = driver_->cuMemAlloc(&address, nbytes);
  if (result != 0) {  // out of memory: idle blocks of other sizes go back
    std::vector<Block> idle;
    {
      const std::lock_guard lock(mutex_);
      const auto shared =
          std::partition(blocks_.begin(), blocks_.end(), [](const Block& b) { return b.handle || b.sent; });
      idle.assign(shared, blocks_.end());
      blocks_.erase(shared, blocks_.end());
    }
    for (const Block& block : idle) driver_->cuMemFree(reinterpret_cast<uintptr_t>(block.data));
    result = driver_->cuMemAlloc(&address, nbytes);
  }
  check(result, ("cuMemAlloc of " + std::to_string(nbytes) + " bytes").c_str());
  return {reinterpret_cast<std::byte*>(address), nbytes, {}};
}

void Device::take_back(const Block& block) {
  const std::lock_guard lock(mutex_);
  blocks_.push_back(block);
}

void Device::share(Block& block) {
  if (block.handle) return;
  const Current current(*this);
  CudaMemoryHandle handle{};
  check(driver_->cuIpcGetMemHandle(&handle, reinterpret_cast<uintptr_t>(block.data)), "cuIpcGetMemHandle");
  block.handle = handle;
}

std::byte* Device::map(const CudaMemoryHandle& handle) {
  const Current current(*this);
  uintptr_t address = 0;
  check(driver_->cuIpcOpenMemHandle(&address, handle, kLazyPeerAccess), "cuIpcOpenMemHandle");
  return reinterpret_cast<std::byte*>(address);
}

void Device::unmap(std::byte* data) {
  const Current current(*this);
  check(driver_->cuIpcCloseMemHandle(reinterpret_cast<uintptr_t>(data)), "cuIpcCloseMemHandle");
}

void Device::check(int result, const char* what) const {
  if (result == 0) return;
  throw Error(ErrorCode::kInternal,
              "CUDA device " + std::to_string(number_) + ": " + what + ": " + driver_->error_text(result));
}

void* Device::take_event() {
  {
    const std::lock_guard lock(mutex_);
    if (!events_.empty()) {
      void* const event = events_.back();
      events_.pop_back();
      return event;
    }
  }
  void* event = nullptr;
  check(driver_->cuEventCreate(&event, kDisableTiming), "cuEventCreate");
  return event;
}

std::shared_ptr<DeviceMark> Device::record(void* stream) {
  const Current current(*this);
  auto mark = std::make_shared<DeviceMark>(*this, take_event());
  check(driver_->cuEventRecord(mark->event(), stream), "cuEventRecord");
  return mark;
}

std::shared_ptr<DeviceMark> Device::mark(uintptr_t stream) {
  {
    const Current current(*this);
    int status = 0;
    const int result = driver_->cuStreamIsCapturing(reinterpret_cast<void*>(stream), &status);
    if (result != kCaptureImplicit) check(result, "cuStreamIsCapturing");
    if (result == kCaptureImplicit || status != 0)
      throw Error(ErrorCode::kInvalid, "the stream is being captured into a CUDA graph, which cannot hold collectives");
  }
  return record(reinterpret_cast<void*>(stream));
}

PinnedMemory Device::pinned(size_t nbytes) {
  if (nbytes == 0) return {};
  // Locking pages takes longer than copying them, so what one operation has used should fit the next: small blocks are
  // powers of two, and large ones may serve what is half as large.
  nbytes = nbytes < kLargeBlock ? std::bit_ceil(std::max(nbytes, kLeastBlock))
                                : (nbytes + kLargeBlock - 1) / kLargeBlock * kLargeBlock;
  {
    const std::lock_guard lock(mutex_);
    if (const std::optional<Block> block = take_fitting(pinned_, nbytes)) return {*this, block->data, block->nbytes};
  }
  const Current current(*this);
  void* data = nullptr;
  int result = driver_->cuMemHostAlloc(&data, nbytes, kPortable);
  if (result != 0) {  // out of memory: idle blocks of other sizes go back
    std::vector<Block> idle;
    {
      const std::lock_guard lock(mutex_);
      idle.swap(pinned_);
    }
    for (const Block& block : idle) driver_->cuMemFreeHost(block.data);
    result = driver_->cuMemHostAlloc(&data, nbytes, kPortable);
  }
  check(result, ("cuMemHostAlloc of " + std::to_string(nbytes) + " bytes").c_str());
  return {*this, static_cast<std::byte*>(data), nbytes};
}

void Device::keep(std::shared_ptr<DeviceMark> until, std::shared_ptr<void> what) {
  let_go_own();
  const std::lock_guard lock(kept_mutex_);
  kept_.emplace_back(std::move(until), std::move(what));
}

void Device::let_go_own() {
  const auto is_over = [](const auto& entry) {
    try {
      return entry.first->reached();
    } catch (const Error&) {
      return true;  // the device has failed and uses nothing any more
    }
  };
  decltype(kept_) over;  // destroyed when nothing is locked: that may call the driver, and wait for it
  const std::lock_guard lock(kept_mutex_);
  const auto begin = std::stable_partition(kept_.begin(), kept_.end(), [&](const auto& e) { return !is_over(e); });
  over.assign(std::make_move_iterator(begin), std::make_move_iterator(kept_.end()));
  kept_.erase(begin, kept_.end());
}

std::vector<Device*> Device::all() {
  AllDevices& all = all_devices();
  const std::lock_guard lock(all.mutex);
  std::vector<Device*> devices = all.list;
  std::erase(devices, nullptr);
  return devices;
}

void Device::let_go() {
  for (Device* device : all()) device->let_go_own();
}

std::vector<std::shared_ptr<DeviceMark>> Device::kept_marks() {
  std::vector<std::shared_ptr<DeviceMark>> marks;
  for (Device* device : all()) {
    const std::lock_guard lock(device->kept_mutex_);
    for (const auto& entry : device->kept_) marks.push_back(entry.first);
  }
  return marks;
}

DeviceMark::~DeviceMark() {
  const std::lock_guard lock(device_->mutex_);
  device_->events_.push_back(event_);  // to be recorded anew, whether it was reached or not
}

bool DeviceMark::reached() const {
  const Device::Current current(*device_);
  const int result = device_->driver_->cuEventQuery(event_);
  if (result == kNotReady) return false;
  device_->check(result, "cuEventQuery");
  return true;
}

PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept
    : device_(other.device_), data_(std::exchange(other.data_, nullptr)), nbytes_(other.nbytes_) {}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(nbytes_, other.nbytes_);
  return *this;
}

PinnedMemory::~PinnedMemory() {
  if (data_ == nullptr) return;
  const std::lock_guard lock(device_->mutex_);
  device_->pinned_.push_back({data_, nbytes_});
}

std::unique_ptr<PageLock> PageLock::try_lock(Device& device, std::byte* data, size_t nbytes) {
  const Device::Current current(device);
  if (const int error = device.driver_->cuMemHostRegister(data, nbytes, kPortable); error != 0) {
    static std::atomic<bool> told{false};
    if (!told.exchange(true))
      log_warning(
          "gradients are copied once more on their way to and from the device: shared memory cannot be "
          "page-locked: " +
          device.driver_->error_text(error));
    return nullptr;
  }
  return std::unique_ptr<PageLock>(new PageLock(device, data));
}

PageLock::PageLock(Device& device, std::byte* data) : device_(&device), data_(data), pid_(getpid()) {}

PageLock::~PageLock() {
  if (getpid() != pid_) return;
  try {
    const Device::Current current(*device_);
    device_->driver_->cuMemHostUnregister(data_);
  } catch (const Error&) {
    return;  // the driver has ended, and its locks with it
  }
}

DeviceStream::DeviceStream(Device& device, bool urgent) : device_(&device) {
  const Device::Current current(device);
  int least = 0, greatest = 0;
  device.check(device.driver_->cuCtxGetStreamPriorityRange(&least, &greatest), "cuCtxGetStreamPriorityRange");
  device.check(device.driver_->cuStreamCreateWithPriority(&stream_, kNonBlocking, urgent ? greatest : least),
               "cuStreamCreateWithPriority");
}

void DeviceStream::copy(void* to, const void* from, size_t nbytes) {
  if (nbytes == 0) return;
  const Device::Current current(*device_);
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  device_->check(device_->driver_->cuMemcpyAsync(address(to), address(from), nbytes, stream_), "cuMemcpyAsync");
}

void DeviceStream::launch(void* kernel, const Launch& what, unsigned blocks, unsigned threads) {
  const Device::Current current(*device_);
  size_t nbytes = sizeof what;
  // CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END
  void* extra[] = {reinterpret_cast<void*>(1), const_cast<Launch*>(&what), reinterpret_cast<void*>(2), &nbytes,
                   nullptr};
  device_->check(device_->driver_->cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream_, nullptr,
                                                  static_cast<void**>(extra)),
                 "cuLaunchKernel");
}

std::shared_ptr<DeviceMark> DeviceStream::mark() { return device_->record(stream_); }

}  // namespace collective
