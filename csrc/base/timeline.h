// When each operation was agreed on and when it ran, and when steps ended, for traces.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

namespace collective {

// Recorded by the thread that drives the engine, collected now and then by the one that writes files. Costs nothing
// while off.
class Timeline {
 public:
  using Clock = std::chrono::steady_clock;
  struct Event {
    enum class Phase : uint8_t { kWait, kRun, kStep };  // it waited for other ranks or its turn; it ran; a step ended
    Phase phase;
    const char* kind;            // of operation
    std::string name{};          // a tensor's, a bucket's
    std::string group{};         // what precedes messages about its ranks; "" for all of them
    uint64_t number = 0;         // among the group's operations, a bucket's runs, or the steps; alike on all ranks
    size_t nbytes = 0;           // of this rank's data
    size_t part = 0, parts = 1;  // of tensors that run together: which one, and how many there are
    Clock::time_point begin{}, end = Clock::now();
  };
  using Events = std::deque<Event>;  // grows without moving what it holds: the driver would wait for that

  // What was in flight before is recorded, too, with the time at which it began.
  void start() {
    const std::lock_guard lock(mutex_);
    events_.clear();
    step_began_ = Clock::now();
    on_ = true;
  }
  void stop() { on_ = false; }
  bool is_on() const { return on_.load(std::memory_order_relaxed); }
  // What has been recorded since the last call, in the order of the ends.
  Events take() {
    Events events;
    const std::lock_guard lock(mutex_);
    events.swap(events_);
    return events;
  }

  // To be called while it is on.
  void record(Event event) {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
  }
  // The script has ended a step.
  void end_step(uint64_t number) {
    if (!is_on()) return;
    const std::lock_guard lock(mutex_);
    Event step{Event::Phase::kStep, "step"};
    step.number = number;
    step.begin = std::exchange(step_began_, step.end);
    events_.push_back(std::move(step));
  }

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;  // guards what follows
  Clock::time_point step_began_;
  Events events_;
};

}  // namespace collective
