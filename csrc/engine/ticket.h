// The two ends of an operation: what a caller hands in, and what it waits for.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "base/buffer.h"
#include "base/descriptor.h"
#include "engine/bucket_storage.h"

namespace collective {

struct Plan;

// Written by the engine until `finished`, then read by the caller.
struct Ticket : std::enable_shared_from_this<Ticket> {
  std::string name;
  const char* kind = "";                          // for people
  size_t nbytes = 0;                              // of payload, on this rank
  std::chrono::steady_clock::time_point since{};  // when it was submitted
  size_t group = 0;                               // the engine's number of the group that it was submitted to
  bool is_question = false;                       // about the job, rather than an operation that the script wants
  bool reported = false;                          // Engine::take_finished() returns it
  bool given_up = false;                          // a transfer from or to the caller's memory may still be under way
  ErrorCode code = ErrorCode::kNone;
  std::string text;

  Buffer output;               // the result, where its size was not known to the caller
  std::vector<int64_t> rows;   // rows of `output`: by rank they came from, or the one number there is
  std::shared_ptr<Plan> plan;  // of opened buckets; this rank's as long as it is held

  // Set with release after the fields above; pairs with the acquire in finished().
  std::atomic<bool> done{false};
  bool finished() const { return done.load(std::memory_order_acquire); }
};

// A named operation: runs when all ranks have submitted its name.
struct NamedSubmission {
  Descriptor descriptor;
  Slot data;                           // stays valid until the ticket is finished; a broadcast works on `out`
  int64_t rows;                        // first dimension on this rank, where it may differ between ranks
  std::vector<int64_t> splits;         // of an alltoall: rows for each rank
  bool recurring;                      // the name will come again
  std::shared_ptr<DeviceMark> mark{};  // of arrays on a device: what their user had queued before
};

// An operation that is matched by its order (order.h). `data.out` is where its result goes, whatever the kind.
struct OrderedSubmission {
  NamedSubmission named;
  std::vector<int64_t> rows{};      // first dimension by rank, where it may differ and is known
  std::vector<int64_t> expected{};  // of an alltoall: rows from each rank
};

// A send or a receive: runs when the peer has submitted its other half, matched in order per tag.
struct PairSubmission {
  bool sends;
  int peer;  // Pair::kAny for a receive from whoever sends; the ticket's `rows` then tell from whom it came
  int tag;   // 0 to kPairTags - 1
  Descriptor descriptor;
  void* data;
  std::shared_ptr<DeviceMark> mark{};
};
inline constexpr int kPairTags = 1024;

// This rank has run out of data; finished when all ranks have, `rows` then holds the last one's number.
struct JoinSubmission {
  // Of devices: until these are reached its script may use results that lie in buckets, and those are not run again.
  std::vector<std::shared_ptr<DeviceMark>> marks{};
};

// This rank wants to know who was late, see ledger.h: finished with a LedgerPage as `text`.
struct LedgerSubmission {};

// One run of an open bucket: starts at once, since all ranks have agreed to run it equally often.
struct BucketSubmission {
  uint32_t bucket;
  size_t nbytes;  // of its tensors
  BucketRun run;
};

using Submission = std::variant<NamedSubmission, OrderedSubmission, BucketSubmission, PairSubmission, JoinSubmission,
                                LedgerSubmission>;

}  // namespace collective
