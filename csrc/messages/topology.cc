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
    t.leaders.push_back(place.leader);
    if (place.local_rank != t.local_rank) continue;
    ++t.cross_size;
    if (place.leader < leader) ++t.cross_rank;
  }
  t.homogeneous = true;
  for (const auto& [node, ranks] : node_sizes) t.homogeneous &= ranks == t.local_size;
  return t;
}

namespace {

// A private communicator in place of one that was made for it.
Comm adopt(MPI_Comm made, const Comm* job) {
  Comm result = Comm::duplicate(made, job);
  check(MPI_Comm_free(&made), "MPI_Comm_free");
  return result;
}

}  // namespace

Comm ranks_of_machine(MPI_Comm comm, const Comm* job) {
  MPI_Comm local = MPI_COMM_NULL;
  check(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local), "MPI_Comm_split_type");
  return adopt(local, job);
}

Comm only_itself(const Comm* job) { return Comm::duplicate(MPI_COMM_SELF, job); }

Comm split(MPI_Comm comm, int color, int key, const Comm* job) {
  MPI_Comm part = MPI_COMM_NULL;
  check(MPI_Comm_split(comm, color, key, &part), "MPI_Comm_split");
  return adopt(part, job);
}

std::vector<int> of_all_ranks(MPI_Comm comm, int value) {
  int size = 0;
  check(MPI_Comm_size(comm, &size), "MPI_Comm_size");
  std::vector<int> values(static_cast<size_t>(size));
  check(MPI_Allgather(&value, 1, MPI_INT, values.data(), 1, MPI_INT, comm), "MPI_Allgather");
  return values;
}

bool on_all_ranks(MPI_Comm comm, bool flag) {
  int all = flag ? 1 : 0;
  check(MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, comm), "MPI_Allreduce");
  return all == 1;
}

}  // namespace collective
