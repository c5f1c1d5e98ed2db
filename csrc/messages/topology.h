// Where ranks are.
#pragma once

#include <mpi.h>

#include <vector>

#include "messages/comm.h"

namespace collective {

// Where a rank stands: local_* among the ranks that share its memory, cross_* among the ranks of the same
// local_rank on all nodes (Horovod's words).
struct Topology {
  int rank, size, local_rank, local_size, cross_rank, cross_size;
  bool homogeneous;          // every node has the same number of ranks
  std::vector<int> leaders;  // the lowest rank on the machine of each rank
};

// Collective over `comm`.
Topology find_topology(MPI_Comm comm);

// The ranks on this rank's machine, in their order; and this rank alone. job: as for Comm::duplicate(). The first is
// collective over `comm`.
Comm ranks_of_machine(MPI_Comm comm, const Comm* job);
Comm only_itself(const Comm* job);
// The ranks that give the same color, in the order of their keys. Collective over `comm`.
Comm split(MPI_Comm comm, int color, int key, const Comm* job);
// What each rank gives, by rank. Collective over `comm`.
std::vector<int> of_all_ranks(MPI_Comm comm, int value);
// Whether `flag` is set on all ranks; collective over `comm`.
bool on_all_ranks(MPI_Comm comm, bool flag);

}  // namespace collective
