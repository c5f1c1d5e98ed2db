// Lines for the user, on stderr.
#pragma once

#include <chrono>
#include <string>

namespace collective {

// Set once at init, so that every line says who speaks.
void set_log_rank(int rank);
void log_warning(const std::string& text);

// "2.5 s", "300 s"
std::string seconds_text(std::chrono::duration<double> duration);

}  // namespace collective
