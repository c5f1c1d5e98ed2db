#include "engine/operations.h"

#include <algorithm>
#include <cstring>

#include "base/ranges.h"
#include "base/thresholds.h"
#include "messages/allreduce_doubling.h"
#include "messages/alltoall.h"
#include "messages/broadcast.h"
#include "messages/exchange.h"
#include "messages/reduce_scatter.h"
#include "messages/ring.h"
#include "node/exchange_node.h"
#include "node/reduce_scatter_node.h"
#include "nodes/allreduce_nodes.h"

namespace collective {
namespace {

using Made = std::unique_ptr<Operation>;

size_t row_elements(const Descriptor& d) {
  size_t count = 1;
  for (size_t i = 1; i < d.shape.size(); ++i) count *= static_cast<size_t>(d.shape[i]);
  return count;
}

AllreduceSpec spec_of(const Descriptor& d) { return {d.dtype, d.wire, d.op, d.prescale, d.postscale}; }

// Byte offsets of the ranks' rows in their concatenation.
std::vector<size_t> row_offsets(const std::vector<int64_t>& rows, size_t row_bytes) {
  std::vector<size_t> offsets{0};
  for (const int64_t count : rows) offsets.push_back(offsets.back() + static_cast<size_t>(count) * row_bytes);
  return offsets;
}

void copy(std::byte* target, const void* source, size_t nbytes) {
  if (nbytes > 0 && target != source) std::memcpy(target, source, nbytes);
}

// Where the result goes: to the caller's memory, if there is any for it, or the ticket's.
std::byte* output_of(const Task& task, size_t nbytes) {
  if (task.data.out != nullptr) return static_cast<std::byte*>(task.data.out);
  task.ticket->output = Buffer(nbytes);
  return task.ticket->output.data();
}

size_t most_rows(const Task& task) {
  return static_cast<size_t>(*std::max_element(task.rows->begin(), task.rows->end()));
}

bool runs_in_lane(const Place& place, const std::vector<Task>& bucket) {
  if (place.lane == nullptr) return false;
  const Descriptor& d = *bucket[0].descriptor;
  switch (d.kind) {
    case Kind::kAllreduce: return d.op != ReduceOp::kAdasum;  // that needs whole tensors, not slices of them
    case Kind::kAlltoall:
      return place.comm.size() == 2 ||
             most_rows(bucket[0]) * row_elements(d) * size_of(d.dtype) <= thresholds::kAlltoallByMessages;
    case Kind::kBarrier:
    case Kind::kBuckets:
    case Kind::kPair:
    case Kind::kRefusal: return false;
    default: return true;
  }
}

// Whether it goes through the memory of several nodes.
bool goes_through_nodes(const Place& place, const Descriptor& d) {
  const bool reduces = d.kind == Kind::kAllreduce || d.kind == Kind::kReduceScatter || d.kind == Kind::kReduce;
  return place.nodes != nullptr && reduces && d.op != ReduceOp::kAdasum;
}

Made make_allreduce(const Place& place, const std::vector<Task>& bucket) {
  std::vector<Slot> slots;
  for (const Task& task : bucket) {
    slots.push_back(task.data);
    slots.back().count = task.descriptor->count();
  }
  const AllreduceSpec spec = spec_of(*bucket[0].descriptor);
  if (runs_in_lane(place, bucket)) return std::make_unique<AllreduceNode>(*place.lane, spec, std::move(slots));
  if (goes_through_nodes(place, *bucket[0].descriptor))
    return std::make_unique<AllreduceNodes>(*place.nodes, place.comm.size(), place.pool, spec, std::move(slots),
                                            place.digest);
  return std::make_unique<Allreduce>(place.comm, place.pool, place.tag, spec, std::move(slots));
}

Made make_broadcast(const Place& place, const Task& task) {
  const size_t nbytes = task.descriptor->count() * size_of(task.descriptor->dtype);
  void* data = task.data.out;
  if (place.lane != nullptr) return ExchangeNode::broadcast(*place.lane, task.descriptor->root, data, nbytes);
  if (data == nullptr && nbytes > 0) {
    task.ticket->output = Buffer(nbytes);  // of a rank that has joined: passed on, then dropped
    data = task.ticket->output.data();
  }
  return std::make_unique<Broadcast>(place.comm, place.tag, task.descriptor->root, data, nbytes);
}

Made make_allgather(const Place& place, const Task& task) {
  Ticket& ticket = *task.ticket;
  std::vector<size_t> offsets =
      row_offsets(*task.rows, row_elements(*task.descriptor) * size_of(task.descriptor->dtype));
  const auto me = static_cast<size_t>(place.comm.rank());
  ticket.rows = *task.rows;
  std::byte* const out = output_of(task, offsets.back());
  if (place.lane != nullptr) return ExchangeNode::gather(*place.lane, ExchangeNode::kAll, task.data.in, out, offsets);
  copy(out + offsets[me], task.data.in, offsets[me + 1] - offsets[me]);
  if (place.comm.size() == 1) return nullptr;
  return std::make_unique<Ring>(place.comm, place.pool, place.tag, Ring::Phases::kAllgather, out, out,
                                ranges_of(offsets), Arithmetic{DType::kUInt8, ReduceOp::kSum});
}

[[noreturn]] void throw_unexpected(const std::vector<int64_t>& expected, const std::vector<int64_t>& received,
                                   const RankNames& names) {
  const auto [mine, theirs] = std::mismatch(expected.begin(), expected.end(), received.begin());
  throw Error(ErrorCode::kMismatch, names.text_of(static_cast<int>(mine - expected.begin())) + " sends " +
                                        std::to_string(*theirs) + " elements to a rank that expects " +
                                        std::to_string(*mine));
}

Made make_alltoall(const Place& place, const Task& task) {
  const size_t row_bytes = row_elements(*task.descriptor) * size_of(task.descriptor->dtype);
  std::vector<int64_t> splits = *task.splits;
  splits.resize(static_cast<size_t>(place.comm.size()));  // none, of a rank that has joined
  const auto allocate = [task, row_bytes, &names = place.comm.names()](const std::vector<int64_t>& received) {
    if (task.expected != nullptr && !task.expected->empty() && *task.expected != received)
      throw_unexpected(*task.expected, received, names);
    task.ticket->rows = received;
    return output_of(task, row_offsets(received, row_bytes).back());
  };
  if (runs_in_lane(place, {task}))
    return std::make_unique<AlltoallNode>(*place.lane, task.data.in, splits, most_rows(task), row_bytes, allocate);
  return std::make_unique<Alltoall>(place.comm, place.tag, task.data.in, std::move(splits), row_bytes, allocate);
}

Made make_reduce_scatter(const Place& place, const Task& task) {
  const Descriptor& d = *task.descriptor;
  // By rows for each rank, where these are given.
  std::vector<size_t> offsets = task.rows->empty()
                                    ? even_offsets(static_cast<size_t>(d.shape[0]), row_elements(d), place.comm.size())
                                    : row_offsets(*task.rows, row_elements(d));
  if (place.lane != nullptr)
    return std::make_unique<ReduceScatterNode>(*place.lane, spec_of(d), std::move(offsets), task.data.in,
                                               task.data.out);
  if (goes_through_nodes(place, d))
    return AllreduceNodes::reduce_scatter(*place.nodes, place.comm.rank(), place.pool, spec_of(d), offsets,
                                          task.data.in, task.data.out, place.digest);
  return std::make_unique<ReduceScatter>(place.comm, place.pool, place.tag, spec_of(d), std::move(offsets),
                                         task.data.in, task.data.out);
}

Made make_reduce(const Place& place, const Task& task) {
  const Descriptor& d = *task.descriptor;
  if (place.lane != nullptr)
    return std::make_unique<AllreduceNode>(
        *place.lane, spec_of(d),
        std::vector<Slot>{{task.data.in, place.comm.rank() == d.root ? task.data.out : nullptr, d.count()}});
  if (goes_through_nodes(place, d))
    return std::make_unique<AllreduceNodes>(
        *place.nodes, place.comm.size(), place.pool, spec_of(d),
        std::vector<Slot>{{task.data.in, place.comm.rank() == d.root ? task.data.out : nullptr, d.count()}},
        place.digest);
  return ReduceScatter::to_root(place.comm, place.pool, place.tag, spec_of(d), d.count(), d.root, task.data.in,
                                task.data.out);
}

Made make_gather(const Place& place, const Task& task) {
  const Descriptor& d = *task.descriptor;
  Ticket& ticket = *task.ticket;
  const std::vector<size_t> offsets = row_offsets(*task.rows, row_elements(d) * size_of(d.dtype));
  const int me = place.comm.rank();
  ticket.rows = *task.rows;
  std::byte* const out = me == d.root ? output_of(task, offsets.back()) : nullptr;
  if (place.lane != nullptr) return ExchangeNode::gather(*place.lane, d.root, task.data.in, out, offsets);
  const auto nbytes = [&](int rank) {
    return offsets[static_cast<size_t>(rank) + 1] - offsets[static_cast<size_t>(rank)];
  };
  std::vector<Exchange::Send> sends;
  std::vector<Exchange::Receive> receives;
  if (me == d.root) {
    copy(out + offsets[static_cast<size_t>(me)], task.data.in, nbytes(me));
    for (int peer = 0; peer < place.comm.size(); ++peer)
      if (peer != me) receives.push_back({peer, out + offsets[static_cast<size_t>(peer)], nbytes(peer)});
  } else {
    sends.push_back({d.root, task.data.in, nbytes(me)});
  }
  return std::make_unique<Exchange>(place.comm, place.tag, sends, receives);
}

Made make_scatter(const Place& place, const Task& task) {
  const Descriptor& d = *task.descriptor;
  Ticket& ticket = *task.ticket;
  const int p = place.comm.size();
  const int me = place.comm.rank();
  const auto root_rows = static_cast<size_t>((*task.rows)[static_cast<size_t>(d.root)]);
  const std::vector<size_t> offsets = even_offsets(root_rows, row_elements(d) * size_of(d.dtype), p);
  const std::vector<size_t> parts = even_offsets(root_rows, 1, p);
  const auto nbytes = [&](int rank) {
    return offsets[static_cast<size_t>(rank) + 1] - offsets[static_cast<size_t>(rank)];
  };
  ticket.rows = {static_cast<int64_t>(parts[static_cast<size_t>(me) + 1] - parts[static_cast<size_t>(me)])};
  std::byte* const out = output_of(task, nbytes(me));
  if (place.lane != nullptr) return ExchangeNode::scatter(*place.lane, d.root, task.data.in, out, offsets);
  std::vector<Exchange::Send> sends;
  std::vector<Exchange::Receive> receives;
  if (me == d.root) {
    const auto* in = static_cast<const std::byte*>(task.data.in);
    copy(out, in + offsets[static_cast<size_t>(me)], nbytes(me));
    for (int peer = 0; peer < p; ++peer)
      if (peer != me) sends.push_back({peer, in + offsets[static_cast<size_t>(peer)], nbytes(peer)});
  } else {
    receives.push_back({d.root, out, nbytes(me)});
  }
  return std::make_unique<Exchange>(place.comm, place.tag, sends, receives);
}

// It consists of the agreement alone, or, on one node, of all ranks having come to it; otherwise of a word to all.
Made make_barrier(const Place& place, const Task& task) {
  if (place.agreed || place.lane != nullptr || place.comm.size() == 1) return nullptr;
  task.ticket->output = Buffer(1);
  std::byte* const word = task.ticket->output.data();
  *word = std::byte{0};
  return std::make_unique<AllreduceDoubling>(place.comm, place.pool, place.tag, word, word, 1,
                                             Arithmetic{DType::kUInt8, ReduceOp::kMax});
}

}  // namespace

bool takes_turns(const Place& place, const std::vector<Task>& bucket) {
  return runs_in_lane(place, bucket) || goes_through_nodes(place, *bucket[0].descriptor);
}

std::unique_ptr<Operation> make_operation(const Place& place, const std::vector<Task>& bucket) {
  const Task& task = bucket[0];
  switch (task.descriptor->kind) {
    case Kind::kAllreduce: return make_allreduce(place, bucket);
    case Kind::kBroadcast: return make_broadcast(place, task);
    case Kind::kAllgather: return make_allgather(place, task);
    case Kind::kAlltoall: return make_alltoall(place, task);
    case Kind::kReduceScatter: return make_reduce_scatter(place, task);
    case Kind::kReduce: return make_reduce(place, task);
    case Kind::kGather: return make_gather(place, task);
    case Kind::kScatter: return make_scatter(place, task);
    case Kind::kBarrier: return make_barrier(place, task);
    case Kind::kBuckets:
    case Kind::kPair:
    case Kind::kRefusal: return nullptr;
  }
  return nullptr;
}

}  // namespace collective
