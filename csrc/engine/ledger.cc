#include "engine/ledger.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace collective {
namespace {

constexpr auto kTellEvery = std::chrono::seconds(1);
constexpr uint64_t kAllUpTo = 1024;  // numbers of which each is recorded
constexpr size_t kMostNames = 64;    // of operations, by rank

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

// Of how many operations around this number one is recorded: a power of two.
uint64_t thinned(uint64_t number) { return uint64_t{1} << std::bit_width(number / kAllUpTo); }

// Mixed, so that not always the same operation of a step is recorded (the finalizer of SplitMix64).
bool is_recorded(uint64_t number) {
  const uint64_t every = thinned(number);
  if (every == 1) return true;
  uint64_t mixed = number + 0x9e3779b97f4a7c15;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
  return ((mixed ^ (mixed >> 31)) & (every - 1)) == 0;
}

}  // namespace

void WaitLog::note(Waiting waiting, Clock::time_point end, std::string_view name) {
  if (!waiting.is_own) waiting.begin = end;
  if (first_ == Clock::time_point{}) first_ = waiting.begin;
  const bool is_operation = waiting.series == Series::kOperations;
  if (is_operation) waiting.begin = std::max(waiting.begin, last_);
  const Clock::duration wait = std::max(end - waiting.begin, Clock::duration{});
  if (Series::is_whole(waiting.series)) {
    last_ = std::max(last_, end);
    totals_->add(wait);
  }
  if (!is_recorded(waiting.number)) return;
  records_.put(waiting.series);
  records_.put(waiting.number);
  records_.put(waiting.is_own ? static_cast<float>(seconds(wait)) : NAN);
  // Of operations, each rank that waits tells the name; of a bucket, it is told once.
  const bool tells = is_operation ? seconds(wait) >= Ledger::kNoticed : named_.insert(waiting.series).second;
  records_.put_text(tells ? name : std::string_view());
}

std::string WaitLog::take(Clock::time_point now) {
  next_ = now + kTellEvery;
  Writer all;
  all.put(seconds(last_ - first_));
  all.put_text(records_.take());
  return all.take();
}

void Ledger::take(int source, const std::string& records) {
  Reader head(records);
  elapsed_ = std::max(elapsed_, head.get<double>());
  const std::string body = head.get_text();
  const size_t size = ranks_.job_ranks().size();
  for (Reader r(body); !r.empty();) {
    OfSeries& series = series_[r.get<uint64_t>()];
    const auto number = r.get<uint64_t>();
    Open& open = series.open[number];
    if (open.waits.empty()) open.waits.resize(size);
    const auto wait = r.get<float>();
    if (std::isnan(wait)) open.counts = false;
    open.waits[static_cast<size_t>(source)] = wait;
    if (std::string name = r.get_text(); !name.empty()) {
      if (series.name.empty()) series.name = name;
      open.name = std::move(name);
    }
    if (++open.told < size) continue;
    if (open.counts) judge(series, number, open);
    series.open.erase(number);
  }
}

void Ledger::judge(OfSeries& series, uint64_t number, const Open& all) {
  const auto weight = static_cast<double>(thinned(number));
  series.ranks.resize(all.waits.size());
  series.count += weight;
  sorted_ = all.waits;
  const auto middle = sorted_.begin() + static_cast<std::ptrdiff_t>(sorted_.size() / 2);
  std::nth_element(sorted_.begin(), middle, sorted_.end());
  const auto last = std::min_element(all.waits.begin(), all.waits.end());
  const double lateness = static_cast<double>(*middle) - static_cast<double>(*last);
  const auto index = static_cast<size_t>(last - all.waits.begin());
  double borne_out = 0;
  for (const OfSeries::Late& one : series.latest)
    if (one.rank == index) borne_out = std::max(borne_out, one.lateness);
  series.latest[series.recorded++ % series.latest.size()] = {index, lateness};
  if (lateness < kNoticed) return;
  const double cost = lateness + (weight - 1) * std::min(lateness, borne_out);
  OfRank& rank = series.ranks[index];
  ++rank.seen;
  rank.last += weight;
  rank.cost += cost;
  if (all.name.empty()) return;
  if (rank.costs.size() < kMostNames || rank.costs.contains(all.name)) rank.costs[all.name] += cost;
}

LedgerPage Ledger::page() const {
  LedgerPage page{ranks_.label(), static_cast<int>(ranks_.job_ranks().size()), elapsed_, {}};
  for (const auto& [number, series] : series_) {
    LedgerPage::Part part{number, series.name, series.count, {}};
    for (size_t i = 0; i < series.ranks.size(); ++i) {
      const OfRank& rank = series.ranks[i];
      if (rank.last == 0) continue;
      const auto longest = std::max_element(rank.costs.begin(), rank.costs.end(),
                                            [](const auto& a, const auto& b) { return a.second < b.second; });
      part.entries.push_back({ranks_.job_rank(static_cast<int>(i)), rank.seen, rank.last, rank.cost,
                              longest == rank.costs.end() ? "" : longest->first});
    }
    page.parts.push_back(std::move(part));
  }
  std::sort(page.parts.begin(), page.parts.end(), [](const auto& a, const auto& b) { return a.series < b.series; });
  return page;
}

std::string LedgerPage::encode() const {
  Writer w;
  w.put_text(label);
  w.put(size);
  w.put(elapsed);
  for (const Part& part : parts) {
    w.put(part.series);
    w.put_text(part.name);
    w.put(part.count);
    w.put(static_cast<uint32_t>(part.entries.size()));
    for (const Entry& entry : part.entries) {
      w.put(entry.rank);
      w.put(entry.seen);
      w.put(entry.last);
      w.put(entry.cost);
      w.put_text(entry.longest);
    }
  }
  return w.take();
}

LedgerPage LedgerPage::decode(const std::string& bytes) {
  Reader r(bytes);
  LedgerPage page;
  page.label = r.get_text();
  page.size = r.get<int>();
  page.elapsed = r.get<double>();
  while (!r.empty()) {
    Part part{r.get<uint64_t>(), r.get_text(), r.get<double>(), {}};
    part.entries.resize(r.get<uint32_t>());
    for (Entry& entry : part.entries) {
      entry.rank = r.get<int>();
      entry.seen = r.get<uint64_t>();
      entry.last = r.get<double>();
      entry.cost = r.get<double>();
      entry.longest = r.get_text();
    }
    page.parts.push_back(std::move(part));
  }
  return page;
}

}  // namespace collective
