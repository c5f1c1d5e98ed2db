// A stand-in for the CUDA driver, for machines without a GPU: libcuda.so.1, with the functions of
// csrc/device/cuda_driver.h.
//
// It forgives little. Device memory cannot be read or written at its address, only through copies; every stream is a
// thread that takes its time, so that what does not wait for its events sees old data; copies take page-locked host
// memory only; calls without a current context, or with an event or stream of another, fail. Kernels are those of
// collective/kernels, compiled for the host, and run thread by thread. What it cannot show: speed, and whatever the
// real driver does differently.
//
//   STAND_IN_CUDA_DEVICES=2           how many there are
//   STAND_IN_CUDA_OWN=1               each rank of a node has its own, as where CUDA_VISIBLE_DEVICES differs
//   STAND_IN_CUDA_OPEN=1              device memory can be read and written at its address: as for a CUDA-aware MPI
//   STAND_IN_CUDA_FAIL=cuMemcpyAsync:3   the third call of this function fails, and so does every call after
//   STAND_IN_CUDA_REFUSE=cuIpcOpenMemHandle_v2   this function is not supported
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../collective/kernels/launch.h"

namespace {

enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kNotSupported = 801,
  kIllegalAddress = 700
};

// What an event stands for: one recording of it.
struct Recording {
  std::mutex mutex;
  std::condition_variable changed;
  bool over = false;
  void finish() {
    const std::lock_guard lock(mutex);
    over = true;
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return over; });
  }
  bool is_over() {
    const std::lock_guard lock(mutex);
    return over;
  }
};

struct Event {
  int device;
  std::mutex mutex;
  std::shared_ptr<Recording> last;  // null: never recorded
};

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  std::mt19937 random;
  int device;

  Stream(unsigned seed, int device) : random(seed), device(device) {
    std::thread([this] { run(); }).detach();  // for ever, like the process's other streams
  }
  void put(std::function<void()> work) {
    const std::lock_guard lock(mutex);
    queue.push_back(std::move(work));
    changed.notify_all();
  }
  void run() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [this] { return !queue.empty(); });
        work = std::move(queue.front());
        queue.pop_front();
      }
      if (random() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 1500));
      work();
    }
  }
};

// Where bytes are; for device memory, a second mapping beside the one at its address, which is closed.
struct Bytes {
  std::byte* data;
  size_t nbytes;
  int device;  // whose kernels reach it; -1: the host's, all do
  int file;    // that other processes map; -1: none
  std::atomic<bool> freed{false};
  Bytes(std::byte* data, size_t nbytes, int device = -1, int file = -1)
      : data(data), nbytes(nbytes), device(device), file(file) {}
  ~Bytes() {
    if (device >= 0) munmap(data, nbytes);
    if (file >= 0) close(file);
  }
};

// Part of a block, which it keeps alive.
struct Reach {
  std::shared_ptr<Bytes> bytes;
  std::byte* data = nullptr;
  explicit operator bool() const { return data != nullptr; }
  bool freed() const { return bytes->freed; }
};

struct World {
  std::mutex mutex;
  std::map<uintptr_t, std::shared_ptr<Bytes>> blocks;
  std::map<std::pair<int, uintptr_t>, std::unique_ptr<Stream>> default_streams;  // by device and handle
  std::map<std::string, int> calls;
  bool failed = false;
  bool host_is_device = false;
  int page_locks = 0;
  std::atomic<int> launches{0};
  void* captured = nullptr;  // a stream
  std::vector<std::shared_ptr<Recording>> gates;
  unsigned streams = 0;
};

World& world() {
  static auto* const the_world = new World;
  return *the_world;
}

thread_local std::vector<int> contexts;  // of devices; a context's handle is its device's number + 1

int device_count() {
  const char* const given = std::getenv("STAND_IN_CUDA_DEVICES");
  return given != nullptr ? std::atoi(given) : 2;
}

bool fails(const char* function) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  const char* const given = std::getenv("STAND_IN_CUDA_FAIL");
  if (given != nullptr && !w.failed) {
    const std::string text = given;
    const size_t colon = text.find(':');
    if (text.substr(0, colon) == function && ++w.calls[function] >= std::atoi(text.c_str() + colon + 1))
      w.failed = true;
  }
  return w.failed;
}

