// Where a bucket lies, and how it is reduced there. Each way for gradients to travel is one BucketStorage:
//
//     MessageStorage      in memory of this rank; MPI messages (allreduce.h)
//     NodeStorage         in shared memory of the node (allreduce_bucket_node.h)
//     NodesStorage        in shared memory of each node, and messages between nodes (allreduce_bucket_nodes.h)
//     DeviceNodeStorage   in memory of devices that all ranks of the node map (allreduce_device.h); flags in NodeStorage's
//     DeviceRingStorage   in memory of this rank's device; MPI messages from there (allreduce_device_ring.h)
//
// In a bucket lie the elements of its tensors, one tensor behind the other, in the wire's type; and flags, one for each
// tensor and some for the caller, which are numbers of the wire's type as well and are reduced like elements.
#pragma once

#include <memory>
#include <vector>

#include "base/buffer.h"
#include "base/descriptor.h"
#include "base/operation.h"
#include "device/allreduce_device_ring.h"
#include "device/device_staging.h"
#include "device/staged.h"
#include "messages/comm.h"
#include "node/allreduce_bucket_node.h"
#include "nodes/allreduce_bucket_nodes.h"
#include "reduce/spec.h"

namespace collective {

// One run of a bucket.
struct BucketRun {
  std::vector<Slot> tensors;  // in the storage's dtype(); without `out`: results stay in the bucket; they fill it
  Slot flags;
  // Of tensors on a device: what comes before; and, where the bucket is on the host, the slots are in this memory, loaded
  // from there.
  std::vector<std::shared_ptr<DeviceMark>> marks{};
  std::vector<PinnedMemory> memory{};
  std::vector<Staged::Copy> loads{};
  std::shared_ptr<void> keep{};  // owns the storage and what the slots are in
  // Of a rank that has joined, whose script may still read the results of its last own run.
  bool is_neutral = false;
};

class BucketStorage {
 public:
  // spec: of the plan; its types are the bucket's. on_device: where the elements lie.
  BucketStorage(const AllreduceSpec& spec, const BucketShape& shape, bool on_device);
  BucketStorage(const BucketStorage&) = delete;
  BucketStorage& operator=(const BucketStorage&) = delete;
  virtual ~BucketStorage() = default;

  // Makes what this rank's script needs, before its first run; a rank that joins without a bucket of its own has no use
  // for that. device: on which its tensors are; -1 for the host.
  void prepare(int device);

  // Reduces it. A storage's previous run must be done on this rank.
  virtual std::unique_ptr<Operation> run(BucketRun run) = 0;
  // A run without anything of this rank's own.
  BucketRun neutral() const;

  const AllreduceSpec& spec() const { return spec_; }
  // Of the elements, as they travel.
  size_t nbytes() const { return shape_.elements * size_of(shape_.wire); }
  // What tensors are handed over as: their own type; or the wire's, where they leave their device for the host, for they
  // are cast before. It follows from what all ranks have agreed on, as the arithmetic does.
  DType dtype() const { return spec_.dtype; }
  // Once prepared: the elements, and the flags behind them or elsewhere; results lie here after a run.
  std::byte* tensors() const { return tensors_; }
  std::byte* flags() const { return flags_; }
  // Whether the elements are on a device. The flags never are.
  bool on_device() const { return on_device_; }
  // Whether a device copies from and to the elements itself.
  virtual bool is_direct() const { return false; }

  // The flags that a run of this rank sets, in the tensors' type.
  Buffer own_flags;
  // Behind what has been fetched since the last run, for which the next must wait.
  std::vector<std::shared_ptr<DeviceMark>> fetched;

 protected:
  virtual void do_prepare(int device) = 0;
  // Of the host's elements and flags, one behind the other.
  void lie_at(std::byte* bucket);
  size_t count() const { return shape_.elements + shape_.flags; }

  AllreduceSpec spec_;
  BucketShape shape_;
  bool on_device_;
  std::byte *tensors_ = nullptr, *flags_ = nullptr;
};

class MessageStorage final : public BucketStorage {
 public:
  // tag: this bucket's alone.
  MessageStorage(const AllreduceSpec& spec, const BucketShape& shape, const Comm& comm, BufferPool& pool, int tag)
      : BucketStorage(spec, shape, false), comm_(&comm), pool_(&pool), tag_(tag) {}
  std::unique_ptr<Operation> run(BucketRun run) override;
  bool is_direct() const override { return pinned_.data() != nullptr; }

 private:
  void do_prepare(int device) override;

  const Comm* comm_;
  BufferPool* pool_;
  int tag_;
  Buffer own_;
  PinnedMemory pinned_;  // in its place, of a bucket for a device
};

class NodeStorage : public BucketStorage {
 public:
  static size_t nbytes(const BucketShape& shape) {
    return NodeBucket::nbytes(shape.wire, shape.elements + shape.flags);
  }
  // At byte `offset` of every rank's part of the memory, which must outlive it.
  NodeStorage(const AllreduceSpec& spec, const BucketShape& shape, const SharedMemory& memory, size_t offset);
  std::unique_ptr<Operation> run(BucketRun run) override;
  bool is_direct() const override { return lock_ != nullptr; }

 protected:
  NodeBucket bucket_;

 private:
  void do_prepare(int device) override;

  std::unique_ptr<PageLock> lock_;
};

class NodesStorage final : public NodeStorage {
 public:
  // memory: of this node. size: ranks of the group. tag: this bucket's alone.
  NodesStorage(const AllreduceSpec& spec, const BucketShape& shape, const SharedMemory& memory, size_t offset,
               const Nodes& nodes, int size, BufferPool& pool, int tag)
      : NodeStorage(spec, shape, memory, offset), nodes_(&nodes), size_(size), pool_(&pool), tag_(tag) {}
  std::unique_ptr<Operation> run(BucketRun run) override;

 private:
  const Nodes* nodes_;
  int size_;
  BufferPool* pool_;
  int tag_;
};

class DeviceNodeStorage final : public BucketStorage {
 public:
  // Of the host's shared memory, and of the devices'.
  static size_t host_nbytes(const BucketShape& shape) {
    return NodeBucket::nbytes(shape.wire, shape.flags) + DeviceStaging::kCounterBytes;
  }
  static size_t device_nbytes(const BucketShape& shape);
  // nccl: what sums, if not kernels of this package; number: of this bucket in that.
  DeviceNodeStorage(const AllreduceSpec& spec, const BucketShape& shape, const SharedMemory& memory, size_t offset,
                    std::shared_ptr<DeviceMemory> device_memory, size_t device_offset, std::shared_ptr<NcclComm> nccl,
                    uint32_t number);
  std::unique_ptr<Operation> run(BucketRun run) override;

 private:
  void do_prepare(int) override {}

  NodeBucket flag_bucket_;
  DeviceStaging staging_;
};

class DeviceRingStorage final : public BucketStorage {
 public:
  // Throws where the device has no more memory.
  DeviceRingStorage(const AllreduceSpec& spec, const BucketShape& shape, const Comm& comm, BufferPool& pool, int tag,
                    Device& device);
  std::unique_ptr<Operation> run(BucketRun run) override;

 private:
  void do_prepare(int device) override;

  const Comm* comm_;
  BufferPool* pool_;
  int tag_;
  std::shared_ptr<DeviceRingPlace> place_;
  Buffer flag_bucket_;
};

}  // namespace collective
