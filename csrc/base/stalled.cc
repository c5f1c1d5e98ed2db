#include "base/stalled.h"

#include <mutex>
#include <utility>

#include "base/log.h"

namespace collective {
namespace {
std::mutex mutex;  // guards what follows
std::function<void(const std::string&)> told_of_stalls;
}  // namespace

void log_stalled(const std::string& text) {
  {
    const std::lock_guard lock(mutex);
    if (told_of_stalls) {
      told_of_stalls(text);
      return;
    }
  }
  log_warning(text);
}

bool is_told_of_stalls() {
  const std::lock_guard lock(mutex);
  return static_cast<bool>(told_of_stalls);
}

void set_told_of_stalls(std::function<void(const std::string&)> told) {
  const std::lock_guard lock(mutex);
  told_of_stalls = std::move(told);
}

}  // namespace collective