bool refuses(const char* function) {
  const char* const given = std::getenv("STAND_IN_CUDA_REFUSE");
  return given != nullptr && std::strcmp(given, function) == 0;
}

#define STAND_IN_BEGIN(needs_context)          \
  if (fails(__func__)) return kIllegalAddress; \
  if (refuses(__func__)) return kNotSupported; \
  if ((needs_context) && contexts.empty()) return kInvalidContext

// Where bytes can be copied from and to; null where the range is not wholly in one block.
Reach reach(uintptr_t address, size_t nbytes) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  const auto after = w.blocks.upper_bound(address);
  if (after != w.blocks.begin()) {
    const auto& [begin, bytes] = *std::prev(after);
    if (address - begin + nbytes <= bytes->nbytes) return {bytes, bytes->data + (address - begin)};
  }
  if (!w.host_is_device) return {};
  auto* const data = reinterpret_cast<std::byte*>(address);
  return {std::make_shared<Bytes>(data, nbytes), data};
}

Stream& stream_of(void* handle) {
  const auto number = reinterpret_cast<uintptr_t>(handle);
  if (number > 2) return *static_cast<Stream*>(handle);
  World& w = world();
  const std::lock_guard lock(w.mutex);
  auto& stream = w.default_streams[{contexts.back(), number < 2 ? 0 : 2}];
  if (stream == nullptr) stream = std::make_unique<Stream>(++w.streams, contexts.back());
  return *stream;
}

// Device memory, at an address where nobody can read or write it unless that is asked for.
int map_device(uintptr_t* address, size_t nbytes, int file) {
  const int access = std::getenv("STAND_IN_CUDA_OPEN") != nullptr ? PROT_READ | PROT_WRITE : PROT_NONE;
  void* const closed = mmap(nullptr, nbytes, access, MAP_SHARED, file, 0);
  void* const alias = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (closed == MAP_FAILED || alias == MAP_FAILED) return kInvalidValue;
  *address = reinterpret_cast<uintptr_t>(closed);
  const std::lock_guard lock(world().mutex);
  world().blocks[*address] = std::make_shared<Bytes>(static_cast<std::byte*>(alias), nbytes, contexts.back(), file);
  return kSuccess;
}

// A kernel's argument as the host can use it. What must not be there ends the process: nobody could catch it.
template <typename T>
T* resolve(T* pointer, int device) {
  if (pointer == nullptr) return nullptr;
  const Reach there = reach(reinterpret_cast<uintptr_t>(pointer), 1);
  if (!there || (there.bytes->device >= 0 && there.bytes->device != device)) {
    std::fputs("stand-in for CUDA: a kernel was given memory that its device does not reach\n", stderr);
    std::abort();
  }
  return reinterpret_cast<T*>(there.data);
}

struct Handle {
  int pid, file;
  size_t nbytes;
  char rest[48];
};
static_assert(sizeof(Handle) == 64);

struct Module {
  void* library;
  void (*run)(void (*kernel)(collective::Launch), const collective::Launch*, unsigned grid, unsigned block);
};

struct Kernel {
  Module* module;
  void (*function)(collective::Launch);
};

// Runs when its stream gets there, so what it is given must still be there.
void run_kernel(const Kernel& kernel, collective::Launch what, unsigned grid, unsigned block, int device) {
  for (int i = 0; i < what.piece_count; ++i) {
    what.pieces[i].from = resolve(what.pieces[i].from, device);
    what.pieces[i].to = resolve(what.pieces[i].to, device);
  }
  for (int i = 0; i < what.source_count; ++i) what.sources[i] = resolve(what.sources[i], device);
  for (int i = 0; i < what.target_count; ++i) what.targets[i] = resolve(what.targets[i], device);
  kernel.module->run(kernel.function, &what, grid, block);
}

}  // namespace

