// Mail between nodes. The lowest rank of each node is its leader. Leaders form a tree, whose root is rank 0; a leader has
// at most kArity others below it, and the other ranks of its node, whose words it hears through the node's memory:
//
//      rank 0 (node 0) ---- rank 4 (node 1) ---- ranks 5, 6, 7
//         |   \-- ranks 1, 2, 3
//         |-------------- rank 8 (node 2) ---- ...
//
// Words go up the tree. A leader holds a submission until all ranks below it, and itself, have submitted that name: it
// could not be executed before. Then one message says so for all of them. What waits longer than kPatience goes up as it
// is, so that the coordinator can tell who is late and what differs; and so does everything before any other word but
// those about waits, so that the words of a rank stay in order as far as that matters. Decisions go down the tree.
//
// messages:  at most 2 (kArity + 1) at a rank and round: from and to those below it and the one above
// limits:    an engine that stops tells those below it; one that hangs, or whose process dies without the launcher ending
//            the job, cuts them off, and they seem to be late
// source:    the tree is that of other collectives; for holding words back, the bit vectors of Horovod's response cache
//            serve the same end
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/codec.h"
#include "engine/decision.h"
#include "engine/limits.h"
#include "engine/mail.h"
#include "messages/letters.h"

namespace collective {

// A leader's end. The other ranks of a node have that of the node alone.
class TreeMail final : public Mail {
 public:
  static constexpr int kArity = 7;
  static constexpr auto kPatience = std::chrono::milliseconds(100);

  // leaders: by rank, the leader of its node. names: this rank's table, for the ids in words. members: to and from the
  // other ranks of this node, numbered in their order with this one as 0; null where there are none.
  TreeMail(int rank, const std::vector<int>& leaders, const NameTable& names, std::unique_ptr<Letters> letters,
           std::unique_ptr<Mail> members);

  void send(std::string bytes) override;
  std::optional<Message> poll() override;
  bool sent() override;
  void hang_up() override;
  void tell_below(const std::string& bytes) override;
  bool take_moved() override { return std::exchange(moved_, false); }
  void decided(const std::string& name) override;
  void all_joined() override { joined_ = 0; }

 private:
  struct Variant {  // the same word of several ranks
    std::string word;
    std::vector<int> sources;
  };
  struct Held {  // of one name, since the last decision about it
    std::vector<Variant> variants;
    size_t ranks = 0;  // that have submitted it, those included whose word has gone up already
    Clock::time_point since;
  };
  struct Child {
    int leader;
    std::vector<int> below;  // its ranks and those of the nodes below it
  };

  bool is_root() const { return parent_ < 0; }
  void take_words(const std::vector<int>& sources, std::string_view words);
  void take_batch(const Child& child, const std::string& bytes);
  void pass_on(const std::vector<int>& sources, std::string_view word);
  void send_up(Held& held);
  void flush();

  int rank_, parent_ = -1;
  std::vector<Child> children_;
  std::vector<int> members_;  // of this node, by their number there
  size_t ranks_ = 0;          // this node's and those of the nodes below it
  size_t joined_ = 0;         // of these
  const NameTable* names_;
  std::unique_ptr<Letters> letters_;
  std::unique_ptr<Mail> local_;
  std::unordered_map<std::string, Held> held_;  // by name
  Writer up_;                                   // to the parent, at the end of a poll
  std::deque<Message> arrived_;                 // at the root
  Clock::time_point next_look_;
  bool moved_ = false;
};

}  // namespace collective
