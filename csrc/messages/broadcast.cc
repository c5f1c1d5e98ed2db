#include "messages/broadcast.h"

#include "base/thresholds.h"

namespace collective {

Broadcast::Broadcast(const Comm& comm, int tag, int root, void* data, size_t nbytes)
    : comm_(&comm),
      tag_(tag),
      data_(static_cast<std::byte*>(data)),
      nbytes_(nbytes),
      segments_((nbytes + kSegmentBytes - 1) / kSegmentBytes) {
  const int p = comm.size();
  const int place = (comm.rank() - root + p) % p;  // 0 is the root
  const auto rank_at = [&](int other) { return (other + root) % p; };
  const auto add_child = [&](int other) {
    children_.emplace_back();
    children_.back().rank = rank_at(other);
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
  for (; posted_ < segments_ && posted_ - received_ < kDepth; ++posted_, moved = true)
    receives_[posted_ % kDepth] = comm_->irecv(data_ + begin(posted_), length(posted_), parent_, tag_);
  for (; received_ < posted_ && receives_[received_ % kDepth].done(); ++received_) moved = true;
  bool done = received_ == segments_;
  for (Child& child : children_) {
    for (; child.done < child.started && child.sends[child.done % kDepth].done(); ++child.done) moved = true;
    for (; child.started < received_ && child.started - child.done < kDepth; ++child.started, moved = true)
      child.sends[child.started % kDepth] =
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