extern "C" {

int standInWrite(uintptr_t to, const void* from, size_t nbytes, void* stream);
int standInWait(void* stream);
int standInRead(void* to, uintptr_t from, size_t nbytes, void* stream);
int cuStreamCreate(void** stream, unsigned);

int cuInit(unsigned) { return device_count() > 0 ? kSuccess : 100; }
int cuGetErrorName(int error, const char** name) {
  *name = error == kIllegalAddress ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
  return kSuccess;
}
int cuGetErrorString(int, const char** text) {
  *text = "the stand-in's error";
  return kSuccess;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
int cuDeviceGetCount(int* count) {
  *count = device_count();
  return kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= device_count()) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}
int cuDeviceGetName(char* name, int length, int device) {
  std::snprintf(name, static_cast<size_t>(length), "stand-in %d", device);
  return kSuccess;
}
int cuDeviceGetPCIBusId(char* id, int length, int device) {
  const char* rank = nullptr;
  if (std::getenv("STAND_IN_CUDA_OWN") != nullptr)
    for (const char* const launchers : {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"})
      if (rank == nullptr) rank = std::getenv(launchers);
  const int first = rank != nullptr ? std::atoi(rank) * device_count() : 0;
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", first + device);
  return kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  *value = attribute == 16 ? 3 : attribute == 75 ? 9 : 0;  // multiprocessors, compute capability 9.0
  return kSuccess;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  thread_local int own = 0;
  std::swap(own, *mode);
  return kSuccess;
}
int cuStreamIsCapturing(void* stream, int* status) {
  STAND_IN_BEGIN(true);
  *status = stream != nullptr && stream == world().captured ? 1 : 0;
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(static_cast<uintptr_t>(device) + 1);
  return kSuccess;
}
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1);
  return kSuccess;
}
int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = reinterpret_cast<void*>(static_cast<uintptr_t>(contexts.back()) + 1);
  contexts.pop_back();
  return kSuccess;
}

int cuMemAlloc_v2(uintptr_t* address, size_t nbytes) {
  STAND_IN_BEGIN(true);
  const int file = memfd_create("device", MFD_CLOEXEC);
  if (nbytes == 0 || file < 0 || ftruncate(file, static_cast<off_t>(nbytes)) != 0) return kInvalidValue;
  const int result = map_device(address, nbytes, file);
  if (result == kSuccess) std::memset(world().blocks[*address]->data, 0xA5, nbytes);
  return result;
}
int cuMemFree_v2(uintptr_t address) {
  STAND_IN_BEGIN(true);
  const std::lock_guard lock(world().mutex);
  const auto found = world().blocks.find(address);
  if (found == world().blocks.end()) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), found->second->nbytes);
  found->second->freed = true;
  world().blocks.erase(found);
  return kSuccess;
}
int cuMemHostAlloc(void** data, size_t nbytes, unsigned) {
  STAND_IN_BEGIN(true);
  *data = std::aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096);
  std::memset(*data, 0x5A, nbytes);
  const std::lock_guard lock(world().mutex);
  world().blocks[reinterpret_cast<uintptr_t>(*data)] = std::make_shared<Bytes>(static_cast<std::byte*>(*data), nbytes);
  return kSuccess;
}
int cuMemFreeHost(void* data) {
  STAND_IN_BEGIN(true);
  const std::lock_guard lock(world().mutex);
  const auto found = world().blocks.find(reinterpret_cast<uintptr_t>(data));
  if (found == world().blocks.end()) return kInvalidValue;
  found->second->freed = true;  // and stays, for copies that should not be there any more
  world().blocks.erase(found);
  return kSuccess;
}
int cuMemHostRegister_v2(void* data, size_t nbytes, unsigned) {
  STAND_IN_BEGIN(true);
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + nbytes + kPage - 1) / kPage * kPage;
  const std::lock_guard lock(world().mutex);
  for (const auto& [at, bytes] : world().blocks)
    if (at < end && at + bytes->nbytes > begin) return 712;  // CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
  world().blocks[begin] = std::make_shared<Bytes>(reinterpret_cast<std::byte*>(begin), end - begin);
  ++world().page_locks;
  return kSuccess;
}
int cuMemHostUnregister(void* data) {
  STAND_IN_BEGIN(true);
  const std::lock_guard lock(world().mutex);
  if (world().blocks.erase(reinterpret_cast<uintptr_t>(data) / 4096 * 4096) == 0) return kInvalidValue;
  --world().page_locks;
  return kSuccess;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}
