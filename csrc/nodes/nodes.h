// How the ranks of a group are spread over nodes, and what those of each node share.
//
// A node is a set of ranks that do share memory: where MPI says that ranks are on one machine and they cannot map each
// other's memory, each of them is a node of its own, which takes part by messages. On every node the first L ranks are
// owners, where L is how many ranks the smallest node has: each node's owner number i reduces slice i of everything, and
// exchanges it with the owners number i of the other nodes, so that all owners of a node drive the network together.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "messages/comm.h"
#include "messages/topology.h"
#include "node/shared_memory.h"
#include "nodes/places.h"

namespace collective {

struct Nodes {
  Comm local;  // the ranks of this node
  Comm
      cross;  // the owners number local.rank() of all nodes, in the order of the nodes; of other ranks, themselves alone
  int count;                             // nodes
  int owners;                            // on each node
  std::unique_ptr<SharedMemory> memory;  // of this node
  std::unique_ptr<Places> places;        // in it, for operations by name

  bool owns() const { return local.rank() < owners; }
};

// Collective over `comm`, of which this is the topology. job: as for Comm::duplicate(). tag: of messages on a node,
// meanwhile. more: bytes that it shall have behind the places, for this many ranks. leaders: gets the lowest rank of each rank's node. Nothing where every node has a single rank, so that no
// memory is shared.
std::optional<Nodes> find_nodes(MPI_Comm comm, const Topology& topology, const Comm* job, int tag,
                                std::chrono::seconds timeout, const std::function<size_t(int)>& more,
                                std::vector<int>& leaders);

}  // namespace collective
