#include "engine/order.h"

#include <utility>

namespace collective {
namespace {

// FNV-1a (draft-eastlake-fnv): alike on all ranks, which std::hash need not be.
uint64_t digest_of(std::string_view bytes) {
  uint64_t digest = 0xcbf29ce484222325;
  for (const char byte : bytes) digest = (digest ^ static_cast<unsigned char>(byte)) * 0x100000001b3;
  return digest;
}

}  // namespace

std::string Order::Entry::what() const {
  return std::string(name_of(submission.named.descriptor.kind)) + " '" + ticket->name + "'";
}

void Order::add(std::shared_ptr<Ticket> ticket, OrderedSubmission submission) {
  std::string encoded = submission.named.descriptor.encode();
  const uint64_t digest = digest_of(encoded);
  last_.push_back(encoded);
  if (last_.size() > kRemembered) last_.pop_front();
  waiting_.push_back({std::move(ticket), std::move(submission), ++submitted_, digest, std::move(encoded)});
}

std::optional<Order::Entry> Order::take(const RankNames& names) {
  if (waiting_.empty()) return std::nullopt;
  Entry& first = waiting_.front();
  const auto& mark = first.submission.named.mark;
  if (mark != nullptr && !mark->reached()) return std::nullopt;
  if (roll_) {
    if (!shown_) roll_->show(first.digest, first.submission.named.rows, first.encoded);
    shown_ = true;
    if (!roll_->all_shown()) return std::nullopt;
    shown_ = false;
    if (!roll_->all_alike()) {
      std::vector<Variant> variants;
      const std::vector<std::string> descriptions = roll_->descriptions();
      for (size_t i = 0; i < descriptions.size(); ++i) variants.push_back({descriptions[i], {ranks_[i]}});
      first.difference = describe_difference(variants, names);
    } else if (first.submission.rows.empty() && rows_differ(first.submission.named.descriptor.kind) &&
               ranks_.size() == names.job_ranks().size()) {  // all are on this node
      first.submission.rows = roll_->rows();
    }
  }
  Entry entry = std::move(first);
  waiting_.pop_front();
  return entry;
}

std::deque<Order::Entry> Order::take_from(uint64_t turn) {
  std::deque<Entry> entries;
  while (!waiting_.empty() && waiting_.back().turn >= turn) {
    entries.push_front(std::move(waiting_.back()));
    waiting_.pop_back();
  }
  refused_ += entries.size();
  return entries;
}

std::string Order::state() const {
  if (waiting_.empty()) return "";
  const auto& mark = waiting_.front().submission.named.mark;
  if (mark != nullptr && !mark->reached())
    return "waits for what its user has queued on device " + std::to_string(mark->device().number());
  if (!shown_) return "has not been looked at";
  return "waits for rank " + std::to_string(roll_->missing()) + " to come to it";
}

std::string Order::described(uint64_t turn) const {
  const uint64_t first = submitted_ - last_.size() + 1;
  return turn < first || turn > submitted_ ? "" : last_[turn - first];
}

}  // namespace collective