int cuStreamCreateWithPriority(void** stream, unsigned, int priority) {
  if (priority > 0 || priority < -5) return kInvalidValue;
  return cuStreamCreate(stream, 0);
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  STAND_IN_BEGIN(true);
  auto* const e = static_cast<Event*>(event);
  std::shared_ptr<Recording> recording;
  {
    const std::lock_guard lock(e->mutex);
    recording = e->last;
  }
  if (recording != nullptr) stream_of(stream).put([recording] { recording->wait(); });
  return kSuccess;
}

// A handle: which process, and the number of its file there.
int cuIpcGetMemHandle(Handle* handle, uintptr_t address) {
  STAND_IN_BEGIN(true);
  const std::lock_guard lock(world().mutex);
  const auto found = world().blocks.find(address);
  if (found == world().blocks.end() || found->second->file < 0) return kInvalidValue;
  *handle = {getpid(), found->second->file, found->second->nbytes, {}};
  return kSuccess;
}
int cuIpcOpenMemHandle_v2(uintptr_t* address, Handle handle, unsigned flags) {
  STAND_IN_BEGIN(true);
  if (flags != 1) return kInvalidValue;
  if (handle.pid == getpid()) return kInvalidContext;
  const std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  return file < 0 ? static_cast<int>(kInvalidHandle) : map_device(address, handle.nbytes, file);
}
int cuIpcCloseMemHandle(uintptr_t address) { return cuMemFree_v2(address); }

int cuModuleLoadData(void** module, const void* image) {
  STAND_IN_BEGIN(true);
  const auto* const header = static_cast<const Elf64_Ehdr*>(image);
  if (std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return 200;  // CUDA_ERROR_INVALID_IMAGE
  const size_t nbytes = header->e_shoff + size_t{header->e_shnum} * header->e_shentsize;
  const int file = memfd_create("kernels", 0);
  if (write(file, image, nbytes) != static_cast<ssize_t>(nbytes)) return kInvalidValue;
  void* const library = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return 200;
  *module = new Module{library, reinterpret_cast<decltype(Module::run)>(dlsym(library, "collective_run"))};
  return kSuccess;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  STAND_IN_BEGIN(true);
  auto* const loaded = static_cast<Module*>(module);
  void* const found = dlsym(loaded->library, name);
  if (found == nullptr) return 500;  // CUDA_ERROR_NOT_FOUND
  *function = new Kernel{loaded, reinterpret_cast<decltype(Kernel::function)>(found)};
  return kSuccess;
}
int cuLaunchKernel(void* function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra) {
  STAND_IN_BEGIN(true);
  const bool is_buffer = arguments == nullptr && extra[0] == reinterpret_cast<void*>(1) &&
                         extra[2] == reinterpret_cast<void*>(2) && extra[4] == nullptr;
  if (!is_buffer || *static_cast<size_t*>(extra[3]) != sizeof(collective::Launch)) return kInvalidValue;
  if (grid * grid_y * grid_z * block * block_y * block_z != grid * block || grid == 0 || block > 1024 || shared != 0)
    return kInvalidValue;
  if (stream_of(stream).device != contexts.back()) return kInvalidHandle;
  const auto what = *static_cast<const collective::Launch*>(extra[1]);
  const Kernel kernel = *static_cast<Kernel*>(function);
  ++world().launches;
  stream_of(stream).put([=, device = contexts.back()] { run_kernel(kernel, what, grid, block, device); });
  return kSuccess;
}

int cuStreamCreate(void** stream, unsigned) {
  STAND_IN_BEGIN(true);
  unsigned seed = 0;
  {
    const std::lock_guard lock(world().mutex);
    seed = ++world().streams;
  }
  *stream = new Stream(seed, contexts.back());
  return kSuccess;
}
int cuMemcpyAsync(uintptr_t to, uintptr_t from, size_t nbytes, void* stream) {
  STAND_IN_BEGIN(true);
  const Reach target = reach(to, nbytes), source = reach(from, nbytes);
  if (!target || !source) return kInvalidValue;
  if (stream_of(stream).device != contexts.back()) return kInvalidHandle;
  stream_of(stream).put([=] {
    if (target.freed() || source.freed()) {
      std::fputs("stand-in for CUDA: a copy to or from memory that was freed\n", stderr);
      std::abort();
    }
    std::memcpy(target.data, source.data, nbytes);
  });
  return kSuccess;
}
// The synchronous copies take any memory of the host, and their time.
int cuMemcpyHtoD_v2(uintptr_t to, const void* from, size_t nbytes) {
  STAND_IN_BEGIN(true);
  const int error = standInWrite(to, from, nbytes, nullptr);
  return error != kSuccess ? error : standInWait(nullptr);
}
int cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t nbytes) {
  STAND_IN_BEGIN(true);
  return standInRead(to, from, nbytes, nullptr);
}
int cuEventCreate(void** event, unsigned) {
  STAND_IN_BEGIN(true);
  *event = new Event{contexts.back(), {}, {}};
  return kSuccess;
}
int cuEventRecord(void* event, void* stream) {
  STAND_IN_BEGIN(true);
  if (static_cast<Event*>(event)->device != stream_of(stream).device) return kInvalidHandle;
  auto recording = std::make_shared<Recording>();
  {
    auto* const e = static_cast<Event*>(event);
    const std::lock_guard lock(e->mutex);
    e->last = recording;
  }
  stream_of(stream).put([recording] { recording->finish(); });
  return kSuccess;
}
int cuEventQuery(void* event) {
  STAND_IN_BEGIN(true);
  auto* const e = static_cast<Event*>(event);
  const std::lock_guard lock(e->mutex);
  return e->last == nullptr || e->last->is_over() ? kSuccess : kNotReady;
}
// ---- for tests: what kernels of a user would do ----

