#include "allreduce_device_ring.h"

#include <algorithm>
#include <utility>

namespace collective {

void DeviceReducer::start(const Arithmetic& arithmetic, void* dst, const void* a, const void* b, size_t count,
                          bool last) {
  Arithmetic now = arithmetic;
  if (!last) {
    now.scale = 1.0;
    now.divisor = 1;
  }
  queue_reduce(*device_, device_->work(), now, {a, b}, {dst}, count);
  marks_.push_back(device_->work().mark());
}

bool DeviceReducer::pop_over() {
  if (!marks_.front()->reached()) return false;
  marks_.pop_front();
  return true;
}

std::byte* DeviceReducer::scratch(size_t nbytes) {
  scratch_ = std::make_shared<DeviceBlock>(*device_, nbytes);
  return scratch_->data();
}

AllreduceDeviceRing::AllreduceDeviceRing(const Comm& comm, BufferPool& pool, int tag, Device& device,
                                         const AllreduceSpec& spec, std::vector<Slot> slots, std::byte* storage,
                                         std::vector<std::shared_ptr<DeviceMark>> after)
    : comm_(&comm),
      pool_(&pool),
      tag_(tag),
      device_(&device),
      spec_(spec),
      scaling_(scaling_of(spec, comm.size())),
      slots_(std::move(slots)),
      after_(std::move(after)),
      bucket_(storage),
      reducer_(device) {
  for (const Slot& slot : slots_) total_ += slot.count;
  const bool alone = storage == nullptr && slots_.size() == 1 && spec.wire == spec.dtype && slots_[0].in != nullptr &&
                     slots_[0].out != nullptr && scaling_.before == 1.0 && spec.dtype != DType::kBool;
  packs_ = !alone;
  if (alone) {
    reduce_in_ = slots_[0].in;
    bucket_ = static_cast<std::byte*>(slots_[0].out);
    return;
  }
  if (bucket_ == nullptr) {
    own_ = std::make_shared<DeviceBlock>(device, std::max(total_, size_t{1}) * size_of(spec.wire));
    bucket_ = own_->data();
  }
  reduce_in_ = bucket_;
}

AllreduceDeviceRing::~AllreduceDeviceRing() {
  if (phase_ == Phase::kStart) return;
  // Given up: the device and MPI may still use them. (When it is over there is no mark.)
  if (mark_ == nullptr && ring_ == nullptr && reducer_.idle()) return;
  new std::shared_ptr<DeviceBlock>(own_);
  new DeviceReducer(std::move(reducer_));
}

std::vector<Conversion> AllreduceDeviceRing::cut(bool packs) const {
  std::vector<Conversion> pieces;
  std::byte* inside = bucket_;
  for (const Slot& slot : slots_) {
    if (packs)
      pieces.push_back({slot.in, inside, slot.count});
    else if (slot.out != nullptr && slot.out != bucket_)
      pieces.push_back({inside, slot.out, slot.count});
    inside += slot.count * size_of(spec_.wire);
  }
  return pieces;
}

Step AllreduceDeviceRing::step() {
  switch (phase_) {
    case Phase::kStart:
      if (!std::all_of(after_.begin(), after_.end(), [](const auto& mark) { return mark->reached(); }))
        return Step::kIdle;
      phase_ = Phase::kPack;
      if (packs_) {
        queue_convert(*device_, device_->work(), spec_.wire, spec_.dtype, cut(true), scaling_.before, spec_.op);
        mark_ = device_->work().mark();
      }
      return Step::kMoved;
    case Phase::kPack:
      if (mark_ != nullptr && !mark_->reached()) return Step::kIdle;
      mark_ = nullptr;
      ring_ = std::make_unique<Ring>(*comm_, *pool_, tag_, Ring::Phases::kAllreduce, reduce_in_, bucket_,
                                     even_offsets(total_, 1, comm_->size()), scaling_.arithmetic, &reducer_);
      phase_ = Phase::kRing;
      return Step::kMoved;
    case Phase::kRing: {
      const Step step = ring_->step();
      if (step != Step::kDone) return step;
      ring_ = nullptr;
      phase_ = Phase::kUnpack;
      const std::vector<Conversion> pieces = cut(false);
      if (pieces.empty()) return Step::kDone;
      queue_convert(*device_, device_->work(), spec_.dtype, spec_.wire, pieces, 1.0, spec_.op);
      mark_ = device_->work().mark();
      return Step::kMoved;
    }
    case Phase::kUnpack:
      if (!mark_->reached()) return Step::kIdle;
      mark_ = nullptr;
      return Step::kDone;
  }
  return Step::kDone;
}

std::string AllreduceDeviceRing::describe() const {
  switch (phase_) {
    case Phase::kStart: return "waits for what its user has queued on device " + std::to_string(device_->number());
    case Phase::kRing: return "on devices: " + ring_->describe();
    default: return "waits for device " + std::to_string(device_->number());
  }
}

}  // namespace collective
