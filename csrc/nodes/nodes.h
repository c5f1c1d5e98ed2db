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
#include "nodes/nodes_lane.h"

namespace collective {

struct Nodes {
  Comm local;                // the ranks of this node
  Comm cross;                // the owners of this rank's slice on all nodes; a rank that owns none is alone in it
  std::vector<int> leaders;  // by rank, the lowest rank of its node
  std::vector<std::vector<int>> ranks;   // of each node, in the order of `cross`
  int count = 0;                         // nodes
  int owners = 0;                        // on each node
  std::shared_ptr<SharedMemory> memory;  // of this node; what may still be written to it holds it, too
  std::unique_ptr<NodesLane> lane;       // in it, for operations by name

  bool owns() const { return local.rank() < owners; }
};

// Collective over `comm`, of which this is the topology. job: as for Comm::duplicate(). tag: of messages on a node,
// meanwhile. more: the bytes needed behind the lane, given the number of the node's ranks. Returns nothing where every
// machine has a single rank, or no machine's ranks can share memory; a warning names a machine whose ranks cannot.
std::optional<Nodes> find_nodes(MPI_Comm comm, const Topology& topology, const Comm* job, int tag,
                                std::chrono::seconds timeout, const std::function<size_t(int)>& more);

}  // namespace collective
