// The two ends of an operation: what a caller hands in, and what it waits for.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "allreduce.h"
#include "buffer.h"
#include "descriptor.h"

namespace collective {

// Written by the engine until `finished`, then read by the caller.
struct Ticket {
  std::string name;
  ErrorCode code = ErrorCode::kNone;
  std::string text;

  Buffer output;              // of an allgather: the concatenation, sum(rows) rows
  std::vector<int64_t> rows;  // of an allgather: the first dimension by rank
  uint32_t channel = 0;       // of opened channels: the number of the first

  // Set with release after the fields above; pairs with the acquire in finished().
  std::atomic<bool> done{false};
  bool finished() const { return done.load(std::memory_order_acquire); }
};

// A named operation: runs when all ranks have submitted its name.
struct NamedSubmission {
  Descriptor descriptor;
  Slot data;       // stays valid until the ticket is finished; a broadcast works on `out`
  int64_t rows;    // of an allgather: first dimension on this rank
  bool recurring;  // the name will come again
};

// One run of an open channel: starts at once, since all ranks have agreed to run it equally often.
struct ChannelSubmission {
  uint32_t channel;
  AllreduceSpec spec;
  std::vector<Slot> slots;
  void* storage;
  std::shared_ptr<void> keep;  // owns the storage
};

}  // namespace collective
