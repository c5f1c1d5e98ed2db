#include "nodes/nodes_pass.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/thresholds.h"
#include "messages/allreduce_direct.h"
#include "messages/allreduce_doubling.h"
#include "node/slices.h"

namespace collective {

NodesPass::NodesPass(NodeBucket& area, const Nodes& nodes, BufferPool& pool, int tag, const Arithmetic& arithmetic,
                     const Slots& slots, Load load)
    : area_(&area),
      nodes_(&nodes),
      pool_(&pool),
      tag_(tag),
      arithmetic_(arithmetic),
      slots_(&slots),
      load_(std::move(load)),
      element_size_(size_of(arithmetic.dtype)),
      piece_count_(kPieceBytes / element_size_),
      run_(area.begin_run()) {
  for (const Range& chunk : load_.chunks) own_.push_back(own_slice(chunk));
}

Range NodesPass::own_slice(Range chunk) const {
  if (!nodes_->owns()) return {chunk.begin, chunk.begin};
  const size_t most = std::max<size_t>(1, chunk.count() * element_size_ / kShortestSlice);
  const int owners = static_cast<int>(std::min<size_t>(most, static_cast<size_t>(nodes_->owners)));
  if (nodes_->local.rank() >= owners) return {chunk.end, chunk.end};
  return slice_of(chunk, nodes_->local.rank(), owners, element_size_);
}

// This node's elements, and what has been received, if any.
void NodesPass::reduce(const void* received, Range elements, bool last) {
  const int ranks = nodes_->local.size();
  sources_.clear();
  results_.clear();
  if (received != nullptr) sources_.push_back(received);
  for (int rank = 0; rank < ranks; ++rank) {
    std::byte* const there = at(rank, elements.begin);
    sources_.push_back(there);
    if (last) results_.push_back(there);
  }
  if (!last) results_.push_back(own(elements.begin));
  const Arithmetic partial{arithmetic_.dtype, arithmetic_.op};
  reduce_ranks(last ? arithmetic_ : partial, results_.data(), static_cast<int>(results_.size()), sources_.data(),
               static_cast<int>(sources_.size()), elements.count());
}

// To the other ranks' memory.
void NodesPass::take(Range elements) {
  for (int rank = 0; rank < nodes_->local.size(); ++rank)
    if (rank != nodes_->local.rank())
      std::memcpy(at(rank, elements.begin), own(elements.begin), elements.count() * element_size_);
}

// Calls visit(elements of the slots, where they lie in this rank's area).
template <typename Visit>
bool NodesPass::walk(const Visit& visit) {
  for (size_t budget = piece_count_; part_ < load_.parts.size() && budget > 0;) {
    const Part& part = load_.parts[part_];
    const size_t begin = part.elements.begin + position_, end = std::min(part.elements.end, begin + budget);
    visit(Range{begin, end}, own(part.at + position_));
    budget -= end - begin;
    position_ += end - begin;
    if (end < part.elements.end) continue;
    ++part_;
    position_ = 0;
  }
  if (part_ < load_.parts.size()) return false;
  part_ = position_ = 0;
  return true;
}

bool NodesPass::pack() {
  return walk([this](Range elements, std::byte* area) {
    for (size_t slot = slots_->find(elements.begin), at = elements.begin; at < elements.end; ++slot) {
      const size_t stop = std::min(elements.end, slots_->offset(slot + 1));
      std::byte* const target = area + (at - elements.begin) * element_size_;
      if (at < stop && slots_->packed_at(at, stop) != target) slots_->pack_shared(target, at, stop);
      at = stop;
    }
  });
}

bool NodesPass::unpack() {
  return walk([this](Range elements, const std::byte* area) { slots_->unpack(elements.begin, elements.end, area); });
}

bool NodesPass::reduce_short() {
  const size_t begin = own_[0].begin + position_, end = std::min(own_[0].end, begin + piece_count_);
  if (begin < end) reduce(nullptr, {begin, end}, false);
  position_ += end - begin;
  return end == own_[0].end;
}

bool NodesPass::push_short() {
  const size_t begin = own_[0].begin + position_, end = std::min(own_[0].end, begin + piece_count_);
  if (begin < end) take({begin, end});
  position_ += end - begin;
  return end == own_[0].end;
}

void NodesPass::start_crossing() {
  if (!is_short()) {
    const auto phases = load_.scatters ? Ring::Phases::kReduceScatter : Ring::Phases::kAllreduce;
    crossing_ = std::make_unique<Ring>(nodes_->cross, *pool_, tag_, phases, static_cast<RingData&>(*this), own(0), own_,
                                       arithmetic_);
    return;
  }
  const size_t count = own_[0].count();
  if (count == 0) return;
  std::byte* const data = own(own_[0].begin);
  if (count * element_size_ < thresholds::kRing)
    crossing_ = std::make_unique<AllreduceDoubling>(nodes_->cross, *pool_, tag_, data, data, count, arithmetic_);
  else
    crossing_ = std::make_unique<AllreduceDirect>(nodes_->cross, *pool_, tag_, data, count, arithmetic_);
}

Step NodesPass::step() {
  switch (phase_) {
    case Phase::kPack:
      if (!pack()) return Step::kMoved;
      area_->publish_packed(run_ + 1);
      phase_ = Phase::kReduce;
      return Step::kMoved;
    case Phase::kReduce:
      if (!area_->all_packed(run_ + 1)) return Step::kIdle;
      if (nodes_->owns()) {
        if (is_short() && !reduce_short()) return Step::kMoved;
        start_crossing();
      }
      position_ = 0;
      phase_ = Phase::kCross;
      return Step::kMoved;
    case Phase::kCross: {
      const Step step = crossing_ == nullptr ? Step::kDone : crossing_->step();
      if (step != Step::kDone) return step;
      crossing_ = nullptr;
      phase_ = Phase::kPush;
      return Step::kMoved;
    }
    case Phase::kPush:
      if (is_short() && !push_short()) return Step::kMoved;
      position_ = 0;
      area_->publish_pushed(run_ + 1);
      phase_ = Phase::kWait;
      return Step::kMoved;
    case Phase::kWait:
      if (!area_->all_pushed(run_ + 1)) return Step::kIdle;
      if (!load_.unpacks) return Step::kDone;
      phase_ = Phase::kUnpack;
      return Step::kMoved;
    case Phase::kUnpack: return unpack() ? Step::kDone : Step::kMoved;
  }
  return Step::kDone;
}

std::string NodesPass::describe() const {
  switch (phase_) {
    case Phase::kPack: return "packs";
    case Phase::kReduce:
      return "waits for rank " + std::to_string(area_->missing_to_pack()) + ", on this node, to start or pack";
    case Phase::kCross: return "between the nodes: " + (crossing_ == nullptr ? "" : crossing_->describe());
    case Phase::kPush: return "copies its slice";
    case Phase::kWait:
      return "waits for rank " + std::to_string(area_->missing_to_push()) + ", on this node, to push its slice";
    case Phase::kUnpack: break;
  }
  return "unpacks";
}

}  // namespace collective
