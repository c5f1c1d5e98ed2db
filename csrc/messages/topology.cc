#include "messages/topology.h"

#include <map>
#include <vector>

#include "messages/mpi_call.h"

namespace collective {

Topology find_topology(MPI_Comm comm) {
  Topology t{};
  check(MPI_Comm_rank(comm, &t.rank), "MPI_Comm_rank");
  check(MPI_Comm_size(comm, &t.size), "MPI_Comm_size");
  MPI_Comm local = MPI_COMM_NULL;
  check(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, t.rank, MPI_INFO_NULL, &local), "MPI_Comm_split_type");
  check(MPI_Comm_rank(local, &t.local_rank), "MPI_Comm_rank");
  check(MPI_Comm_size(local, &t.local_size), "MPI_Comm_size");
  int leader = t.rank;  // a node is named by its lowest rank
  check(MPI_Bcast(&leader, 1, MPI_INT, 0, local), "MPI_Bcast");
  check(MPI_Comm_free(&local), "MPI_Comm_free");

  struct Place {
    int leader, local_rank;
  };
  const Place mine{leader, t.local_rank};
  std::vector<Place> places(static_cast<size_t>(t.size));
  check(MPI_Allgather(&mine, 2, MPI_INT, places.data(), 2, MPI_INT, comm), "MPI_Allgather");
  std::map<int, int> node_sizes;
  for (const Place& place : places) {
    ++node_sizes[place.leader];
    if (place.local_rank != t.local_rank) continue;
    ++t.cross_size;
    if (place.leader < leader) ++t.cross_rank;
  }
  t.homogeneous = true;
  for (const auto& [node, ranks] : node_sizes) t.homogeneous &= ranks == t.local_size;
  return t;
}

NodeComms split_by_node(MPI_Comm comm, const Topology& topology) {
  NodeComms comms{MPI_COMM_NULL, MPI_COMM_NULL, 0, 0};
  check(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, topology.rank, MPI_INFO_NULL, &comms.local),
        "MPI_Comm_split_type");
  check(MPI_Allreduce(&topology.local_size, &comms.owners, 1, MPI_INT, MPI_MIN, comm), "MPI_Allreduce");
  check(MPI_Allreduce(&topology.local_size, &comms.most, 1, MPI_INT, MPI_MAX, comm), "MPI_Allreduce");
  const int color = topology.local_rank < comms.owners ? topology.local_rank : MPI_UNDEFINED;
  check(MPI_Comm_split(comm, color, topology.rank, &comms.cross), "MPI_Comm_split");
  return comms;
}

void free_node_comms(NodeComms& comms) {
  for (MPI_Comm* comm : {&comms.local, &comms.cross})
    if (*comm != MPI_COMM_NULL) check(MPI_Comm_free(comm), "MPI_Comm_free");
}

bool on_all_ranks(MPI_Comm comm, bool flag) {
  int all = flag ? 1 : 0;
  check(MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, comm), "MPI_Allreduce");
  return all == 1;
}

}  // namespace collective
