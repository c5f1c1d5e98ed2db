// When each operation was agreed and when it ran, for people who look at a trace.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace collective {

// Guarded by the engine's driver. Costs nothing while it is off.
class Timeline {
 public:
  using Clock = std::chrono::steady_clock;
  struct Event {
    std::string name;
    const char* phase;        // "negotiate", or the kind of operation
    int64_t begin, duration;  // microseconds; begin counts from start()
  };

  void start() {
    events_.clear();
    origin_ = Clock::now();
    on_ = true;
  }
  std::vector<Event> stop() {
    on_ = false;
    return std::move(events_);
  }
  void record(const std::string& name, const char* phase, Clock::time_point begin) {
    if (!on_ || events_.size() >= kMostEvents) return;
    const auto us = [](auto duration) {
      return std::chrono::duration_cast<std::chrono::microseconds>(duration).count();
    };
    events_.push_back({name, phase, us(begin - origin_), us(Clock::now() - begin)});
  }

 private:
  static constexpr size_t kMostEvents = size_t{1} << 20;  // some 100 MB
  bool on_ = false;
  Clock::time_point origin_;
  std::vector<Event> events_;
};

}  // namespace collective
