// A small piece of shared memory between the ranks of one node, which stays in the cache: what allreduce_node,
// exchange_node and reduce_scatter_node send their data through.
//
// Every rank has a staging area in it, of kDepth places. Data goes through chunk by chunk: a rank packs what others
// want into a place of its own area and counts that; they read it there and count that in turn; when all have, the
// place is packed again. Counters only grow, from operation to operation too, and a chunk's number is what they count:
// every rank gives an operation the same number of chunks, so that the next one may begin on one rank while another
// still reads the last one's.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "node/shared_memory.h"

namespace collective {

// Operations take turns in a lane in the order of their construction, which must be the same on all ranks. They may
// overlap there.
class Lane {
 public:
  // The bytes it takes of each rank's part of the memory.
  static constexpr size_t nbytes() { return kStaging + kDepth * kChunkBytes; }
  // The lane at `offset` (of whole lines) of every part. The memory must outlive it, and serve no other lane there.
  Lane(const SharedMemory& memory, size_t offset);

  int rank() const { return rank_; }
  int size() const { return size_; }

 private:
  friend class AllreduceNode;
  friend class ExchangeNode;
  friend class ReduceScatterNode;
  static constexpr size_t kChunkBytes = size_t{1} << 20;  // at most
  static constexpr size_t kDepth = 3;
  // The length of chunks that are packed and read once, in an operation whose ranks pack this much: short enough that
  // reading a message overlaps packing it. Measured, 2 ranks in 64 KiB, 256 KiB, 1 MiB: broadcast 1 MiB 18.3, 20.2,
  // 20.2 us; allgather 4 MiB (all) 106, 94, 102, 16 MiB 546, 583, 727; reduce-scatter 4 MiB 102, 92, 111.
  static size_t chunk_bytes(size_t nbytes) { return std::clamp(nbytes / 16, size_t{64} << 10, size_t{256} << 10); }
  static constexpr size_t kStaging = 4 * kLineBytes;  // behind the counters

  // For describe(): the operation of chunks [first, end) waits for `rank` of the job to get `chunk` through a stage.
  static std::string waits_text(uint64_t first, uint64_t end, uint64_t chunk, int rank, const char* stage) {
    return "chunk " + std::to_string(chunk - first) + " of " + std::to_string(end - first) + ": waits for rank " +
           std::to_string(rank) + " to " + stage + " it";
  }

  std::byte* staging(int rank, uint64_t chunk) const {
    return parts_[static_cast<size_t>(rank)] + kStaging + chunk % kDepth * kChunkBytes;
  }

  int rank_, size_;
  std::vector<std::byte*> parts_;
  // How many chunks each rank has packed (its staging may be read), reduced (its slice there may be read) and unpacked
  // (it reads no staging of them any more). When an operation is done on a rank, all three have passed its chunks.
  Counters packed_, reduced_, unpacked_;
  uint64_t reserved_ = 0;  // chunks that belong to the operations so far
  std::vector<const void*> sources_;
};

}  // namespace collective
