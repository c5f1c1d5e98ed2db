#include "engine/bucket.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/float_mode.h"
#include "device/device_kernels.h"

namespace collective {
namespace {

void write_one(DType dtype, std::byte* target) {
  const auto write = [target](auto value) { std::memcpy(target, &value, sizeof value); };
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kBool: write(uint8_t{1}); break;
    case DType::kUInt16:
    case DType::kInt16: write(uint16_t{1}); break;
    case DType::kInt32: write(int32_t{1}); break;
    case DType::kInt64: write(int64_t{1}); break;
    case DType::kFloat16: write(uint16_t{0x3C00}); break;
    case DType::kBFloat16: write(uint16_t{0x3F80}); break;
    case DType::kFloat32:
    case DType::kComplex64: write(1.0F); break;  // the imaginary part stays zero
    case DType::kFloat64:
    case DType::kComplex128: write(1.0); break;
  }
}

}  // namespace

Bucket::Bucket(std::shared_ptr<Engine> engine, size_t group, std::string name, std::shared_ptr<void> plan,
               uint32_t channel, const AllreduceSpec& spec, std::vector<size_t> counts, size_t notes,
               std::shared_ptr<NodeBucket> shared, std::shared_ptr<std::byte> on_device, int device)
    : engine_(std::move(engine)),
      group_(group),
      name_(std::move(name)),
      channel_(channel),
      spec_(spec),
      counts_(std::move(counts)),
      notes_(notes),
      storage_(std::make_shared<Storage>()) {
  if (spec.op != ReduceOp::kSum && spec.op != ReduceOp::kAverage)
    throw Error(ErrorCode::kInvalid, std::string("a bucket reduces by Sum or Average, not by ") + name_of(spec.op));
  storage_->plan = std::move(plan);
  offsets_.push_back(0);
  for (const size_t count : counts_) offsets_.push_back(offsets_.back() + count);
  storage_->flags = Buffer(flag_count() * size_of(spec.dtype));
  const size_t count = (on_device == nullptr ? offsets_.back() : 0) + flag_count();
  if (shared != nullptr && (shared->count() != count || shared->wire() != spec.wire))
    throw Error(ErrorCode::kInternal, "a channel's memory does not fit its bucket");
  const size_t nbytes = count * size_of(spec.wire);
  const bool direct = device >= 0 && spec.wire == spec.dtype && on_device == nullptr;
  storage_->shared = std::move(shared);
  storage_->on_device = std::move(on_device);
  if (storage_->shared) {
    storage_->bucket = storage_->shared->storage();
    if (direct)
      storage_->lock = PageLock::try_lock(Device::get(device), storage_->bucket, NodeBucket::nbytes(spec.wire, count));
  } else if (direct) {
    storage_->pinned = Device::get(device).pinned(nbytes);
    storage_->bucket = storage_->pinned.data();
  } else {
    storage_->own = Buffer(nbytes);
    storage_->bucket = storage_->own.data();
  }
}

