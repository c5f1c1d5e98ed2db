// Where ranks are.
#pragma once

#include <mpi.h>

namespace collective {

// Where a rank stands: local_* among the ranks that share its memory, cross_* among the ranks of the same
// local_rank on all nodes (Horovod's words).
struct Topology {
  int rank, size, local_rank, local_size, cross_rank, cross_size;
  bool homogeneous;  // every node has the same number of ranks
};

// Collective over `comm`.
Topology find_topology(MPI_Comm comm);

// Whether `flag` is set on all ranks; collective over `comm`.
bool on_all_ranks(MPI_Comm comm, bool flag);

}  // namespace collective
