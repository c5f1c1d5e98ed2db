// What a rank waits for, as it tells the others: in words, and so that what several ranks tell can be put together.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/limits.h"

namespace collective {

// Something in flight.
struct InFlight {
  // How far it has come: its user's device has not reached it; the other ranks have been told, or it waits for its turn;
  // all ranks have submitted it, and it waits for what runs; it runs.
  enum class Phase { kNotReady, kSubmitted, kAgreed, kRunning };
  std::string key;    // the same on all ranks that wait for the same; "" for what only this rank waits for
  std::string what;   // for people
  std::string state;  // what it waits for, in words; "" for nothing of interest
  Phase phase;
  Clock::time_point since;
  // Of what starts without agreement: which other ranks have started it can be told from how far they are.
  std::optional<uint32_t> bucket{};
  uint64_t run = 0;           // of the bucket; without one: its turn, if any
  std::optional<int> peer{};  // the rank in the job that it waits for, where it is one
};

// All of that in a group, and how far its rank is.
struct GroupWaits {
  std::string label;              // what precedes messages about it
  std::string identity;           // with its label and its ranks it tells groups apart
  std::vector<int> ranks;         // in the job
  std::vector<uint32_t> started;  // runs by bucket
  uint64_t turns;                 // submitted of what is matched by its order
  bool has_joined, is_leaving;
  std::vector<InFlight> in_flight;
};

// All of that on a rank.
struct RankWaits {
  bool is_waited_for;  // some thread of the script's waits for something in flight
  bool is_shut_down;   // or about to be
  std::vector<GroupWaits> groups;
};

}  // namespace collective
