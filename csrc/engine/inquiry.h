// Questions between ranks. "Have you started this?" is asked when something that runs without agreement makes no progress,
// a bucket or an operation that is matched by its order: it costs nothing until something stalls, and the engine of a rank
// answers even while its script is stuck elsewhere. "Are you there?" is asked of the coordinator, and "what do you do?" by
// it, of ranks that are late.
//
// And a demand, "run this", is sent to a rank that has joined and so does not start its buckets by itself.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/descriptor.h"
#include "engine/limits.h"
#include "messages/letters.h"

namespace collective {

class Inquiry {
 public:
  explicit Inquiry(const Comm& comm);

  // Run number `run` (from 1) of a bucket; or of kOrder: the operation with that turn.
  struct Question {
    uint32_t bucket;
    uint64_t run;
  };
  static constexpr uint32_t kOrder = UINT32_MAX - 1;
  // What a rank knows about it: how many runs it has started, and how the operation with this turn is described ("" where
  // it is not known).
  struct Known {
    uint64_t started;
    std::string description;
  };

  // What a rank's script does: waits for something in flight, in words, or is somewhere else; both "" where that is not
  // known.
  struct Doing {
    std::string waits_for, at;
    std::string text() const;  // "waits itself, for ..."
  };

  void ask(const Question& question);
  void ask_doing(int peer);
  // Whether every question of this rank has been answered, so that no letter is under way to it.
  bool is_answered() const { return awaited_ == 0; }
  // Answers others with what this rank knows and does, and takes answers. doing: nothing while that is being found out.
  // told: called with what others do, as asked.
  void progress(const std::function<Known(const Question&)>& known, const std::function<std::optional<Doing>()>& doing,
                const std::function<void(int peer, const Doing&)>& told);
  // "Are you there?", and whether that was answered.
  void ask_presence(int peer);
  bool is_present() const { return present_; }
  void demand(int peer, uint32_t bucket, uint64_t plan, uint32_t run);
  // What others have demanded since the last call.
  struct Demand {
    uint64_t plan;  // that the bucket was opened with
    uint32_t bucket;
    uint32_t run;
  };
  std::vector<Demand> take_demands();
  // In words, which ranks have not started what is in question, as far as the answers tell. Ranks that cannot start it,
  // because they wait for another operation, are told apart.
  std::string verdict(const Question& question) const;
  // In words, how the others' descriptions of it differ from this one; "" where none does, as far as the answers tell.
  std::string difference(const Question& question, const std::string& description) const;

 private:
  struct Answer {
    uint64_t started;
    std::string description;
    Doing doing;
  };
  struct Asked {
    Question question;
    int by;
    Clock::time_point since;
  };
  void answer(const Asked& asked, const Known& known, const Doing& doing);
  const Answer* answer_of(int peer, const Question& question) const;

  const Comm* comm_;
  MpiLetters asked_of_, told_, demanded_;       // questions, answers, demands
  std::vector<std::optional<Answer>> answers_;  // by rank, to the last question
  Question asked_{0, 0};
  std::vector<Asked> unanswered_;  // others' questions
  size_t awaited_ = 0;             // answers to this rank's
  bool present_ = false;
};

}  // namespace collective
