#include "base/rank_names.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace collective {
namespace {

// "0-4, 7"; ranks: increasing.
std::string numbers_text(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    if (i > 0) text += ", ";
    text += std::to_string(ranks[i]);
    if (end - i > 1) text += (end - i > 2 ? "-" : ", ") + std::to_string(ranks[end - 1]);
    i = end;
  }
  return text;
}

constexpr size_t kHostsInText = 4;

std::vector<std::string>& hosts() {
  static std::vector<std::string> of_ranks;  // empty: all ranks are on one
  return of_ranks;
}

// " (node1, node2)"
std::string hosts_text(const std::vector<int>& ranks) {
  std::vector<std::string> named;
  for (const int rank : ranks) {
    if (static_cast<size_t>(rank) >= hosts().size()) return "";
    const std::string& host = hosts()[static_cast<size_t>(rank)];
    if (std::find(named.begin(), named.end(), host) == named.end()) named.push_back(host);
  }
  std::string text;
  for (size_t i = 0; i < std::min(named.size(), kHostsInText); ++i) text += (i == 0 ? " (" : ", ") + named[i];
  if (named.size() > kHostsInText) text += " and " + std::to_string(named.size() - kHostsInText) + " more hosts";
  return text.empty() ? text : text + ")";
}

}  // namespace

void set_hosts(std::vector<std::string> of_ranks) {
  const bool one = std::equal(of_ranks.begin() + (of_ranks.empty() ? 0 : 1), of_ranks.end(), of_ranks.begin());
  hosts() = one ? std::vector<std::string>() : std::move(of_ranks);
}

std::string host_of(int job_rank) { return hosts().empty() ? "" : hosts().at(static_cast<size_t>(job_rank)); }

std::string ranks_text(const std::vector<int>& ranks) {
  return (ranks.size() == 1 ? "rank " : "ranks ") + numbers_text(ranks);
}

RankNames RankNames::of_job(int size) {
  RankNames names;
  names.job_ranks_.resize(static_cast<size_t>(size));
  std::iota(names.job_ranks_.begin(), names.job_ranks_.end(), 0);
  return names;
}

RankNames RankNames::of_process_set(std::vector<int> job_ranks) {
  RankNames names;
  names.label_ = "process set [" + numbers_text(job_ranks) + "]: ";
  names.job_ranks_ = std::move(job_ranks);
  return names;
}

std::vector<int> RankNames::in_job(const std::vector<int>& ranks) const {
  std::vector<int> numbers;
  for (const int rank : ranks) numbers.push_back(job_rank(rank));
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

std::string RankNames::text_of(const std::vector<int>& ranks) const { return ranks_text(in_job(ranks)); }

std::string RankNames::located(const std::vector<int>& ranks) const {
  const std::vector<int> numbers = in_job(ranks);
  return ranks_text(numbers) + hosts_text(numbers);
}

}  // namespace collective
