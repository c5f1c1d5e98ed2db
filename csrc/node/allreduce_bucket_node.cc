#include "node/allreduce_bucket_node.h"

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
      sources_(static_cast<size_t>(size_)),
      results_(static_cast<size_t>(size_)) {
  if (offset % kLineBytes != 0 || offset + nbytes(wire, count) > memory.nbytes())
    throw Error(ErrorCode::kInternal, "a bucket of " + std::to_string(nbytes(wire, count)) + " bytes at byte " +
                                          std::to_string(offset) + " of " + std::to_string(memory.nbytes()));
  for (int rank = 0; rank < size_; ++rank) storage_.push_back(memory.part(rank) + offset);
}

uint64_t NodeBucket::begin_run(DType wire, size_t count) {
  if (wire != wire_ || count != count_)
    throw Error(ErrorCode::kInternal, "a bucket of " + std::to_string(count_) + " " + name_of(wire_) + " was given " +
                                          std::to_string(count) + " " + name_of(wire));
  return begin_run();
}

uint64_t NodeBucket::begin_run() {
  if (pushed_.own() != runs_)
    throw Error(ErrorCode::kInternal, "a bucket was started while its last run was in flight");
  return runs_++;
}

size_t NodeBucket::pack(const Slots& slots, size_t& slot, size_t begin, size_t end) {
  const size_t element_size = size_of(wire_);
  size_t copied = 0;
  for (size_t at = begin; at < end;) {
    while (slots.offset(slot + 1) <= at) ++slot;
    const size_t stop = std::min(end, slots.offset(slot + 1));
    if (!slots.unchanged() || slots.list()[slot].in != storage() + slots.offset(slot) * element_size) {
      slots.pack_shared(storage() + at * element_size, at, stop);
      copied += stop - at;
    }
    at = stop;
  }
  return copied;
}

AllreduceBucketNode::AllreduceBucketNode(NodeBucket& bucket, const AllreduceSpec& spec, std::vector<Slot> slots)
    : bucket_(&bucket),
      arithmetic_(scaling_of(spec, bucket.size_, Passes::kOnePass).arithmetic),
      slots_(spec, scaling_of(spec, bucket.size_, Passes::kOnePass).before, std::move(slots)),
      element_size_(size_of(spec.wire)),
      tile_count_(kTileBytes / element_size_),
      run_(bucket.begin_run(spec.wire, slots_.count())) {}

Range AllreduceBucketNode::tile_at(size_t begin) const {
  return {begin, std::min(slots_.count(), begin + tile_count_)};
}

bool AllreduceBucketNode::pack() {
  if (packed_ == slots_.count()) return false;
  for (size_t copied = 0; packed_ < slots_.count() && copied < tile_count_ / 2;) {
    const Range tile = tile_at(packed_);
    const Range own = slice_of(tile, bucket_->rank_, bucket_->size_, element_size_);
    copied += bucket_->pack(slots_, slot_, tile.begin, own.begin);
    copied += bucket_->pack(slots_, slot_, own.end, tile.end);
    packed_ = tile.end;
  }
  bucket_->packed_.publish(run_ * slots_.count() + packed_);
  return true;
}

bool AllreduceBucketNode::reduce() {
  if (reduced_ == slots_.count()) return false;
  const Range tile = tile_at(reduced_);
  if (packed_ < tile.end || !bucket_->packed_.all_reached(run_ * slots_.count() + tile.end)) return false;
  const Range own = slice_of(tile, bucket_->rank_, bucket_->size_, element_size_);
  const auto self = static_cast<size_t>(bucket_->rank_);
  const size_t block_count = kBlockBytes / element_size_;
  alignas(kLineBytes) std::byte block[kBlockBytes];  // for own elements that must be converted or gathered
  for (size_t begin = own.begin; begin < own.end;) {
    size_t end = own.end;
    const std::byte* in = slots_.packed_at(begin, end);
    if (in == nullptr) {
      end = std::min(end, begin + block_count);
      in = slots_.packed_at(begin, end);
    }
    if (in == nullptr) {
      slots_.pack(block, begin, end);
      in = block;
    }
    for (size_t rank = 0; rank < bucket_->storage_.size(); ++rank) {
      bucket_->results_[rank] = bucket_->storage_[rank] + begin * element_size_;
      bucket_->sources_[rank] = bucket_->results_[rank];
    }
    bucket_->sources_[self] = in;
    reduce_ranks(arithmetic_, bucket_->results_.data(), bucket_->size_, bucket_->sources_.data(), bucket_->size_,
                 end - begin);
    begin = end;
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
    return "element " + std::to_string(reduced_) + " of " + count + ": waits for rank " +
           std::to_string(bucket_->packed_.missing()) + " to start or pack";
  return "waits for rank " + std::to_string(bucket_->pushed_.missing()) + " to push its slices";
}

}  // namespace collective
