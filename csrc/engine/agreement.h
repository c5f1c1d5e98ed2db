// Agreement by name: ranks submit named operations in any order; an operation runs when every rank has submitted it.
//
// Rank 0 of the set coordinates. A rank tells it what it has submitted; when the last rank's word for a name is in,
// the coordinator tells all ranks to execute it, together with everything else that has become ready and fits into
// one message. All ranks receive all decisions in the same order. Nothing is sent while nothing is submitted.
//
//   rank 1 ---- "w1: allreduce float32 (3, 4)" ---> rank 0 ---- "execute w0+w1+w2" ---> rank 1
//   rank 2 ---- "w1, w0, w2" (ids, 4 bytes each) -> rank 0 ---- same ----------------> rank 2
//
// A descriptor crosses once per name: the first execution gives the name an id, which stands for name and descriptor
// until the descriptor changes. Descriptors that differ between ranks become an error on every rank, in place of the
// execution. So does a rank that does not come in time, or that has left. A rank that has joined (run out of data)
// counts as having submitted everything: it executes with neutral contributions, and gets the descriptors to do so.
//
// messages:  on a node, one of each rank to rank 0 and one back, in memory; between n nodes 2(n-1), along a tree, at most
//            16 at any rank (tree_mail.h)
// limits:    rank 0 looks at the words of all ranks; a round takes twice the depth of the tree, log7(n)
// source:    the coordinator of Horovod (arXiv 1802.05799), without its cycle time
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/codec.h"
#include "base/descriptor.h"
#include "base/rank_names.h"
#include "engine/coordinator.h"
#include "engine/decision.h"
#include "engine/limits.h"
#include "engine/mail.h"

namespace collective {

// A rank's end of it; that of rank 0 holds the coordinator.
class Agreement {
 public:
  // most_buckets: that may be open at a time.
  Agreement(int rank, const RankNames& names, const Limits& limits, uint32_t most_buckets);
  // How it talks to the coordinator; before anything is said.
  void use(std::unique_ptr<Mail> mail) { mail_ = std::move(mail); }

  // rows: first dimension on this rank, for an allgather. Names that come once only are not worth an id.
  void submit(const std::string& name, const Descriptor& descriptor, int64_t rows, bool recurring);
  // This rank has run out of data, until all ranks have.
  void join();
  // This rank needs the buckets no more that were opened together from number `bucket` on.
  void let_go(uint32_t bucket);
  // This rank submits nothing any more.
  void leave(const std::vector<uint32_t>& started);
  // How long operations have waited here, see WaitLog.
  void tell_waits(const std::string& records);
  // Has the coordinator tell all ranks what it knows of that.
  void ask_ledger() { words_.put(Word::kAsk); }
  // This rank's engine has stopped: tells the others, first those who hear the coordinator through it.
  void stop(ErrorCode code, const std::string& text);
  // Nothing will call progress() any more: waits a little for what was said to be on its way.
  void flush();
  // Sends what was submitted and takes what arrived; never blocks. True if anything moved.
  bool progress(std::vector<Decision>& decisions);

  // Everything that was said is on its way.
  bool sent() const { return mail_->sent(); }

  // This rank listens no more, and the others need not wait for it.
  void hang_up() { mail_->hang_up(); }
  const NameTable& names() const { return names_; }

  // Of rank 0: see Coordinator. On other ranks nobody is wanted.
  std::vector<int> take_wanted() { return coordinator_ ? coordinator_->take_wanted() : std::vector<int>(); }
  void set_doing(int rank, std::string text) {
    if (coordinator_) coordinator_->set_doing(rank, std::move(text));
  }

  // Of rank 0; null on other ranks.
  const Ledger* ledger() const { return coordinator_ ? &coordinator_->ledger() : nullptr; }

  // What rank 0 waits for, a line per name; empty on other ranks.
  std::string describe() const { return coordinator_ ? coordinator_->describe() : ""; }

 private:
  void take_decisions(const std::string& bytes, std::vector<Decision>& decisions);

  int rank_;
  std::optional<Coordinator> coordinator_;
  Writer words_;  // to the coordinator, since the last progress()
  NameTable names_;
  std::unordered_map<std::string, std::string> mine_;  // submitted here and undecided: name -> encoded
  std::unique_ptr<Mail> mail_;
};

}  // namespace collective
