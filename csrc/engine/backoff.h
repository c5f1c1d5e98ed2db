// How a driver that waits for a peer passes the time: looks all the time at first, then sleeps in growing steps.
#pragma once

#include <sched.h>

#include <algorithm>
#include <array>
#include <chrono>

#include "engine/limits.h"

namespace collective {

// Between nodes, segments arrive at the rate of a link, half a millisecond apart at 1 Gbit/s: a driver that looked for
// them all the time would take a third of a core from the computation. So after several waits of some length it begins
// the next one with a nap of a third of the shortest of them. Measured, 2 nodes of 1 rank, 1 Gbit/s, 8.4 MB: CPU time of an
// all-reduce 39 ms without naps, 22 with naps of half the wait; added to a training step 51 and 46 ms.
class Backoff {
 public:
  Backoff(bool may_hold, bool crosses_network, bool by_caller)
      : may_hold_(may_hold),
        crosses_network_(crosses_network),
        spin_(by_caller && may_hold && crosses_network ? kSpinOfCaller : kSpin) {}
  void reset() {
    if (idle_since_ == Clock::time_point{}) return;
    if (crosses_network_) {
      last_[next_++ % last_.size()] = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - idle_since_);
      slept_ = false;
    }
    idle_since_ = {};
  }
  // How long to sleep now; zero: go on, a turn of the processor's pause has been taken.
  std::chrono::microseconds pause() {
    const auto now = Clock::now();
    if (idle_since_ == Clock::time_point{}) idle_since_ = now;
    const auto idle = std::chrono::duration_cast<std::chrono::microseconds>(now - idle_since_);
    if (const auto nap = expected() / 3; nap > spin_ && !slept_) {
      slept_ = true;
      return std::min<std::chrono::microseconds>(nap, kLongestSleep);
    }
    // An eighth of the time waited so far: a late answer is noticed late by that share of the wait at most.
    if (idle >= spin_) return std::clamp<std::chrono::microseconds>(idle / 8, kShortestSleep, kLongestSleep);
    if (may_hold_ && idle < kHold)
      relax();
    else
      sched_yield();
    return {};
  }

 private:
  // Waiting for a peer: where every rank of the node can have a core, the driver keeps it for kHold, within which most
  // answers come; then it offers the core to others; then it sleeps. A system call in each turn would cost more than most
  // answers take.
  static constexpr auto kHold = std::chrono::microseconds(20);
  static constexpr auto kSpin = std::chrono::microseconds(50);
  // A caller that waits has nothing better to do with its core, and answers across a network take longer.
  static constexpr auto kSpinOfCaller = std::chrono::microseconds(200);
  static constexpr auto kShortestSleep = std::chrono::microseconds(20);
  static constexpr auto kLongestSleep = std::chrono::microseconds(500);

  static void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  // How long nothing will come, at least: the shortest of the last waits.
  std::chrono::microseconds expected() const { return *std::min_element(last_.begin(), last_.end()); }

  bool may_hold_, crosses_network_;
  std::chrono::microseconds spin_;
  Clock::time_point idle_since_{};
  std::array<std::chrono::microseconds, 4> last_{};
  size_t next_ = 0;
  bool slept_ = false;
};

}  // namespace collective
