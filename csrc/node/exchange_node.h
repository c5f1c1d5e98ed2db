// Any pattern of copies between the ranks of one node, through their lane: the basis of broadcast, allgather, alltoall,
// gather and scatter there.
//
// What a rank has for others is cut into as many pieces as the operation has chunks. Chunk k holds piece k of all that
// the rank sends, side by side, so that every chunk has something for everybody, and all ranks copy at all times:
//
//      rank 0                    rank 1                    rank 2           alltoall, p = 3, chunk k; ab = what a
//    [ 01 02 ]                 [ 10 12 ]                 [ 20 21 ]          sends to b
//                                                                           pack    -> counter `packed`
//      00, 10, 20 -> out         11, 21, 01 -> out         22, 02, 12 -> out  unpack, each when its source has packed
//                                                                                   -> counters `reduced`, `unpacked`
//
//      broadcast, root 1         [ 1 ]    nobody else packs; a rank that packs nothing counts all chunks at once,
//      gather, root 0       [ ] [ 1 ] [ 2 ]   and so does one that unpacks nothing: neither has to be waited for
//
// steps:           1 synchronisation per chunk, overlapped with other chunks
// memory traffic:  a load and a store of what is sent, once however many read it; a load and a store of what is
//                  received; of these a load and a store stay in the cache. What a rank sends to itself is copied once
// limits:          a chunk's pieces begin on lines: some 100 bytes are lost for each
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/operation.h"
#include "node/lane.h"

namespace collective {

class ExchangeNode final : public Operation {
 public:
  // data: nbytes, read on root, written on the others unless null.
  static std::unique_ptr<ExchangeNode> broadcast(Lane& lane, int root, void* data, size_t nbytes);
  // offsets: p+1 byte offsets of the ranks' parts in `out`, which root has, or with kAll every rank. in: this rank's
  // part.
  static constexpr int kAll = -1;
  static std::unique_ptr<ExchangeNode> gather(Lane& lane, int root, const void* in, void* out,
                                              const std::vector<size_t>& offsets);
  // offsets: of the ranks' parts in `in`, which root has. out: this rank's part.
  static std::unique_ptr<ExchangeNode> scatter(Lane& lane, int root, const void* in, void* out,
                                               const std::vector<size_t>& offsets);

  // Any pattern. The largest number of bytes, and of parts, that any rank packs: the same on all ranks. Then, before
  // the first step, what this rank packs, unpacks and copies.
  ExchangeNode(Lane& lane, size_t most_nbytes, size_t most_parts);

  // The room that a part of this length takes in each chunk: what to add to its place for that of the next part.
  size_t piece(size_t nbytes) const;
  // Offers `data` to the other ranks, its pieces from byte `place` of each chunk.
  void pack(size_t place, const void* data, size_t nbytes);
  // Takes what `source` has packed at this place. nbytes: as there; less only where there is one chunk.
  void unpack(int source, size_t place, void* data, size_t nbytes);
  // Copies what stays on this rank.
  void copy(const void* from, void* to, size_t nbytes);

  Step step() override;
  std::string describe() const override;

 private:
  struct Part {
    int source;             // whose staging area
    size_t place;           // in each chunk there
    const std::byte* from;  // null: the staging area
    std::byte* to;          // null: the staging area
    size_t nbytes;
  };
  bool pack_chunk();
  bool unpack_chunk();
  size_t copy_piece(const Part& part, uint64_t chunk) const;

  Lane* lane_;
  uint64_t first_, end_;  // chunks of the lane
  std::vector<Part> packs_, unpacks_;
  size_t next_ = 0;  // of unpacks_, the first one of the current chunk that is not done
};

// Alltoall of rows: no rank knows how many rows the others send, so they first tell each other, in a chunk of its own.
class AlltoallNode final : public Operation {
 public:
  // splits[r]: rows for rank r, in order in `in`. most_rows: the largest number that any rank sends in all. `allocate`
  // is called once with the number of rows that each rank sends here and returns the memory for all of them, in rank
  // order.
  using Allocate = std::function<void*(const std::vector<int64_t>& received)>;
  AlltoallNode(Lane& lane, const void* in, const std::vector<int64_t>& splits, size_t most_rows, size_t row_bytes,
               Allocate allocate);

  Step step() override;
  std::string describe() const override;

 private:
  struct Sent {
    int64_t rows;
    uint64_t place;
  };
  void start_rows();

  int rank_;
  const std::byte* in_;
  size_t row_bytes_;
  std::vector<Sent> sent_, received_;  // by rank
  Allocate allocate_;
  ExchangeNode counts_, rows_;
  bool counting_ = true;
};

}  // namespace collective
