// The operations of one set of ranks: what was submitted, what was agreed, what runs. Driven by one thread at a time.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/buffer.h"
#include "base/timeline.h"
#include "engine/agreement.h"
#include "engine/devices.h"
#include "engine/inquiry.h"
#include "engine/join.h"
#include "engine/ledger.h"
#include "engine/limits.h"
#include "engine/operations.h"
#include "engine/order.h"
#include "engine/plans.h"
#include "engine/run_queue.h"
#include "engine/stalls.h"
#include "engine/ticket.h"
#include "engine/waits.h"
#include "engine/watch.h"
#include "messages/comm.h"
#include "node/allreduce_node.h"
#include "nodes/nodes.h"

namespace collective {

struct GroupOptions {
  // Its operations are matched by their order (order.h), rather than by name; then it has no buckets, and no join().
  bool ordered = false;
  std::string label{};                                     // what precedes messages about it; else what its ranks make
  std::string identity{};                                  // tells apart groups of the same ranks, alike on all of them
  std::optional<std::chrono::duration<double>> timeout{};  // of its operations; else that of the limits
};

class Group {
 public:
  using Finish = std::function<void(Ticket&, ErrorCode, const std::string&)>;
  using DoingHere = std::function<std::optional<Inquiry::Doing>()>;
  // Collective over `comm`. finish: called once for every ticket that was submitted. doing: what this rank's script
  // does; nothing while that is being found out. all: the group of all ranks; null
  // where it is this one.
  Group(MPI_Comm comm, const Limits& limits, Timeline& timeline, WaitTotals& waits, Finish finish, DoingHere doing,
        const Group* all, const GroupOptions& options);

  int rank() const { return control_.rank(); }
  int size() const { return control_.size(); }

  void submit(std::shared_ptr<Ticket> ticket, NamedSubmission submission);
  void submit(std::shared_ptr<Ticket> ticket, OrderedSubmission submission);
  void submit(std::shared_ptr<Ticket> ticket, BucketSubmission submission);
  void submit(std::shared_ptr<Ticket> ticket, PairSubmission submission);
  void submit(std::shared_ptr<Ticket> ticket, JoinSubmission submission);
  void submit(std::shared_ptr<Ticket> ticket, LedgerSubmission submission);
  // How arrays on devices are reduced, in words.
  const std::string& device_way() const { return devices_.way(); }
  // Whether the ranks share memory.
  bool shares_memory() const { return memory_.has_value(); }
  // Does what can be done without blocking; true if anything moved. Throws when the group cannot go on.
  bool progress();
  // Something is in flight here, so progress() should be called soon and again.
  bool busy() const {
    return !pending_.empty() || !running_.empty() || !held_back_.empty() || join_.is_waiting() ||
           (leaving_ && !is_dismissed_) || !not_ready_.empty() || !order_.waiting().empty() || !asking_.empty() ||
           !agreement_.sent();
  }

  // Orderly end: what runs may finish; what is not agreed fails, on the other ranks too; nothing may be submitted
  // afterwards. Then call progress() until over(), when every rank has left.
  void leave();
  // The same, without anybody who waits for the end: nothing hurries then.
  void dismiss() { is_dismissed_ = leaving_ = true; }
  bool is_dismissed() const { return is_dismissed_; }
  bool over() const { return all_left_ && running_.empty() && held_back_.empty() && agreement_.sent(); }
  // Collective, after over().
  void release();

  // Of the other ranks, those that have not left.
  std::vector<int> remaining() const;
  // Whether a rank that is named by its number in the job has left.
  bool has_left(int job_rank) const;
  std::string located(const std::vector<int>& ranks) const { return control_.names().located(ranks); }
  // The processes of the other ranks, where they share memory.
  std::vector<Watch::Peer> processes() const;

  // Tells all ranks that this one's engine has stopped.
  void tell_stopped(ErrorCode code, const std::string& text) { agreement_.stop(code, text); }
  // Waits briefly until that word is on its way; on the coordinator also the word of another rank.
  void flush() { agreement_.flush(); }
  // Fails everything in flight; nothing may be submitted after.
  void fail_all(ErrorCode code, const std::string& text);

  // Who was late; null where another rank coordinates.
  const Ledger* ledger() const { return agreement_.ledger(); }

