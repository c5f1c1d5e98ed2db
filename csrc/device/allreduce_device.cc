#include "device/allreduce_device.h"

#include <algorithm>
#include <utility>

namespace collective {
namespace {

// NCCL is not asked to scale. (It can, by a factor in the elements' own type, but a third in bfloat16 is 0.2 % off.)
// Tensors that are packed anyway are scaled on the way; a bucket whose gradients are views is read and written once
// more. So an average here is that of rounded contributions.
Scaling scaled_first(const AllreduceSpec& spec, int size) {
  Scaling scaling = scaling_of(spec, size, Passes::kSteps);
  scaling.before *= std::exchange(scaling.arithmetic.scale, 1.0);
  scaling.before /= static_cast<double>(std::exchange(scaling.arithmetic.divisor, 1));
  return scaling;
}

}  // namespace

AllreduceDevice::AllreduceDevice(DeviceStaging& staging, const AllreduceSpec& spec, std::vector<Slot> slots,
                                 std::vector<std::shared_ptr<DeviceMark>> after)
    : staging_(&staging),
      spec_(spec),
      nccl_(staging.nccl_ != nullptr && NcclComm::sums(spec) ? staging.nccl_.get() : nullptr),
      scaling_(nccl_ == nullptr ? scaling_of(spec, staging.size(), Passes::kOnePass)
                                : scaled_first(spec, staging.size())),
      slots_(spec, scaling_.before, std::move(slots)),
      after_(std::move(after)),
      element_size_(size_of(spec.wire)),
      piece_count_(staging.place_nbytes_ / element_size_),
      first_(staging.reserved_) {
  staging.reserved_ += (slots_.count() + piece_count_ - 1) / piece_count_;
  end_ = staging.reserved_;
}

void AllreduceDevice::give_up() noexcept {
  // A kernel that waits for other ranks would occupy the device.
  if (nccl_ != nullptr && (calling_ || !reducing_.empty())) nccl_->give_up(staging_->memory_);
}

Range AllreduceDevice::range_of(uint64_t piece) const {
  const size_t begin = static_cast<size_t>(piece - first_) * piece_count_;
  return {begin, std::min(slots_.count(), begin + piece_count_)};
}

uint64_t AllreduceDevice::count_over(Queued& queued) {
  uint64_t count = 0;
  for (; !queued.empty() && (queued.front() == nullptr || queued.front()->reached()); ++count) queued.pop_front();
  return count;
}

bool AllreduceDevice::look() {
  if (nccl_ != nullptr && !reducing_.empty()) nccl_->ready();  // throws if it has failed
  const uint64_t packed = count_over(packing_), unpacked = count_over(unpacking_);
  // In the order of the pieces: those of the previous operation may be on another stream, and not complete.
  const uint64_t reduced = staging_->reduced_.own() >= first_ ? count_over(reducing_) : 0;
  if (packed > 0) staging_->packed_.publish(staging_->packed_.own() + packed);
  if (reduced > 0) staging_->reduced_.publish(staging_->reduced_.own() + reduced);
  over_ += unpacked;
  return packed + reduced + unpacked > 0;
}

bool AllreduceDevice::pack() {
  DeviceStaging& staging = *staging_;
  const uint64_t piece = staging.packs_;
  if (piece < first_ || piece >= end_ || piece >= staging.unpacks_ + staging.depth_) return false;
  const std::vector<Conversion> pieces =
      conversions(slots_, spec_, range_of(piece), staging.place(staging.memory_->rank(), piece), true);
  DeviceStream& stream = staging.device().work();
  ++staging.packs_;
  queue_convert(staging.device(), stream, spec_.wire, spec_.dtype, pieces, scaling_.before, spec_.op);
  packing_.push_back(stream.mark());
  return true;
}

bool AllreduceDevice::reduce() {
  DeviceStaging& staging = *staging_;
  const uint64_t piece = staging.reductions_;
  if (piece < first_ || piece >= staging.packs_ || piece >= end_) return false;
  if (nccl_ != nullptr) return reduce_by_nccl(piece);
  if (!staging.packed_.all_reached(piece + 1)) return false;
  const Range range = range_of(piece);
  const Range own = slice_of({0, range.end - range.begin}, staging.memory_->rank(), staging.size(), element_size_);
  std::vector<const void*> sources;
  std::vector<void*> targets;
  for (int rank = 0; rank < staging.size(); ++rank) {
    targets.push_back(staging.place(rank, piece) + own.begin * element_size_);
    sources.push_back(targets.back());
  }
  ++staging.reductions_;
  DeviceStream& stream = staging.device().work();
  queue_reduce(staging.device(), stream, scaling_.arithmetic, sources, targets, own.end - own.begin,
               staging.size() > 1 ? kBlocksBetweenDevices : 0);
  reducing_.push_back(own.end > own.begin ? stream.mark() : nullptr);
  return true;
}

bool AllreduceDevice::reduce_by_nccl(uint64_t piece) {
  DeviceStaging& staging = *staging_;
  if (!nccl_->ready()) return false;
  if (!calling_) {
    if (!staging.packed_.all_reached(piece + 1) || !nccl_->turns().take(staging.number_)) return false;
    const Range range = range_of(piece);
    calling_ = true;
    nccl_->all_reduce(spec_.wire, staging.place(staging.memory_->rank(), piece), range.end - range.begin);
    if (!nccl_->ready()) return true;
  }
  calling_ = false;
  ++staging.reductions_;
  reducing_.push_back(nccl_->mark());
  return true;
}

bool AllreduceDevice::unpack() {
  DeviceStaging& staging = *staging_;
  const uint64_t piece = staging.unpacks_;
  if (piece < first_ || piece >= staging.reductions_ || piece >= end_) return false;
  // NCCL's kernel has met the others' when it is complete. It is on a stream of its own, where it may wait for ever.
  if (nccl_ != nullptr ? staging.reduced_.own() <= piece : !staging.reduced_.all_reached(piece + 1)) return false;
  const std::vector<Conversion> pieces =
      conversions(slots_, spec_, range_of(piece), staging.place(staging.memory_->rank(), piece), false);
  ++staging.unpacks_;
  DeviceStream& stream = staging.device().work();
  queue_convert(staging.device(), stream, spec_.dtype, spec_.wire, pieces, 1.0, spec_.op);
  unpacking_.push_back(pieces.empty() ? nullptr : stream.mark());
  return true;
}

Step AllreduceDevice::step() {
  if (!std::all_of(after_.begin(), after_.end(), [](const auto& mark) { return mark->reached(); })) return Step::kIdle;
  after_.clear();
  bool moved = look();
  moved |= unpack();  // the last stage first: it makes room
  moved |= reduce();
  moved |= pack();
  if (over_ == end_ - first_) return Step::kDone;
  return moved ? Step::kMoved : Step::kIdle;
}

std::string AllreduceDevice::describe() const {
  const DeviceStaging& staging = *staging_;
  const auto text = [&](uint64_t piece, int rank, const char* stage) {
    return "piece " + std::to_string(piece - first_) + " of " + std::to_string(end_ - first_) + ": waits for rank " +
           std::to_string(rank) + " to " + stage + " it on its device";
  };
  if (!after_.empty())
    return "waits for what its user has queued on device " + std::to_string(staging.device().number());
  if (staging.packs_ < first_) return "waits behind another operation on the devices";
  if (nccl_ != nullptr && (calling_ || !reducing_.empty()))
    return "waits for NCCL on device " + std::to_string(staging.device().number());
  if (!packing_.empty() || !reducing_.empty() || !unpacking_.empty())
    return "waits for device " + std::to_string(staging.device().number());
  if (staging.reductions_ < staging.packs_ && nccl_ != nullptr && staging.packed_.all_have(staging.reductions_ + 1))
    return "waits for its turn with NCCL";
  if (staging.reductions_ < staging.packs_) return text(staging.reductions_, staging.packed_.missing(), "pack");
  return text(staging.unpacks_, staging.reduced_.missing(), "reduce");
}

}  // namespace collective
