#include "engine/stalls.h"

#include <algorithm>

#include "base/log.h"
#include "base/stalled.h"

namespace collective {
namespace {

// The coordinator reports a time-out. A rank that does not hear from it gives up this much later.
constexpr auto kCoordinatorGrace = std::chrono::seconds(5);
// How long the others have to answer before their answers are reported.
constexpr auto kAnswerTime = std::chrono::milliseconds(700);
// How long an operation that is matched by its order stalls before the ranks compare what they do.
constexpr auto kFirstComparison = std::chrono::seconds(1);

}  // namespace

Wait::Due Wait::look(Clock::time_point now, const Limits& limits) {
  if (now - since_ >= limits.timeout) return Due::kTimeout;
  if (warned_ || now - since_ < limits.stall_warning) return Due::kNothing;
  warned_ = true;
  return Due::kWarning;
}

void Stalls::look_at(RunQueue& queue, Clock::time_point now, const std::function<std::string(uint64_t)>& described) {
  Running* const running = queue.oldest();
  if (running == nullptr) return;
  std::optional<Inquiry::Question> question;
  if (running->of_bucket) question = {running->of_bucket->bucket, running->of_bucket->run};
  if (running->turn) question = {Inquiry::kOrder, *running->turn};
  look(
      *running, running->what, question, running->turn ? described(*running->turn) : "",
      [&] { return running->operation->describe(); }, now);
}

void Stalls::look_at(Order::Entry& entry, const std::function<std::string()>& state, Clock::time_point now) {
  look(entry.wait, entry.what(), Inquiry::Question{Inquiry::kOrder, entry.turn}, entry.encoded, state, now);
}

void Stalls::look(Waited& wait, const std::string& what, const std::optional<Inquiry::Question>& question,
                  const std::string& description, const std::function<std::string()>& state, Clock::time_point now) {
  const auto waited = now - wait.since;
  std::chrono::duration<double> patience = std::min(limits_->stall_warning, limits_->timeout);
  if (!description.empty()) patience = std::min<std::chrono::duration<double>>(patience, kFirstComparison);
  if (waited < patience) return;
  const bool never = wait.asked == Clock::time_point{};
  // Again where descriptions may differ: a rank that has come since then may do something else. After 1, 2, 4, ... of
  // the first wait, and before the last word.
  const bool is_last = waited >= limits_->timeout && now - wait.asked >= kFirstComparison;
  const bool again = !description.empty() && (is_last || now - wait.asked >= wait.asked - wait.since);
  if (question && (never || again)) {
    wait.asked = now;
    inquiry_->ask(*question);
  }
  if (question && now < wait.asked + kAnswerTime) return;
  if (question && !description.empty())
    if (const std::string difference = inquiry_->difference(*question, description); !difference.empty())
      throw Error(ErrorCode::kMismatch, what + ": " + difference);
  const auto why = [&] { return what + ": " + (question ? inquiry_->verdict(*question) + "; " : "") + state(); };
  if (waited >= limits_->timeout)
    throw Error(ErrorCode::kTimeout,
                why() + ". It did not finish within the timeout of " + seconds_text(limits_->timeout));
  if (!wait.warned && waited >= limits_->stall_warning) {
    wait.warned = true;
    log_stalled(names_->label() + "stalled: " + why());
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
  if (is_told_of_stalls()) {  // and finds out for itself whether the coordinator answers
    if (told_of_ != since) log_stalled(text());
    told_of_ = since;
    return;
  }
  if (!silent || warned_ || waited < limits_->stall_warning) return;
  warned_ = true;
  log_stalled(names_->label() + "stalled: " + text());
}

}  // namespace collective
