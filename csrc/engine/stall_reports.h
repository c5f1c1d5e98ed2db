// What the engine tells a thread of Python's about waits that are too long: that thread asks the other processes, beside
// MPI, and finds out why (collective/stalls.py).
#pragma once

#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace collective {

class StallReports {
 public:
  // The engine's side.
  void put(std::string text) {
    {
      const std::lock_guard lock(mutex_);
      texts_.push_back(std::move(text));
    }
    put_.notify_one();
  }
  void end() {
    {
      const std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    put_.notify_one();
  }
  // The other side: blocks until there is one, and takes the last of several; nothing at the end.
  std::optional<std::string> take() {
    std::unique_lock lock(mutex_);
    put_.wait(lock, [this] { return !texts_.empty() || is_over_; });
    if (is_over_) return std::nullopt;
    std::string text = std::move(texts_.back());
    texts_.clear();
    return text;
  }

 private:
  std::mutex mutex_;
  std::condition_variable put_;
  std::vector<std::string> texts_;
  bool is_over_ = false;
};

}  // namespace collective
