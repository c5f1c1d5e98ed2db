#include "node/shared_memory.h"

#include <sys/mman.h>

#include <numeric>
#include <utility>

namespace collective {

Mapping::Mapping(Mapping&& other) noexcept
    : address_(std::exchange(other.address_, nullptr)), nbytes_(std::exchange(other.nbytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(nbytes_, other.nbytes_);
  return *this;
}

Mapping::~Mapping() {
  if (address_ != nullptr) munmap(address_, nbytes_);
}

SharedMemory::SharedMemory(int rank, std::vector<std::byte*> parts, size_t nbytes)
    : rank_(rank), parts_(std::move(parts)), nbytes_(nbytes), job_ranks_(parts_.size()) {
  std::iota(job_ranks_.begin(), job_ranks_.end(), 0);
}

Counters::Counters(const SharedMemory& memory, size_t offset)
    : rank_(static_cast<size_t>(memory.rank())), job_ranks_(memory.job_ranks()) {
  for (int rank = 0; rank < memory.size(); ++rank)
    counters_.push_back(reinterpret_cast<uint64_t*>(memory.part(rank) + offset));
}

}  // namespace collective
