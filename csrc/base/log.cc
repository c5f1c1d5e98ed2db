#include "base/log.h"

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <mutex>
#include <utility>

namespace collective {
namespace {
int log_rank = -1;
std::atomic<LogLevel> least_level{LogLevel::kWarning};

struct Shared {
  std::mutex mutex;  // guards the rest
  std::function<void(const std::string&)> told_of_stalls;
  bool queues = false;
  std::deque<LogLine> lines;
  std::condition_variable queued;
};
// Never destroyed: a thread of Python's may wait in it until the process ends.
Shared& shared = *new Shared;

}  // namespace

void set_log_rank(int rank) { log_rank = rank; }

void set_log_level(LogLevel level) { least_level = level; }

void log(LogLevel level, const std::string& text) {
  if (level < least_level) return;
  std::string line = (log_rank < 0 ? "" : "rank " + std::to_string(log_rank) + ": ") + text;  // unknown before init()
  if (!line.empty() && line.back() == '\n') line.pop_back();
  {
    const std::lock_guard lock(shared.mutex);
    if (shared.queues) {
      shared.lines.push_back({level, std::move(line)});
      shared.queued.notify_one();
      return;
    }
  }
  // A single write, since several ranks share one terminal.
  line = "[collective] " + line + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void queue_log_lines(bool on) {
  const std::lock_guard lock(shared.mutex);
  shared.queues = on;
  shared.queued.notify_all();
}

bool wait_for_log_line() {
  std::unique_lock lock(shared.mutex);
  shared.queued.wait(lock, [] { return !shared.lines.empty() || !shared.queues; });
  return !shared.lines.empty();
}

std::optional<LogLine> take_log_line() {
  const std::lock_guard lock(shared.mutex);
  if (shared.lines.empty()) return std::nullopt;
  LogLine line = std::move(shared.lines.front());
  shared.lines.pop_front();
  return line;
}

void log_stalled(const std::string& text) {
  {
    const std::lock_guard lock(shared.mutex);
    if (shared.told_of_stalls) {
      shared.told_of_stalls(text);
      return;
    }
  }
  log_warning(text);
}

bool is_told_of_stalls() {
  const std::lock_guard lock(shared.mutex);
  return static_cast<bool>(shared.told_of_stalls);
}

void set_told_of_stalls(std::function<void(const std::string&)> told) {
  const std::lock_guard lock(shared.mutex);
  shared.told_of_stalls = std::move(told);
}

std::string seconds_text(std::chrono::duration<double> duration) {
  const double seconds = duration.count();
  std::string text = std::to_string(seconds);
  return text.substr(0, text.find('.') + (seconds < 10 ? 2 : 0)) + " s";
}

}  // namespace collective
