// The channels of a group: buckets whose layout the ranks agree on once, when they open them, and which each rank then
// runs when it likes, all of them equally often, without a word to the others.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "device/allreduce_device_ring.h"
#include "device/device_staging.h"
#include "engine/ticket.h"
#include "messages/comm.h"
#include "node/allreduce_bucket_node.h"
#include "node/shared_memory_creation.h"

namespace collective {

class Channels {
 public:
  // Channels have the tags from `first_tag` on, one each.
  Channels(const Comm& comm, BufferPool& pool, int first_tag);

  // Opens the channels that `descriptor` describes, from number `first` on, as all ranks have agreed; `ticket` gets
  // their first number and their memory, in so far as the ranks have any in common (shares_memory); that of their
  // devices where the descriptor is about these and all ranks can take part: `device` is this rank's, or null; sends:
  // whose memory it can send, or null; nccl: what sums on these devices, or null. Returns the operation that makes it,
  // or null.
  std::unique_ptr<Operation> open(uint32_t first, const Descriptor& descriptor, std::shared_ptr<Ticket> ticket,
                                  bool shares_memory, Device* device, Device* sends,
                                  const std::shared_ptr<NcclComm>& nccl);

  struct Run {
    std::unique_ptr<Operation> operation;
    std::shared_ptr<void> keep;  // the memory that it works on
  };
  // The next run.
  Run start(ChannelSubmission submission);
  // The same of a rank that has joined, without anything of its own.
  Run start_neutral(uint32_t channel);

  // Whether it may be started; a channel that is not known here yet may not.
  bool is_open(uint32_t channel) const { return channel < channels_.size() && channels_[channel].open; }
  // The plan that it was last opened with, alike on all ranks; 0 where there was none.
  uint64_t plan_of(uint32_t channel) const { return channel < channels_.size() ? channels_[channel].plan : 0; }
  // How often each has been started. Goes on where its number is used again, on all ranks from the same value: when a
  // plan is released every rank has started every run of it.
  const std::vector<uint32_t>& started() const { return started_; }

  // The first channels of the plans that this rank's script has let go since the last call.
  std::vector<uint32_t> take_let_go();
  // All ranks have let this plan go: its memory is freed, and its numbers may come again.
  void release(uint32_t first);

 private:
  struct Channel {
    AllreduceSpec spec;
    size_t count, flags;     // elements
    uint64_t plan = 0;       // that it was opened with
    size_t number = 0;       // in that
    bool on_node = false;    // the plan has memory
    bool on_device = false;  // tensors are on devices
    // Where messages go from there: this rank's, as long as its script or a run holds it.
    Device* device = nullptr;
    std::weak_ptr<DeviceRingPlace> place;
    bool open = false;  // its memory is decided on
  };
  // Channels that were opened together. They are needed until all ranks' scripts are done with them: where one has
  // joined, its engine goes on for the others. A script holds the plan by its ticket and its buckets, and so do runs. A
  // rank tells the coordinator when only its engine holds it; when all have, the coordinator says so, and gives the
  // numbers, and with them the tags, to another plan. By then every run of it is over on the rank that wanted it, and
  // so has been started on all of them; where it is not over yet, the next plan waits (see Group::execute_agreed).
  struct Plan {
    uint32_t first;
    bool told = false;                   // this rank has let it go
    std::optional<SharedMemory> memory;  // a place for each channel in every rank's part, where they share any
    std::deque<NodeBucket> buckets;      // by channel; where they are on devices, for the flags alone
    std::deque<DeviceStaging> on_device;
  };
  static std::shared_ptr<DeviceRingPlace> make_place(Device& device, const Channel& channel);
  class Opening;
  class OpeningOnDevices;
  class OnDevice;

  const Comm* comm_;
  BufferPool* pool_;
  int first_tag_;
  std::vector<Channel> channels_;
  std::vector<uint32_t> started_;                              // by channel
  std::unordered_map<uint64_t, std::shared_ptr<Plan>> plans_;  // by number, from 1
  uint64_t opened_ = 0;                                        // plans, alike on all ranks
};

}  // namespace collective
