#include "messages/allreduce.h"

#include <algorithm>
#include <utility>

#include "base/thresholds.h"
#include "messages/allreduce_direct.h"
#include "messages/allreduce_doubling.h"
#include "messages/arrangement.h"
#include "messages/ring.h"
#include "reduce/identity.h"

namespace collective {

Allreduce::Allreduce(const Comm& comm, BufferPool& pool, int tag, const AllreduceSpec& spec, std::vector<Slot> slots,
                     void* storage)
    : comm_(&comm),
      pool_(&pool),
      tag_(tag),
      spec_(spec),
      scaling_(scaling_of(spec, comm.size(), Passes::kSteps)),
      slots_(std::move(slots)) {
  for (const Slot& slot : slots_) total_ += slot.count;
  if (storage == nullptr && slots_.size() > 1) {
    Arrangement made = arrange(spec, std::move(slots_), comm.size());
    slots_ = std::move(made.slots);
    short_ = made.short_count;
    chunks_ = ranges_of(made.chunks);
  } else if (is_short(spec, total_)) {
    short_ = total_;
  } else {
    chunks_ = ranges_of(even_offsets(total_, 1, comm.size()));
  }
  const bool alone = storage == nullptr && slots_.size() == 1 && spec.wire == spec.dtype && slots_[0].in != nullptr &&
                     slots_[0].out != nullptr;
  if (alone) {
    bucket_ = static_cast<std::byte*>(slots_[0].out);
    reduce_in_ = scaling_.before == 1.0 ? slots_[0].in : bucket_;
    if (scaling_.before == 1.0) start_reducing();
    return;
  }
  if (storage != nullptr) {
    bucket_ = static_cast<std::byte*>(storage);
  } else {
    pooled_ = pool.take(total_ * size_of(spec.wire));
    bucket_ = pooled_.data();
  }
  reduce_in_ = bucket_;
}

template <typename Copy>
bool Allreduce::walk(const Copy& copy) {
  size_t budget = kPieceBytes / size_of(spec_.wire);
  while (slot_ < slots_.size() && budget > 0) {
    const Slot& slot = slots_[slot_];
    const size_t count = std::min(budget, slot.count - element_);
    if (count > 0) copy(slot, element_, count, bucket_ + position_ * size_of(spec_.wire));
    element_ += count;
    position_ += count;
    budget -= count;
    if (element_ == slot.count) {
      ++slot_;
      element_ = 0;
    }
  }
  if (slot_ < slots_.size()) return false;
  slot_ = element_ = position_ = 0;
  return true;
}

// Short tensors first, then the ring: one after the other, since they share a tag.
bool Allreduce::next_reduction() {
  const size_t behind = short_ * size_of(spec_.wire);
  for (; reductions_ < 2 && reduction_ == nullptr; ++reductions_) {
    if (reductions_ == 0 && short_ > 0) {
      if (behind < thresholds::kRing || spec_.op == ReduceOp::kAdasum)
        reduction_ =
            std::make_unique<AllreduceDoubling>(*comm_, *pool_, tag_, reduce_in_, bucket_, short_, scaling_.arithmetic);
      else
        reduction_ = std::make_unique<AllreduceDirect>(*comm_, *pool_, tag_, bucket_, short_, scaling_.arithmetic);
    } else if (reductions_ == 1 && !chunks_.empty()) {
      reduction_ = std::make_unique<Ring>(*comm_, *pool_, tag_, Ring::Phases::kAllreduce,
                                          static_cast<const std::byte*>(reduce_in_) + behind, bucket_ + behind, chunks_,
                                          scaling_.arithmetic);
    }
  }
  return reduction_ != nullptr;
}

void Allreduce::start_reducing() {
  phase_ = Phase::kReduce;
  if (comm_->size() > 1)
    next_reduction();
  else if (reduce_in_ != bucket_ || scaling_.arithmetic.scale != 1.0)
    convert(spec_.wire, bucket_, spec_.wire, reduce_in_, total_, scaling_.arithmetic.scale);
}

Step Allreduce::step() {
  const size_t element_size = size_of(spec_.dtype);
  switch (phase_) {
    case Phase::kPack:
      if (walk([&](const Slot& slot, size_t first, size_t count, std::byte* bucket) {
            if (slot.in == nullptr)
              fill_identity(spec_.wire, spec_.op, bucket, count);
            else if (const auto* in = static_cast<const std::byte*>(slot.in) + first * element_size;
                     in != bucket || spec_.wire != spec_.dtype || scaling_.before != 1.0)
              convert(spec_.wire, bucket, spec_.dtype, in, count, scaling_.before);
          }))
        start_reducing();
      return Step::kMoved;
    case Phase::kReduce: {
      const Step step = reduction_ ? reduction_->step() : Step::kDone;
      if (step != Step::kDone) return step;
      reduction_.reset();
      if (comm_->size() > 1 && next_reduction()) return Step::kMoved;
      if (bucket_ == slots_[0].out) return Step::kDone;
      phase_ = Phase::kUnpack;
      return Step::kMoved;
    }
    case Phase::kUnpack:
      return walk([&](const Slot& slot, size_t first, size_t count, const std::byte* bucket) {
        if (slot.out != nullptr)
          convert(spec_.dtype, static_cast<std::byte*>(slot.out) + first * element_size, spec_.wire, bucket, count);
      })
                 ? Step::kDone
                 : Step::kMoved;
  }
  return Step::kDone;
}

std::string Allreduce::describe() const {
  switch (phase_) {
    case Phase::kPack: return "packs tensor " + std::to_string(slot_) + " of " + std::to_string(slots_.size());
    case Phase::kReduce: return reduction_ ? reduction_->describe() : "reduced";
    case Phase::kUnpack: return "unpacks tensor " + std::to_string(slot_) + " of " + std::to_string(slots_.size());
  }
  return "";
}

}  // namespace collective
