// What runs in a group, stepped in turn: agreed operations, runs of buckets, sends and receives.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/operation.h"
#include "base/rank_names.h"
#include "base/timeline.h"
#include "engine/ledger.h"
#include "engine/limits.h"
#include "engine/ticket.h"

namespace collective {

// How long something has waited, and what was done about it.
struct Waited {
  Clock::time_point since = Clock::now();
  Clock::time_point asked{};  // when the others were last asked about it
  bool warned = false;
};

struct Running : Waited {
  // In this order: an operation goes before the memory that it works on.
  std::shared_ptr<void> keep;
  std::vector<std::shared_ptr<Ticket>> tickets;  // of this rank, to be finished with it
  std::unique_ptr<Operation> operation;
  std::string what;  // for people
  // For the timeline: its kind, and the bytes of this rank's data.
  const char* kind = "";
  size_t nbytes = 0;

  // What it is: one of these.
  std::optional<uint64_t> execution{};  // an operation of all ranks: its number, alike on all of them
  std::optional<uint64_t> turn{};       // and its turn, where they are matched by their order
  struct OfBucket {
    uint32_t bucket, run;  // runs count from 1
  };
  std::optional<OfBucket> of_bucket{};
  std::optional<Waiting> waiting{};  // to be noted at the end
  std::optional<int> peer{};         // a send or receive: its other end
  bool from_any = false;             // a receive from whoever sends

  // As its user calls it.
  std::string_view name() const { return tickets.empty() ? std::string_view() : tickets[0]->name; }

  Clock::time_point alone{};  // of a send or receive: when its peer was heard to have left
};

class RunQueue {
 public:
  using Finish = std::function<void(Ticket&, ErrorCode, const std::string&)>;
  // names: what its ranks are called.
  RunQueue(Timeline& timeline, const RankNames& names, WaitLog& waits, Finish finish)
      : timeline_(&timeline), names_(&names), waits_(&waits), finish_(std::move(finish)) {}

  RunQueue(const RunQueue&) = delete;
  RunQueue& operator=(const RunQueue&) = delete;
  ~RunQueue();  // gives all up, and finishes no ticket: whatever it would tell may be gone

  void add(Running running) { running_.push_back(std::move(running)); }
  // Steps each of them, and finishes the tickets of those that are done; true if anything moved.
  bool step();
  // Gives one up: its tickets fail. It is kept for the life of the process, with the memory that it works on: a transfer
  // that has begun cannot be stopped for certain, neither MPI's nor a device's.
  void give_up(size_t i, ErrorCode code, const std::string& text);
  void give_all_up(ErrorCode code, const std::string& text);

  bool empty() const { return running_.empty(); }
  size_t size() const { return running_.size(); }
  Running& operator[](size_t i) { return running_[i]; }
  const std::vector<Running>& all() const { return running_; }
  // The one that has been running longest; null: none runs.
  Running* oldest();

  // Whether a run of one of the buckets from `first` on is under way.
  bool uses_buckets(uint32_t first, uint32_t count) const;
  // Whether an agreed operation of a number below `execution` is under way.
  bool is_before(uint64_t execution) const;
  // Bytes of page-locked memory that agreed operations take from the host.
  size_t page_locked() const;

 private:
  void record(const Running& finished);
  // The tickets of one that is kept for the life of the process.
  std::vector<std::shared_ptr<Ticket>> keep_for_ever(size_t i);

  std::vector<Running> running_;
  Timeline* timeline_;
  const RankNames* names_;
  WaitLog* waits_;
  Finish finish_;
};

// What is being handled as an Error that names the operation.
[[noreturn]] void throw_for(const std::string& what);

}  // namespace collective
