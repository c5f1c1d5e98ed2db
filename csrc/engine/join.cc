#include "engine/join.h"

#include <algorithm>
#include <utility>

namespace collective {

void Join::begin(std::shared_ptr<Ticket> ticket, JoinSubmission submission) {
  ticket_ = std::move(ticket);
  ever_ = true;
  told_ = false;
  wait_ = {};
  marks_ = Device::kept_marks();
  marks_.insert(marks_.end(), submission.marks.begin(), submission.marks.end());
}

bool Join::take_ready() {
  if (!std::all_of(marks_.begin(), marks_.end(), [](const auto& mark) { return mark->reached(); })) return false;
  marks_.clear();
  told_ = true;
  return true;
}

void Join::add(int peer, const RunQueue& running, const Plans& plans) {
  joined_.push_back(peer);
  for (const Running& run : running.all())
    if (run.of_bucket)
      inquiry_->demand(peer, run.of_bucket->bucket, plans.plan_of(run.of_bucket->bucket), run.of_bucket->run);
}

void Join::demand(const Running& running, const Plans& plans) const {
  const auto [bucket, run] = *running.of_bucket;
  for (const int peer : joined_) inquiry_->demand(peer, bucket, plans.plan_of(bucket), run);
}

std::optional<uint32_t> Join::next_demanded(const RunQueue& running, const Plans& plans,
                                            const std::function<bool(uint32_t)>& has_left) {
  if (!ever_) return std::nullopt;
  const std::vector<Inquiry::Demand> arrived = inquiry_->take_demands();
  demands_.insert(demands_.end(), arrived.begin(), arrived.end());
  for (auto demand = demands_.begin(); demand != demands_.end();) {
    const uint32_t bucket = demand->bucket;
    const uint64_t plan = plans.plan_of(bucket);
    // A demand may come before this rank knows the bucket, or while its memory is being made; and, where another rank
    // has demanded the same, when the bucket has gone.
    if (plan < demand->plan || (plan == demand->plan && !plans.is_open(bucket))) {
      ++demand;
    } else if (plan > demand->plan || plans.started()[bucket] >= demand->run || has_left(bucket)) {
      demand = demands_.erase(demand);
    } else if (running.uses_buckets(bucket, 1)) {
      ++demand;  // one after the other, as scripts do it: they have one tag, and one place
    } else {
      return bucket;
    }
  }
  return std::nullopt;
}

}  // namespace collective
