#include "engine/stalls.h"

#include <algorithm>

#include "base/log.h"

namespace collective {
namespace {

// The coordinator reports a time-out. A rank that does not hear from it gives up this much later.
constexpr auto kCoordinatorGrace = std::chrono::seconds(5);
// How long the others have to answer before their answers are reported.
constexpr auto kAnswerTime = std::chrono::milliseconds(500);

}  // namespace

Wait::Due Wait::look(Clock::time_point now, const Limits& limits) {
  if (now - since_ >= limits.timeout) return Due::kTimeout;
  if (warned_ || now - since_ < limits.stall_warning) return Due::kNothing;
  warned_ = true;
  return Due::kWarning;
}

void Stalls::look_at(RunQueue& queue, Clock::time_point now) {
  Running* const running = queue.oldest();
  if (running == nullptr || now - running->since < std::min(limits_->stall_warning, limits_->timeout)) return;
  if (running->of_bucket && running->asked == Clock::time_point{}) {
    running->asked = now;
    inquiry_->ask(running->of_bucket->bucket);
  }
  if (running->of_bucket && now < running->asked + kAnswerTime) return;
  const auto why = [&] {
    const std::string verdict =
        running->of_bucket ? inquiry_->verdict(running->of_bucket->bucket, running->of_bucket->run) + "; " : "";
    return running->what + ": " + verdict + running->operation->describe();
  };
  const auto waited = now - running->since;
  if (waited >= limits_->timeout)
    throw Error(ErrorCode::kTimeout, why() + ". It did not finish within " + seconds_text(limits_->timeout));
  if (!running->warned && waited >= limits_->stall_warning) {
    running->warned = true;
    log_warning(names_->label() + "stalled: " + why());
  }
}

void Stalls::look_at_coordinator(const std::string* what, Clock::time_point since, Clock::time_point now) {
  const auto patience = std::min(limits_->stall_warning, limits_->timeout);
  if (rank_ == 0 || what == nullptr || now - since < patience) {
    asked_ = {};
    warned_ = false;
    return;
  }
  if (asked_ == Clock::time_point{} || (inquiry_->is_present() && now - asked_ >= patience)) {
    asked_ = now;
    warned_ = false;
    inquiry_->ask_presence(0);
  }
  const bool silent = !inquiry_->is_present() && now - asked_ >= kAnswerTime;
  const auto text = [&] {
    return *what + ": " + names_->located({0}) + ", which coordinates, " +
           (inquiry_->is_present() ? "answers, but its word does not arrive" : "does not answer");
  };
  const auto waited = now - since;
  if (waited > limits_->timeout + kCoordinatorGrace || (silent && waited > limits_->timeout))
    throw Error(ErrorCode::kTimeout, text() + ". It did not within " + seconds_text(limits_->timeout));
  if (!silent || warned_ || waited < limits_->stall_warning) return;
  warned_ = true;
  log_warning(names_->label() + "stalled: " + text());
}

}  // namespace collective
