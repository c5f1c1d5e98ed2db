// Makes the operation that an agreed description asks for.
#pragma once

#include <memory>
#include <vector>

#include "device/device.h"
#include "engine/ticket.h"
#include "node/allreduce_node.h"
#include "nodes/nodes.h"

namespace collective {

// One entry of an agreed bucket on this rank. On a rank that has joined `data` is empty, and no caller waits for `ticket`.
struct Task {
  Ticket* ticket;
  const Descriptor* descriptor;
  Slot data;
  const std::vector<int64_t>* splits;              // of an alltoall: rows for each rank
  const std::vector<int64_t>* rows;                // first dimension by rank, where it may differ
  std::shared_ptr<DeviceMark> mark{};              // of an array on a device: what comes before
  const std::vector<int64_t>* expected = nullptr;  // of an alltoall: rows from each rank, where the caller knows
};

// Where an operation runs.
struct Place {
  const Comm& comm;
  BufferPool& pool;
  int tag;
  Lane* lane;    // of the node's shared memory; null where the ranks do not share any
  Nodes* nodes;  // where they are on several nodes, and share memory there; else null
  // Of the description, by which messages of operations that are matched by their order are told apart; else 0.
  uint64_t digest = 0;
  bool agreed = true;  // all ranks have come to the operation
};

// Whether the operation takes turns with others in shared memory, so that it has to be made in the agreed order.
bool takes_turns(const Place& place, const std::vector<Task>& bucket);

// The operation for a bucket of tasks (several for an all-reduce only); null when there is nothing to send. Tickets
// get their `output` and `rows` where the operation's result has a size of its own.
std::unique_ptr<Operation> make_operation(const Place& place, const std::vector<Task>& bucket);

}  // namespace collective
