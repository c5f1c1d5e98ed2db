#include "engine/whereabouts.h"

#include <utility>

namespace collective {
namespace {
constexpr auto kFresh = std::chrono::milliseconds(250);
}  // namespace

std::optional<std::string> Whereabouts::look() {
  const std::lock_guard lock(mutex_);
  if (!someone_looks_ || is_over_) return "";
  if (Clock::now() - told_ < kFresh) return text_;
  is_asked_ = true;
  asked_.notify_all();
  return std::nullopt;
}

bool Whereabouts::wait_for_question() {
  std::unique_lock lock(mutex_);
  someone_looks_ = true;
  asked_.wait(lock, [this] { return is_asked_ || is_over_; });
  return !is_over_;
}

void Whereabouts::tell(std::string text) {
  const std::lock_guard lock(mutex_);
  text_ = std::move(text);
  told_ = Clock::now();
  is_asked_ = false;
}

void Whereabouts::end() {
  const std::lock_guard lock(mutex_);
  is_over_ = true;
  asked_.notify_all();
}

}  // namespace collective