  std::string describe() const;
  // All that is in flight here.
  GroupWaits waits() const;
  // What has been in flight here for the longest time, and since when; "" for nothing.
  std::pair<Clock::time_point, std::string> oldest() const;
  // "process set [1, 2]: ", before what is told about it; "" for all ranks.
  const std::string& label() const { return control_.names().label(); }

 private:
  struct Pending {
    std::shared_ptr<Ticket> ticket;
    NamedSubmission submission;
    Wait wait;
    bool agreed = false;  // and held back until it can run here
    // Where it is matched by its order.
    uint64_t turn = 0, digest = 0;
    std::vector<int64_t> expected{};
    size_t nbytes() const;     // of this rank's data, as it travels
    std::string what() const;  // for people
    // What it waits for while it is not ready.
    std::string waits_text() const;
  };
  bool share_memory();
  void use_tree(const std::vector<int>& leaders);
  std::vector<int> every_rank_alone() const;
  std::chrono::seconds creation_time() const;  // that making shared memory may take
  // Finishes a ticket with what went wrong in this group.
  void refuse(Ticket& ticket, ErrorCode code, const std::string& text) { finish_(ticket, code, label() + text); }
  bool submit_what_is_ready();
  void tell_waits(Clock::time_point now);
  void submit_ready(std::shared_ptr<Ticket> ticket, NamedSubmission submission);
  void tell_let_go();

  bool start_ordered();

  void carry_out(Decision& decision);
  void execute_agreed();
  bool look_at_devices(const Decision& decision);
  void execute(const Decision& decision);
  void record_wait(const Pending& pending, size_t number_of_tensors);
  int next_tag(uint64_t digest);
  Place place(int tag, uint64_t digest);
  void start(std::shared_ptr<Ticket> ticket, uint32_t bucket, std::unique_ptr<Operation> operation,
             std::shared_ptr<void> keep, bool is_own);
  void start_demanded();
  void all_joined(int last);

  void check_waits(Clock::time_point now);
  const Pending* oldest_pending() const;

  int left_before(uint32_t bucket) const;
  int left_before_turn(uint64_t turn) const;
  bool all_others_left() const;
  bool refuse_if_left(const Decision& decision);
  std::string left_text(int peer) const;
  void peer_left(const Decision& decision);
  void give_up_on(size_t i, int peer);  // of running_, when its peer has left

  Comm control_, data_;
  std::optional<Nodes> nodes_;          // of a set on several nodes, not all of which have one rank
  std::optional<SharedMemory> memory_;  // of a set whose ranks are all on one node; outlives what is in it
  bool ordered_;
  std::string identity_;
  Limits limits_;
  Agreement agreement_;
  Inquiry inquiry_;
  Timeline* timeline_;
  Finish finish_;
  DoingHere doing_;
  bool asks_itself_ = false;  // what this rank does, for the coordinator here
  BufferPool pool_;
  std::unique_ptr<Lane> lane_;  // in the memory

  Devices devices_;  // likewise

  // Submitted here, of arrays on a device that its user's work has not reached: the others learn of it when it has, so
  // that nothing that is agreed waits for anybody's device.
  std::vector<Pending> not_ready_;
  std::unordered_map<std::string, Pending> pending_;  // submitted here, not yet agreed
  Order order_;                                       // submitted here, not yet their turn
  std::vector<Decision> decisions_;                   // kept for its capacity
  std::deque<Decision> held_back_;                    // agreed, but their tag is still in use here
  WaitLog waits_;
  struct Asking {
    std::shared_ptr<Ticket> ticket;
    Wait wait;
  };
  std::vector<Asking> asking_;  // for the ledger
  RunQueue running_;
  Plans plans_;
  Join join_;
  Stalls stalls_;
  std::vector<std::pair<int, std::vector<uint32_t>>> departed_;  // ranks that left, and the runs they had started
  std::unordered_map<int, std::shared_ptr<bool>> pair_over_;     // the last operation by pair tag and peer
  uint64_t executions_ = 0;                                      // agreed operations, alike on all ranks
  uint64_t decided_ = 0;                                         // the same, fused ones as one, and nothing else
  Clock::time_point next_check_;
  bool leaving_ = false, is_dismissed_ = false, left_ = false, all_left_ = false;
};

}  // namespace collective
