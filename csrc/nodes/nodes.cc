#include "nodes/nodes.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <numeric>
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

void warn_that_it_cannot_share(const Comm& machine, const std::string& why) {
  static std::atomic<bool> told{false};  // one warning for all process sets: the reason is that of the machine
  if (!told.exchange(true) && machine.rank() == 0)
    log_warning(ranks_text(machine.names().job_ranks()) + " of " + host_name() +
                " take part by MPI messages, which is slower: they cannot share memory: " + why);
}

}  // namespace

std::optional<Nodes> find_nodes(MPI_Comm comm, const Topology& topology, const Comm* job, int tag,
                                std::chrono::seconds timeout, const std::function<size_t(int)>& more) {
  const std::vector<int> on_machine = of_all_ranks(comm, topology.local_size);
  if (*std::max_element(on_machine.begin(), on_machine.end()) == 1) return std::nullopt;
  Nodes nodes;
  nodes.local = ranks_of_machine(comm, job);
  std::optional<SharedMemory> memory;
  if (nodes.local.size() > 1) {
    std::string why;
    memory = try_share_memory(nodes.local, tag, NodesLane::nbytes() + more(nodes.local.size()), timeout, why);
    if (!memory) {
      warn_that_it_cannot_share(nodes.local, why);
      nodes.local.release();
      nodes.local = only_itself(job);
    }
  }
  const std::vector<int> sizes = of_all_ranks(comm, nodes.local.size());
  if (*std::max_element(sizes.begin(), sizes.end()) == 1) {
    nodes.local.release();
    return std::nullopt;
  }
  if (!memory) memory = SharedMemoryCreation::of_one_rank(nodes.local, NodesLane::nbytes() + more(1));
  nodes.leaders = topology.leaders;
  for (size_t rank = 0; rank < sizes.size(); ++rank)
    if (sizes[rank] == 1) nodes.leaders[rank] = static_cast<int>(rank);
  for (size_t rank = 0; rank < sizes.size(); ++rank) nodes.count += nodes.leaders[rank] == static_cast<int>(rank);
  nodes.owners = *std::min_element(sizes.begin(), sizes.end());
  // In the order of the machines, whatever the order of the ranks.
  const auto place_of = [&](int rank) { return std::pair(topology.leaders[static_cast<size_t>(rank)], rank); };
  std::vector<int> by_place(sizes.size());
  std::iota(by_place.begin(), by_place.end(), 0);
  std::sort(by_place.begin(), by_place.end(), [&](int a, int b) { return place_of(a) < place_of(b); });
  for (const int leader : by_place) {
    if (nodes.leaders[static_cast<size_t>(leader)] != leader) continue;
    nodes.ranks.emplace_back();
    for (int rank = 0; rank < topology.size; ++rank)
      if (nodes.leaders[static_cast<size_t>(rank)] == leader) nodes.ranks.back().push_back(rank);
  }
  int place = 0;
  for (int rank = 0; rank < topology.size; ++rank) place += place_of(rank) < place_of(topology.rank) ? 1 : 0;
  nodes.cross = split(comm, nodes.owns() ? nodes.local.rank() : nodes.owners + topology.rank, place, job);
  nodes.cross.set_crosses_network();
  nodes.memory = std::make_shared<SharedMemory>(std::move(*memory));
  nodes.lane = std::make_unique<NodesLane>(*nodes.memory, nodes.count, nodes.owners);
  return nodes;
}

}  // namespace collective
