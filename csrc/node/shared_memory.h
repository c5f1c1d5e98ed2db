// Memory of equal size for every rank of a node, mapped by all of them (see shared_memory_creation.h), and the counters
// by which they take turns in it.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace collective {

// Two cache lines: processors fetch lines in pairs, and some have lines of 128 bytes.
inline constexpr size_t kLineBytes = 128;

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// A range of addresses, unmapped on destruction.
class Mapping {
 public:
  Mapping() = default;
  Mapping(void* address, size_t nbytes) : address_(address), nbytes_(nbytes) {}
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();
  std::byte* data() const { return static_cast<std::byte*>(address_); }

 private:
  void* address_ = nullptr;
  size_t nbytes_ = 0;
};

class SharedMemory {
 public:
  // Memory that is mapped already: parts[r] is rank r's. It stays the caller's, and must be zero.
  SharedMemory(int rank, std::vector<std::byte*> parts, size_t nbytes);

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(parts_.size()); }
  size_t nbytes() const { return nbytes_; }
  // Zero at first, aligned to 2 MiB (huge pages, where the system gives them).
  std::byte* part(int rank) const { return parts_[static_cast<size_t>(rank)]; }
  // What its ranks are called: see rank_names.h.
  const std::vector<int>& job_ranks() const { return job_ranks_; }
  // The IDs of their processes, as this one sees them; none where the memory is the caller's.
  const std::vector<pid_t>& pids() const { return pids_; }

 private:
  friend class SharedMemoryCreation;
  int rank_;
  std::vector<std::byte*> parts_;
  size_t nbytes_;
  std::vector<int> job_ranks_;
  std::vector<pid_t> pids_;
  std::vector<Mapping> mappings_;  // none where the memory is the caller's
};

// One counter of each rank at the same place of every part: 64 bits that only grow, alone on their line, written by
// their rank and watched by all.
class Counters {
 public:
  Counters(const SharedMemory& memory, size_t offset);

  // What this rank has published.
  uint64_t own() const { return own_; }
  // All reads and writes of this rank before this are complete for whoever sees the new value.
  void publish(uint64_t value) {
    own_ = value;
    at(rank_).store(value, std::memory_order_release);  // pairs with the loads below
  }
  // Whether this rank has published at least `value`.
  bool reached(int rank, uint64_t value) const {
    return at(static_cast<size_t>(rank)).load(std::memory_order_acquire) >= value;  // pairs with publish()
  }
  // Whether every rank has published at least `value`. Resumes where it last stopped, so ask for one value until it is
  // reached, and only then for greater ones.
  bool all_reached(uint64_t value) {
    for (; next_ < counters_.size(); ++next_)
      if (at(next_).load(std::memory_order_acquire) < value) return false;  // pairs with the store in publish()
    next_ = 0;
    return true;
  }
  // The same from the start, for callers that only look on.
  bool all_have(uint64_t value) const {
    for (size_t rank = 0; rank < counters_.size(); ++rank)
      if (!reached(static_cast<int>(rank), value)) return false;
    return true;
  }
  // After all_reached() has returned false: the first rank that is missing, by its number in the job.
  int missing() const { return job_ranks_[next_]; }
  const std::vector<int>& job_ranks() const { return job_ranks_; }

 private:
  static_assert(std::atomic_ref<uint64_t>::is_always_lock_free, "processes share the counters");
  std::atomic_ref<uint64_t> at(size_t rank) const { return std::atomic_ref<uint64_t>(*counters_[rank]); }
  size_t rank_;
  size_t next_ = 0;
  uint64_t own_ = 0;
  std::vector<uint64_t*> counters_;
  std::vector<int> job_ranks_;
};

}  // namespace collective
