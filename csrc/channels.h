// The channels of a group: buckets whose layout the ranks agree on once, when they open them, and which each rank then
// runs when it likes, all of them equally often, without a word to the others.
#pragma once

#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "allreduce_bucket_node.h"
#include "allreduce_device_ring.h"
#include "buffer.h"
#include "comm.h"
#include "device_staging.h"
#include "operation.h"
#include "ticket.h"

namespace collective {

class Channels {
 public:
  // Channels have the tags from `first_tag` on, one each, and there are at most so many.
  Channels(const Comm& comm, BufferPool& pool, int first_tag, size_t most);

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
  // How often each has been started.
  const std::vector<uint32_t>& started() const { return started_; }

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
  // The memory of channels that were opened together, a place for each in every rank's part. It is needed until all
  // ranks' scripts are done with it: where one has joined, its engine goes on for the others. So ranks tell each other,
  // whenever they open new channels, which of the last 64 plans their scripts have let go, and release what all have.
  struct Plan {
    SharedMemory memory;
    std::deque<NodeBucket> buckets;  // by channel; where they are on devices, for the flags alone
    std::deque<DeviceStaging> on_device;
  };
  static std::shared_ptr<DeviceRingPlace> make_place(Device& device, const Channel& channel);
  class Opening;
  class OpeningOnDevices;
  class OnDevice;

  const Comm* comm_;
  BufferPool* pool_;
  int first_tag_;
  size_t most_;
  std::vector<Channel> channels_;
  std::vector<uint32_t> started_;                              // by channel
  std::unordered_map<uint64_t, std::shared_ptr<Plan>> plans_;  // by number; null while one is being opened
  uint64_t opened_ = 0;                                        // plans with memory, alike on all ranks
};

}  // namespace collective
