#include "messages/reduce_scatter.h"

#include <algorithm>

#include "messages/exchange.h"
#include "messages/ring.h"
#include "reduce/identity.h"

namespace collective {

ReduceScatter::ReduceScatter(const Comm& comm, BufferPool& pool, int tag, const AllreduceSpec& spec,
                             std::vector<size_t> offsets, const void* in, void* out)
    : comm_(&comm),
      tag_(tag),
      pool_(&pool),
      spec_(spec),
      scaling_(scaling_of(spec, comm.size(), Passes::kSteps)),
      offsets_(std::move(offsets)),
      in_(static_cast<const std::byte*>(in)),
      out_(static_cast<std::byte*>(out)),
      scratch_(pool.take(offsets_.back() * size_of(spec.wire))),
      packs_(in == nullptr || spec.wire != spec.dtype || scaling_.before != 1.0 || comm.size() == 1) {}

bool ReduceScatter::pack() {
  if (!packs_) return true;
  const size_t n = std::min(kPieceBytes / size_of(spec_.wire), offsets_.back() - position_);
  std::byte* const target = scratch_.data() + position_ * size_of(spec_.wire);
  if (in_ == nullptr) {
    fill_identity(spec_.wire, spec_.op, target, n);
  } else {
    convert(spec_.wire, target, spec_.dtype, in_ + position_ * size_of(spec_.dtype), n, scaling_.before);
    if (comm_->size() == 1 && scaling_.arithmetic.scale != 1.0)
      convert(spec_.wire, target, spec_.wire, target, n, scaling_.arithmetic.scale);
  }
  position_ += n;
  return position_ == offsets_.back();
}

void ReduceScatter::start_reducing() {
  phase_ = Phase::kReduce;
  position_ = 0;
  if (comm_->size() == 1) return;
  const std::byte* const source = packs_ ? scratch_.data() : in_;
  current_ = std::make_unique<Ring>(*comm_, *pool_, tag_, Ring::Phases::kReduceScatter, source, scratch_.data(),
                                    ranges_of(offsets_), scaling_.arithmetic);
}

std::unique_ptr<ReduceScatter> ReduceScatter::to_root(const Comm& comm, BufferPool& pool, int tag,
                                                      const AllreduceSpec& spec, size_t count, int root, const void* in,
                                                      void* out) {
  auto op = std::make_unique<ReduceScatter>(comm, pool, tag, spec, even_offsets(count, 1, comm.size()), in, out);
  op->root_ = root;
  return op;
}

void ReduceScatter::start_collecting() {
  phase_ = Phase::kCollect;
  std::vector<Exchange::Send> sends;
  std::vector<Exchange::Receive> receives;
  const auto nbytes = [this](size_t rank) { return (offsets_[rank + 1] - offsets_[rank]) * size_of(spec_.wire); };
  if (root_ == comm_->rank()) {
    for (int peer = 0; peer < comm_->size(); ++peer)
      if (peer != root_) receives.push_back({peer, part(static_cast<size_t>(peer)), nbytes(static_cast<size_t>(peer))});
  } else if (root_ >= 0) {
    const auto me = static_cast<size_t>(comm_->rank());
    sends.push_back({root_, part(me), nbytes(me)});
  }
  current_ = std::make_unique<Exchange>(*comm_, tag_, sends, receives);
}

bool ReduceScatter::fetch() {
  if (out_ == nullptr || (root_ >= 0 && root_ != comm_->rank())) return true;
  const size_t first = root_ >= 0 ? 0 : static_cast<size_t>(comm_->rank());
  const size_t last = root_ >= 0 ? offsets_.size() - 1 : first + 1;
  const size_t n = std::min(kPieceBytes / size_of(spec_.wire), offsets_[last] - offsets_[first] - position_);
  convert(spec_.dtype, out_ + position_ * size_of(spec_.dtype), spec_.wire,
          part(first) + position_ * size_of(spec_.wire), n);
  position_ += n;
  return position_ == offsets_[last] - offsets_[first];
}

Step ReduceScatter::step() {
  switch (phase_) {
    case Phase::kPack:
      if (pack()) start_reducing();
      return Step::kMoved;
    case Phase::kReduce:
    case Phase::kCollect: {
      const Step step = current_ ? current_->step() : Step::kDone;
      if (step != Step::kDone) return step;
      if (phase_ == Phase::kReduce)
        start_collecting();
      else
        phase_ = Phase::kFetch;
      return Step::kMoved;
    }
    case Phase::kFetch: return fetch() ? Step::kDone : Step::kMoved;
  }
  return Step::kDone;
}

std::string ReduceScatter::describe() const {
  switch (phase_) {
    case Phase::kPack: return "packs";
    case Phase::kReduce: return "reduce-scatter: " + (current_ ? current_->describe() : "");
    case Phase::kCollect: return "collects at the root: " + (current_ ? current_->describe() : "");
    case Phase::kFetch: break;
  }
  return "copies the result";
}

}  // namespace collective
