// A stand-in for NCCL beside the one for the CUDA driver: libnccl.so.2, with the functions of
// csrc/device/nccl_library.h, for the ranks of one node.
//
// Like NCCL's, its all-reduces run on a stream and occupy it until all ranks have come; ranks that do not call in the
// same order are aborted, with a message. Communicators must not block, and what they do in the background takes its
// time.
//
//   STAND_IN_NCCL_FAIL=ncclAllReduce   this function fails; in the background do "connect", the making of a
//                                      communicator, and "later", an all-reduce that NCCL has taken in
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device/nccl_library.h"

// Of the stand-in for the driver.
extern "C" void standInQueue(void* stream, void (*work)(void*), void* argument);
extern "C" void* standInReach(uintptr_t address, size_t nbytes);

namespace {

using collective::NcclConfig;
using collective::NcclId;

enum Result { kSuccess = 0, kSystemError = 2, kInvalidArgument = 4, kInvalidUsage = 5, kInProgress = 7 };
constexpr int kMost = 8;
constexpr size_t kAreaBytes = size_t{64} << 20, kHeaderBytes = 4096;

// What the ranks share, before an area of each.
struct Shared {
  std::atomic<int> joined, aborted;
  struct Rank {
    std::atomic<uint64_t> wrote, read;  // all-reduces
    size_t count;
    int dtype;
  } ranks[kMost];
};
static_assert(sizeof(Shared) <= kHeaderBytes);

struct Identity {
  int pid, file;
};

struct Comm {
  int rank, size;
  Shared* shared = nullptr;
  uint64_t calls = 0;
  std::atomic<int> state{kInProgress}, pending{0};
  std::atomic<bool> aborted{false};

