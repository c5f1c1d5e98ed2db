// What an engine has done since it started, for those who watch a job.
//
// Counted always, under the engine's mutex, which submit(), wait() and finish() hold anyway. What that adds to an
// operation is two or three looks at the clock and one into a small map.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "engine/limits.h"
#include "engine/ticket.h"

namespace collective {

// At one moment. Times are in seconds.
struct Statistics {
  struct Finished {
    uint64_t operations = 0, bytes = 0;
  };
  struct InFlight {
    std::string name, kind;
    double seconds = 0.0;
  };
  double seconds = 0.0;                      // since the engine started
  std::map<std::string, Finished> finished;  // without error, by kind; without questions
  uint64_t failed = 0;                       // operations that ended in an error
  size_t in_flight = 0;
  double in_flight_seconds = 0.0;  // in which at least one operation was in flight
  double waited_seconds = 0.0;     // in which at least one caller waited for one
  std::optional<InFlight> oldest;  // of those in flight
  std::string state;
};

// The times that it is handed are read under the mutex, too: of two threads, the later one is not to have the earlier
// time.
class Tally {
 public:
  void submitted(Clock::time_point now) { in_flight_.begin(now); }
  void finished(const Ticket& ticket, ErrorCode code) {
    in_flight_.end(Clock::now());
    if (ticket.is_question) return;
    if (code != ErrorCode::kNone) {
      ++failed_;
      return;
    }
    Statistics::Finished& of_kind = finished_[ticket.kind];
    ++of_kind.operations;
    of_kind.bytes += ticket.nbytes;
  }
  void wait_begins(Clock::time_point now) { waiting_.begin(now); }
  void wait_ends() { waiting_.end(Clock::now()); }

  // Without what only the engine knows: `oldest` and `state`.
  Statistics read() const {
    const auto now = Clock::now();
    Statistics all;
    all.seconds = seconds(now - started_);
    for (const auto& [kind, of_kind] : finished_) all.finished.emplace(kind, of_kind);
    all.failed = failed_;
    all.in_flight = in_flight_.count();
    all.in_flight_seconds = seconds(in_flight_.total(now));
    all.waited_seconds = seconds(waiting_.total(now));
    return all;
  }

 private:
  // The time during which there was at least one of something.
  class Span {
   public:
    void begin(Clock::time_point now) {
      if (count_++ == 0) since_ = now;
    }
    void end(Clock::time_point now) {
      if (--count_ == 0) total_ += now - since_;
    }
    size_t count() const { return count_; }
    Clock::duration total(Clock::time_point now) const { return count_ > 0 ? total_ + (now - since_) : total_; }

   private:
    size_t count_ = 0;
    Clock::time_point since_;
    Clock::duration total_{};
  };
  static double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

  Clock::time_point started_ = Clock::now();
  std::map<std::string_view, Statistics::Finished> finished_;  // kinds are literals
  uint64_t failed_ = 0;
  Span in_flight_, waiting_;
};

}  // namespace collective
