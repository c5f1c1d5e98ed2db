// The plans of a group. A plan is a list of buckets whose layout the ranks agree on once, when they open it; then each
// rank runs a bucket when it likes, all of them equally often, without a word to the others.
//
// A bucket's number is its place among all open buckets of the group, alike on all ranks; it decides its MPI tag. Plans
// are needed until all ranks' scripts are done with them: where one has joined, its engine goes on for the others. A
// script holds a plan by its ticket and its buckets, and so do runs. A rank tells the coordinator when only its engine
// holds it; when all have, the coordinator says so, and gives the numbers to another plan. By then every run is done on
// the rank that wanted it, and so has been started on all of them; where one is not done yet, the next plan waits (see
// Group::execute_agreed).
#pragma once

#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/buffer.h"
#include "base/descriptor.h"
#include "base/operation.h"
#include "engine/bucket_storage.h"
#include "engine/devices.h"
#include "engine/ticket.h"
#include "messages/comm.h"
#include "node/shared_memory.h"
#include "nodes/allreduce_bucket_nodes.h"

namespace collective {

struct Plan {
  uint32_t first;                      // its first bucket's number
  bool told = false;                   // this rank has let it go
  std::optional<SharedMemory> memory;  // a place for each bucket in every rank's part, where they share any
  // By bucket; none until where they lie is decided.
  std::vector<std::unique_ptr<BucketStorage>> storages;
};

class Plans {
 public:
  // Buckets have the tags from `first_tag` on, one each.
  Plans(const Comm& comm, BufferPool& pool, int first_tag) : comm_(&comm), pool_(&pool), first_tag_(first_tag) {}

  // Opens the buckets that `descriptor` describes, from number `first` on, as all ranks have agreed; `ticket` gets the
  // plan. on_node: the ranks share memory. nodes: where those of each of several nodes do; else null. device: this
  // rank's, where the buckets are about devices; else null. Returns the operation that makes their storages, or null.
  std::unique_ptr<Operation> open(uint32_t first, const Descriptor& descriptor, Ticket& ticket, bool on_node,
                                  Device* device, const Devices& devices, const Nodes* nodes);

  // The next run of a bucket.
  std::unique_ptr<Operation> start(uint32_t bucket, BucketRun run);
  // The same of a rank that has joined, without anything of its own; `keep` gets what owns its memory.
  std::unique_ptr<Operation> start_neutrally(uint32_t bucket, std::shared_ptr<void>& keep);

  // Of its elements, as they travel.
  size_t nbytes(uint32_t bucket) const;
  // Whether it may be started; a bucket that is not known here yet may not.
  bool is_open(uint32_t bucket) const;
  // The number of the plan that it was last opened with, from 1, alike on all ranks; 0 where there was none.
  uint64_t plan_of(uint32_t bucket) const { return bucket < numbers_.size() ? numbers_[bucket] : 0; }
  // Of runs of an open bucket, see ledger.h.
  uint64_t series_of(uint32_t bucket) const;
  // How often each has been started. Goes on where its number is used again, on all ranks from the same value: when a
  // plan is released every rank has started every run of it.
  const std::vector<uint32_t>& started() const { return started_; }

  // The first buckets of the plans that this rank's script has let go since the last call.
  std::vector<uint32_t> take_let_go();
  // All ranks have let this plan go: its memory is freed, and its numbers may come again.
  void release(uint32_t first) { plans_.erase(plan_of(first)); }

 private:
  const std::shared_ptr<Plan>& plan_at(uint32_t bucket) const;

  const Comm* comm_;
  BufferPool* pool_;
  int first_tag_;
  std::vector<uint64_t> numbers_;                              // of plans, by bucket
  std::vector<uint32_t> started_;                              // by bucket
  std::unordered_map<uint64_t, std::shared_ptr<Plan>> plans_;  // by number
  uint64_t opened_ = 0;                                        // plans
};

}  // namespace collective
