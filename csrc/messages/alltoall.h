// Every rank sends a part of its rows to every rank. Ranks first tell each other how many to expect, then send them.
//
//   rank 0    counts[1], counts[2] ->  and  <- counts[0] of ranks 1, 2       p = 3; then memory for the result
//             rows for 1, rows for 2 ->  and  <- rows for 0 of ranks 1, 2
//
// steps:              2, each with all peers at once
// bytes on the wire:  8 to each other rank, then the rows for other ranks, each directly and once
// memory traffic:     none for these, which are sent and received where they lie; rows that stay are copied once
// limits:             p-1 messages per rank and step, or more where there are over 1 MiB for a peer (exchange.h), and
//                     short rows are not gathered into longer messages, so latency grows with p
// source:             MPI_Alltoallv of the MPI standard, with the receive counts found out first
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/operation.h"
#include "messages/comm.h"
#include "messages/exchange.h"

namespace collective {

class Alltoall final : public Operation {
 public:
  // splits[r]: rows for rank r, in order in `in`. `allocate` is called once with the number of rows that each rank
  // sends here, and returns the memory for all of them, in rank order.
  using Allocate = std::function<void*(const std::vector<int64_t>& received)>;
  Alltoall(const Comm& comm, int tag, const void* in, std::vector<int64_t> splits, size_t row_bytes, Allocate allocate);

  Step step() override;
  std::string describe() const override;

 private:
  void start_rows();

  const Comm* comm_;
  int tag_;
  const std::byte* in_;
  size_t row_bytes_;
  std::vector<int64_t> splits_, received_;
  Allocate allocate_;
  bool counting_ = true;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace collective
