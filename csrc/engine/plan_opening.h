// How the ranks of a group come to the storages of a plan's buckets: all of them to the same kind.
#pragma once

#include <memory>

#include "engine/plans.h"

namespace collective {

struct PlanContext {
  const Comm& comm;
  BufferPool& pool;
  int tag;  // the first bucket's; the others' follow
  Descriptor descriptor;

  AllreduceSpec spec() const {
    return {descriptor.dtype, descriptor.wire, descriptor.op, descriptor.prescale, descriptor.postscale};
  }
};

// In memory of each rank: there is nothing to agree on.
void open_for_messages(const PlanContext& context, Plan& plan);

// In memory that the ranks of the node share: of the host, or of their devices where the plan is about these and all
// ranks can take part. device: this rank's, or null. nccl: what sums on these devices, or null.
std::unique_ptr<Operation> open_on_node(PlanContext context, std::shared_ptr<Plan> plan, Device* device,
                                        std::shared_ptr<NcclComm> nccl);

// In memory that the ranks of each node share, where those of all nodes can.
std::unique_ptr<Operation> open_on_nodes(PlanContext context, std::shared_ptr<Plan> plan, const Nodes& nodes);

// In memory of each rank's device, which MPI sends. device: this rank's, null where it cannot take part.
std::unique_ptr<Operation> open_on_devices(PlanContext context, std::shared_ptr<Plan> plan, Device* device);

}  // namespace collective
