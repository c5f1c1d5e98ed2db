// Waits that are too long: a warning, unless somebody wants to be told and finds out the rest.
#pragma once

#include <functional>
#include <string>

namespace collective {

void log_stalled(const std::string& text);
bool is_told_of_stalls();
// told: called by the thread that drives, so it does not block. Null for nobody.
void set_told_of_stalls(std::function<void(const std::string&)> told);

}  // namespace collective
