#include "device.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <utility>

#include "log.h"

namespace collective {

// The functions of the driver in use here, declared after its reference manual (CUDA Driver API). A device is an int,
// every other handle a pointer, and so is an address here.
#define COLLECTIVE_CUDA_FUNCTIONS(X)                                                             \
  X(cuInit, "cuInit", (unsigned flags))                                                          \
  X(cuGetErrorName, "cuGetErrorName", (int error, const char** name))                            \
  X(cuGetErrorString, "cuGetErrorString", (int error, const char** text))                        \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int* count))                                          \
  X(cuDeviceGet, "cuDeviceGet", (int* device, int ordinal))                                      \
  X(cuDeviceGetName, "cuDeviceGetName", (char* name, int length, int device))                    \
  X(cuDeviceGetPCIBusId, "cuDeviceGetPCIBusId", (char* id, int length, int device))              \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void** context, int device))          \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (void* context))                                    \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (void** context))                                     \
  X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int* mode))         \
  X(cuStreamIsCapturing, "cuStreamIsCapturing", (void* stream, int* status))                     \
  X(cuMemFreeHost, "cuMemFreeHost", (void* data))                                                \
  X(cuMemHostAlloc, "cuMemHostAlloc", (void** data, size_t nbytes, unsigned flags))              \
  X(cuMemHostRegister, "cuMemHostRegister_v2", (void* data, size_t nbytes, unsigned flags))      \
  X(cuMemHostUnregister, "cuMemHostUnregister", (void* data))                                    \
  X(cuMemcpyAsync, "cuMemcpyAsync", (uintptr_t to, uintptr_t from, size_t nbytes, void* stream)) \
  X(cuStreamCreate, "cuStreamCreate", (void** stream, unsigned flags))                           \
  X(cuEventCreate, "cuEventCreate", (void** event, unsigned flags))                              \
  X(cuEventRecord, "cuEventRecord", (void* event, void* stream))                                 \
  X(cuEventQuery, "cuEventQuery", (void* event))

struct CudaDriver {
#define COLLECTIVE_DECLARE(name, symbol, arguments) int(*name) arguments = nullptr;
  COLLECTIVE_CUDA_FUNCTIONS(COLLECTIVE_DECLARE)
#undef COLLECTIVE_DECLARE
  std::string missing;  // why it cannot be used
  int devices = 0;
};

namespace {

constexpr int kNotReady = 600;          // CUDA_ERROR_NOT_READY
constexpr int kCaptureImplicit = 906;   // CUDA_ERROR_STREAM_CAPTURE_IMPLICIT: of the default stream, by another one
constexpr unsigned kNonBlocking = 1;    // CU_STREAM_NON_BLOCKING: no implicit order with the legacy default stream
constexpr unsigned kDisableTiming = 2;  // CU_EVENT_DISABLE_TIMING
constexpr unsigned kPortable = 1;       // CU_MEMHOSTALLOC_PORTABLE: page-locked for all devices
constexpr size_t kLeastBlock = 64 << 10, kLargeBlock = 1 << 20;  // bytes

std::string error_text(const CudaDriver& driver, int error) {
  const char *name = nullptr, *text = nullptr;
  driver.cuGetErrorName(error, &name);
  driver.cuGetErrorString(error, &text);
  return std::string(name != nullptr ? name : "error") + " (" + std::to_string(error) + ")" +
         (text != nullptr ? std::string(": ") + text : "");
}

const CudaDriver* load_driver() {
  auto* driver = new CudaDriver;  // for the life of the process, see Device::get
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    driver->missing = std::string("no CUDA driver: ") + (why != nullptr ? why : "libcuda.so.1");
    return driver;
  }
#define COLLECTIVE_LOAD(name, symbol, arguments)                                   \
  driver->name = reinterpret_cast<decltype(driver->name)>(dlsym(library, symbol)); \
  if (driver->name == nullptr) driver->missing = "the CUDA driver has no function " symbol;
  COLLECTIVE_CUDA_FUNCTIONS(COLLECTIVE_LOAD)
#undef COLLECTIVE_LOAD
  if (!driver->missing.empty()) return driver;
  int error = driver->cuInit(0);
  if (error == 0) error = driver->cuDeviceGetCount(&driver->devices);
  if (error != 0)
    driver->missing = "the CUDA driver does not start: " + error_text(*driver, error);
  else if (driver->devices == 0)
    driver->missing = "no CUDA device is visible";
  return driver;
}

const CudaDriver& the_driver() {
  static const CudaDriver* const driver = load_driver();
  return *driver;
}

}  // namespace

