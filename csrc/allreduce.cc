#include "allreduce.h"

#include <algorithm>
#include <bit>

#include "allreduce_doubling.h"
#include "identity.h"
#include "ring.h"

namespace collective {
namespace {

// Below this recursive doubling, which has fewer steps, above it the ring, which sends less.
constexpr size_t kRingFromBytes = size_t{16} << 10;

bool is_integer(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kUInt16:
    case DType::kInt16:
    case DType::kInt32:
    case DType::kInt64: return true;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kFloat32:
    case DType::kFloat64:
    case DType::kComplex64:
    case DType::kComplex128:
    case DType::kBool: return false;
  }
  return false;
}

}  // namespace

Scaling scaling_of(const AllreduceSpec& spec, int size, Passes passes) {
  Scaling s{spec.prescale, {spec.wire, spec.op, spec.postscale, 1}};
  if (spec.op != ReduceOp::kAverage) return s;
  s.arithmetic.divisor = size;
  if (is_integer(spec.dtype)) return s;
  const auto power = static_cast<int>(std::bit_ceil(static_cast<unsigned>(size)));
  // A sum of float16 may exceed 65504 where the average does not, and so may a float32 where it is packed. A power of
  // two takes no bit from any but the smallest values (below 2^-14 times itself), as a division by p would from all.
  if (spec.wire == DType::kFloat16 && !(passes == Passes::kOnePass && spec.dtype == DType::kFloat16)) {
    s.before /= power;
    s.arithmetic.scale *= power;
  }
  if (power == size) {  // the same bits as by dividing, and cheaper
    s.arithmetic.divisor = 1;
    s.arithmetic.scale /= size;
  }
  return s;
}

std::unique_ptr<Operation> make_reduction(const Comm& comm, BufferPool& pool, int tag, const void* in, void* out,
                                          size_t count, const Arithmetic& arithmetic) {
  if (count * size_of(arithmetic.dtype) < kRingFromBytes || arithmetic.op == ReduceOp::kAdasum)
    return std::make_unique<AllreduceDoubling>(comm, pool, tag, in, out, count, arithmetic);
  return std::make_unique<Ring>(comm, pool, tag, Ring::Phases::kAllreduce, in, out, even_offsets(count, 1, comm.size()),
                                arithmetic);
}

Allreduce::Allreduce(const Comm& comm, BufferPool& pool, int tag, const AllreduceSpec& spec, std::vector<Slot> slots,
                     void* storage)
    : comm_(&comm),
      pool_(&pool),
      tag_(tag),
      spec_(spec),
      scaling_(scaling_of(spec, comm.size(), Passes::kSteps)),
      slots_(std::move(slots)) {
  for (const Slot& slot : slots_) total_ += slot.count;
  const bool alone = storage == nullptr && slots_.size() == 1 && spec.wire == spec.dtype && slots_[0].in != nullptr &&
                     slots_[0].out != nullptr;
  if (alone) {
    bucket_ = static_cast<std::byte*>(slots_[0].out);
    reduce_in_ = scaling_.before == 1.0 ? slots_[0].in : bucket_;
    if (scaling_.before == 1.0) start_reduction();
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

void Allreduce::start_reduction() {
  phase_ = Phase::kReduce;
  if (comm_->size() > 1)
    reduction_ = make_reduction(*comm_, *pool_, tag_, reduce_in_, bucket_, total_, scaling_.arithmetic);
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
        start_reduction();
      return Step::kMoved;
    case Phase::kReduce: {
      const Step step = reduction_ ? reduction_->step() : Step::kDone;
      if (step != Step::kDone) return step;
      reduction_.reset();
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
