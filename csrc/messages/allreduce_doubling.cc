#include "messages/allreduce_doubling.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace collective {
namespace {
constexpr size_t kLong = size_t{1} << 20;  // bytes: longer messages are segmented
}

AllreduceDoubling::AllreduceDoubling(const Comm& comm, BufferPool& pool, int tag, const void* in, void* out,
                                     size_t count, const Arithmetic& arithmetic)
    : comm_(&comm),
      tag_(tag),
      in_(static_cast<const std::byte*>(in)),
      out_(static_cast<std::byte*>(out)),
      count_(count),
      nbytes_(count * size_of(arithmetic.dtype)),
      arithmetic_(arithmetic),
      power_(static_cast<int>(std::bit_floor(static_cast<unsigned>(comm.size())))),
      extra_(comm.size() - power_),
      scratch_(pool.take(nbytes_)) {
  if (nbytes_ > kLong) return;  // Adasum's, in pieces
  copy(nbytes_);
}

void AllreduceDoubling::copy(size_t most) {
  const size_t n = std::min(most, nbytes_ - copied_);
  if (in_ != out_ && n > 0) std::memcpy(out_ + copied_, in_ + copied_, n);
  copied_ += n;
  if (copied_ < nbytes_) return;
  phase_ = folds() ? Phase::kFold : Phase::kExchange;
  start();
}

int AllreduceDoubling::partner() const {
  const int rank = comm_->rank();
  if (phase_ != Phase::kExchange) return rank % 2 == 0 ? rank + 1 : rank - 1;
  // Ranks that take part in the exchange are numbered 0..power-1: the odd one of each pair, then all the others.
  const int index = folds() ? rank / 2 : rank - extra_;
  const int other = index ^ distance_;
  return other < extra_ ? 2 * other + 1 : other + extra_;
}

void AllreduceDoubling::start() {
  const bool even = comm_->rank() % 2 == 0;
  const bool receives = phase_ == Phase::kExchange || (phase_ == Phase::kFold) == !even;
  const bool sends = phase_ == Phase::kExchange || !receives;
  const int peer = partner();
  std::byte* target = phase_ == Phase::kUnfold ? out_ : scratch_.data();
  if (nbytes_ > kLong) {
    exchange_ = std::make_unique<Exchange>(
        *comm_, tag_, sends ? std::vector<Exchange::Send>{{peer, out_, nbytes_}} : std::vector<Exchange::Send>{},
        receives ? std::vector<Exchange::Receive>{{peer, target, nbytes_}} : std::vector<Exchange::Receive>{});
    return;
  }
  if (receives) receive_ = comm_->irecv(target, nbytes_, peer, tag_);
  if (sends) send_ = comm_->isend(out_, nbytes_, peer, tag_);
}

bool AllreduceDoubling::combine(const void* a, const void* b, bool last) {
  if (nbytes_ <= kLong || arithmetic_.op != ReduceOp::kAdasum) {
    arithmetic_.combine(out_, a, b, count_, last);
    return true;
  }
  if (scaled_ == 0) {
    if (!adasum_) adasum_.emplace(arithmetic_.dtype, out_, a, b, count_);
    if (!adasum_->step()) return false;
  }
  if (last && arithmetic_.scale != 1.0) {
    const size_t element = size_of(arithmetic_.dtype), n = std::min(kLong / element, count_ - scaled_);
    std::byte* const piece = out_ + scaled_ * element;
    convert(arithmetic_.dtype, piece, arithmetic_.dtype, piece, n, arithmetic_.scale);
    scaled_ += n;
    if (scaled_ < count_) return false;
    scaled_ = 0;
  }
  adasum_.reset();
  return true;
}

void AllreduceDoubling::finish() {
  const bool even = comm_->rank() % 2 == 0;
  switch (phase_) {
    case Phase::kFold:
      if (!even && !combine(scratch_.data(), out_, false)) return;
      phase_ = even ? Phase::kUnfold : Phase::kExchange;
      break;
    case Phase::kExchange: {
      const bool last = distance_ * 2 == power_;
      const bool mine_first = comm_->rank() < partner();
      const void* mine = out_;
      const void* theirs = scratch_.data();
      if (!combine(mine_first ? mine : theirs, mine_first ? theirs : mine, last)) return;
      distance_ *= 2;
      if (last) phase_ = folds() ? Phase::kUnfold : Phase::kDone;
      break;
    }
    case Phase::kUnfold: phase_ = Phase::kDone; break;
    case Phase::kCopy:
    case Phase::kDone: break;
  }
  if (phase_ != Phase::kDone) start();
}

Step AllreduceDoubling::step() {
  if (phase_ == Phase::kCopy) {
    copy(kLong);
    return Step::kMoved;
  }
  if (exchange_ != nullptr) {
    const Step step = exchange_->step();
    if (step != Step::kDone) return step;
    exchange_.reset();
  }
  if (!send_.done() || !receive_.done()) return Step::kIdle;
  finish();
  return phase_ == Phase::kDone ? Step::kDone : Step::kMoved;
}

std::string AllreduceDoubling::describe() const {
  return "recursive doubling: waits for " + comm_->names().text_of(partner()) + " at distance " +
         std::to_string(distance_);
}

}  // namespace collective