std::shared_ptr<Ticket> Bucket::start(const std::vector<const void*>& tensors, const std::vector<size_t>& notes,
                                      std::shared_ptr<DeviceMark> mark) {
  if (tensors.size() != counts_.size())
    throw Error(ErrorCode::kInvalid, "a bucket of " + std::to_string(counts_.size()) + " tensors was given " +
                                         std::to_string(tensors.size()));
  std::vector<Slot> slots;
  slots.reserve(counts_.size() + 1);
  std::byte* flags = storage_->flags.data();
  std::memset(flags, 0, storage_->flags.nbytes());
  for (size_t i = 0; i < counts_.size(); ++i) {
    slots.push_back({tensors[i], nullptr, counts_[i]});
    // A tensor without elements has no address, and is there all the same.
    if (tensors[i] != nullptr || counts_[i] == 0) write_one(spec_.dtype, flags + i * size_of(spec_.dtype));
  }
  for (const size_t note : notes)
    if (note < notes_) write_one(spec_.dtype, flags + (counts_.size() + note) * size_of(spec_.dtype));
  slots.push_back({flags, nullptr, flag_count()});
  ChannelSubmission run{channel_, spec_.dtype, std::move(slots), storage_->bucket, storage_};
  if (mark != nullptr) run.marks.push_back(mark);
  for (auto& fetched : storage_->fetched) run.marks.push_back(std::move(fetched));
  storage_->fetched.clear();
  if (mark != nullptr && storage_->on_device == nullptr) {
    Device& device = mark->device();
    std::byte* base = storage_->bucket;
    if (!storage_->direct()) {
      run.memory.push_back(device.pinned(offsets_.back() * size_of(spec_.dtype)));
      base = run.memory[0].data();
    }
    for (size_t i = 0; i < counts_.size(); ++i) {
      if (tensors[i] == nullptr) continue;
      std::byte* const host = base + offsets_[i] * size_of(spec_.dtype);
      run.loads.push_back({&device, const_cast<void*>(tensors[i]), host, counts_[i] * size_of(spec_.dtype)});
      run.slots[i].in = host;
    }
  }
  return engine_->submit(group_, name_, std::move(run), false);
}

std::shared_ptr<std::byte> Bucket::place(size_t i) const {
  std::byte* const begin = storage_->on_device == nullptr ? storage_->bucket : storage_->on_device.get();
  return {storage_, begin + offsets_.at(i) * size_of(spec_.wire)};
}

bool Bucket::flag(size_t i) const {
  const size_t element = size_of(spec_.wire);
  const size_t first = storage_->on_device == nullptr ? offsets_.back() : 0;
  const std::byte* flag = storage_->bucket + (first + i) * element;
  return std::any_of(flag, flag + element, [](std::byte b) { return b != std::byte{0}; });
}

void Bucket::fetch(const std::vector<void*>& targets) const {
  const FloatMode mode;
  for (size_t i = 0; i < counts_.size(); ++i)
    if (targets.at(i) != nullptr)
      convert(spec_.dtype, targets[i], spec_.wire, storage_->bucket + offsets_[i] * size_of(spec_.wire), counts_[i]);
}

void Bucket::fetch(const std::vector<void*>& targets, Device& device, uintptr_t stream) {
  Storage& storage = *storage_;
  DeviceStream queue(device, stream);
  device.mark(stream);  // refuses one that is captured
  // On the device, or in page-locked memory, from where the device copies; else it is converted there first.
  std::shared_ptr<PinnedMemory> bounce;
  if (storage.on_device != nullptr) {
    std::vector<Conversion> tensors;
    for (size_t i = 0; i < counts_.size(); ++i)
      if (targets.at(i) != nullptr)
        tensors.push_back({storage.on_device.get() + offsets_[i] * size_of(spec_.wire), targets[i], counts_[i]});
    queue_convert(device, queue, spec_.dtype, spec_.wire, tensors, 1.0, spec_.op);
  } else {
    if (!storage.direct())
      bounce = std::make_shared<PinnedMemory>(device.pinned(offsets_.back() * size_of(spec_.dtype)));
    std::byte* const base = bounce == nullptr ? storage.bucket : bounce->data();
    std::vector<void*> hosts(targets.size());
    for (size_t i = 0; i < counts_.size(); ++i)
      if (targets.at(i) != nullptr) hosts[i] = base + offsets_[i] * size_of(spec_.dtype);
    if (bounce != nullptr) fetch(hosts);
    for (size_t i = 0; i < counts_.size(); ++i)
      if (targets[i] != nullptr) queue.copy(targets[i], hosts[i], counts_[i] * size_of(spec_.dtype));
  }
  storage.fetched.push_back(device.mark(stream));
  device.keep(storage.fetched.back(),
              std::make_shared<std::pair<std::shared_ptr<void>, std::shared_ptr<void>>>(storage_, bounce));
}

}  // namespace collective
