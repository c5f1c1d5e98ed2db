#include "messages/allreduce_direct.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/ranges.h"

namespace collective {
namespace {
constexpr size_t kPieceBytes = size_t{1} << 20;  // of all ranks together: what one step combines
}

AllreduceDirect::AllreduceDirect(const Comm& comm, BufferPool& pool, int tag, void* data, size_t count,
                                 const Arithmetic& arithmetic)
    : comm_(&comm),
      tag_(tag),
      data_(static_cast<std::byte*>(data)),
      arithmetic_(arithmetic),
      element_size_(size_of(arithmetic.dtype)),
      offsets_(even_offsets(count, 1, comm.size())) {
  const auto me = static_cast<size_t>(comm.rank());
  scratch_ = pool.take(static_cast<size_t>(comm.size() - 1) * nbytes(me));
  std::vector<Exchange::Send> sends;
  std::vector<Exchange::Receive> receives;
  std::byte* place = scratch_.data();
  for (int peer = 0; peer < comm.size(); ++peer) {
    const auto rank = static_cast<size_t>(peer);
    operands_.push_back(rank == me ? at(offsets_[me]) : place);
    if (rank == me) continue;
    sends.push_back({peer, at(offsets_[rank]), nbytes(rank)});
    receives.push_back({peer, place, nbytes(me)});
    place += nbytes(me);
  }
  exchange_ = std::make_unique<Exchange>(comm, tag, sends, receives);
}

// Combines the next elements of this rank's chunk in the order of allreduce_doubling: pairs of neighbours until a power
// of two is left, then those at distance 1, 2, 4, and so on. True at the end.
bool AllreduceDirect::combine() {
  const auto me = static_cast<size_t>(comm_->rank());
  const size_t p = operands_.size(), power = std::bit_floor(p), extra = p - power;
  const size_t count =
      std::min(offsets_[me + 1] - offsets_[me] - combined_, std::max<size_t>(1, kPieceBytes / element_size_ / p));
  const auto operand = [&](size_t rank) { return operands_[rank] + combined_ * element_size_; };
  const auto survivor = [&](size_t index) { return operand(index < extra ? 2 * index + 1 : index + extra); };
  for (size_t i = 0; i < extra; ++i)
    arithmetic_.combine(operand(2 * i + 1), operand(2 * i), operand(2 * i + 1), count, false);
  for (size_t distance = 1; distance < power; distance *= 2)
    for (size_t i = 0; i < power; i += 2 * distance)
      arithmetic_.combine(survivor(i), survivor(i), survivor(i + distance), count, 2 * distance == power);
  if (survivor(0) != operand(me)) std::memcpy(operand(me), survivor(0), count * element_size_);
  combined_ += count;
  return combined_ == offsets_[me + 1] - offsets_[me];
}

void AllreduceDirect::start_gather() {
  const auto me = static_cast<size_t>(comm_->rank());
  std::vector<Exchange::Send> sends;
  std::vector<Exchange::Receive> receives;
  for (int peer = 0; peer < comm_->size(); ++peer) {
    if (peer == comm_->rank()) continue;
    const auto rank = static_cast<size_t>(peer);
    sends.push_back({peer, at(offsets_[me]), nbytes(me)});
    receives.push_back({peer, at(offsets_[rank]), nbytes(rank)});
  }
  exchange_ = std::make_unique<Exchange>(*comm_, tag_, sends, receives);
}

Step AllreduceDirect::step() {
  if (phase_ == Phase::kCombine) {
    if (!combine()) return Step::kMoved;
    start_gather();
    phase_ = Phase::kGather;
    return Step::kMoved;
  }
  const Step step = exchange_->step();
  if (step != Step::kDone || phase_ == Phase::kGather) return step;
  phase_ = Phase::kCombine;
  return Step::kMoved;
}

std::string AllreduceDirect::describe() const {
  switch (phase_) {
    case Phase::kScatter: return "scatters: " + exchange_->describe();
    case Phase::kCombine: return "combines";
    case Phase::kGather: return "gathers: " + exchange_->describe();
  }
  return "";
}

}  // namespace collective
