#include "allreduce_bucket_node.h"

#include <algorithm>
#include <utility>

namespace collective {

NodeBucket::NodeBucket(const SharedMemory& memory, size_t offset, DType wire, size_t count)
    : rank_(memory.rank()),
      size_(memory.size()),
      wire_(wire),
      count_(count),
      packed_(memory, offset + round_up(count * size_of(wire), kLineBytes)),
      pushed_(memory, offset + round_up(count * size_of(wire), kLineBytes) + kLineBytes),
      sources_(static_cast<size_t>(size_)) {
  if (offset % kLineBytes != 0 || offset + nbytes(wire, count) > memory.nbytes())
    throw Error(ErrorCode::kInternal, "a bucket of " + std::to_string(nbytes(wire, count)) + " bytes at byte " +
                                          std::to_string(offset) + " of " + std::to_string(memory.nbytes()));
  for (int rank = 0; rank < size_; ++rank) storage_.push_back(memory.part(rank) + offset);
}

AllreduceBucketNode::AllreduceBucketNode(NodeBucket& bucket, const AllreduceSpec& spec, std::vector<Slot> slots)
    : bucket_(&bucket),
      arithmetic_(scaling_of(spec, bucket.size_).arithmetic),
      slots_(spec, scaling_of(spec, bucket.size_).before, std::move(slots)),
      element_size_(size_of(spec.wire)),
      tile_count_(kTileBytes / element_size_),
      run_(bucket.runs_) {
  if (spec.wire != bucket.wire_ || slots_.count() != bucket.count_)
    throw Error(ErrorCode::kInternal, "a bucket of " + std::to_string(bucket.count_) + " " + name_of(bucket.wire_) +
                                          " was given " + std::to_string(slots_.count()) + " " + name_of(spec.wire));
  if (bucket.pushed_.own() != run_)
    throw Error(ErrorCode::kInternal, "a bucket was started while its last run was under way");
  ++bucket.runs_;
}

bool AllreduceBucketNode::pack() {
  if (packed_ == slots_.count()) return false;
  std::byte* const storage = bucket_->storage();
  size_t budget = tile_count_;
  while (packed_ < slots_.count() && budget > 0) {
    const size_t slot_begin = slots_.offset(slot_), slot_end = slots_.offset(slot_ + 1);
    if (slots_.unchanged() && slots_.list()[slot_].in == storage + slot_begin * element_size_) {
      packed_ = slot_end;
    } else {
      const size_t end = std::min(slot_end, packed_ + budget);
      slots_.pack_shared(storage + packed_ * element_size_, packed_, end);
      budget -= end - packed_;
      packed_ = end;
    }
    if (packed_ == slot_end) ++slot_;
  }
  bucket_->packed_.publish(run_ * slots_.count() + packed_);
  return true;
}

bool AllreduceBucketNode::reduce() {
  if (reduced_ == slots_.count()) return false;
  const Range tile{reduced_, std::min(slots_.count(), reduced_ + tile_count_)};
  if (packed_ < tile.end || !bucket_->packed_.all_reached(run_ * slots_.count() + tile.end)) return false;
  const Range own = slice_of(tile, bucket_->rank_, bucket_->size_, element_size_);
  const size_t block_count = kBlockBytes / element_size_;
  for (size_t begin = own.begin; begin < own.end; begin += block_count) {
    const size_t offset = begin * element_size_, count = std::min(block_count, own.end - begin);
    for (size_t rank = 0; rank < bucket_->sources_.size(); ++rank)
      bucket_->sources_[rank] = bucket_->storage_[rank] + offset;
    std::byte* const result = bucket_->storage() + offset;
    reduce_ranks(arithmetic_, result, bucket_->sources_.data(), bucket_->size_, count);
    for (int i = 1; i < bucket_->size_; ++i)
      copy_by_stores(bucket_->storage_[static_cast<size_t>((bucket_->rank_ + i) % bucket_->size_)] + offset, result,
                     count * element_size_);
  }
  reduced_ = tile.end;
  return true;
}

Step AllreduceBucketNode::step() {
  // What is packed everywhere is reduced first, while it is in the cache.
  const bool moved = reduce() || pack();
  if (!pushed_ && reduced_ == slots_.count()) {
    pushed_ = true;
    bucket_->pushed_.publish(run_ + 1);
  }
  if (pushed_ && bucket_->pushed_.all_reached(run_ + 1)) return Step::kDone;
  return moved ? Step::kMoved : Step::kIdle;
}

std::string AllreduceBucketNode::describe() const {
  const std::string count = std::to_string(slots_.count());
  if (!pushed_)
    return "element " + std::to_string(reduced_) + " of " + count + ": waits for local rank " +
           std::to_string(bucket_->packed_.missing()) + " to start or pack";
  return "waits for local rank " + std::to_string(bucket_->pushed_.missing()) + " to push its slices";
}

}  // namespace collective
