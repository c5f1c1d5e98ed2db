// MPI point-to-point, as little of it as the algorithms need. Only comm.cc calls MPI.
#pragma once

#include <mpi.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

namespace collective {

// One non-blocking transfer. Its memory must outlive it. Move-only; inactive when default-constructed or done.
class Request {
 public:
  Request() = default;
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;
  Request(Request&& other) noexcept;
  Request& operator=(Request&& other) noexcept;
  ~Request();

  // Makes progress; true once the transfer is complete (always true when inactive).
  bool done();

 private:
  friend class Comm;
  // An active transfer is given up only when the engine fails: a receive is cancelled, so that MPI does not
  // write into memory that is about to be freed; a send is left to MPI.
  void abandon() noexcept;

  MPI_Request request_ = MPI_REQUEST_NULL;
  bool receives_ = false;
};

struct Message {
  int source;
  std::string bytes;
};

// A private duplicate of the caller's communicator, so that our messages never meet the user's.
class Comm {
 public:
  Comm() = default;
  // Collective over `parent`. job: the communicator of all ranks, whose numbers people know; null where it is this one.
  static Comm duplicate(MPI_Comm parent, const Comm* job = nullptr);
  Comm(const Comm&) = delete;
  Comm& operator=(const Comm&) = delete;
  Comm(Comm&& other) noexcept;
  Comm& operator=(Comm&& other) noexcept;
  ~Comm();  // does not free: MPI_Comm_free is collective, so only an orderly shutdown may call release()

  // Collective. Call only when no transfer is active.
  void release();

  int rank() const { return rank_; }
  int size() const { return size_; }

  // What is told to people: ranks by their numbers in the job, and of which of its process sets ("" for all ranks).
  int job_rank(int rank) const { return job_ranks_[static_cast<size_t>(rank)]; }
  const std::vector<int>& job_ranks() const { return job_ranks_; }
  // "rank 3", "ranks 0-4, 7" for these ranks.
  std::string text_of(const std::vector<int>& ranks) const;
  std::string text_of(int rank) const { return "rank " + std::to_string(job_rank(rank)); }
  // "process set [1, 2]: "
  const std::string& label() const { return label_; }

  Request isend(const void* data, size_t nbytes, int peer, int tag) const;
  Request irecv(void* data, size_t nbytes, int peer, int tag) const;
  // A whole message of unknown length with this tag from any rank, if one has arrived.
  std::optional<Message> poll(int tag) const;

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  std::vector<int> job_ranks_;
  std::string label_;
};

// "rank 3", "ranks 0-4, 7"; ranks: increasing.
std::string ranks_text(const std::vector<int>& ranks);

// Where a rank stands: local_* among the ranks that share its memory, cross_* among the ranks of the same
// local_rank on all nodes (Horovod's words).
struct Topology {
  int rank, size, local_rank, local_size, cross_rank, cross_size;
  bool homogeneous;  // every node has the same number of ranks
};

// Collective over `comm`.
Topology find_topology(MPI_Comm comm);

// Returns when every rank of `comm` has called it: what is collective and blocks may come then. Warns of who is missing,
// and throws kTimeout. The ranks that wait long tell each other by empty messages of the greatest tag; else there are
// none of tags that the owner of `comm` could meet.
void meet(MPI_Comm comm, std::chrono::duration<double> stall_warning, std::chrono::duration<double> timeout);

// Whether `flag` is set on all ranks; collective over `comm`.
bool on_all_ranks(MPI_Comm comm, bool flag);

// Throws kInvalid unless MPI is initialised, not finalised, and allows calls from several threads.
void require_mpi_threads();

// The MPI whose headers this file was compiled with ("Open MPI 5.0.11") and the one that runs
// (MPI_Get_library_version, callable before MPI_Init), and the file it was loaded from.
std::string built_for_mpi();
std::string running_mpi();
std::string running_mpi_path();

}  // namespace collective
