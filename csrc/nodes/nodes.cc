#include "nodes/nodes.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "base/log.h"
#include "base/rank_names.h"
#include "node/shared_memory_creation.h"

namespace collective {
namespace {

std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace

std::optional<Nodes> find_nodes(MPI_Comm comm, const Topology& topology, const Comm* job, int tag,
                                std::chrono::seconds timeout, const std::function<size_t(int)>& more,
                                std::vector<int>& leaders) {
  Nodes nodes;
  nodes.local = ranks_of_machine(comm, job);
  std::string why;
  const auto share = [&] {
    return try_share_memory(nodes.local, tag, Places::nbytes() + more(nodes.local.size()), timeout, why);
  };
  std::optional<SharedMemory> memory = share();
  if (!memory) {
    if (nodes.local.rank() == 0)
      log_warning("the ranks of " + host_name() + " (" + ranks_text(nodes.local.names().job_ranks()) +
                  ") take part by MPI messages, which is slower: they cannot share memory: " + why);
    nodes.local.release();
    nodes.local = only_itself(job);
    memory = share();
    if (!memory) throw Error(ErrorCode::kInternal, why);
  }
  const std::vector<int> sizes = of_all_ranks(comm, nodes.local.size());
  leaders = topology.leaders;
  for (size_t rank = 0; rank < leaders.size(); ++rank)
    if (sizes[rank] == 1) leaders[rank] = static_cast<int>(rank);
  if (*std::max_element(sizes.begin(), sizes.end()) == 1) {
    nodes.local.release();
    return std::nullopt;
  }
  nodes.owners = *std::min_element(sizes.begin(), sizes.end());
  nodes.count = 0;
  for (size_t rank = 0; rank < leaders.size(); ++rank) nodes.count += leaders[rank] == static_cast<int>(rank) ? 1 : 0;
  // In the order of the nodes, whatever the order of the ranks.
  nodes.cross = split(comm, nodes.owns() ? nodes.local.rank() : nodes.owners + topology.rank,
                      leaders[static_cast<size_t>(topology.rank)], job);
  nodes.cross.set_crosses_network();
  nodes.memory = std::make_unique<SharedMemory>(std::move(*memory));
  nodes.places = std::make_unique<Places>(*nodes.memory, 0);
  return nodes;
}

}  // namespace collective
