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

// Communicators of the ranks on this rank's node, and of the ranks on all nodes that have its local rank (null beyond the
// `owners` ranks that every node has; `most`: that one has). Collective over `comm`.
struct NodeComms {
  MPI_Comm local, cross;
  int owners, most;
};
NodeComms split_by_node(MPI_Comm comm, const Topology& topology);
void free_node_comms(NodeComms& comms);

// Whether `flag` is set on all ranks; collective over `comm`.
bool on_all_ranks(MPI_Comm comm, bool flag);

}  // namespace collective
