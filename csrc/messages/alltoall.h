// Everybody sends a part of its rows to everybody. Ranks tell each other first how many rows come, then send them.
//
// steps:              2, each with all peers at once
// bytes on the wire:  what is asked for
// limits:             p-1 messages per rank and step
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
  // splits[r]: rows for rank r, in order in `in`. `allocate` is called once with the rows that each rank sends here
  // and returns the memory for all of them, in rank order.
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
