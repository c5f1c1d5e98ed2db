// Agreement by name: ranks submit named operations in any order; an operation runs when every rank has submitted it.
//
// Rank 0 of the set coordinates. A rank tells it what it has submitted; when the last rank's word for a name is in,
// the coordinator tells all ranks to execute it, together with everything else that has become ready and fits into
// the same bucket. All ranks receive all decisions in one order. Nothing is sent while nothing is submitted.
//
//   rank 1 ---- "w1: allreduce float32 (3, 4)" ---> rank 0 ---- "execute w0+w1+w2" ---> rank 1
//   rank 2 ---- "w1, w0, w2" (ids, 4 bytes each) -> rank 0 ---- same ----------------> rank 2
//
// A descriptor crosses once per name: the first execution gives the name an id, which stands for name and descriptor
// until the descriptor changes. Descriptors that differ between ranks become an error on every rank, in place of the
// execution. So does a rank that does not come in time, or that has left. A rank that has joined (run out of data)
// counts as having submitted everything: it executes with neutral contributions, and gets the descriptors to do so.
//
// messages:  2(p-1) short ones per round, one hop to rank 0 and one back
// limits:    rank 0 sends and receives p-1 messages a round
// source:    the coordinator of Horovod (arXiv 1802.05799), without its cycle time
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "comm.h"
#include "descriptor.h"
#include "mail.h"

namespace collective {

using Clock = std::chrono::steady_clock;

struct Limits {
  size_t fusion_threshold;                      // bytes: tensors below it share buckets of up to this size
  std::chrono::duration<double> stall_warning;  // name the missing ranks after this long
  std::chrono::duration<double> timeout;        // give up after this long
  bool shared_memory;                           // use it between the ranks of a node, where they can have it
  bool nccl;                                    // it sums between their devices, where it can
};

struct Decision {
  enum class Kind : uint8_t {
    kExecute,    // entries, in one bucket when there are several
    kFail,       // entries[0] fails on this rank, with code and text
    kLeft,       // `rank` has shut down, having started each channel `started` times
    kAllLeft,    // every rank has
    kJoined,     // `rank` has joined
    kAllJoined,  // every rank has, `rank` as the last; none counts as joined any more
    kStopped,    // the engine of `rank` has stopped, with code and text
    kReleased,   // the channels from `channel` on that were opened together: every rank has let them go
  };
  struct Entry {
    std::string name;
    std::vector<int64_t> rows;  // first dimension by rank, where it may differ; zero for ranks that have joined
    std::string encoded;        // the descriptor, when this rank has joined and not submitted it
  };
  explicit Decision(Kind kind) : kind(kind) {}
  Kind kind;
  std::vector<Entry> entries;
  uint32_t channel = 0, channels = 0;  // of opened channels: the number of the first, and how many
  ErrorCode code = ErrorCode::kNone;
  std::string text;
  int rank = -1;
  std::vector<uint32_t> started;
};

class Agreement {
 public:
  // most_channels: that may be open at a time.
  Agreement(const Comm& comm, const Limits& limits, uint32_t most_channels);
  // Another way to talk, on all ranks alike and before anything was said.
  void use(std::unique_ptr<Mail> mail) { mail_ = std::move(mail); }

  // rows: first dimension on this rank, for an allgather. Names that come once only are not worth an id.
  void submit(const std::string& name, const Descriptor& descriptor, int64_t rows, bool recurring);
  // This rank has run out of data, until all ranks have.
  void join();
  // This rank needs the channels no more that were opened together from number `channel` on.
  void let_go(uint32_t channel);
  // This rank submits nothing any more.
  void leave(const std::vector<uint32_t>& started);
  // This rank's engine has stopped: tells the others, and waits a little for the word to be on its way.
  void stop(ErrorCode code, const std::string& text);
  // Sends what was submitted and takes what arrived; never blocks. True if anything moved.
  bool progress(std::vector<Decision>& decisions);

  // Everything that was said is on its way.
  bool sent() const { return mail_->sent(); }

  // This rank listens no more, and the others need not wait for it.
  void hang_up() { mail_->hang_up(); }

  // What rank 0 waits for, a line per name; empty on other ranks.
  std::string describe() const;

 private:
  struct Known {
    std::string name, encoded;
  };
  struct Pending {  // at the coordinator: a name that some ranks have submitted
    std::vector<Variant> variants;
    std::vector<int64_t> rows;
    std::vector<char> here;  // by rank
    int missing = 0;
    bool recurring = false;
    Clock::time_point since, warned;
  };
  struct Ready {
    std::string name, encoded;
    std::vector<int64_t> rows;
    bool recurring;
    uint32_t channel, channels;  // that it opens
  };
  struct Opened {  // channels that were opened together
    uint32_t count;
    int let_go;  // by how many ranks
  };

  bool complete_but_for_joined(const Pending& pending) const;
  void take_joined(int source);
  bool coordinates() const { return comm_->rank() == 0; }
  void arrive(int source, const std::string& name, const std::string& encoded, int64_t rows, bool recurring);
  void complete(const std::string& name, Pending& pending);
  void take_requests(int source, const std::string& bytes);
  void take_let_go(uint32_t channel);
  void write_stopped(int rank, ErrorCode code, const std::string& text);
  uint32_t room_for(uint32_t count) const;
  void take_left(int source, std::vector<uint32_t> started);
  void fail(const std::string& name, const std::vector<int>& targets, ErrorCode code, const std::string& text);
  void decide_ready();
  void write_execution(const std::vector<Ready*>& bucket);
  void check_stalls(Clock::time_point now);
  void warn_of_stalls(Clock::time_point now);
  static std::string what(const std::string& name, const Pending& pending);  // for people
  void take_decisions(const std::string& bytes, std::vector<Decision>& decisions);
  std::vector<int> absent(const Pending& pending) const;
  std::vector<int> present(const Pending& pending) const;

  const Comm* comm_;
  Limits limits_;
  Writer requests_;   // to the coordinator, since the last progress()
  Writer decisions_;  // from the coordinator, likewise

  // Alike on all ranks: changed by decisions only.
  std::vector<Known> known_;                           // by id
  std::unordered_map<std::string, uint32_t> id_of_;    // name -> latest id
  std::unordered_map<std::string, std::string> mine_;  // submitted here and undecided: name -> encoded

  // The coordinator's.
  std::unordered_map<std::string, Pending> pending_;
  std::vector<Ready> ready_;
  uint32_t most_channels_;
  std::map<uint32_t, Opened> opened_;  // by their first number
  // Names given up on, with the ranks that had not come: their late submission is answered at once, so that calls
  // of all ranks stay paired.
  std::unordered_map<std::string, std::vector<uint32_t>> expired_;
  std::vector<char> left_, joined_;
  int left_count_ = 0, joined_count_ = 0;
  Clock::time_point next_check_;

  std::unique_ptr<Mail> mail_;
};

}  // namespace collective