// How many ranges of host memory cuMemHostRegister has locked.
int standInPageLocks() { return world().page_locks; }
// Bytes of host memory that are page-locked, by cuMemHostAlloc or by cuMemHostRegister.
size_t standInPinned() {
  size_t nbytes = 0;
  const std::lock_guard lock(world().mutex);
  for (const auto& [at, bytes] : world().blocks)
    if (bytes->device < 0) nbytes += bytes->nbytes;
  return nbytes;
}
// How many kernels have been launched.
int standInLaunches() { return world().launches; }
// This stream is being captured; null: none.
void standInCapture(void* stream) { world().captured = stream; }
// For the stand-in for NCCL: queues this; and where the bytes are that a device has at this address, or null.
void standInQueue(void* stream, void (*work)(void*), void* argument) {
  stream_of(stream).put([=] { work(argument); });
}
void* standInReach(uintptr_t address, size_t nbytes) { return reach(address, nbytes).data; }
// From now on all memory of the host counts as a device's.
void standInTakeHost(int yes) { world().host_is_device = yes != 0; }
// Everything queued on the stream after this waits for the next standInRelease().
void standInHold(void* stream) {
  const auto gate = std::make_shared<Recording>();
  {
    const std::lock_guard lock(world().mutex);
    world().gates.push_back(gate);
  }
  stream_of(stream).put([gate] { gate->wait(); });
}
void standInRelease() {
  const std::lock_guard lock(world().mutex);
  for (const auto& gate : world().gates) gate->finish();
  world().gates.clear();
}
// Queues a write of these bytes, which are kept.
int standInWrite(uintptr_t to, const void* from, size_t nbytes, void* stream) {
  const Reach target = reach(to, nbytes);
  if (!target) return kInvalidValue;
  const auto* const begin = static_cast<const std::byte*>(from);
  stream_of(stream).put([target, bytes = std::vector<std::byte>(begin, begin + nbytes)] {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    if (!bytes.empty()) std::memcpy(target.data, bytes.data(), bytes.size());
  });
  return kSuccess;
}
int standInWait(void* stream) {
  const auto recording = std::make_shared<Recording>();
  stream_of(stream).put([recording] { recording->finish(); });
  recording->wait();
  return kSuccess;
}
// Waits for the stream, then reads.
int standInRead(void* to, uintptr_t from, size_t nbytes, void* stream) {
  const Reach source = reach(from, nbytes);
  if (!source) return kInvalidValue;
  const auto recording = std::make_shared<Recording>();
  stream_of(stream).put([=] {
    std::memcpy(to, source.data, nbytes);
    recording->finish();
  });
  recording->wait();
  return kSuccess;
}

}  // extern "C"
