// Log lines for the user, on stderr.
#pragma once

#include <chrono>
#include <string>

namespace collective {

// collective/config.py has the same numbers.
enum class LogLevel : int { kTrace, kDebug, kInfo, kWarning, kError, kFatal };

// Set by init(), so that every line names its rank.
void set_log_rank(int rank);
// Lines below this level are dropped.
void set_log_level(LogLevel level);
void log(LogLevel level, const std::string& text);
inline void log_warning(const std::string& text) { log(LogLevel::kWarning, text); }
inline void log_error(const std::string& text) { log(LogLevel::kError, text); }

// "2.5 s", "300 s"
std::string seconds_text(std::chrono::duration<double> duration);

}  // namespace collective
