#include "nodes/allreduce_nodes.h"

#include <algorithm>
#include <utility>

#include "messages/mpi_library.h"
#include "node/shared_memory.h"

namespace collective {

AllreduceNodes::AllreduceNodes(Nodes& nodes, int size, BufferPool& pool, const AllreduceSpec& spec,
                               std::vector<Slot> slots, uint64_t digest)
    : AllreduceNodes(nodes, size, pool, spec, arrange(spec, std::move(slots), nodes.count), digest) {}

std::unique_ptr<AllreduceNodes> AllreduceNodes::reduce_scatter(Nodes& nodes, int rank, BufferPool& pool,
                                                               const AllreduceSpec& spec,
                                                               const std::vector<size_t>& offsets, const void* in,
                                                               void* out, uint64_t digest) {
  Arrangement made;
  made.chunks = {0};
  for (const std::vector<int>& ranks : nodes.ranks) {
    size_t end = made.chunks.back();
    for (const int peer : ranks) {
      const size_t begin = offsets[static_cast<size_t>(peer)], next = offsets[static_cast<size_t>(peer) + 1];
      const void* const part =
          in == nullptr ? nullptr : static_cast<const std::byte*>(in) + begin * size_of(spec.dtype);
      made.slots.push_back({part, peer == rank ? out : nullptr, next - begin});
      end += next - begin;
    }
    made.chunks.push_back(end);
  }
  const int size = static_cast<int>(offsets.size()) - 1;
  return std::unique_ptr<AllreduceNodes>(new AllreduceNodes(nodes, size, pool, spec, std::move(made), digest, true));
}

AllreduceNodes::AllreduceNodes(Nodes& nodes, int size, BufferPool& pool, const AllreduceSpec& spec, Arrangement made,
                               uint64_t digest, bool scatters)
    : nodes_(&nodes),
      memory_(nodes.memory),
      pool_(&pool),
      scaling_(scaling_of(spec, size, Passes::kSteps)),
      slots_(spec, scaling_.before, std::move(made.slots)),
      element_size_(size_of(spec.wire)),
      digest_(digest) {
  cut(made, scatters);
  first_ = nodes.lane->reserve(loads_.size());
}

void AllreduceNodes::cut(const Arrangement& made, bool scatters) {
  const size_t most = nodes_->lane->piece_bytes() / element_size_;
  for (size_t begin = 0; begin < made.short_count; begin += most) {
    const Range part{begin, std::min(made.short_count, begin + most)};
    loads_.push_back({{{part, 0}}, {{0, part.count()}}, true});
  }
  if (made.chunks.empty()) return;
  const auto nodes = static_cast<size_t>(nodes_->count);
  // Of each chunk, in whole lines; at least one, so that a piece of 4 MiB is enough for 32,768 nodes.
  const size_t line = kLineBytes / element_size_, share = most / nodes / line * line;
  size_t longest = 0;
  for (size_t i = 0; i < nodes; ++i) longest = std::max(longest, made.chunks[i + 1] - made.chunks[i]);
  for (size_t begin = 0; begin < longest; begin += share) {
    NodesPass::Load load{{}, {}, true, scatters};
    for (size_t i = 0; i < nodes; ++i) {
      const size_t length = made.chunks[i + 1] - made.chunks[i];
      const Range part{std::min(length, begin), std::min(length, begin + share)};
      const size_t skip = made.short_count + made.chunks[i], at = i * share;
      if (part.count() > 0) load.parts.push_back({{skip + part.begin, skip + part.end}, at});
      load.chunks.push_back({at, at + part.count()});
    }
    loads_.push_back(std::move(load));
  }
}

Step AllreduceNodes::step() {
  bool moved = false;
  NodesLane& lane = *nodes_->lane;
  static const int highest = highest_tag();
  while (started_ < loads_.size() && lane.is_free(first_ + started_)) {
    const uint64_t turn = first_ + started_;
    in_flight_.push_back(
        {turn, std::make_unique<NodesPass>(lane.area(turn), *nodes_, *pool_, lane.tag(turn, digest_, highest),
                                           scaling_.arithmetic, slots_, std::move(loads_[started_]))});
    ++started_;
    moved = true;
  }
  size_t before = 0;  // that have not crossed
  for (auto piece = in_flight_.begin(); piece != in_flight_.end();) {
    NodesPass& run = *piece->run;
    if (before >= lane.crossing() && !run.packs()) break;
    const Step step = run.step();
    moved |= step != Step::kIdle;
    if (run.packs()) break;
    before += run.has_crossed() ? 0 : 1;
    if (step == Step::kDone) {
      lane.end(piece->turn);
      piece = in_flight_.erase(piece);
    } else {
      ++piece;
    }
  }
  if (in_flight_.empty() && started_ == loads_.size()) return Step::kDone;
  return moved ? Step::kMoved : Step::kIdle;
}

std::string AllreduceNodes::describe() const {
  if (in_flight_.empty()) return "waits for its turn behind another operation";
  const Piece& oldest = in_flight_.front();
  return "piece " + std::to_string(oldest.turn - first_) + " of " + std::to_string(loads_.size()) + ": " +
         oldest.run->describe();
}

}  // namespace collective
