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

}  // namespace

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

std::string RankNames::text_of(const std::vector<int>& ranks) const {
  std::vector<int> numbers;
  for (const int rank : ranks) numbers.push_back(job_rank(rank));
  std::sort(numbers.begin(), numbers.end());
  return ranks_text(numbers);
}

}  // namespace collective
