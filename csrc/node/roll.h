// What the ranks of a node do next, shown to each other before they do it, where operations are matched by their order.
//
// Every rank has two entries in its part of the memory, which successive turns use alternately. It shows turn t + 1 when
// all have shown turn t. By then all have read what turn t - 1 showed, whose entry turn t + 1 takes:
//
//     part of a rank:   shown | digest, rows, description of even turns | the same of odd turns
//
// cost:   one line that changes hands for each rank; a description is read only where digests differ
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "node/shared_memory.h"

namespace collective {

class Roll {
 public:
  static constexpr size_t kLongest = 4000;  // bytes of a description
  // What it takes of each part.
  static constexpr size_t nbytes() { return kLineBytes + 2 * kEntryBytes; }
  // The roll at `offset` (of whole lines) of every part. The memory must outlive it, and serve nothing else there.
  Roll(const SharedMemory& memory, size_t offset);

  // This rank's next turn. All have shown the last one.
  void show(uint64_t digest, int64_t rows, std::string_view description);
  // Whether all have shown it, too.
  bool all_shown() { return shown_.all_reached(shown_.own()); }
  // Then: whether all show the same digest, and what they show, by rank.
  bool all_alike() const;
  std::vector<int64_t> rows() const;
  std::vector<std::string> descriptions() const;

  // After all_shown() has returned false: the first rank that has not, by its number in the job.
  int missing() const { return shown_.missing(); }

 private:
  struct Entry {
    uint64_t digest;
    int64_t rows;
    uint64_t nbytes;
    char description[kLongest];
  };
  static constexpr size_t kEntryBytes = round_up(sizeof(Entry), kLineBytes);
  Entry& entry(int rank) const { return *entries_[static_cast<size_t>(rank)][shown_.own() % 2]; }

  int rank_;
  Counters shown_;  // turns, from 1
  std::vector<std::array<Entry*, 2>> entries_;
};

}  // namespace collective
