#include "nodes/allreduce_bucket_nodes.h"

#include <utility>

#include "base/thresholds.h"
#include "node/slices.h"

namespace collective {
namespace {

NodesPass::Load load_of(const Slots& slots, DType wire, int nodes) {
  const Range all{0, slots.count()};
  NodesPass::Load load{{{all, 0}}, {}, false};
  if (all.count() * size_of(wire) < thresholds::kRing)
    load.chunks = {all};
  else
    for (int node = 0; node < nodes; ++node) load.chunks.push_back(slice_of(all, node, nodes, size_of(wire)));
  return load;
}

}  // namespace

AllreduceBucketNodes::AllreduceBucketNodes(NodeBucket& bucket, const Nodes& nodes, int size, BufferPool& pool, int tag,
                                           const AllreduceSpec& spec, std::vector<Slot> slots)
    : slots_(spec, scaling_of(spec, size, Passes::kSteps).before, std::move(slots)),
      run_(bucket, nodes, pool, tag, scaling_of(spec, size, Passes::kSteps).arithmetic, slots_,
           load_of(slots_, spec.wire, nodes.count)) {}

}  // namespace collective
