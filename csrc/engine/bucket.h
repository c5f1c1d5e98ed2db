// A bucket of tensors that is reduced again and again: the gradients of an optimizer that become ready together.
//
// Its layout is agreed once, when its channel is opened. Then a run needs no agreement: pack, reduce. The result stays
// in the bucket until it is fetched, so a run never writes into a tensor that its owner may still be using.
//
// Behind the tensors lie flags, reduced like them. One per tensor: a tensor that this rank does not have counts as
// zeros, and its flag tells afterwards whether any rank had it. And some that the caller uses as it likes ("notes"):
// what any rank has noted, all ranks know after the run, at no extra message.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace collective {

class Bucket {
 public:
  // plan: what the channel was opened with. counts: elements by tensor. notes: how many. spec.op is Sum or Average: flags must add up. shared: the channel's
  // memory, when the ranks of a node share it; else null. on_device: its memory on the device, where it is there; then
  // `shared` holds the flags alone. device: of the tensors; -1 for the host.
  Bucket(std::shared_ptr<Engine> engine, size_t group, std::string name, std::shared_ptr<void> plan, uint32_t channel,
         const AllreduceSpec& spec, std::vector<size_t> counts, size_t notes, std::shared_ptr<NodeBucket> shared,
         std::shared_ptr<std::byte> on_device, int device = -1);

  // Starts a run. tensors: by position, null where this rank has none; they stay valid until the ticket is finished.
  // notes: the indices of those set here. mark: of tensors on the device. The previous run must have finished.
  std::shared_ptr<Ticket> start(const std::vector<const void*>& tensors, const std::vector<size_t>& notes,
                                std::shared_ptr<DeviceMark> mark = nullptr);

  // Where tensor i lies in the bucket, in the wire's type, on the device if the bucket is there; shares the bucket's
  // ownership. A run may be started from there, without a copy; it leaves its result there.
  std::shared_ptr<std::byte> place(size_t i) const;
  size_t place_nbytes(size_t i) const { return counts_.at(i) * size_of(spec_.wire); }

  // After the run: whether any rank had tensor i; whether any rank set note i; the results.
  bool present(size_t i) const { return flag(i); }
  bool noted(size_t i) const { return flag(counts_.size() + i); }
  // targets: by tensor, null where the result is not wanted.
  void fetch(const std::vector<void*>& targets) const;
  // The same to targets on the device, queued on this stream of the caller's, as Device::mark() has it.
  void fetch(const std::vector<void*>& targets, Device& device, uintptr_t stream);

 private:
  bool flag(size_t i) const;
  size_t flag_count() const { return counts_.size() + notes_; }

  struct Storage {
    std::shared_ptr<void> plan;
    Buffer flags;  // of this rank, in the tensors' type
    Buffer own;    // the bucket, unless it is shared
    std::shared_ptr<NodeBucket> shared;
    std::shared_ptr<std::byte> on_device;
    std::byte* bucket;  // in the wire's type: tensors (unless they are on_device), then flags
    // Behind the fetches since the last run, for which the next must wait.
    std::vector<std::shared_ptr<DeviceMark>> fetched;
    PinnedMemory pinned;             // instead of `own`, of a bucket for a device
    std::unique_ptr<PageLock> lock;  // of `shared`, likewise
    // The device copies to and from the bucket itself.
    bool direct() const { return lock != nullptr || pinned.data() != nullptr; }
  };
  std::shared_ptr<Engine> engine_;
  size_t group_;
  std::string name_;
  uint32_t channel_;
  AllreduceSpec spec_;
  std::vector<size_t> counts_, offsets_;  // elements; offsets_.back() is where the flags begin
  size_t notes_;
  std::shared_ptr<Storage> storage_;
};

}  // namespace collective
