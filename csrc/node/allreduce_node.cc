#include "node/allreduce_node.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/thresholds.h"

namespace collective {
namespace {

// What must be converted is read once more than in the other way.
size_t short_bytes(int size, bool unchanged) {
  return thresholds::kNodeSlices / static_cast<size_t>(std::max(1, size - 1)) / (unchanged ? 1 : 8);
}

// While the data itself stays in the cache, few large chunks are best, since each change of stage costs. Beyond that,
// the staging areas must leave room for it. Measured, 2 ranks in place, chunks of 256 KiB, 512 KiB, 1 MiB: 4 MiB 135,
// 133, 118 us; 16 MiB 720, 690, 680-700; 32 MiB 1590, 1760, 1760. Two, three or four chunks in flight perform alike.
size_t chunk_bytes(size_t nbytes, int size, size_t depth, size_t most) {
  constexpr size_t kLeast = size_t{256} << 10;
  constexpr size_t kLong = size_t{16} << 20, kAllStaging = size_t{8} << 20;
  return nbytes > kLong ? kLeast : std::clamp(kAllStaging / (depth * static_cast<size_t>(size)), kLeast, most);
}

}  // namespace

AllreduceNode::AllreduceNode(Lane& lane, const AllreduceSpec& spec, std::vector<Slot> slots)
    : lane_(&lane),
      arithmetic_(scaling_of(spec, lane.size_, Passes::kOnePass).arithmetic),
      slots_(spec, scaling_of(spec, lane.size_, Passes::kOnePass).before, std::move(slots)),
      element_size_(size_of(spec.wire)),
      short_(slots_.count() * element_size_ <= short_bytes(lane.size_, slots_.unchanged())),
      first_(lane.reserved_) {
  const size_t nbytes = slots_.count() * element_size_;
  const size_t most = chunk_bytes(nbytes, lane.size_, Lane::kDepth, Lane::kChunkBytes);
  const size_t chunks = (nbytes + most - 1) / most;
  // Even chunks, of whole lines: a short last one would cost a pipeline stage for little data.
  chunk_count_ = chunks == 0 ? 0 : round_up((slots_.count() + chunks - 1) / chunks, kLineBytes / element_size_);
  lane.reserved_ += chunks;
  end_ = lane.reserved_;
}

Range AllreduceNode::range_of(uint64_t chunk) const {
  const size_t begin = static_cast<size_t>(chunk - first_) * chunk_count_;
  return {std::min(slots_.count(), begin), std::min(slots_.count(), begin + chunk_count_)};
}

bool AllreduceNode::pack() {
  const uint64_t chunk = lane_->packed_.own();
  if (chunk < first_ || chunk >= end_) return false;
  if (chunk >= Lane::kDepth && !lane_->unpacked_.all_reached(chunk - Lane::kDepth + 1)) return false;
  const Range range = range_of(chunk);
  // Of a short message this rank's own slice is packed too, for the peers reduce it as well.
  const Range own = short_ ? Range{range.end, range.end} : slice_of(range, lane_->rank_, lane_->size_, element_size_);
  std::byte* staging = lane_->staging(lane_->rank_, chunk);
  slots_.pack_shared(staging, range.begin, own.begin);
  slots_.pack_shared(staging + (own.end - range.begin) * element_size_, own.end, range.end);
  lane_->packed_.publish(chunk + 1);
  return true;
}

// Reduces `range` of the chunk to the outputs; with `keep` also into this rank's own staging area.
void AllreduceNode::reduce_range(uint64_t chunk, Range range, bool keep) {
  const size_t offset = (range.begin - range_of(chunk).begin) * element_size_;
  const auto self = static_cast<size_t>(lane_->rank_);
  for (size_t rank = 0; rank < lane_->sources_.size(); ++rank)
    lane_->sources_[rank] = lane_->staging(static_cast<int>(rank), chunk) + offset;
  std::byte* const kept = keep ? lane_->staging(lane_->rank_, chunk) + offset : nullptr;
  if (!short_) lane_->sources_[self] = nullptr;
  slots_.reduce(arithmetic_, lane_->sources_, self, range.begin, range.end, kept);
}

bool AllreduceNode::reduce_own() {
  const uint64_t chunk = lane_->reduced_.own();
  if (chunk < first_ || chunk >= lane_->packed_.own() || chunk >= end_) return false;
  if (!lane_->packed_.all_reached(chunk + 1)) return false;
  reduce_range(chunk, slice_of(range_of(chunk), lane_->rank_, lane_->size_, element_size_), lane_->size_ > 1);
  lane_->reduced_.publish(chunk + 1);
  return true;
}

bool AllreduceNode::unpack() {
  const uint64_t chunk = lane_->unpacked_.own();
  if (chunk < first_ || chunk >= lane_->reduced_.own() || chunk >= end_) return false;
  if (!lane_->reduced_.all_reached(chunk + 1)) return false;
  const Range range = range_of(chunk);
  for (int i = 1; i < lane_->size_; ++i) {
    const int owner = (lane_->rank_ + i) % lane_->size_;
    const Range slice = slice_of(range, owner, lane_->size_, element_size_);
    slots_.unpack(slice.begin, slice.end, lane_->staging(owner, chunk) + (slice.begin - range.begin) * element_size_);
  }
  lane_->unpacked_.publish(chunk + 1);
  return true;
}

bool AllreduceNode::reduce_all() {
  const uint64_t chunk = lane_->unpacked_.own();
  if (chunk < first_ || chunk >= lane_->packed_.own() || chunk >= end_) return false;
  if (!lane_->packed_.all_reached(chunk + 1)) return false;
  reduce_range(chunk, range_of(chunk), false);
  lane_->reduced_.publish(chunk + 1);
  lane_->unpacked_.publish(chunk + 1);
  return true;
}

Step AllreduceNode::step() {
  bool moved;
  if (short_) {
    moved = pack();  // and on at once: if the peers have packed already, this completes it
    moved |= reduce_all();
  } else {
    moved = unpack() || reduce_own() || pack();  // the last stage first: it makes room
  }
  if (lane_->unpacked_.own() >= end_) return Step::kDone;
  return moved ? Step::kMoved : Step::kIdle;
}

std::string AllreduceNode::describe() const {
  const uint64_t unpacked = lane_->unpacked_.own(), reduced = lane_->reduced_.own(), packed = lane_->packed_.own();
  if (unpacked < first_) return "waits in its lane behind another operation";
  if (reduced > unpacked) return Lane::waits_text(first_, end_, unpacked, lane_->reduced_.missing(), "reduce");
  if (packed > unpacked) return Lane::waits_text(first_, end_, unpacked, lane_->packed_.missing(), "pack");
  return Lane::waits_text(first_, end_, unpacked, lane_->unpacked_.missing(), "make room for");
}

}  // namespace collective
