#include "base/log.h"

#include <atomic>
#include <cstdio>

namespace collective {
namespace {
int log_rank = -1;
std::atomic<LogLevel> least_level{LogLevel::kWarning};
}  // namespace

void set_log_rank(int rank) { log_rank = rank; }

void set_log_level(LogLevel level) { least_level = level; }

void log(LogLevel level, const std::string& text) {
  if (level < least_level) return;
  // A single write, since several ranks share one terminal.
  const std::string who = log_rank < 0 ? "" : "rank " + std::to_string(log_rank) + ": ";  // unknown before init()
  const std::string line = "[collective] " + who + text + (text.empty() || text.back() != '\n' ? "\n" : "");
  std::fwrite(line.data(), 1, line.size(), stderr);
}

std::string seconds_text(std::chrono::duration<double> duration) {
  const double seconds = duration.count();
  std::string text = std::to_string(seconds);
  return text.substr(0, text.find('.') + (seconds < 10 ? 2 : 0)) + " s";
}

}  // namespace collective
