// Who waits too long: warnings that say for what and for whom, and an end to each wait.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "base/rank_names.h"
#include "engine/inquiry.h"
#include "engine/limits.h"
#include "engine/order.h"
#include "engine/run_queue.h"

namespace collective {

// One wait that only this rank knows of.
class Wait {
 public:
  Wait() : Wait(Clock::now()) {}
  explicit Wait(Clock::time_point since) : since_(since) {}
  Clock::time_point since() const { return since_; }
  // What is due now: a warning, once; or the end.
  enum class Due { kNothing, kWarning, kTimeout };
  Due look(Clock::time_point now, const Limits& limits);

 private:
  Clock::time_point since_;
  bool warned_ = false;
};

class Stalls {
 public:
  Stalls(int rank, const RankNames& names, const Limits& limits, Inquiry& inquiry)
      : rank_(rank), names_(&names), limits_(&limits), inquiry_(&inquiry) {}

  // Looks at the run that stalls longest, which tells the story: the others wait behind it. Asks the other ranks about
  // what runs without agreement, then warns; throws kTimeout at the end, and kMismatch where ranks do different things.
  // described: the description of the operation with this turn.
  void look_at(RunQueue& running, Clock::time_point now, const std::function<std::string(uint64_t)>& described);
  // Looks at an operation that waits for its turn; state: for what. Throws kTimeout.
  void look_at(Order::Entry& entry, const std::function<std::string()>& state, Clock::time_point now);
  // Looks whether the coordinator answers, while something waits for its word: it is what warns of ranks that are late,
  // so nobody else would warn of it. what, since: of the submission that has waited longest, null for none.
  void look_at_coordinator(const std::string* what, Clock::time_point since, Clock::time_point now);

 private:
  // question: what the others can tell about it, if anything; description: how this rank describes it, "" for nothing
  // that can differ.
  void look(Waited& wait, const std::string& what, const std::optional<Inquiry::Question>& question,
            const std::string& description, const std::function<std::string()>& state, Clock::time_point now);

  int rank_;
  const RankNames* names_;
  const Limits* limits_;
  Inquiry* inquiry_;
  Clock::time_point asked_{};    // the coordinator, whether it is there
  bool warned_ = false;          // of it
  Clock::time_point told_of_{};  // since when what was last told had waited
};

}  // namespace collective