// The device's context in this thread, as long as it lives; the thread's own comes back after. Meanwhile calls are
// allowed that would else fail, and spoil the capture, while some thread of the user captures a graph.
class Device::Current {
 public:
  explicit Current(const Device& device) : driver_(device.driver_) {
    device.check(driver_->cuCtxPushCurrent(device.context_), "cuCtxPushCurrent");
    driver_->cuThreadExchangeStreamCaptureMode(&capture_mode_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    driver_->cuThreadExchangeStreamCaptureMode(&capture_mode_);
    void* context = nullptr;
    driver_->cuCtxPopCurrent(&context);
  }

 private:
  const CudaDriver* driver_;
  int capture_mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED; then the thread's own
};

std::pair<std::string, std::string> Device::look_up(int number) {
  const CudaDriver& driver = the_driver();
  int handle = 0;
  char name[128] = {}, place[64] = {};
  if (!driver.missing.empty() || driver.cuDeviceGet(&handle, number) != 0 ||
      driver.cuDeviceGetName(name, sizeof name - 1, handle) != 0 ||
      driver.cuDeviceGetPCIBusId(place, sizeof place - 1, handle) != 0)
    throw Error(ErrorCode::kInvalid, "CUDA device " + std::to_string(number) + " cannot be looked at");
  return {name, place};
}

int Device::count(std::string& why) {
  const CudaDriver& driver = the_driver();
  why = driver.missing;
  return why.empty() ? driver.devices : 0;
}

Device& Device::get(int number) {
  static std::mutex mutex;
  static auto* const devices = new std::vector<Device*>;
  const CudaDriver& driver = the_driver();
  if (!driver.missing.empty()) throw Error(ErrorCode::kInvalid, driver.missing);
  if (number < 0 || number >= driver.devices)
    throw Error(ErrorCode::kInvalid, "no CUDA device " + std::to_string(number) + ": there are " +
                                         std::to_string(driver.devices) + " (see CUDA_VISIBLE_DEVICES)");
  const std::lock_guard lock(mutex);
  devices->resize(static_cast<size_t>(driver.devices));
  Device*& device = (*devices)[static_cast<size_t>(number)];
  if (device == nullptr) device = new Device(driver, number);
  return *device;
}

Device::Device(const CudaDriver& driver, int number) : driver_(&driver), number_(number) {
  int handle = 0;
  check(driver.cuDeviceGet(&handle, number), "cuDeviceGet");
  check(driver.cuDevicePrimaryCtxRetain(&context_, handle), "cuDevicePrimaryCtxRetain");
  loads_ = std::make_unique<DeviceStream>(*this);
  stores_ = std::make_unique<DeviceStream>(*this);
}

void Device::check(int result, const char* what) const {
  if (result == 0) return;
  throw Error(ErrorCode::kInternal,
              "CUDA device " + std::to_string(number_) + ": " + what + ": " + error_text(*driver_, result));
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
  // powers of two, large ones may be taken for what is half as large.
  nbytes = nbytes < kLargeBlock ? std::bit_ceil(std::max(nbytes, kLeastBlock))
                                : (nbytes + kLargeBlock - 1) / kLargeBlock * kLargeBlock;
  {
    const std::lock_guard lock(mutex_);
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->nbytes >= nbytes && block->nbytes / 2 <= nbytes &&
          (best == blocks_.end() || block->nbytes < best->nbytes))
        best = block;
    if (best != blocks_.end()) {
      const Block block = *best;
      blocks_.erase(best);
      return {*this, block.data, block.nbytes};
    }
  }
  const Current current(*this);
  void* data = nullptr;
  int result = driver_->cuMemHostAlloc(&data, nbytes, kPortable);
  if (result != 0) {  // no more to be had: idle blocks of other sizes go back
    std::vector<Block> idle;
    {
      const std::lock_guard lock(mutex_);
      idle.swap(blocks_);
    }
    for (const Block& block : idle) driver_->cuMemFreeHost(block.data);
    result = driver_->cuMemHostAlloc(&data, nbytes, kPortable);
  }
  check(result, ("cuMemHostAlloc of " + std::to_string(nbytes) + " bytes").c_str());
  return {*this, static_cast<std::byte*>(data), nbytes};
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
  device_->blocks_.push_back({data_, nbytes_});
}

std::unique_ptr<PageLock> PageLock::try_lock(Device& device, std::byte* data, size_t nbytes) {
  const Device::Current current(device);
  if (const int error = device.driver_->cuMemHostRegister(data, nbytes, kPortable); error != 0) {
    static std::atomic<bool> told{false};
    if (!told.exchange(true))
      log_warning(
          "gradients are copied once more on their way to and from the device: shared memory cannot be "
          "page-locked: " +
          error_text(*device.driver_, error));
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

DeviceStream::DeviceStream(Device& device) : device_(&device) {
  const Device::Current current(device);
  device.check(device.driver_->cuStreamCreate(&stream_, kNonBlocking), "cuStreamCreate");
}

void DeviceStream::copy(void* to, const void* from, size_t nbytes) {
  if (nbytes == 0) return;
  const Device::Current current(*device_);
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  device_->check(device_->driver_->cuMemcpyAsync(address(to), address(from), nbytes, stream_), "cuMemcpyAsync");
}

std::shared_ptr<DeviceMark> DeviceStream::mark() { return device_->record(stream_); }

}  // namespace collective
