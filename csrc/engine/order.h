// Operations that ranks match by their order: the n-th that one rank submits to the group belongs together with the n-th
// of every other, as in MPI and torch.distributed. Nothing is agreed on before one runs.
//
// Where ranks share memory, each shows what it does next before it touches what they share (node/roll.h), and starts when
// all have; they see alike whether all do the same. Between nodes nothing is compared in advance: messages of operations
// with different descriptions have different tags and never meet, so such operations stall. What stalls is looked into by
// asking the other ranks what they do (inquiry.h), for which the last descriptions are kept.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/rank_names.h"
#include "engine/inquiry.h"
#include "engine/run_queue.h"
#include "engine/ticket.h"
#include "node/roll.h"

namespace collective {

// Where operations are matched by their order, how many a rank has begun takes the place of the runs of buckets.
inline std::vector<uint32_t> as_words(uint64_t turns) {
  return {static_cast<uint32_t>(turns), static_cast<uint32_t>(turns >> 32)};
}
inline uint64_t turns_of(const std::vector<uint32_t>& words) { return uint64_t{words.at(1)} << 32 | words.at(0); }

class Order {
 public:
  struct Entry {
    std::shared_ptr<Ticket> ticket;
    OrderedSubmission submission;
    uint64_t turn;  // from 1
    uint64_t digest;
    std::string encoded;
    std::string difference{};  // how ranks of the node differ, in words
    Waited wait{};
    std::string what() const;  // for people
  };

  // The ranks compare in this memory, where they share any. ranks: those of the group that share it.
  void use(const SharedMemory& memory, size_t offset, std::vector<int> ranks) {
    roll_.emplace(memory, offset);
    ranks_ = std::move(ranks);
  }

  void add(std::shared_ptr<Ticket> ticket, OrderedSubmission submission);
  // The next whose turn has come: every rank on the node has come to it, too, or differs.
  std::optional<Entry> take(const RankNames& names);

  // The one that waits for its turn; null: none.
  Entry* first() { return waiting_.empty() ? nullptr : &waiting_.front(); }
  const std::deque<Entry>& waiting() const { return waiting_; }
  std::string state() const;
  // How many this rank has submitted, and how many of these have had their turn, all before the others.
  uint64_t submitted() const { return submitted_; }
  uint64_t taken() const { return submitted_ - refused_ - waiting_.size(); }
  // The description of one of the last, as long as it is known; else "".
  std::string described(uint64_t turn) const;
  // Takes out all that wait, from this turn on: they will have none.
  std::deque<Entry> take_from(uint64_t turn);

 private:
  static constexpr size_t kRemembered = 256;

  std::deque<Entry> waiting_;
  std::deque<std::string> last_;  // descriptions, of turns up to submitted_
  uint64_t submitted_ = 0, refused_ = 0;
  std::optional<Roll> roll_;
  std::vector<int> ranks_;  // in the roll
  bool shown_ = false;      // the first that waits
};

}  // namespace collective
