#include "nodes/allreduce_bucket_nodes.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/thresholds.h"
#include "messages/allreduce_doubling.h"
#include "messages/ring.h"

namespace collective {

AllreduceBucketNodes::AllreduceBucketNodes(NodeBucket& bucket, const Nodes& nodes, int size, BufferPool& pool, int tag,
                                           const AllreduceSpec& spec, std::vector<Slot> slots)
    : bucket_(&bucket),
      nodes_(&nodes),
      pool_(&pool),
      tag_(tag),
      scaling_(scaling_of(spec, size, Passes::kSteps)),
      slots_(spec, scaling_.before, std::move(slots)),
      element_size_(size_of(spec.wire)),
      piece_count_(kPieceBytes / element_size_),
      run_(bucket.begin_run(spec.wire, slots_.count())) {
  if (owns()) own_ = slice_of({0, slots_.count()}, nodes.local.rank(), nodes.owners, element_size_);
}

std::byte* AllreduceBucketNodes::at(int rank, size_t element) const {
  return bucket_->storage_of(rank) + element * element_size_;
}

// A piece into this rank's bucket; true at the end.
bool AllreduceBucketNodes::pack() {
  const size_t end = std::min(slots_.count(), position_ + piece_count_);
  bucket_->pack(slots_, slot_, position_, end);
  position_ = end;
  return position_ == slots_.count();
}

// A piece of this rank's slice, from all buckets of the node into this rank's; true at the end.
bool AllreduceBucketNodes::reduce() {
  const size_t end = std::min(own_.end, position_ + piece_count_);
  std::vector<const void*> sources;
  for (int rank = 0; rank < nodes_->local.size(); ++rank) sources.push_back(at(rank, position_));
  const Arithmetic partial{scaling_.arithmetic.dtype, scaling_.arithmetic.op};
  reduce_ranks(partial, at(nodes_->local.rank(), position_), sources.data(), nodes_->local.size(), end - position_);
  position_ = end;
  return position_ == own_.end;
}

void AllreduceBucketNodes::start_crossing() {
  std::byte* const data = at(nodes_->local.rank(), own_.begin);
  const size_t count = own_.end - own_.begin;
  if (count * element_size_ < thresholds::kRing)
    crossing_ =
        std::make_unique<AllreduceDoubling>(nodes_->cross, *pool_, tag_, data, data, count, scaling_.arithmetic);
  else
    crossing_ = std::make_unique<Ring>(nodes_->cross, *pool_, tag_, Ring::Phases::kAllreduce, data, data,
                                       even_offsets(count, 1, nodes_->cross.size()), scaling_.arithmetic);
}

// A piece of the finished slice, to the others' buckets; true at the end.
bool AllreduceBucketNodes::push() {
  const size_t end = std::min(own_.end, position_ + piece_count_);
  const int me = nodes_->local.rank();
  for (int rank = 0; rank < nodes_->local.size(); ++rank)
    if (rank != me) std::memcpy(at(rank, position_), at(me, position_), (end - position_) * element_size_);
  position_ = end;
  return position_ == own_.end;
}

Step AllreduceBucketNodes::step() {
  switch (phase_) {
    case Phase::kPack:
      if (!pack()) return Step::kMoved;
      bucket_->publish_packed((run_ + 1) * slots_.count());
      phase_ = Phase::kReduce;
      position_ = own_.begin;
      return Step::kMoved;
    case Phase::kReduce:
      if (!bucket_->all_packed((run_ + 1) * slots_.count())) return Step::kIdle;
      if (!reduce()) return Step::kMoved;
      if (own_.begin < own_.end) start_crossing();
      phase_ = Phase::kCross;
      return Step::kMoved;
    case Phase::kCross: {
      const Step step = crossing_ == nullptr ? Step::kDone : crossing_->step();
      if (step != Step::kDone) return step;
      crossing_ = nullptr;
      phase_ = Phase::kPush;
      position_ = own_.begin;
      return Step::kMoved;
    }
    case Phase::kPush:
      if (!push()) return Step::kMoved;
      bucket_->publish_pushed(run_ + 1);
      phase_ = Phase::kWait;
      return Step::kMoved;
    case Phase::kWait: return bucket_->all_pushed(run_ + 1) ? Step::kDone : Step::kIdle;
  }
  return Step::kDone;
}

std::string AllreduceBucketNodes::describe() const {
  switch (phase_) {
    case Phase::kPack: return "packs";
    case Phase::kReduce:
      return "waits for rank " + std::to_string(bucket_->missing_to_pack()) + ", on this node, to start or pack";
    case Phase::kCross: return "between the nodes: " + (crossing_ == nullptr ? "" : crossing_->describe());
    case Phase::kPush: return "copies its slice";
    case Phase::kWait: break;
  }
  return "waits for rank " + std::to_string(bucket_->missing_to_push()) + ", on this node, to push its slice";
}

}  // namespace collective
