// What the ranks of a group are called in messages to the user: their ranks in the job, whatever they are in the group.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace collective {

// "rank 3", "ranks 0-4, 7"; ranks: increasing.
std::string ranks_text(const std::vector<int>& ranks);

// The hosts of all ranks of the job, for RankNames::located(). Not while an engine runs.
void set_hosts(std::vector<std::string> hosts);

// Of a rank of the job; "": all are on one.
std::string host_of(int job_rank);

class RankNames {
 public:
  RankNames() = default;
  // For the group of all ranks.
  static RankNames of_job(int size);
  // For a process set: job_ranks[i] is the job's number for its rank i.
  static RankNames of_process_set(std::vector<int> job_ranks);

  int job_rank(int rank) const { return job_ranks_[static_cast<size_t>(rank)]; }
  const std::vector<int>& job_ranks() const { return job_ranks_; }
  // "rank 3", "ranks 0-4, 7" for these ranks of the group.
  std::string text_of(const std::vector<int>& ranks) const;
  std::string text_of(int rank) const { return "rank " + std::to_string(job_rank(rank)); }
  // The same of ranks that somebody will have to look for: in a job on several hosts "ranks 2, 3 (node1)".
  std::string located(const std::vector<int>& ranks) const;
  // "process set [1, 2]: ", which precedes messages about it; "" for the group of all ranks.
  const std::string& label() const { return label_; }
  void set_label(std::string label) { label_ = std::move(label); }

 private:
  std::vector<int> in_job(const std::vector<int>& ranks) const;

  std::vector<int> job_ranks_;
  std::string label_;
};

}  // namespace collective
