// What ranks tell the coordinator (words), what it tells all ranks (decisions), and the ids that stand for names in both.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "base/codec.h"
#include "base/types.h"

namespace collective {

struct Decision {
  enum class Kind : uint8_t {
    kExecute,    // entries, fused when there are several
    kFail,       // entries[0] fails on this rank, with code and text
    kLeft,       // `rank` has shut down, having started each bucket `started` times
    kAllLeft,    // every rank has
    kJoined,     // `rank` has joined
    kAllJoined,  // every rank has, `rank` as the last; none counts as joined any more
    kStopped,    // the engine of `rank` has stopped, with code and text
    kLedger,     // who was late, in `text`, as some rank has asked
    kReleased,   // the buckets from `bucket` on that were opened together: every rank has let them go
  };
  struct Entry {
    std::string name;
    std::vector<int64_t> rows;  // first dimension by rank, where it may differ; zero for ranks that have joined
    std::string encoded;        // the descriptor, when this rank has joined and not submitted it
  };
  explicit Decision(Kind kind) : kind(kind) {}
  Kind kind;
  std::vector<Entry> entries;
  uint32_t bucket = 0, buckets = 0;  // of opened buckets: the number of the first, and how many
  ErrorCode code = ErrorCode::kNone;
  std::string text;
  int rank = -1;
  std::vector<uint32_t> started;
};

// How a word begins; what follows it:
enum class Word : uint8_t {
  kId,     // a submission: its id
  kFull,   // a submission: name, descriptor, rows, whether it is worth an id
  kJoin,   // nothing
  kLetGo,  // the number of a plan's first bucket
  kLeave,  // how often each bucket was started
  kStop,   // code and text
  kWaits,  // how long operations have waited, see ledger.h
  kAsk,    // nothing: wants kLedger
};

inline bool is_submission(Word word) { return word == Word::kId || word == Word::kFull; }

// Reads what follows a word. id, name: of a submission, one of the two.
inline void read_word(Reader& r, Word word, uint32_t& id, std::string& name) {
  switch (word) {
    case Word::kId: id = r.get<uint32_t>(); break;
    case Word::kFull:
      name = r.get_text();
      r.get_text();
      r.get<int64_t>();
      r.get<bool>();
      break;
    case Word::kJoin: break;
    case Word::kLetGo: r.get<uint32_t>(); break;
    case Word::kLeave: r.get_list<uint32_t>(); break;
    case Word::kStop:
      r.get<ErrorCode>();
      r.get_text();
      break;
    case Word::kWaits: r.get_text(); break;
    case Word::kAsk: break;
  }
}

// How an entry of a decision to execute begins; what follows it, before the rows:
enum class NameForm : uint8_t {
  kId,              // the id
  kPlain,           // the name
  kNewId,           // the name, which has the next id from now on
  kWithDescriptor,  // name and descriptor, for the ranks that have joined
};

// The decision kStopped.
inline void write_stopped(Writer& decisions, int rank, ErrorCode code, const std::string& text) {
  decisions.put(Decision::Kind::kStopped);
  decisions.put(rank);
  decisions.put(code);
  decisions.put_text(text);
}

// The ids of names, in the order in which decisions give them: alike on all ranks. An id stands for a name and its
// descriptor, until the name gets another. Ids are never recycled; a job with more names than kMost goes on with full
// descriptors.
class NameTable {
 public:
  static constexpr size_t kMost = 1 << 16;
  struct Entry {
    std::string name, encoded;
  };
  const Entry& at(uint32_t id) const { return entries_.at(id); }
  // The id that stands for both; null: none.
  const uint32_t* find(const std::string& name, const std::string& encoded) const {
    const auto id = ids_.find(name);
    return id != ids_.end() && entries_[id->second].encoded == encoded ? &id->second : nullptr;
  }
  void add(const std::string& name, const std::string& encoded) {
    if (entries_.size() == kMost) return;
    ids_[name] = static_cast<uint32_t>(entries_.size());
    entries_.push_back({name, encoded});
  }

 private:
  std::vector<Entry> entries_;
  std::unordered_map<std::string, uint32_t> ids_;  // name -> latest id
};

}  // namespace collective
