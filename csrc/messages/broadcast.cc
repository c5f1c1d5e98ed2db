#include "messages/broadcast.h"

#include <algorithm>

#include "base/thresholds.h"

namespace collective {

Broadcast::Broadcast(const Comm& comm, int tag, int root, void* data, size_t nbytes)
    : comm_(&comm),
      tag_(tag),
      data_(static_cast<std::byte*>(data)),
      nbytes_(nbytes),
      cut_(comm.segments(kSegments)),
      segments_((nbytes + cut_.nbytes - 1) / cut_.nbytes),
      receives_(std::min(segments_, cut_.depth)) {
  const int p = comm.size();
  const auto& order = comm.order();
  const auto of_root = static_cast<int>(std::find(order.begin(), order.end(), root) - order.begin());
  const int place = (comm.position() - of_root + p) % p;  // 0 is the root
  const auto rank_at = [&](int other) { return comm.at(other + of_root); };
  const auto add_child = [&](int other) {
    children_.emplace_back();
    children_.back().rank = rank_at(other);
    children_.back().sends.resize(receives_.size());
  };
  if (nbytes >= thresholds::kBroadcastChain) {
    if (place > 0) parent_ = rank_at(place - 1);
    if (place + 1 < p) add_child(place + 1);
  } else {
    int bit = 1;
    while (bit < p && (place & bit) == 0) bit *= 2;
    if (place > 0) parent_ = rank_at(place - bit);
    for (bit /= 2; bit > 0; bit /= 2)
      if (place + bit < p) add_child(place + bit);
  }
  if (parent_ < 0) posted_ = received_ = segments_;
}

Step Broadcast::step() {
  bool moved = false;
  const size_t depth = receives_.size();
  for (; posted_ < segments_ && posted_ - received_ < depth; ++posted_, moved = true)
    receives_[posted_ % depth] = comm_->irecv(data_ + begin(posted_), length(posted_), parent_, tag_);
  for (; received_ < posted_ && receives_[received_ % depth].done(); ++received_) moved = true;
  bool done = received_ == segments_;
  for (Child& child : children_) {
    for (; child.done < child.started && child.sends[child.done % depth].done(); ++child.done) moved = true;
    for (; child.started < received_ && child.started - child.done < depth; ++child.started, moved = true)
      child.sends[child.started % depth] =
          comm_->isend(data_ + begin(child.started), length(child.started), child.rank, tag_);
    done &= child.done == segments_;
  }
  return done ? Step::kDone : moved ? Step::kMoved : Step::kIdle;
}

std::string Broadcast::describe() const {
  if (received_ < segments_)
    return "broadcast: waits for " + comm_->names().text_of(parent_) + ", segment " + std::to_string(received_) +
           " of " + std::to_string(segments_);
  for (const Child& child : children_)
    if (child.done < segments_)
      return "broadcast: waits for " + comm_->names().text_of(child.rank) + " to take segment " +
             std::to_string(child.done) + " of " + std::to_string(segments_);
  return "broadcast: done";
}

}  // namespace collective
