#include "messages/reduce_scatter.h"

#include <algorithm>

#include "messages/exchange.h"
#include "messages/ring.h"
#include "reduce/identity.h"

namespace collective {

ReduceScatter::ReduceScatter(const Comm& comm, BufferPool& pool, int tag, const AllreduceSpec& spec,
                             std::vector<size_t> offsets, const void* in, void* out)
    : comm_(&comm), tag_(tag), spec_(spec), offsets_(std::move(offsets)), out_(out) {
  const Scaling scaling = scaling_of(spec, comm.size(), Passes::kSteps);
  const size_t count = offsets_.back();
  scratch_ = pool.take(count * size_of(spec.wire));
  const void* source = scratch_.data();
  if (in == nullptr)
    fill_identity(spec.wire, spec.op, scratch_.data(), count);
  else if (spec.wire != spec.dtype || scaling.before != 1.0 || comm.size() == 1)
    convert(spec.wire, scratch_.data(), spec.dtype, in, count, scaling.before);
  else
    source = in;
  if (comm.size() > 1)
    current_ = std::make_unique<Ring>(comm, pool, tag, Ring::Phases::kReduceScatter, source, scratch_.data(), offsets_,
                                      scaling.arithmetic);
  else if (scaling.arithmetic.scale != 1.0)
    convert(spec.wire, scratch_.data(), spec.wire, scratch_.data(), count, scaling.arithmetic.scale);
}

std::unique_ptr<ReduceScatter> ReduceScatter::to_root(const Comm& comm, BufferPool& pool, int tag,
                                                      const AllreduceSpec& spec, size_t count, int root, const void* in,
                                                      void* out) {
  auto op = std::make_unique<ReduceScatter>(comm, pool, tag, spec, even_offsets(count, 1, comm.size()), in, out);
  op->root_ = root;
  return op;
}

void ReduceScatter::start_collecting() {
  reducing_ = false;
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

void ReduceScatter::fetch() {
  if (out_ == nullptr || (root_ >= 0 && root_ != comm_->rank())) return;
  const size_t first = root_ >= 0 ? 0 : static_cast<size_t>(comm_->rank());
  const size_t last = root_ >= 0 ? offsets_.size() - 1 : first + 1;
  convert(spec_.dtype, out_, spec_.wire, part(first), offsets_[last] - offsets_[first]);
}

Step ReduceScatter::step() {
  const Step step = current_ ? current_->step() : Step::kDone;
  if (step != Step::kDone) return step;
  if (reducing_) {
    start_collecting();
    return Step::kMoved;
  }
  fetch();
  return Step::kDone;
}

std::string ReduceScatter::describe() const {
  return std::string(reducing_ ? "reduce-scatter: " : "collects at the root: ") +
         (current_ ? current_->describe() : "");
}

}  // namespace collective
