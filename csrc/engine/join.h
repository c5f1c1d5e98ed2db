// What join() is in a group: this rank's, which has run out of data and waits until all have; and the other ranks', for
// whom it takes part in what they run meanwhile.
//
// In named operations a rank that has joined takes part because the coordinator's decision brings their description. In
// buckets, which run without agreement, each rank that starts a run demands it of those that have joined.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "device/device.h"
#include "engine/inquiry.h"
#include "engine/plans.h"
#include "engine/run_queue.h"
#include "engine/stalls.h"
#include "engine/ticket.h"

namespace collective {

class Join {
 public:
  explicit Join(Inquiry& inquiry) : inquiry_(&inquiry) {}

  // This rank joins; `ticket` is finished when all have.
  void begin(std::shared_ptr<Ticket> ticket, JoinSubmission submission);
  // Whether it has, and waits for the others.
  bool is_waiting() const { return ticket_ != nullptr; }
  // Whether the others have not been told yet. Not before the results of this rank's buckets have been fetched and used,
  // for the others may want to run them again.
  bool is_held_back() const { return ticket_ != nullptr && !told_; }
  // True when it is time to tell them, once. (Ask while is_held_back().)
  bool take_ready();
  Wait& wait() { return wait_; }
  const Wait& wait() const { return wait_; }
  // Its ticket, which the caller finishes.
  std::shared_ptr<Ticket> take() {
    marks_.clear();
    return std::exchange(ticket_, nullptr);
  }
  static constexpr const char* kWaits = "waits for what its user has queued on a device before";

  // Another rank has joined: the runs of buckets that are under way may have started before this rank knew.
  void add(int peer, const RunQueue& running, const Plans& plans);
  // No rank counts as joined any more.
  void clear() { joined_.clear(); }
  // This rank has started a run that those that have joined are to take part in.
  void demand(const Running& running, const Plans& plans) const;

  // A bucket of which this rank can start a demanded run now; ask until there is none. has_left: whether a rank has left
  // without the bucket's next run, which nobody starts then.
  std::optional<uint32_t> next_demanded(const RunQueue& running, const Plans& plans,
                                        const std::function<bool(uint32_t)>& has_left);

 private:
  Inquiry* inquiry_;
  std::shared_ptr<Ticket> ticket_;
  std::vector<std::shared_ptr<DeviceMark>> marks_;  // that come before the others are told
  Wait wait_;
  bool told_ = false;
  bool ever_ = false;  // it has joined some time; a demand of that time may come after all others have joined as well
  std::vector<int> joined_;               // the other ranks that have
  std::vector<Inquiry::Demand> demands_;  // of runs that cannot start yet
};

}  // namespace collective
