// What the ledger makes of records, without ranks: of made-up times.
//
//   build/csrc/test_ledger
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "engine/ledger.h"

using namespace collective;

namespace {

constexpr uint64_t kMany = 600'000;
constexpr double kEvery = 1024;  // of the operations around that number one is recorded

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// Three ranks, of which rank 1 comes to operations so much later than the others.
class Job {
 public:
  // Whether it was recorded.
  bool operate(uint64_t number, double late) {
    const auto end = now_ + std::chrono::seconds(100);
    const auto begin = end - std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(late + 0.0001));
    now_ = end;
    bool recorded = false;
    for (int rank = 0; rank < 3; ++rank) {
      const auto own = rank == 1 ? end - std::chrono::microseconds(100) : begin;
      WaitLog& log = logs_[static_cast<size_t>(rank)];
      log.note({Series::kOperations, number, own, true}, end, "x");
      recorded = !log.empty();
      if (recorded) ledger_.take(rank, log.take(end));
    }
    return recorded;
  }
  // From this number on until so many were recorded; the number after the last.
  uint64_t record(uint64_t number, int count, double late) {
    while (count > 0) count -= operate(number++, late);
    return number;
  }
  // Of rank 1.
  LedgerPage::Entry entry() const {
    const LedgerPage page = ledger_.page();
    check(page.parts.size() == 1 && page.parts[0].entries.size() == 1, "one rank was late");
    check(page.parts[0].entries[0].rank == 1, "rank 1 was late");
    return page.parts[0].entries[0];
  }

 private:
  Clock::time_point now_ = Clock::time_point{} + std::chrono::hours(1);
  WaitTotals totals_;
  std::vector<WaitLog> logs_{WaitLog(totals_), WaitLog(totals_), WaitLog(totals_)};
  Ledger ledger_{RankNames::of_job(3)};
};

bool is_about(double value, double expected) { return std::abs(value - expected) < 1e-3 * expected; }

void outlier() {
  Job job;
  uint64_t next = job.record(kMany, 20, 0);
  next = job.record(next, 1, 30);
  job.record(next, 20, 0);
  const LedgerPage::Entry found = job.entry();
  check(found.seen == 1, "seen once");
  check(found.last == kEvery, "it stands for others");
  check(is_about(found.cost, 30), "an outlier counts once, not " + std::to_string(found.cost) + " s");
}

void outlier_among_small_ones() {
  Job job;
  uint64_t next = job.record(kMany, 20, 0.002);
  next = job.record(next, 1, 30);
  job.record(next, 20, 0.002);
  const double small = 0.002 + 39 * kEvery * 0.002, large = 30 + (kEvery - 1) * 0.002;
  check(is_about(job.entry().cost, small + large),
        "it is borne out by small ones: " + std::to_string(job.entry().cost));
}

void what_goes_on() {
  Job job;
  const uint64_t next = job.record(kMany, 20, 0);
  job.record(next, 50, 0.03);
  const LedgerPage::Entry found = job.entry();
  check(found.seen == 50, "seen each time");
  check(found.last == 50 * kEvery, "each stands for others");
  check(is_about(found.cost, 0.03 * (1 + 49 * kEvery)), "in full from the second on: " + std::to_string(found.cost));
}

void now_and_then() {
  Job job;
  uint64_t next = kMany;
  for (int i = 0; i < 10; ++i) {
    next = job.record(next, 1, 0.03);
    next = job.record(next, 7, 0);
  }
  check(is_about(job.entry().cost, 0.03 * (1 + 9 * kEvery)), "of eight, one bears it out");
  Job rarer;
  next = kMany;
  for (int i = 0; i < 10; ++i) {
    next = rarer.record(next, 1, 30);
    next = rarer.record(next, 8, 0);
  }
  check(is_about(rarer.entry().cost, 10 * 30), "of nine, none");
}

void all_recorded() {
  Job job;
  for (uint64_t number = 0; number < 1000; ++number)
    check(job.operate(number, number % 100 == 0 ? 30 : 0), "each is recorded");
  check(job.entry().seen == 10 && job.entry().last == 10, "each stands for itself");
  check(is_about(job.entry().cost, 10 * 30), "and costs what it cost");
}

}  // namespace

int main() {
  outlier();
  outlier_among_small_ones();
  what_goes_on();
  now_and_then();
  all_recorded();
  std::printf("ledger: checks passed\n");
}
