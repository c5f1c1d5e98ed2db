#include "base/log.h"

#include <unistd.h>

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

// A line that nobody has taken for so long is written by whoever has the next one.
constexpr auto kTaken = std::chrono::seconds(1);

struct Shared {
  std::atomic<pid_t> queues{0};  // the process whose lines do
  std::mutex mutex;              // guards the rest
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
  const auto write = [](const std::string& one) {
    // A single write, since several ranks share one terminal.
    const std::string all = "[collective] " + one + "\n";
    std::fwrite(all.data(), 1, all.size(), stderr);
  };
  if (shared.queues != getpid()) {  // looked at first, since a forked child may find the mutex locked for ever
    write(line);
    return;
  }
  const std::lock_guard lock(shared.mutex);
  if (shared.queues == 0) {  // since just now: nobody would take it any more
    write(line);
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  shared.lines.push_back({level, std::move(line), now});
  shared.queued.notify_one();
  if (now - shared.lines.front().since < kTaken) return;
  for (const LogLine& waiting : shared.lines) write(waiting.text);
  shared.lines.clear();
}

void queue_log_lines(bool on) {
  const std::lock_guard lock(shared.mutex);
  shared.queues = on ? getpid() : 0;
  shared.queued.notify_all();
}

bool wait_for_log_line() {
  std::unique_lock lock(shared.mutex);
  shared.queued.wait(lock, [] { return !shared.lines.empty() || shared.queues == 0; });
  return !shared.lines.empty();
}

std::optional<LogLine> take_log_line() {
  const std::lock_guard lock(shared.mutex);
  if (shared.lines.empty()) return std::nullopt;
  LogLine line = std::move(shared.lines.front());
  shared.lines.pop_front();
  return line;
}

std::string seconds_text(std::chrono::duration<double> duration) {
  const double seconds = duration.count();
  std::string text = std::to_string(seconds);
  return text.substr(0, text.find('.') + (seconds < 10 ? 2 : 0)) + " s";
}

}  // namespace collective
