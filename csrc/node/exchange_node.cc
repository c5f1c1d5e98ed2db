#include "node/exchange_node.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace collective {
namespace {

// One step copies about this much.
constexpr size_t kStepBytes = size_t{1} << 20;

}  // namespace

ExchangeNode::ExchangeNode(Lane& lane, size_t most_nbytes, size_t most_parts) : lane_(&lane), first_(lane.reserved_) {
  const size_t lines = most_parts * kLineBytes;  // what rounding may add to the pieces
  const size_t room = std::max(Lane::chunk_bytes(most_nbytes), 2 * lines) - lines;
  lane.reserved_ += (most_nbytes + room - 1) / room;
  end_ = lane.reserved_;
}

size_t ExchangeNode::piece(size_t nbytes) const {
  const size_t chunks = end_ - first_;
  return chunks == 0 ? 0 : round_up((nbytes + chunks - 1) / chunks, kLineBytes);
}

void ExchangeNode::pack(size_t place, const void* data, size_t nbytes) {
  if (nbytes > 0) packs_.push_back({lane_->rank_, place, static_cast<const std::byte*>(data), nullptr, nbytes});
}

void ExchangeNode::unpack(int source, size_t place, void* data, size_t nbytes) {
  if (nbytes > 0) unpacks_.push_back({source, place, nullptr, static_cast<std::byte*>(data), nbytes});
}

void ExchangeNode::copy(const void* from, void* to, size_t nbytes) {
  if (nbytes > 0)
    unpacks_.insert(unpacks_.begin(),  // first of all, for it waits for nobody
                    {lane_->rank_, 0, static_cast<const std::byte*>(from), static_cast<std::byte*>(to), nbytes});
}

// Copies this chunk's piece of a part from its source to its destination; returns its bytes.
size_t ExchangeNode::copy_piece(const Part& part, uint64_t chunk) const {
  const size_t length = piece(part.nbytes);
  const size_t begin = std::min(part.nbytes, static_cast<size_t>(chunk - first_) * length);
  const size_t nbytes = std::min(part.nbytes - begin, length);
  if (nbytes == 0) return 0;
  std::byte* const to = part.to != nullptr ? part.to + begin : lane_->staging(part.source, chunk) + part.place;
  std::memcpy(to, part.from != nullptr ? part.from + begin : lane_->staging(part.source, chunk) + part.place, nbytes);
  return nbytes;
}

bool ExchangeNode::pack_chunk() {
  const uint64_t chunk = lane_->packed_.own();
  if (chunk < first_ || chunk >= end_) return false;
  if (packs_.empty()) {
    lane_->packed_.publish(end_);
    return true;
  }
  if (chunk >= Lane::kDepth && !lane_->unpacked_.all_reached(chunk - Lane::kDepth + 1)) return false;
  for (const Part& part : packs_) copy_piece(part, chunk);
  lane_->packed_.publish(chunk + 1);
  return true;
}

bool ExchangeNode::unpack_chunk() {
  const uint64_t chunk = lane_->unpacked_.own();
  if (chunk < first_ || chunk >= end_) return false;
  const size_t before = next_;
  for (size_t moved = 0; next_ < unpacks_.size(); ++next_) {
    const Part& part = unpacks_[next_];
    if (moved >= kStepBytes) return true;
    if (part.from == nullptr && !lane_->packed_.reached(part.source, chunk + 1)) return next_ > before;
    moved += copy_piece(part, chunk);
  }
  next_ = 0;
  const uint64_t done = unpacks_.empty() ? end_ : chunk + 1;
  lane_->reduced_.publish(done);
  lane_->unpacked_.publish(done);
  return true;
}

Step ExchangeNode::step() {
  const bool packed = pack_chunk();  // and on at once: if the peers have packed already, this may complete it
  const bool moved = unpack_chunk() || packed;
  if (lane_->packed_.own() >= end_ && lane_->unpacked_.own() >= end_) return Step::kDone;
  return moved ? Step::kMoved : Step::kIdle;
}

std::string ExchangeNode::describe() const {
  const uint64_t unpacked = lane_->unpacked_.own(), packed = lane_->packed_.own();
  if (unpacked < first_ || packed < first_) return "waits in its lane behind another operation";
  if (unpacked < end_ && next_ < unpacks_.size() && !lane_->packed_.reached(unpacks_[next_].source, unpacked + 1))
    return Lane::waits_text(first_, end_, unpacked,
                            lane_->packed_.job_ranks()[static_cast<size_t>(unpacks_[next_].source)], "pack");
  return Lane::waits_text(first_, end_, packed, lane_->unpacked_.missing(), "make room for");
}

std::unique_ptr<ExchangeNode> ExchangeNode::broadcast(Lane& lane, int root, void* data, size_t nbytes) {
  auto operation = std::make_unique<ExchangeNode>(lane, nbytes, 1);
  if (lane.rank() == root)
    operation->pack(0, data, nbytes);
  else if (data != nullptr)
    operation->unpack(root, 0, data, nbytes);
  return operation;
}

