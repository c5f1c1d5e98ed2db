// How the ranks of a node come to share memory.
//
// A rank's part is an anonymous file (memfd_create), which the others open through /proc/PID/fd/N: no name that could
// clash or be left behind, no limit of /dev/shm, and closed to other users. Two messages to every peer make it:
//
//     offer:    pid, fd, a random cookie        each rank has reserved, mapped and touched its own part
//     verdict:  could I map every part?         each rank has mapped the others' parts and found their cookies there
//
// Every rank sees the same offers and the same verdicts, so either all have the memory, or none has and all know the
// same reason: ranks in separate PID namespaces (whose cookie would be another process's), a kernel that forbids it, no
// memory left.
//
// limits:   all pages are there before the first use (never a SIGBUS), so nbytes are taken from the machine at once
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/operation.h"
#include "messages/comm.h"
#include "messages/reports.h"
#include "node/shared_memory.h"

namespace collective {

// Collective over `comm`, whose ranks are all on one node. nbytes: of each rank's part, the same everywhere. `tag`
// belongs to this creation alone while it lasts. Its first step reserves the memory and touches it, at some 5 GB/s, and
// so is long; so may be the one that maps the others' parts.
class SharedMemoryCreation final : public Operation {
 public:
  SharedMemoryCreation(const Comm& comm, int tag, size_t nbytes);
  ~SharedMemoryCreation() override;

  // For a rank that has nobody to share with, in private memory. Throws where there is none.
  static SharedMemory of_one_rank(const Comm& comm, size_t nbytes);

  Step step() override;
  std::string describe() const override;

  // Once done: the memory, or why there is none.
  std::optional<SharedMemory> take();
  const std::string& why() const { return why_; }

 private:
  struct Report {
    uint64_t nbytes;
    uint64_t cookie[2];
    int64_t pid;
    int32_t fd;
    char failure[220];  // empty: all is well so far
  };
  enum class Phase { kReserve, kOffers, kVerdicts, kDone };

  void reserve_own();
  void map_peers();
  void map_peer(int peer);
  void close_fd();

  const Comm* comm_;
  size_t nbytes_;
  Phase phase_ = Phase::kReserve;
  int fd_ = -1;
  Reports<Report> reports_;
  std::vector<Mapping> mappings_;  // by rank
  std::string why_;
};

// The same, blocking. Returns nothing, on all ranks, where they cannot share memory; `why` then gives the reason and
// names the rank. Throws kTimeout, naming a missing rank, when one does not take part in time.
std::optional<SharedMemory> try_share_memory(const Comm& comm, int tag, size_t nbytes, std::chrono::seconds timeout,
                                             std::string& why);

}  // namespace collective
