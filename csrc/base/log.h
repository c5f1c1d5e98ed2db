// Log lines for the user: on stderr, or, while Python collects them for its logging, in a queue.
#pragma once

#include <chrono>
#include <optional>
#include <string>

namespace collective {

// collective/config.py has the same numbers.
enum class LogLevel : int { kTrace, kDebug, kInfo, kWarning, kError, kFatal };

// Set by init(), so that every line names its rank.
void set_log_rank(int rank);
// Lines below this level are dropped.
void set_log_level(LogLevel level);
void log(LogLevel level, const std::string& text);

struct LogLine {
  LogLevel level;
  std::string text;
  std::chrono::steady_clock::time_point since{};
};
// Whether lines of this process go to the queue, from which take_log_line() takes them; what is in it stays there.
// While nobody takes them, because a function in C keeps the interpreter's lock, they go to stderr all the same.
void queue_log_lines(bool on);
// The oldest; nothing if there is none.
std::optional<LogLine> take_log_line();
// Blocks until there is one; false if there will be none, because lines go to stderr again.
bool wait_for_log_line();

inline void log_warning(const std::string& text) { log(LogLevel::kWarning, text); }
inline void log_error(const std::string& text) { log(LogLevel::kError, text); }

// "2.5 s", "300 s"
std::string seconds_text(std::chrono::duration<double> duration);

}  // namespace collective
