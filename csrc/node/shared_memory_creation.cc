#include "node/shared_memory_creation.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; an older kernel answers EINVAL
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace collective {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// From this size on a part consists of whole huge pages.
constexpr size_t kHugeFrom = size_t{256} << 10;
constexpr char kFileName[] = "collective";
constexpr size_t kCookieBytes = 16;

size_t small_page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// What is mapped: the part, and its cookie behind it.
size_t file_bytes(size_t nbytes) {
  return round_up(nbytes + kCookieBytes, nbytes < kHugeFrom ? small_page() : kHugePage);
}

std::string error_text(const std::string& call) { return call + ": " + std::strerror(errno); }

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// At an address that huge pages can serve: by itself the kernel aligns mappings of files to small pages only.
Mapping map_file(int fd, size_t length) {
  void* reserved = mmap(nullptr, length + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) throw Failure(error_text("mmap"));
  std::byte* const first = static_cast<std::byte*>(reserved);
  std::byte* const begin = first + (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
  if (mmap(begin, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
    const std::string text = error_text("mmap");
    munmap(reserved, length + kHugePage);
    throw Failure(text);
  }
  if (begin > first) munmap(first, static_cast<size_t>(begin - first));
  munmap(begin + length, kHugePage - static_cast<size_t>(begin - first));
  // Advice only: with small pages everything works as well, only more slowly.
  if (length >= kHugePage) madvise(begin, length, MADV_HUGEPAGE);
  return {begin, length};
}

// Populates all pages now, by their owner, so that they are near its core, and so that a shortage of memory is an error
// here instead of a SIGBUS at some later access.
void reserve_pages(std::byte* begin, size_t nbytes, int fd) {
  // Huge pages even where shmem_enabled, which governs files in memory, says "never" (the default of most systems): one
  // small page of each is populated, then the kernel is asked to make it huge. Measured, 64 MiB: 5 ms; small pages
  // alone, 60-80.
  for (size_t at = 0; at + kHugePage <= nbytes; at += kHugePage)
    if (madvise(begin + at, small_page(), MADV_POPULATE_WRITE) != 0) break;
  // Advice only, in Linux 6.1 and later: with small pages everything works as well.
  if (nbytes >= kHugePage) madvise(begin, nbytes, MADV_COLLAPSE);
  if (madvise(begin, nbytes, MADV_POPULATE_WRITE) == 0) return;
  if (errno != EINVAL) throw Failure(error_text("MADV_POPULATE_WRITE"));
  const int error = posix_fallocate(fd, 0, static_cast<off_t>(nbytes));
  if (error != 0) throw Failure(std::string("posix_fallocate: ") + std::strerror(error));
}

}  // namespace

SharedMemoryCreation::SharedMemoryCreation(const Comm& comm, int tag, size_t nbytes)
    : comm_(&comm), nbytes_(nbytes), reports_(comm, tag) {
  mappings_.resize(static_cast<size_t>(comm.size()));
}

SharedMemoryCreation::~SharedMemoryCreation() { close_fd(); }

void SharedMemoryCreation::close_fd() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void SharedMemoryCreation::reserve_own() {
  fd_ = memfd_create(kFileName, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd_ < 0) throw Failure(error_text("memfd_create"));
  const size_t nbytes = file_bytes(nbytes_);
  if (ftruncate(fd_, static_cast<off_t>(nbytes)) != 0) throw Failure(error_text("ftruncate"));
  // From now on nobody can shorten it, which would turn a peer's access into a SIGBUS.
  if (fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) throw Failure(error_text("F_ADD_SEALS"));
  Mapping mapping = map_file(fd_, nbytes);
  reserve_pages(mapping.data(), nbytes, fd_);
  std::random_device random;
  for (uint64_t& word : reports_.own().cookie) word = uint64_t{random()} << 32 | random();
  std::memcpy(mapping.data() + nbytes_, reports_.own().cookie, kCookieBytes);
  mappings_[static_cast<size_t>(comm_->rank())] = std::move(mapping);
}

void SharedMemoryCreation::map_peer(int peer) {
  const Report& report = reports_.all()[static_cast<size_t>(peer)];
  const std::string path = "/proc/" + std::to_string(report.pid) + "/fd/" + std::to_string(report.fd);
  // Behind the path there may be anything, if that PID is another process here: look before opening it.
  char link[64] = {};
  if (readlink(path.c_str(), link, sizeof link - 1) < 0) throw Failure(error_text(path));
  if (std::string(link).rfind(std::string("/memfd:") + kFileName, 0) != 0)
    throw Failure(path + " is another file: the ranks see different processes");
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) throw Failure(error_text(path));
  try {
    struct stat status{};
    if (fstat(fd, &status) != 0) throw Failure(error_text("fstat"));
    const size_t nbytes = file_bytes(nbytes_);
    if (static_cast<size_t>(status.st_size) != nbytes)
      throw Failure(path + " has another size: the ranks see different processes");
    Mapping mapping = map_file(fd, nbytes);
    if (std::memcmp(mapping.data() + nbytes_, report.cookie, kCookieBytes) != 0)
      throw Failure(path + " has another cookie: the ranks see different processes");
    // Advice only: otherwise each page's first use faults into the kernel.
    madvise(mapping.data(), nbytes, MADV_POPULATE_WRITE);
    mappings_[static_cast<size_t>(peer)] = std::move(mapping);
  } catch (...) {
    close(fd);
    throw;
  }
  close(fd);
}

void SharedMemoryCreation::map_peers() {
  for (int peer = 0; peer < comm_->size(); ++peer)
    if (peer != comm_->rank()) map_peer(peer);
}

Step SharedMemoryCreation::step() {
  switch (phase_) {
    case Phase::kReserve:
      reports_.attempt([this] { reserve_own(); });
      reports_.own().nbytes = nbytes_;
      reports_.own().pid = getpid();
      reports_.own().fd = fd_;
      reports_.exchange();
      phase_ = Phase::kOffers;
      return Step::kMoved;
    case Phase::kOffers:
      if (!reports_.exchanged()) return Step::kIdle;
      for (const Report& report : reports_.all())
        if (report.nbytes != nbytes_)
          throw Error(ErrorCode::kInternal, "shared memory: one rank asked for " + std::to_string(nbytes_) +
                                                " bytes, another for " + std::to_string(report.nbytes));
      why_ = reports_.failure();
      if (!why_.empty()) {
        phase_ = Phase::kDone;
        break;
      }
      reports_.attempt([this] { map_peers(); });
      reports_.exchange();
      phase_ = Phase::kVerdicts;
      return Step::kMoved;
    case Phase::kVerdicts:
      if (!reports_.exchanged()) return Step::kIdle;
      why_ = reports_.failure();
      phase_ = Phase::kDone;
      break;
    case Phase::kDone: break;
  }
  close_fd();  // everybody has mapped it, or nobody will
  if (!why_.empty()) mappings_.clear();
  return Step::kDone;
}

SharedMemory SharedMemoryCreation::of_one_rank(const Comm& comm, size_t nbytes) {
  void* const part = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (part == MAP_FAILED)
    throw Error(ErrorCode::kInternal, "out of memory: " + std::to_string(nbytes) + " bytes were requested");
  SharedMemory memory(comm.rank(), {static_cast<std::byte*>(part)}, nbytes);
  memory.job_ranks_ = comm.names().job_ranks();
  memory.pids_ = {getpid()};
  memory.mappings_.emplace_back(part, nbytes);
  return memory;
}

std::optional<SharedMemory> SharedMemoryCreation::take() {
  if (phase_ != Phase::kDone || mappings_.empty()) return std::nullopt;
  std::vector<std::byte*> parts;
  for (const Mapping& mapping : mappings_) parts.push_back(mapping.data());
  SharedMemory memory(comm_->rank(), std::move(parts), nbytes_);
  memory.job_ranks_ = comm_->names().job_ranks();
  for (const Report& report : reports_.all()) memory.pids_.push_back(static_cast<pid_t>(report.pid));
  memory.mappings_ = std::exchange(mappings_, {});
  return memory;
}

std::string SharedMemoryCreation::describe() const {
  if (phase_ == Phase::kReserve) return "reserves shared memory";
  return "shared memory: waits for rank " + std::to_string(reports_.missing()) +
         (phase_ == Phase::kOffers ? " to offer its part" : " to map the others' parts");
}

std::optional<SharedMemory> try_share_memory(const Comm& comm, int tag, size_t nbytes, std::chrono::seconds timeout,
                                             std::string& why) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + timeout;
  SharedMemoryCreation creation(comm, tag, nbytes);
  for (;;) {
    const Step step = creation.step();
    if (step == Step::kDone) break;
    if (step == Step::kMoved) continue;
    if (Clock::now() > deadline) throw Error(ErrorCode::kTimeout, creation.describe());
    sched_yield();
  }
  why = creation.why();
  return creation.take();
}

}  // namespace collective
