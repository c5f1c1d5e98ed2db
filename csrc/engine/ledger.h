// Who holds up the others, and by how much: always on, because it costs next to nothing.
//
// The idea. An operation of all ranks ends for all of them at about the same time, soon after the last rank has come to
// it. So how long each rank has waited tells who was late, without comparing clocks:
//
//      rank 0   |----------- waits 40 ms ---------|          lateness = the wait of the middle rank - the own wait
//      rank 1      |-------- waits 37 ms ---------|          rank 2 was last, by 36 ms
//      rank 2                                |-1 -|
//               start                             end
//
// A rank notes how long it waited (WaitLog), and once a second tells the coordinator, rank 0, in one word of the
// agreement's mail. The coordinator compares what it is told of the same operation and keeps sums for each rank
// (Ledger).
//
// What is noted. Runs of a bucket: from its start here to its end. The last bucket of a plan ends the step, so its
// lateness is what a step has cost; that of the buckets before tells where in backward a rank falls behind. Operations
// by name, and those matched by order on a node: from the submission to the decision to run, which all ranks hear at
// the same time; what the previous one has cost is left out, so that of many in flight nothing counts twice. Between
// nodes operations matched by order end in a wait for each other only if all ranks need something of all others; the
// rest is left out there.
//
// What a record stands for. If one of 1024 is recorded, and a rank writes a checkpoint for 30 s just then, the others
// were not all as late: that would cost eight hours. So a record's lateness counts once, and for the others as far as
// the eight records before bear it out: up to the greatest lateness of the same rank in them. What is rare and long is
// told too low rather than too high; what goes on is told in full from its second record on.
//
// cost:     20 ns an operation, 35 where it is recorded; of a bucket, a clock is read as well. A record is 24 bytes. Of
//           each series the first 1024 operations are recorded, then half of the next 1024, a quarter of the next 2048,
//           ..., chosen by number, alike on all ranks
// limits:   ends differ by the time that the last messages take; lateness below 1 ms counts as none. What arrays on a
//           device wait for before their bucket runs is not seen. Where a rank had joined, nothing counts
// instead:  the coordinator's own view of when words arrive: sees no buckets, and of other nodes only their leaders.
//           Starts by clocks that are compared: drift, and messages to measure it. Waits in the flags of the last
//           bucket: a number for each rank in every step, in the wire's type, and nothing for operations without
//           buckets
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/codec.h"
#include "base/rank_names.h"
#include "engine/limits.h"

namespace collective {

// Operations that are compared with each other, alike on all ranks: one series for all that are not buckets, and one
// for each bucket of a plan.
struct Series {
  static constexpr uint64_t kOperations = 0;
  // index: of the bucket in the plan, whose number counts from 1. is_last: in the plan.
  static uint64_t of_bucket(uint64_t plan, uint64_t index, bool is_last) { return plan << 32 | index << 1 | is_last; }
  // Whether its lateness is a cost, rather than a part of one.
  static bool is_whole(uint64_t series) { return series == kOperations || (series & 1) != 0; }
};

// An operation that this rank takes part in.
struct Waiting {
  uint64_t series;
  uint64_t number;          // in its series, alike on all ranks
  Clock::time_point begin;  // when this rank has come to it
  bool is_own;              // else a rank that has joined takes part for the others
};

// Over all groups of a rank: how many operations by name and steps there were, and how long it has waited in them.
struct WaitTotals {
  std::atomic<uint64_t> count{0};
  std::atomic<int64_t> ns{0};
  // By the driver alone.
  void add(std::chrono::nanoseconds wait) {
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    ns.store(ns.load(std::memory_order_relaxed) + wait.count(), std::memory_order_relaxed);
  }
};

// A rank's end, of one group.
class WaitLog {
 public:
  explicit WaitLog(WaitTotals& totals) : totals_(&totals) {}
  // name: for people; of a bucket its own, of an operation that comes once only its kind.
  void note(Waiting waiting, Clock::time_point end, std::string_view name);
  // Whether there is something to tell, and it is time.
  bool is_due(Clock::time_point now) const { return !records_.empty() && now >= next_; }
  bool empty() const { return records_.empty(); }
  // What is new, for Ledger::take().
  std::string take(Clock::time_point now);

 private:
  WaitTotals* totals_;
  Clock::time_point first_{}, last_{};  // start of the first operation, end of the last
  Clock::time_point next_{};
  std::unordered_set<uint64_t> named_;  // series whose name has been told
  Writer records_;
};

// What has been found.
struct LedgerPage {
  struct Entry {
    int rank;             // in the job
    uint64_t seen;        // how often it was last, by kNoticed at least, of what was recorded
    double last;          // the same, of all
    double cost;          // s: by how much, in all
    std::string longest;  // of operations by name: that which it has held up for longest
  };
  struct Part {
    uint64_t series;
    std::string name;
    double count;  // of operations
    std::vector<Entry> entries;
  };
  std::string label;   // of the group, "" for that of all ranks
  int size = 0;        // of the group
  double elapsed = 0;  // s, from the first operation to the last
  std::vector<Part> parts;

  std::string encode() const;
  static LedgerPage decode(const std::string& bytes);
};

// The coordinator's end.
class Ledger {
 public:
  // Lateness that counts.
  static constexpr double kNoticed = 1e-3;

  explicit Ledger(const RankNames& names) : ranks_(names) {}
  // What a rank's WaitLog has to tell.
  void take(int source, const std::string& records);
  LedgerPage page() const;

 private:
  struct Open {  // of which not all ranks have told
    std::vector<float> waits;
    size_t told = 0;
    bool counts = true;
    std::string name;
  };
  struct OfRank {
    uint64_t seen = 0;
    double last = 0, cost = 0;
    std::unordered_map<std::string, double> costs;  // by operation
  };
  struct OfSeries {
    struct Late {  // of one that was recorded: its last rank, and by how much
      size_t rank = 0;
      double lateness = 0;
    };
    std::string name;
    std::array<Late, 8> latest{};
    uint64_t recorded = 0;
    double count = 0;
    std::vector<OfRank> ranks;
    std::unordered_map<uint64_t, Open> open;  // by number
  };
  void judge(OfSeries& series, uint64_t number, const Open& all);

  RankNames ranks_;
  double elapsed_ = 0;
  std::unordered_map<uint64_t, OfSeries> series_;
  std::vector<float> sorted_;  // kept for its capacity
};

}  // namespace collective