  std::byte* area(int of) const {
    return reinterpret_cast<std::byte*>(shared) + kHeaderBytes + static_cast<size_t>(of) * kAreaBytes;
  }
  template <typename Reached>
  bool wait(const Reached& reached) const {
    for (int i = 0; i < size; ++i)
      while (!reached(shared->ranks[i])) {
        if (aborted) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    return true;
  }
};

std::atomic<int> all_calls{0}, under_way{0};

bool fails(const char* what) {
  const char* const given = std::getenv("STAND_IN_NCCL_FAIL");
  return given != nullptr && std::strcmp(given, what) == 0;
}

void take_time() {
  thread_local std::mt19937 random(static_cast<unsigned>(getpid()));
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
}

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  explicit BFloat16(float value) {
    uint32_t wide = 0;
    std::memcpy(&wide, &value, sizeof wide);
    bits = static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
  }
};

template <typename T, typename Wide>
void sum(const Comm& comm, size_t count, std::byte* out) {
  auto* const result = reinterpret_cast<T*>(out);
  for (size_t i = 0; i < count; ++i) {
    Wide total{};
    for (int rank = 0; rank < comm.size; ++rank) total += reinterpret_cast<const T*>(comm.area(rank))[i];
    result[i] = T(total);
  }
}

struct Call {
  Comm* comm;
  const void* in;
  void* out;
  size_t count;
  int dtype;
  uint64_t number;
  bool fails;  // and does not end
};

size_t size_of(int dtype) {
  constexpr size_t kSizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return kSizes[dtype];
}

// On the stream.
void run(void* argument) {
  const std::unique_ptr<Call> call(static_cast<Call*>(argument));
  Comm& comm = *call->comm;
  Shared::Rank& own = comm.shared->ranks[comm.rank];
  const auto done = [&] {
    --comm.pending;
    --under_way;
  };
  if (!comm.wait([&](const Shared::Rank& rank) { return rank.read >= call->number && !call->fails; })) return done();
  const size_t nbytes = call->count * size_of(call->dtype);
  std::memcpy(comm.area(comm.rank), call->in, nbytes);
  own.count = call->count;
  own.dtype = call->dtype;
  own.wrote = call->number + 1;
  if (!comm.wait([&](const Shared::Rank& rank) { return rank.wrote > call->number; })) return done();
  for (int rank = 0; rank < comm.size; ++rank)
    if (comm.shared->ranks[rank].count != call->count || comm.shared->ranks[rank].dtype != call->dtype) {
      std::fputs("stand-in for NCCL: ranks call in different orders\n", stderr);
      std::abort();
    }
  auto* const out = static_cast<std::byte*>(call->out);
  switch (call->dtype) {
    case 0: sum<int8_t, int8_t>(comm, call->count, out); break;
    case 1: sum<uint8_t, uint8_t>(comm, call->count, out); break;
    case 2: sum<int32_t, int32_t>(comm, call->count, out); break;
    case 4: sum<int64_t, int64_t>(comm, call->count, out); break;
    case 6: sum<_Float16, float>(comm, call->count, out); break;
    case 7: sum<float, float>(comm, call->count, out); break;
    case 8: sum<double, double>(comm, call->count, out); break;
    case 9: sum<BFloat16, float>(comm, call->count, out); break;
    default: std::abort();
  }
  own.read = call->number + 1;
  done();
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  *version = 22900;
  return kSuccess;
}
const char* ncclGetErrorString(int) { return "the stand-in's error"; }
const char* ncclGetLastError(void*) { return ""; }

int ncclGetUniqueId(NcclId* id) {
  if (fails(__func__)) return kSystemError;
  const Identity own{getpid(), memfd_create("nccl", MFD_CLOEXEC)};
  if (own.file < 0 || ftruncate(own.file, static_cast<off_t>(kHeaderBytes + kMost * kAreaBytes)) != 0)
    return kSystemError;
  std::memcpy(id->bytes, &own, sizeof own);
  return kSuccess;
}

int ncclCommInitRankConfig(void** handle, int size, NcclId id, int rank, NcclConfig* config) {
  if (fails(__func__)) return kSystemError;
  if (config == nullptr || config->magic != 0xcafebeef || config->blocking != 0 || size > kMost)
    return kInvalidArgument;
  Identity from{};
  std::memcpy(&from, id.bytes, sizeof from);
  auto* const comm = new Comm{rank, size};
  *handle = comm;
  ++comm->pending;
  std::thread([comm, from] {
    take_time();
    const int file = open(("/proc/" + std::to_string(from.pid) + "/fd/" + std::to_string(from.file)).c_str(), O_RDWR);
    void* const at = mmap(nullptr, kHeaderBytes + kMost * kAreaBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED || fails("connect")) {
      comm->state = kSystemError;
    } else {
      comm->shared = static_cast<Shared*>(at);
      ++comm->shared->joined;
      while (comm->shared->joined < comm->size && !comm->aborted)
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      comm->state = kSuccess;
    }
    --comm->pending;
  }).detach();
  return kInProgress;
}

int ncclCommGetAsyncError(void* handle, int* state) {
  *state = static_cast<Comm*>(handle)->state;
  return kSuccess;
}

// Ends when all ranks have called it, as NCCL's may. What is in flight may still look at it, so it stays.
int ncclCommAbort(void* handle) {
  auto* const comm = static_cast<Comm*>(handle);
  comm->aborted = true;
  while (comm->pending > 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
  if (comm->shared == nullptr) return kSuccess;
  ++comm->shared->aborted;
  while (comm->shared->aborted < comm->size) std::this_thread::sleep_for(std::chrono::microseconds(50));
  return kSuccess;
}

int ncclAllReduce(const void* in, void* out, size_t count, int dtype, int op, void* handle, void* stream) {
  if (fails(__func__)) return kSystemError;
  auto* const comm = static_cast<Comm*>(handle);
  if (comm->state != kSuccess) return kInvalidUsage;
  if (op != 0 || dtype < 0 || dtype > 9 || count * size_of(dtype) > kAreaBytes) return kInvalidArgument;
  const size_t nbytes = count * size_of(dtype);
  const void* const from = standInReach(reinterpret_cast<uintptr_t>(in), nbytes);
  void* const to = standInReach(reinterpret_cast<uintptr_t>(out), nbytes);
  if (from == nullptr || to == nullptr) return kInvalidArgument;
  ++all_calls;
  ++under_way;
  ++comm->pending;
  auto* const call = new Call{comm, from, to, count, dtype, comm->calls++, fails("later")};
  const bool call_fails = call->fails;
  if (call->number % 3 == 0 && !call_fails) {
    standInQueue(stream, run, call);
    return kSuccess;
  }
  comm->state = kInProgress;
  std::thread([=] {
    take_time();
    standInQueue(stream, run, call);
    comm->state = kSuccess;
    if (!call_fails) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    comm->state = kSystemError;
  }).detach();
  return kInProgress;
}

// ---- for tests ----

// How many all-reduces have been called.
int standInNcclCalls() { return all_calls; }
// And how many of them are not complete.
int standInNcclUnderWay() { return under_way; }

}  // extern "C"
