// When each operation was agreed on and when it ran, for traces.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace collective {

// Recorded by the thread that drives the engine, collected now and then by the one that writes the file. Costs nothing
// while off.
class Timeline {
 public:
  using Clock = std::chrono::steady_clock;
  struct Event {
    std::string name;
    const char* kind;         // of operation
    bool ran;                 // else it was negotiated
    int64_t begin, duration;  // microseconds; begin counts from start()
  };

  void start() {
    const std::lock_guard lock(mutex_);
    events_.clear();
    origin_ = Clock::now();
    on_ = true;
  }
  void stop() { on_ = false; }
  // What has been recorded since the last call.
  std::vector<Event> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(events_, {});
  }

  void negotiated(const std::string& name, const char* kind, Clock::time_point begin) {
    record(name, kind, false, begin);
  }
  void ran(const std::string& name, const char* kind, Clock::time_point begin) { record(name, kind, true, begin); }

 private:
  void record(const std::string& name, const char* kind, bool ran, Clock::time_point begin) {
    if (!on_.load(std::memory_order_relaxed)) return;
    const auto us = [](auto duration) {
      return std::chrono::duration_cast<std::chrono::microseconds>(duration).count();
    };
    const auto now = Clock::now();
    const std::lock_guard lock(mutex_);
    begin = std::max(begin, origin_);  // it may have been in flight when recording began
    events_.push_back({name, kind, ran, us(begin - origin_), us(now - begin)});
  }

  std::atomic<bool> on_{false};
  std::mutex mutex_;  // guards what follows
  Clock::time_point origin_;
  std::vector<Event> events_;
};

}  // namespace collective
