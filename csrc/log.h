// Lines for the user, on stderr.
#pragma once

#include <string>

namespace collective {

// Set once at init, so that every line says who speaks.
void set_log_rank(int rank);
void log_warning(const std::string& text);

}  // namespace collective