std::unique_ptr<ExchangeNode> ExchangeNode::gather(Lane& lane, int root, const void* in, void* out,
                                                   const std::vector<size_t>& offsets) {
  const auto self = static_cast<size_t>(lane.rank()), p = static_cast<size_t>(lane.size());
  const auto nbytes = [&](size_t rank) { return offsets[rank + 1] - offsets[rank]; };
  size_t most = 0;
  for (size_t rank = 0; rank < p; ++rank) most = std::max(most, nbytes(rank));
  auto operation = std::make_unique<ExchangeNode>(lane, most, 1);
  if (lane.rank() != root) operation->pack(0, in, nbytes(self));
  if (lane.rank() != root && root != kAll) return operation;
  auto* const to = static_cast<std::byte*>(out);
  operation->copy(in, to + offsets[self], nbytes(self));
  for (size_t i = 1; i < p; ++i) {
    const size_t peer = (self + i) % p;
    operation->unpack(static_cast<int>(peer), 0, to + offsets[peer], nbytes(peer));
  }
  return operation;
}

std::unique_ptr<ExchangeNode> ExchangeNode::scatter(Lane& lane, int root, const void* in, void* out,
                                                    const std::vector<size_t>& offsets) {
  const auto p = static_cast<size_t>(lane.size());
  const auto* const from = static_cast<const std::byte*>(in);
  auto operation = std::make_unique<ExchangeNode>(lane, offsets.back(), p);
  size_t place = 0;
  for (size_t rank = 0; rank < p; ++rank) {
    const size_t nbytes = offsets[rank + 1] - offsets[rank];
    const bool is_self = static_cast<int>(rank) == lane.rank(), is_root = static_cast<int>(rank) == root;
    if (is_self && is_root)
      operation->copy(from + offsets[rank], out, nbytes);
    else if (is_self)
      operation->unpack(root, place, out, nbytes);
    else if (lane.rank() == root)
      operation->pack(place, from + offsets[rank], nbytes);
    if (!is_root) place += operation->piece(nbytes);
  }
  return operation;
}

AlltoallNode::AlltoallNode(Lane& lane, const void* in, const std::vector<int64_t>& splits, size_t most_rows,
                           size_t row_bytes, Allocate allocate)
    : rank_(lane.rank()),
      in_(static_cast<const std::byte*>(in)),
      row_bytes_(row_bytes),
      sent_(splits.size()),
      received_(splits.size()),
      allocate_(std::move(allocate)),
      counts_(lane, splits.size() * sizeof(Sent), 1),
      rows_(lane, most_rows * row_bytes, splits.size()) {
  const auto self = static_cast<size_t>(rank_), p = splits.size();
  size_t place = 0;
  const std::byte* from = in_;
  for (size_t peer = 0; peer < p; ++peer) {
    const size_t nbytes = static_cast<size_t>(splits[peer]) * row_bytes;
    sent_[peer] = {splits[peer], place};
    if (peer != self) {
      rows_.pack(place, from, nbytes);
      place += rows_.piece(nbytes);
    }
    from += nbytes;
  }
  counts_.pack(0, sent_.data(), p * sizeof(Sent));
  for (size_t peer = 0; peer < p; ++peer)
    counts_.unpack(static_cast<int>(peer), self * sizeof(Sent), &received_[peer], sizeof(Sent));
}

void AlltoallNode::start_rows() {
  counting_ = false;
  const size_t p = received_.size(), self = static_cast<size_t>(rank_);
  std::vector<int64_t> rows;
  std::vector<size_t> offsets{0};
  size_t own = 0;  // where the rows that stay here begin in `in`
  for (size_t peer = 0; peer < p; ++peer) {
    rows.push_back(received_[peer].rows);
    offsets.push_back(offsets.back() + static_cast<size_t>(rows.back()) * row_bytes_);
    if (peer < self) own += static_cast<size_t>(sent_[peer].rows) * row_bytes_;
  }
  auto* const out = static_cast<std::byte*>(allocate_(rows));
  rows_.copy(in_ + own, out + offsets[self], offsets[self + 1] - offsets[self]);
  for (size_t i = 1; i < p; ++i) {
    const size_t peer = (self + i) % p;
    rows_.unpack(static_cast<int>(peer), received_[peer].place, out + offsets[peer], offsets[peer + 1] - offsets[peer]);
  }
}

Step AlltoallNode::step() {
  if (counting_) {
    const Step step = counts_.step();
    if (step != Step::kDone) return step;
    start_rows();
  }
  return rows_.step();
}

std::string AlltoallNode::describe() const {
  return std::string("alltoall, ") + (counting_ ? "row counts: " + counts_.describe() : "rows: " + rows_.describe());
}

}  // namespace collective
