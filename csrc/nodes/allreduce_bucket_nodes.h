// All-reduce of a bucket by ranks of several nodes, several of them on each. The bucket lies in the shared memory of each
// node, as in allreduce_bucket_node.h, and is one area of its own: see nodes_pass.h, which has steps, bytes and limits.
#pragma once

#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "node/slots.h"
#include "nodes/nodes.h"
#include "nodes/nodes_pass.h"

namespace collective {

class AllreduceBucketNodes final : public Operation {
 public:
  // size: ranks of the group. tag: this bucket's alone. Slots as for AllreduceBucketNode.
  AllreduceBucketNodes(NodeBucket& bucket, const Nodes& nodes, int size, BufferPool& pool, int tag,
                       const AllreduceSpec& spec, std::vector<Slot> slots);

  Step step() override { return run_.step(); }
  std::string describe() const override { return run_.describe(); }

 private:
  Slots slots_;
  NodesPass run_;
};

}  // namespace collective
