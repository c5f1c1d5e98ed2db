// A bucket of tensors that is reduced again and again, as its owner sees it: the gradients of an optimizer that become
// ready together.
//
// The ranks agree on its layout once, when its plan is opened. After that a run needs no agreement: it packs and
// reduces. The result stays in the bucket until it is fetched, so a run never writes to a tensor that its owner may
// still be using.
//
// Flags follow the tensors and are reduced like them. There is one for each tensor: a tensor that this rank does not have
// counts as zeros, and its flag tells afterwards whether any rank had it. Others are for the caller to use ("notes"):
// what any rank has noted, all ranks know after the run, without an extra message.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/plans.h"

namespace collective {

// What a rank asks of a bucket. All fields but `device` must be the same on all ranks.
struct BucketLayout {
  DType dtype, wire;           // of the tensors, and of the bucket
  std::vector<size_t> counts;  // elements by tensor
  size_t notes;                // how many
  int device = -1;             // that the tensors are on; -1 for the host

  BucketShape shape() const;
};

class Bucket {
 public:
  // number: in the plan.
  Bucket(std::shared_ptr<Engine> engine, size_t group, std::string name, std::shared_ptr<Plan> plan, size_t number,
         BucketLayout layout);

  const std::string& name() const { return name_; }
  // What tensors are handed over as.
  DType dtype() const { return storage_->dtype(); }
  // Among the group's open buckets.
  uint32_t number() const { return number_; }
  // Whether the results lie on the tensors' device.
  bool on_device() const { return storage_->on_device(); }

  // Starts a run. tensors: by position, null where this rank has none; they stay valid until the ticket is finished.
  // notes: the indices of those set here. mark: of tensors on the device. The previous run must have finished.
  std::shared_ptr<Ticket> start(const std::vector<const void*>& tensors, const std::vector<size_t>& notes,
                                std::shared_ptr<DeviceMark> mark = nullptr);

  // Where tensor i lies in the bucket, in the wire's type, on the device if the bucket is there; shares the bucket's
  // ownership. A run may be started from there, without a copy; it leaves its result there.
  std::shared_ptr<std::byte> place(size_t i) const;
  size_t place_nbytes(size_t i) const { return layout_.counts.at(i) * size_of(layout_.wire); }

  // After the run: whether any rank had tensor i; whether any rank set note i; the results.
  bool present(size_t i) const { return flag(i); }
  bool noted(size_t i) const { return flag(layout_.counts.size() + i); }
  // targets: by tensor, null where the result is not wanted.
  void fetch(const std::vector<void*>& targets) const;
  // The same to targets on the device, queued on this stream of the caller's, as Device::mark() has it.
  void fetch(const std::vector<void*>& targets, Device& device, uintptr_t stream);

 private:
  bool flag(size_t i) const;
  size_t flag_count() const { return layout_.counts.size() + layout_.notes; }

  std::shared_ptr<Engine> engine_;
  size_t group_;
  std::string name_;
  std::shared_ptr<Plan> plan_;
  uint32_t number_;
  BucketLayout layout_;
  std::vector<size_t> offsets_;  // of tensors, in elements; offsets_.back() is how many there are
  BucketStorage* storage_;       // the plan's
};

// Buckets that are being opened; `ticket` is finished when they are.
struct BucketOpening {
  std::shared_ptr<Engine> engine;
  size_t group;
  std::string name;
  std::vector<BucketLayout> layouts;
  std::shared_ptr<Ticket> ticket;

  // Once it is finished: one bucket for each layout. contents: by bucket, what is in it, for messages; or nothing.
  std::vector<std::shared_ptr<Bucket>> buckets(const std::vector<std::string>& contents) const;
};

// Opens a plan of these buckets; collective over the group. spec: its types stand for those of the layouts in what is
// compared between ranks; its op is Sum or Average, because flags must add up. described: a line for each tensor, to
// tell how ranks differ. device: the kind of the device that tensors are on, "cpu" for none; mark: of the device that they all
// are on, null where there is none.
BucketOpening open_buckets(std::shared_ptr<Engine> engine, size_t group, const std::string& name,
                           std::vector<BucketLayout> layouts, const AllreduceSpec& spec, std::string described,
                           std::string device, std::shared_ptr<DeviceMark> mark);

}  // namespace collective
