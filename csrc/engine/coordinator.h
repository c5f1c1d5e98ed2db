// Rank 0's part of the agreement by name (agreement.h): it takes the words of all ranks and decides. It knows of no
// network, for the words come and the decisions go as strings of bytes.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/codec.h"
#include "base/descriptor.h"
#include "base/rank_names.h"
#include "engine/decision.h"
#include "engine/ledger.h"
#include "engine/limits.h"

namespace collective {

class Coordinator {
 public:
  // names: of the ranks, and how many there are. most_buckets: that may be open at a time.
  Coordinator(const RankNames& names, const Limits& limits, uint32_t most_buckets);

  // The words of a rank, in the order in which it has said them.
  void take(int source, const std::string& words);
  // What all ranks are to be told, for Agreement::take_decisions(); empty: nothing new. Gives up on names that have
  // waited too long, and warns of those that wait.
  std::string decide(Clock::time_point now);
  // The ranks about which a warning or an error is due soon, since the last call; and what one of them does, in words.
  std::vector<int> take_wanted() { return std::exchange(wanted_, {}); }
  void set_doing(int rank, std::string text) { doing_[rank] = {std::move(text), Clock::now()}; }
  const Ledger& ledger() const { return ledger_; }
  // A line for each name that some ranks have submitted and others not.
  std::string describe() const;

 private:
  struct Pending {  // a name that some ranks have submitted
    std::vector<Variant> variants;
    std::vector<int64_t> rows;
    std::vector<char> here;  // by rank
    int missing = 0;
    bool recurring = false;
    Clock::time_point since, warned;
    bool asked = false;  // what the absent ranks do, since it was last warned of
  };
  struct Ready {
    std::string name, encoded;
    std::vector<int64_t> rows;
    bool recurring;
    uint32_t bucket, buckets;  // that it opens
  };
  struct Opened {  // buckets that were opened together
    uint32_t count;
    int let_go;  // by how many ranks
  };

  int size() const { return static_cast<int>(ranks_.job_ranks().size()); }
  void arrive(int source, const std::string& name, const std::string& encoded, int64_t rows, bool recurring);
  bool complete_but_for_joined(const Pending& pending) const;
  void complete(const std::string& name, Pending& pending);
  void take_joined(int source);
  void take_let_go(uint32_t bucket);
  void take_left(int source, const std::vector<uint32_t>& started);
  uint32_t room_for(uint32_t count) const;
  void fail(const std::string& name, const std::vector<int>& targets, ErrorCode code, const std::string& text);
  void decide_ready();
  void write_execution(const std::vector<Ready*>& fused);
  void check_stalls(Clock::time_point now);
  void warn_of_stalls(Clock::time_point now);
  void want(Clock::time_point now);
  std::string doing_of(const std::vector<int>& ranks, Clock::time_point now) const;
  static std::string what(const std::string& name, const Pending& pending);  // for people
  std::vector<int> absent(const Pending& pending) const;
  std::vector<int> present(const Pending& pending) const;

  RankNames ranks_;
  Limits limits_;
  uint32_t most_buckets_;
  Ledger ledger_;
  bool asked_ = false;  // for the ledger
  Writer decisions_;    // since the last decide()
  NameTable names_;
  std::unordered_map<std::string, Pending> pending_;
  std::vector<Ready> ready_;
  std::map<uint32_t, Opened> opened_;  // by their first number
  // Names given up on, with how often each rank has not come: a late submission is answered at once, so that calls of
  // all ranks stay paired.
  std::unordered_map<std::string, std::vector<uint32_t>> expired_;
  std::vector<char> left_, joined_;
  int left_count_ = 0, joined_count_ = 0;
  Clock::time_point next_check_;
  std::vector<int> wanted_;
  struct Told {
    std::string text;
    Clock::time_point at;
  };
  std::map<int, Told> doing_;
};

}  // namespace collective
