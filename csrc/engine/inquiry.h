// Questions between ranks. "Have you started this?" is asked when a bucket, which runs without agreement, makes no
// progress: it costs nothing until something stalls, and the engine of a rank answers even while its script is stuck
// elsewhere. "Are you there?" is asked of the coordinator.
//
// And a demand, "run this", is sent to a rank that has joined and so does not start its buckets by itself.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "messages/letters.h"

namespace collective {

class Inquiry {
 public:
  explicit Inquiry(const Comm& comm);

  void ask(uint32_t bucket);
  // Answers others with how often this rank has started their bucket and what it waits for itself ("" for nothing),
  // and takes answers.
  void progress(const std::vector<uint32_t>& started, const std::function<std::string()>& waits_for);
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
  // In words, which ranks have not started run number `run` (from 1) of `bucket`, as far as the answers tell. Ranks that
  // cannot start it, because they wait for another operation, are told apart.
  std::string verdict(uint32_t bucket, uint32_t run) const;

 private:
  struct Question {
    uint32_t bucket;
  };
  struct Answer {
    uint32_t bucket;
    uint32_t started;
    char waits_for[160];
  };
  const Comm* comm_;
  MpiLetters asked_of_, told_, demanded_;       // questions, answers, demands
  std::vector<std::optional<Answer>> answers_;  // by rank, to the last question
  uint32_t asked_ = 0;
  bool present_ = false;
};

}  // namespace collective
