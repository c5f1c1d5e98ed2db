#include "engine/bucket_storage.h"

#include <algorithm>
#include <utility>

#include "device/allreduce_device.h"
#include "messages/allreduce.h"

namespace collective {
namespace {

constexpr size_t kDeviceLine = 512;  // as the allocators of devices align

// Elements, then flags.
std::vector<Slot> slots_of(BucketRun& run) {
  std::vector<Slot> slots = std::move(run.tensors);
  slots.push_back(run.flags);
  return slots;
}

// An operation on the host, which starts when tensors from a device have been loaded.
std::unique_ptr<Operation> when_loaded(std::unique_ptr<Operation> operation, BucketRun run) {
  if (run.marks.empty()) return operation;
  std::vector<Staged::Part> parts(1);
  parts[0].loads = std::move(run.loads);
  parts[0].operation = std::move(operation);
  return std::make_unique<Staged>(std::move(run.marks), std::move(run.memory), std::move(parts), 1,
                                  std::move(run.keep));
}

// Elements on devices, then flags on the host, for both may be messages of one tag.
class OnDevice final : public Operation {
 public:
  OnDevice(std::unique_ptr<Operation> tensors, std::unique_ptr<Operation> flags)
      : tensors_(std::move(tensors)), flags_(std::move(flags)) {}

  Step step() override {
    if (tensors_ == nullptr) return flags_->step();
    const Step step = tensors_->step();
    if (step != Step::kDone) return step;
    tensors_ = nullptr;
    return Step::kMoved;
  }
  std::string describe() const override { return tensors_ != nullptr ? tensors_->describe() : flags_->describe(); }
  void give_up() noexcept override {
    if (tensors_ != nullptr) tensors_->give_up();
  }

 private:
  std::unique_ptr<Operation> tensors_, flags_;
};

}  // namespace

BucketStorage::BucketStorage(const AllreduceSpec& spec, const BucketShape& shape, bool on_device)
    : spec_(spec), shape_(shape), on_device_(on_device) {
  spec_.wire = shape.wire;
  spec_.dtype = shape.on_device && !on_device ? shape.wire : shape.dtype;
}

void BucketStorage::prepare(int device) {
  own_flags = Buffer(shape_.flags * size_of(dtype()));
  do_prepare(device);
}

void BucketStorage::lie_at(std::byte* bucket) {
  tensors_ = bucket;
  flags_ = bucket + shape_.elements * size_of(shape_.wire);
}

BucketRun BucketStorage::neutral() const {
  BucketRun run{{{nullptr, nullptr, shape_.elements}}, {nullptr, nullptr, shape_.flags}};
  run.is_neutral = true;
  return run;
}

void MessageStorage::do_prepare(int device) {
  const size_t nbytes = count() * size_of(shape_.wire);
  if (device >= 0) {
    pinned_ = Device::get(device).pinned(nbytes);
    lie_at(pinned_.data());
  } else {
    own_ = Buffer(nbytes);
    lie_at(own_.data());
  }
}

std::unique_ptr<Operation> MessageStorage::run(BucketRun run) {
  // What has no storage must be one slot to be cut as what has one is (see allreduce.h).
  std::unique_ptr<Operation> operation =
      run.is_neutral
          ? std::make_unique<Allreduce>(*comm_, *pool_, tag_, spec_, std::vector<Slot>{{nullptr, nullptr, count()}})
          : std::make_unique<Allreduce>(*comm_, *pool_, tag_, spec_, slots_of(run), tensors_);
  return when_loaded(std::move(operation), std::move(run));
}

NodeStorage::NodeStorage(const AllreduceSpec& spec, const BucketShape& shape, const SharedMemory& memory, size_t offset)
    : BucketStorage(spec, shape, false), bucket_(memory, offset, shape.wire, count()) {
  lie_at(bucket_.storage());
}

void NodeStorage::do_prepare(int device) {
  if (device >= 0) lock_ = PageLock::try_lock(Device::get(device), bucket_.storage(), nbytes(shape_));
}

std::unique_ptr<Operation> NodeStorage::run(BucketRun run) {
  auto operation = std::make_unique<AllreduceBucketNode>(bucket_, spec_, slots_of(run));
  return when_loaded(std::move(operation), std::move(run));
}

std::unique_ptr<Operation> NodesStorage::run(BucketRun run) {
  auto operation = std::make_unique<AllreduceBucketNodes>(bucket_, *nodes_, size_, *pool_, tag_, spec_, slots_of(run));
  return when_loaded(std::move(operation), std::move(run));
}

size_t DeviceNodeStorage::device_nbytes(const BucketShape& shape) {
  return round_up(std::max<size_t>(shape.elements, 1) * size_of(shape.wire), kDeviceLine);
}

DeviceNodeStorage::DeviceNodeStorage(const AllreduceSpec& spec, const BucketShape& shape, const SharedMemory& memory,
                                     size_t offset, std::shared_ptr<DeviceMemory> device_memory, size_t device_offset,
                                     std::shared_ptr<NcclComm> nccl, uint32_t number)
    : BucketStorage(spec, shape, true),
      flag_bucket_(memory, offset, shape.wire, shape.flags),
      staging_(std::move(device_memory), device_offset, device_nbytes(shape), 1, memory,
               offset + NodeBucket::nbytes(shape.wire, shape.flags)) {
  if (nccl != nullptr) staging_.use(std::move(nccl), number);
  tensors_ = staging_.own();
  flags_ = flag_bucket_.storage();
}

std::unique_ptr<Operation> DeviceNodeStorage::run(BucketRun run) {
  return std::make_unique<OnDevice>(
      std::make_unique<AllreduceDevice>(staging_, spec_, std::move(run.tensors), std::move(run.marks)),
      std::make_unique<AllreduceBucketNode>(flag_bucket_, spec_, std::vector<Slot>{run.flags}));
}

DeviceRingStorage::DeviceRingStorage(const AllreduceSpec& spec, const BucketShape& shape, const Comm& comm,
                                     BufferPool& pool, int tag, Device& device)
    : BucketStorage(spec, shape, true),
      comm_(&comm),
      pool_(&pool),
      tag_(tag),
      place_(std::make_shared<DeviceRingPlace>(device, std::max<size_t>(shape.elements, 1) * size_of(shape.wire))) {
  tensors_ = place_->data();
}

void DeviceRingStorage::do_prepare(int) {
  flag_bucket_ = Buffer(shape_.flags * size_of(shape_.wire));
  flags_ = flag_bucket_.data();
}

std::unique_ptr<Operation> DeviceRingStorage::run(BucketRun run) {
  return std::make_unique<OnDevice>(
      std::make_unique<AllreduceDeviceRing>(*comm_, *pool_, tag_, place_, spec_, std::move(run.tensors),
                                            std::move(run.marks)),
      std::make_unique<Allreduce>(*comm_, *pool_, tag_, spec_, std::vector<Slot>{run.flags},
                                  run.is_neutral ? nullptr : flags_));
}

}  // namespace collective
