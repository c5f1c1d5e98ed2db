#include "device/allreduce_device_ring.h"

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
  DeviceStream& stream = place_->device().work();
  queue_reduce(place_->device(), stream, now, {a, b}, {dst}, count, kBlocksBetweenDevices);
  marks_.push_back(stream.mark());
}

bool DeviceReducer::pop_over() {
  if (!marks_.front()->reached()) return false;
  marks_.pop_front();
  return true;
}

AllreduceDeviceRing::AllreduceDeviceRing(const Comm& comm, BufferPool& pool, int tag,
                                         std::shared_ptr<DeviceRingPlace> place, const AllreduceSpec& spec,
                                         std::vector<Slot> slots, std::vector<std::shared_ptr<DeviceMark>> after)
    : comm_(&comm),
      pool_(&pool),
      tag_(tag),
      place_(std::move(place)),
      turn_(place_->taken_++),
      spec_(spec),
      scaling_(scaling_of(spec, comm.size(), Passes::kSteps)),
      slots_(spec, scaling_.before, std::move(slots)),
      after_(std::move(after)),
      reducer_(*place_) {}

AllreduceDeviceRing::~AllreduceDeviceRing() { ++place_->over_; }

void AllreduceDeviceRing::pack() {
  piece_ = {piece_.end, std::min(slots_.count(), piece_.end + place_->nbytes() / size_of(spec_.wire))};
  DeviceStream& stream = place_->device().work();
  const std::vector<Conversion> tensors = conversions(slots_, spec_, piece_, place_->data(), true);
  queue_convert(place_->device(), stream, spec_.wire, spec_.dtype, tensors, scaling_.before, spec_.op);
  mark_ = stream.mark();
  phase_ = Phase::kPack;
}

// Whether there is something to unpack.
bool AllreduceDeviceRing::unpack() {
  const std::vector<Conversion> tensors = conversions(slots_, spec_, piece_, place_->data(), false);
  if (tensors.empty()) return false;
  DeviceStream& stream = place_->device().work();
  queue_convert(place_->device(), stream, spec_.dtype, spec_.wire, tensors, 1.0, spec_.op);
  mark_ = stream.mark();
  return true;
}

Step AllreduceDeviceRing::step() {
  switch (phase_) {
    case Phase::kStart:
      if (place_->over_ < turn_) return Step::kIdle;
      if (!std::all_of(after_.begin(), after_.end(), [](const auto& mark) { return mark->reached(); }))
        return Step::kIdle;
      if (slots_.count() == 0) return Step::kDone;
      pack();
      return Step::kMoved;
    case Phase::kPack:
      if (!mark_->reached()) return Step::kIdle;
      mark_ = nullptr;
      ring_ = std::make_unique<Ring>(*comm_, *pool_, tag_, Ring::Phases::kAllreduce, place_->data(), place_->data(),
                                     ranges_of(even_offsets(piece_.count(), 1, comm_->size())), scaling_.arithmetic,
                                     &reducer_);
      phase_ = Phase::kRing;
      return Step::kMoved;
    case Phase::kRing: {
      const Step step = ring_->step();
      if (step != Step::kDone) return step;
      ring_ = nullptr;
      phase_ = Phase::kUnpack;
      unpack();
      return Step::kMoved;
    }
    case Phase::kUnpack:
      if (mark_ != nullptr && !mark_->reached()) return Step::kIdle;
      mark_ = nullptr;
      if (piece_.end == slots_.count()) return Step::kDone;
      pack();
      return Step::kMoved;
  }
  return Step::kDone;
}

std::string AllreduceDeviceRing::describe() const {
  if (place_->over_ < turn_) return "waits behind another operation on the devices";
  switch (phase_) {
    case Phase::kStart:
      return "waits for what its user has queued on device " + std::to_string(place_->device().number());
    case Phase::kRing: return "on devices: " + ring_->describe();
    default: return "waits for device " + std::to_string(place_->device().number());
  }
}

}  // namespace collective
