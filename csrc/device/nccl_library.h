// The functions of NCCL that are used here, loaded where the user asks for it: building, and running without it, need
// nothing of it. Declared after its user guide (NVIDIA NCCL 2.14, which was the first with communicators that do not
// block, and later). A result is an int, every handle a pointer.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace collective {

// ncclUniqueId: what the ranks of a communicator find each other by.
struct NcclId {
  char bytes[128];
};

// ncclConfig_t as far as 2.14 had it; a later NCCL takes its defaults for the rest.
struct NcclConfig {
  size_t nbytes = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;
};

inline constexpr int kNcclInProgress = 7;  // ncclInProgress

#define COLLECTIVE_NCCL_FUNCTIONS(X)                                                                            \
  X(int, ncclGetVersion, (int* version))                                                                        \
  X(int, ncclGetUniqueId, (NcclId * id))                                                                        \
  X(int, ncclCommInitRankConfig, (void** comm, int size, NcclId id, int rank, NcclConfig* config))              \
  X(int, ncclCommGetAsyncError, (void* comm, int* result))                                                      \
  X(int, ncclCommAbort, (void* comm))                                                                           \
  X(int, ncclAllReduce, (const void* in, void* out, size_t count, int dtype, int op, void* comm, void* stream)) \
  X(const char*, ncclGetErrorString, (int result))                                                              \
  X(const char*, ncclGetLastError, (void* comm))

struct Nccl {
#define COLLECTIVE_DECLARE(result, name, arguments) result(*name) arguments = nullptr;
  COLLECTIVE_NCCL_FUNCTIONS(COLLECTIVE_DECLARE)
#undef COLLECTIVE_DECLARE
  std::string missing = "NCCL has not been loaded";  // why it cannot be used
  std::string version{};

  // Throws what went wrong, in words; nothing for a result that is no error (success, or in progress).
  void check(int result, const char* what) const;
};

// Loads it, once: the one that a framework has loaded, or else the first of these files that can be loaded, or else the
// system's. The process keeps it to its end.
void load_nccl(const std::vector<std::string>& files);
const Nccl& nccl();

}  // namespace collective
