// The background engine: takes submissions from any thread, makes progress on them, and wakes those that wait.
//
// One thread at a time drives: either the engine's own, or a caller that waits for its operation and finds the engine
// idle. So a blocking call costs no hand-over between threads, and while a script computes, the engine's thread goes on.
// Only the driver calls MPI, except where a group is made, which has communicators of its own.
//
// Idle means asleep: with nothing in flight the thread wakes ten times a second to answer inquiries of other ranks.
// Waiting for the network it spins for some microseconds, then sleeps in growing steps, so that compute keeps its core.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/group.h"
#include "engine/stall_reports.h"
#include "engine/statistics.h"
#include "engine/watch.h"
#include "engine/whereabouts.h"
#include "messages/topology.h"

namespace collective {

class Engine {
 public:
  // Collective over `comm`. cores: the core of the engine's thread by local rank; empty: the system's choice.
  Engine(MPI_Comm comm, const Limits& limits, const std::vector<int>& cores);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Topology& topology() const { return topology_; }
  // Whether all ranks are on one node and share memory.
  bool shares_memory();
  // How all ranks together reduce arrays on devices, in words, once they have done it.
  std::string device_way();

  // A group over other ranks beside the first one, which is number 0. Collective over `comm`; the numbers are this
  // rank's own. Groups do not wait for each other.
  size_t add_group(MPI_Comm comm, const GroupOptions& options = {});
  // Collective over the group's ranks. Throws the error that has stopped the engine, or kTimeout where a rank does not
  // come, and then leaves MPI's resources as they are.
  void remove_group(size_t group);
  // The same without waiting: the group goes when all its ranks have called this, or with the engine.
  void dismiss_group(size_t group);

  // Throws kDuplicateName when the name is in flight on this rank, kShutdown after shutdown(), and the error that
  // stopped the engine if one did. caller_waits: the caller calls wait() next, so nobody else need be woken.
  std::shared_ptr<Ticket> submit(size_t group, std::string name, Submission work, bool caller_waits);

  // Blocks until the ticket is finished, or for about `seconds`; true if it is finished.
  bool wait(const Ticket& ticket, double seconds);

  // Blocks until a ticket is finished that report() was called for; null once the engine has shut down and there are no
  // more.
  std::shared_ptr<Ticket> take_finished();
  // Has take_finished() return this ticket when it is finished; false if it is finished already.
  bool report(Ticket& ticket);

  // Collective: returns when every rank has called it. False when the engine had failed, so that MPI resources were
  // left as they are. Throws kTimeout, which names the missing ranks, when a rank does not come.
  bool shutdown();

  Timeline& timeline() { return timeline_; }
  // How long this rank has waited for others.
  const WaitTotals& waited() const { return waits_; }
  // Who was late, of the groups that this rank coordinates, those included that are no more; null if the driver does
  // not make way within `patience`.
  std::optional<std::vector<LedgerPage>> ledgers(std::chrono::milliseconds patience);
  // Asks the coordinators of all groups of this rank for that.
  std::vector<std::shared_ptr<Ticket>> ask_ledgers();
  Whereabouts& whereabouts() { return whereabouts_; }

  // What this rank waits for; null if the driver does not make way within `patience`: it is inside MPI. Nothing of its
  // groups once shutdown() was called.
  std::optional<RankWaits> waits(std::chrono::milliseconds patience);
  // The waits that are too long are told here, and nowhere else, from the first call on. For one engine at a time.
  void report_stalls();
  StallReports& stall_reports() { return stall_reports_; }
  // Callable from any thread, at any time.
  Statistics statistics();

  // The state in words; callable from any thread, also while another one drives, for which it waits up to two seconds.
  std::string describe();

 private:
  struct Work {
    std::shared_ptr<Ticket> ticket;
    Submission submission;
  };
  class Claim;
  std::unique_ptr<Group> make_group(MPI_Comm comm, const GroupOptions& options);
  void bind_thread(const std::vector<int>& cores);
  bool any_busy() const;
  void forget(std::unique_ptr<Group>& group);
  // What the script does: waits for what has been in flight for the longest time, or is elsewhere. Called by the driver.
  std::optional<Inquiry::Doing> doing();
  void run();  // the engine's thread
  // Makes progress until `enough` or nothing is in flight. The caller holds driving_. by_caller: of wait().
  template <typename Enough>
  void drive(const Enough& enough, bool by_caller = false);
  bool failed();
  Clock::time_point end_of_patience() const;
  bool progress();
  void take_submissions();
  void finish(Ticket& ticket, ErrorCode code, const std::string& text);
  // is_told: the other ranks know already.
  void stop_with(ErrorCode code, const std::string& text, bool is_told) noexcept;
  // Everything that is in flight here. The caller holds driving_.
  void fail_everything(ErrorCode code, const std::string& text);
  void end_stall_reports();
  void look_for_deaths();
  void warn_of_remaining(Clock::time_point since, Clock::time_point& warned) const;

  Topology topology_;
  Limits limits_;
  bool has_core_;  // there are as many cores as ranks on the node
  Timeline timeline_;
  WaitTotals waits_;
  std::vector<LedgerPage> pages_;  // of groups that are no more; guarded by driving_, as is the next
  uint64_t questions_ = 0;
  Whereabouts whereabouts_;
  StallReports stall_reports_;
  std::atomic<bool> reports_stalls_{false};
  std::timed_mutex driving_;                    // held by the driver; guards groups_
  std::vector<std::unique_ptr<Group>> groups_;  // by number; null when removed
  Watch watch_;                                 // likewise, over the processes of other ranks
  std::vector<int> ended_;                      // ranks whose processes had ended when they were last looked at
  Clock::time_point next_look_{};
  std::atomic<int> claims_{0};  // threads that want driving_ for themselves: drivers make way

  std::mutex mutex_;                  // guards what follows, up to the atomics; taken after driving_
  std::condition_variable wake_;      // for the thread, and for a driver that sleeps
  std::condition_variable finished_;  // for callers that wait while another thread drives
  std::vector<Work> queue_;
  std::map<std::pair<size_t, std::string>, std::shared_ptr<Ticket>> in_flight_;  // by group and name
  std::deque<std::shared_ptr<Ticket>> reports_;                                  // for take_finished()
  std::condition_variable reported_;
  bool no_more_reports_ = false;
  std::optional<Error> failure_;
  Tally tally_;
  bool stop_thread_ = false;
  int waiting_ = 0;          // threads in finished_
  int drivers_waiting_ = 0;  // callers that drive, or are about to: the thread keeps out of their way

  std::atomic<bool> closed_{false};  // shutdown() was called; set under the mutex
  std::atomic<size_t> queued_{0};    // == queue_.size(), readable without the mutex
  std::atomic<bool> busy_{false};    // == any_busy(), as of the driver's last look
  std::thread thread_;
};

}  // namespace collective
