#include "node/reduce_scatter_node.h"

#include <algorithm>
#include <utility>

namespace collective {
namespace {

// On each rank only its own part has an output.
std::vector<Slot> slots_of(const AllreduceSpec& spec, const std::vector<size_t>& offsets, const void* in, void* out,
                           int self) {
  std::vector<Slot> slots;
  for (size_t rank = 0; rank + 1 < offsets.size(); ++rank) {
    const auto* part =
        in == nullptr ? nullptr : static_cast<const std::byte*>(in) + offsets[rank] * size_of(spec.dtype);
    slots.push_back({part, static_cast<int>(rank) == self ? out : nullptr, offsets[rank + 1] - offsets[rank]});
  }
  return slots;
}

}  // namespace

ReduceScatterNode::ReduceScatterNode(Lane& lane, const AllreduceSpec& spec, const std::vector<size_t>& offsets,
                                     const void* in, void* out)
    : lane_(&lane),
      arithmetic_(scaling_of(spec, lane.size_, Passes::kOnePass).arithmetic),
      element_size_(size_of(spec.wire)),
      offsets_(offsets),
      slots_(spec, scaling_of(spec, lane.size_, Passes::kOnePass).before, slots_of(spec, offsets, in, out, lane.rank_)),
      first_(lane.reserved_) {
  size_t longest = 0;  // part
  for (size_t rank = 0; rank + 1 < offsets.size(); ++rank)
    longest = std::max(longest, offsets[rank + 1] - offsets[rank]);
  // Elements of a chunk, and of a piece in it.
  const size_t pieces = std::max<size_t>(1, static_cast<size_t>(lane.size_) - 1), line = kLineBytes / element_size_;
  const size_t chunk_count = Lane::chunk_bytes(longest * pieces * element_size_) / element_size_;
  const size_t most = std::max<size_t>(1, chunk_count / pieces / line) * line;
  const size_t chunks = (longest + most - 1) / most;
  piece_count_ = chunks == 0 ? 0 : round_up((longest + chunks - 1) / chunks, line);
  lane.reserved_ += chunks;
  end_ = lane.reserved_;
}

Range ReduceScatterNode::piece_of(int rank, uint64_t chunk) const {
  const size_t begin = offsets_[static_cast<size_t>(rank)], end = offsets_[static_cast<size_t>(rank) + 1];
  const size_t at = begin + static_cast<size_t>(chunk - first_) * piece_count_;
  return {std::min(end, at), std::min(end, at + piece_count_)};
}

std::byte* ReduceScatterNode::staging(int source, int rank, uint64_t chunk) const {
  const auto place = static_cast<size_t>(rank > source ? rank - 1 : rank);
  return lane_->staging(source, chunk) + place * piece_count_ * element_size_;
}

bool ReduceScatterNode::pack() {
  const uint64_t chunk = lane_->packed_.own();
  if (chunk < first_ || chunk >= end_) return false;
  if (chunk >= Lane::kDepth && !lane_->unpacked_.all_reached(chunk - Lane::kDepth + 1)) return false;
  for (int rank = 0; rank < lane_->size_; ++rank) {
    if (rank == lane_->rank_) continue;
    const Range piece = piece_of(rank, chunk);
    slots_.pack_shared(staging(lane_->rank_, rank, chunk), piece.begin, piece.end);
  }
  lane_->packed_.publish(chunk + 1);
  return true;
}

bool ReduceScatterNode::reduce() {
  const uint64_t chunk = lane_->unpacked_.own();
  if (chunk < first_ || chunk >= lane_->packed_.own() || chunk >= end_) return false;
  if (!lane_->packed_.all_reached(chunk + 1)) return false;
  const int self = lane_->rank_;
  const Range own = piece_of(self, chunk);
  for (int rank = 0; rank < lane_->size_; ++rank)
    lane_->sources_[static_cast<size_t>(rank)] = rank == self ? nullptr : staging(rank, self, chunk);
  slots_.reduce(arithmetic_, lane_->sources_, static_cast<size_t>(self), own.begin, own.end, nullptr);
  lane_->reduced_.publish(chunk + 1);
  lane_->unpacked_.publish(chunk + 1);
  return true;
}

Step ReduceScatterNode::step() {
  const bool packed = pack();  // and on at once: if the peers have packed already, this may complete it
  const bool moved = reduce() || packed;
  if (lane_->unpacked_.own() >= end_) return Step::kDone;
  return moved ? Step::kMoved : Step::kIdle;
}

std::string ReduceScatterNode::describe() const {
  const uint64_t reduced = lane_->unpacked_.own(), packed = lane_->packed_.own();
  if (reduced < first_) return "waits in its lane behind another operation";
  return "reduce-scatter, " +
         (packed > reduced ? Lane::waits_text(first_, end_, reduced, lane_->packed_.missing(), "pack")
                           : Lane::waits_text(first_, end_, packed, lane_->unpacked_.missing(), "make room for"));
}

}  // namespace collective
