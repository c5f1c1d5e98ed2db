#include "engine/coordinator.h"

#include <algorithm>
#include <set>

#include "base/log.h"
#include "base/stalled.h"

namespace collective {
namespace {

constexpr auto kCheckEvery = std::chrono::milliseconds(100);
constexpr size_t kNamesInWarning = 6;
// How long before a warning the ranks that are late are asked what they do, and how many of them.
constexpr auto kAskAhead = std::chrono::milliseconds(700);
constexpr size_t kRanksToAsk = 8;
constexpr auto kLately = std::chrono::seconds(3);

}  // namespace

Coordinator::Coordinator(const RankNames& names, const Limits& limits, uint32_t most_buckets)
    : ranks_(names),
      limits_(limits),
      most_buckets_(most_buckets),
      ledger_(names),
      left_(names.job_ranks().size()),
      joined_(names.job_ranks().size()) {}

void Coordinator::take(int source, const std::string& words) {
  Reader r(words);
  while (!r.empty()) {
    switch (r.get<Word>()) {
      case Word::kId: {
        // A copy: arrive() may complete the name, and completing may add an id.
        const NameTable::Entry known = names_.at(r.get<uint32_t>());
        arrive(source, known.name, known.encoded, 0, true);
        break;
      }
      case Word::kFull: {
        const std::string name = r.get_text();
        const std::string encoded = r.get_text();
        const auto rows = r.get<int64_t>();
        arrive(source, name, encoded, rows, r.get<bool>());
        break;
      }
      case Word::kJoin: take_joined(source); break;
      case Word::kLetGo: take_let_go(r.get<uint32_t>()); break;
      case Word::kStop: {
        const auto code = r.get<ErrorCode>();
        write_stopped(decisions_, source, code, r.get_text());
        break;
      }
      case Word::kWaits: ledger_.take(source, r.get_text()); break;
      case Word::kAsk: asked_ = true; break;
      case Word::kLeave: take_left(source, r.get_list<uint32_t>()); break;
    }
  }
}

void Coordinator::arrive(int source, const std::string& name, const std::string& encoded, int64_t rows,
                         bool recurring) {
  const auto operation = [&] { return std::string(name_of(Descriptor::decode(encoded).kind)) + " '" + name + "'"; };
  if (left_count_ > 0) {
    std::vector<int> gone;
    for (int rank = 0; rank < size(); ++rank)
      if (left_[static_cast<size_t>(rank)]) gone.push_back(rank);
    fail(name, {source}, ErrorCode::kShutdown, operation() + ": " + ranks_.text_of(gone) + " had already shut down");
    return;
  }
  if (const auto expired = expired_.find(name); expired != expired_.end()) {
    auto& missed = expired->second;
    if (missed[static_cast<size_t>(source)] > 0) {
      --missed[static_cast<size_t>(source)];
      if (std::all_of(missed.begin(), missed.end(), [](uint32_t calls) { return calls == 0; })) expired_.erase(expired);
      fail(name, {source}, ErrorCode::kTimeout,
           operation() + ": " + ranks_.text_of(source) + " submitted it too late, the other ranks gave up after " +
               seconds_text(limits_.timeout));
      return;
    }
  }
  const size_t ranks = ranks_.job_ranks().size();
  Pending& pending = pending_[name];
  if (pending.here.empty()) {
    pending.here.resize(ranks);
    pending.rows.resize(ranks);
    pending.missing = size();
    pending.since = pending.warned = Clock::now();
  }
  pending.here[static_cast<size_t>(source)] = 1;
  pending.rows[static_cast<size_t>(source)] = rows;
  pending.recurring = recurring;
  auto variant = std::find_if(pending.variants.begin(), pending.variants.end(),
                              [&](const Variant& v) { return v.encoded == encoded; });
  if (variant == pending.variants.end()) variant = pending.variants.insert(variant, {encoded, {}});
  variant->ranks.push_back(source);
  --pending.missing;
  if (!complete_but_for_joined(pending)) return;
  complete(name, pending);
  pending_.erase(name);
}

bool Coordinator::complete_but_for_joined(const Pending& pending) const {
  int missing = pending.missing;
  if (joined_count_ > 0)
    for (size_t rank = 0; rank < joined_.size(); ++rank) missing -= joined_[rank] && !pending.here[rank] ? 1 : 0;
  return missing == 0;
}

void Coordinator::take_joined(int source) {
  joined_[static_cast<size_t>(source)] = 1;
  ++joined_count_;
  const bool all = joined_count_ == size();
  if (!all) {
    // Told before what it completes, so that all ranks know which of them take part without having submitted.
    decisions_.put(Decision::Kind::kJoined);
    decisions_.put(source);
  }
  for (auto it = pending_.begin(); it != pending_.end();) {
    if (!complete_but_for_joined(it->second)) {
      ++it;
      continue;
    }
    complete(it->first, it->second);
    it = pending_.erase(it);
  }
  if (!all) return;
  decide_ready();  // with the joined ranks still counting as such
  std::fill(joined_.begin(), joined_.end(), 0);
  joined_count_ = 0;
  decisions_.put(Decision::Kind::kAllJoined);
  decisions_.put(source);
}

void Coordinator::complete(const std::string& name, Pending& pending) {
  for (const Variant& variant : pending.variants) {
    if (Reader(variant.encoded).get<Kind>() != Kind::kRefusal) continue;
    fail(name, present(pending), ErrorCode::kMismatch, "'" + name + "': " + Descriptor::decode(variant.encoded).layout);
    return;
  }
  if (pending.variants.size() > 1) {
    for (Variant& variant : pending.variants) std::sort(variant.ranks.begin(), variant.ranks.end());
    std::sort(pending.variants.begin(), pending.variants.end(),
              [](const Variant& a, const Variant& b) { return a.ranks < b.ranks; });
    const auto first = Descriptor::decode(pending.variants[0].encoded);
    fail(name, present(pending), ErrorCode::kMismatch,
         std::string(name_of(first.kind)) + " '" + name + "': " + describe_difference(pending.variants, ranks_));
    return;
  }
  const auto d = Descriptor::decode(pending.variants[0].encoded);
  const bool rooted =
      d.kind == Kind::kBroadcast || d.kind == Kind::kGather || d.kind == Kind::kScatter || d.kind == Kind::kReduce;
  if (rooted && !pending.here[static_cast<size_t>(d.root)]) {
    fail(name, present(pending), ErrorCode::kMismatch,
         std::string(name_of(d.kind)) + " '" + name + "': its root, " + ranks_.text_of(d.root) + ", has joined");
    return;
  }
  uint32_t bucket = 0, buckets = 0;
  if (d.kind == Kind::kBuckets && d.buckets.size() > 0) {
    bucket = room_for(static_cast<uint32_t>(d.buckets.size()));
    buckets = static_cast<uint32_t>(d.buckets.size());
    if (bucket + buckets > most_buckets_) {
      fail(name, present(pending), ErrorCode::kInvalid,
           std::string(name_of(d.kind)) + " '" + name + "': no room for " + std::to_string(buckets) +
               " more: a process set has " + std::to_string(most_buckets_) +
               " at a time. Raise COLLECTIVE_FUSION_THRESHOLD, or let go of optimizers that are not needed any more");
      return;
    }
    opened_.emplace(bucket, Opened{buckets, 0});
  }
  ready_.push_back(
      {name, std::move(pending.variants[0].encoded), std::move(pending.rows), pending.recurring, bucket, buckets});
}

// The first number of a gap that is large enough.
uint32_t Coordinator::room_for(uint32_t count) const {
  uint32_t first = 0;
  for (const auto& [used, opened] : opened_) {
    if (used - first >= count) break;
    first = used + opened.count;
  }
  return first;
}

void Coordinator::take_let_go(uint32_t bucket) {
  Opened& opened = opened_.at(bucket);
  if (++opened.let_go < size()) return;
  opened_.erase(bucket);
  decisions_.put(Decision::Kind::kReleased);
  decisions_.put(bucket);
}

void Coordinator::take_left(int source, const std::vector<uint32_t>& started) {
  for (auto& [name, pending] : pending_) {
    const auto kind = Descriptor::decode(pending.variants[0].encoded).kind;
    fail(name, present(pending), ErrorCode::kShutdown,
         std::string(name_of(kind)) + " '" + name + "': " + ranks_.text_of(source) +
             " has shut down (its script ended, or it called shutdown()) before it took part");
  }
  pending_.clear();
  left_[static_cast<size_t>(source)] = 1;
  ++left_count_;
  decisions_.put(Decision::Kind::kLeft);
  decisions_.put(source);
  decisions_.put_list(started);
  if (left_count_ == size()) decisions_.put(Decision::Kind::kAllLeft);
}

void Coordinator::fail(const std::string& name, const std::vector<int>& targets, ErrorCode code,
                       const std::string& text) {
  decisions_.put(Decision::Kind::kFail);
  decisions_.put_text(name);
  decisions_.put_list(targets);
  decisions_.put(code);
  decisions_.put_text(ranks_.label() + text);
}

void Coordinator::decide_ready() {
  if (ready_.empty()) return;
  struct Fused {
    std::string_view key;
    size_t nbytes;
    std::vector<Ready*> members;
  };
  std::vector<Fused> all;
  for (Ready& ready : ready_) {
    const Descriptor d = Descriptor::decode(ready.encoded);
    const size_t nbytes = d.kind == Kind::kAllreduce ? d.count() * size_of(d.wire) : 0;
    // Adasum looks at each tensor as a whole.
    const bool fusable = d.kind == Kind::kAllreduce && nbytes < limits_.fusion_threshold && d.op != ReduceOp::kAdasum;
    const std::string_view key = fusable ? fusion_key(ready.encoded) : std::string_view();
    const auto open = std::find_if(all.begin(), all.end(), [&](const Fused& fused) {
      return fusable && fused.key == key && fused.nbytes + nbytes <= limits_.fusion_threshold;
    });
    if (open == all.end()) {
      all.push_back({key, nbytes, {&ready}});
    } else {
      open->nbytes += nbytes;
      open->members.push_back(&ready);
    }
  }
  for (const Fused& fused : all) write_execution(fused.members);
  ready_.clear();
}

void Coordinator::write_execution(const std::vector<Ready*>& fused) {
  decisions_.put(Decision::Kind::kExecute);
  const Descriptor first = Descriptor::decode(fused[0]->encoded);
  const Kind kind = first.kind;
  decisions_.put(fused[0]->bucket);
  decisions_.put(fused[0]->buckets);
  decisions_.put(static_cast<uint32_t>(fused.size()));
  // The other ranks give ids to names in the order of the decisions, in Agreement::take_decisions().
  for (const Ready* ready : fused) {
    const uint32_t* const id = names_.find(ready->name, ready->encoded);
    if (joined_count_ > 0) {
      decisions_.put(NameForm::kWithDescriptor);
      decisions_.put_text(ready->name);
      decisions_.put_text(ready->encoded);
    } else if (id != nullptr) {
      decisions_.put(NameForm::kId);
      decisions_.put(*id);
    } else {
      decisions_.put(ready->recurring ? NameForm::kNewId : NameForm::kPlain);
      decisions_.put_text(ready->name);
      if (ready->recurring) names_.add(ready->name, ready->encoded);
    }
    decisions_.put_list(rows_differ(kind) ? ready->rows : std::vector<int64_t>());
  }
}

std::vector<int> Coordinator::absent(const Pending& pending) const {
  std::vector<int> ranks;
  for (int rank = 0; rank < size(); ++rank)
    if (!pending.here[static_cast<size_t>(rank)] && !joined_[static_cast<size_t>(rank)]) ranks.push_back(rank);
  return ranks;
}

std::vector<int> Coordinator::present(const Pending& pending) const {
  std::vector<int> ranks;
  for (int rank = 0; rank < size(); ++rank)
    if (pending.here[static_cast<size_t>(rank)]) ranks.push_back(rank);
  return ranks;
}

void Coordinator::check_stalls(Clock::time_point now) {
  next_check_ = now + kCheckEvery;
  want(now);
  for (auto it = pending_.begin(); it != pending_.end();) {
    const auto& [name, pending] = *it;
    if (now - pending.since < limits_.timeout) {
      ++it;
      continue;
    }
    const std::vector<int> late = absent(pending);
    fail(name, present(pending), ErrorCode::kTimeout,
         what(name, pending) + ": " + ranks_.located(late) + " did not submit it within " +
             seconds_text(limits_.timeout) + doing_of(late, now));
    auto& missed = expired_[name];
    missed.resize(static_cast<size_t>(size()));
    for (const int rank : late) ++missed[static_cast<size_t>(rank)];
    it = pending_.erase(it);
  }
  warn_of_stalls(now);
}

std::string Coordinator::what(const std::string& name, const Pending& pending) {
  return std::string(name_of(Descriptor::decode(pending.variants[0].encoded).kind)) + " '" + name + "'";
}

// Notes who is late soon before that is told, so that what they do can be told, too.
void Coordinator::want(Clock::time_point now) {
  const auto ahead = std::min<std::chrono::duration<double>>(kAskAhead, limits_.stall_warning / 2);
  for (auto& [name, pending] : pending_) {
    const auto warning = std::max(pending.since + limits_.stall_warning,
                                  pending.warned + (pending.warned - pending.since) + limits_.stall_warning);
    if (pending.asked || (now + ahead < warning && now + ahead < pending.since + limits_.timeout)) continue;
    pending.asked = true;
    for (const int rank : absent(pending)) {
      if (wanted_.size() == kRanksToAsk) break;
      if (std::find(wanted_.begin(), wanted_.end(), rank) == wanted_.end()) wanted_.push_back(rank);
    }
  }
}

// "\n  rank 1: its script is at ..." for those that have told lately.
std::string Coordinator::doing_of(const std::vector<int>& ranks, Clock::time_point now) const {
  std::string text;
  for (const int rank : ranks)
    if (const auto told = doing_.find(rank);
        told != doing_.end() && now - told->second.at < kLately && !told->second.text.empty())
      text += "\n  " + ranks_.text_of(rank) + ": " + told->second.text;
  return text;
}

void Coordinator::warn_of_stalls(Clock::time_point now) {
  // At 1, 2, 4, ... times the interval.
  const auto is_due = [&](const Pending& pending, Clock::time_point at) {
    return at - pending.since >= limits_.stall_warning &&
           at - pending.warned >= (pending.warned - pending.since) + limits_.stall_warning;
  };
  if (std::none_of(pending_.begin(), pending_.end(), [&](const auto& entry) { return is_due(entry.second, now); }))
    return;
  // Those that are due at the next look are told now: what was submitted together is told together.
  std::vector<std::string> stalled;
  std::set<int> missing;
  for (auto& [name, pending] : pending_) {
    if (!is_due(pending, now + kCheckEvery)) continue;
    pending.warned = now;
    pending.asked = false;
    const std::vector<int> late = absent(pending);
    missing.insert(late.begin(), late.end());
    stalled.push_back("  " + what(name, pending) + ": submitted by " + ranks_.text_of(present(pending)) +
                      ", waits for " + ranks_.located(late) + " since " + seconds_text(now - pending.since));
  }
  std::string text = ranks_.label() + "stalled: some ranks have not submitted what others wait for\n";
  std::sort(stalled.begin(), stalled.end());
  for (size_t i = 0; i < std::min(stalled.size(), kNamesInWarning); ++i) text += stalled[i] + "\n";
  if (stalled.size() > kNamesInWarning) text += "  and " + std::to_string(stalled.size() - kNamesInWarning) + " more\n";
  text.pop_back();  // the last line's end
  text += doing_of({missing.begin(), missing.end()}, now) + "\n";
  log_stalled(text);
}

std::string Coordinator::decide(Clock::time_point now) {
  if (now >= next_check_) check_stalls(now);
  decide_ready();
  if (std::exchange(asked_, false)) {
    decisions_.put(Decision::Kind::kLedger);
    decisions_.put_text(ledger_.page().encode());
  }
  return decisions_.empty() ? std::string() : decisions_.take();
}

std::string Coordinator::describe() const {
  std::string text;
  const auto now = Clock::now();
  for (const auto& [name, pending] : pending_)
    text += "  " + what(name, pending) + ": waits for " + ranks_.located(absent(pending)) + " since " +
            seconds_text(now - pending.since) + "\n";
  return text;
}

}  // namespace collective
