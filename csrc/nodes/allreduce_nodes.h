// All-reduce by name of ranks of several nodes, several of them on each, and reduce-scatter: piece by piece through areas in the memory of
// every node (nodes_lane.h). nodes_pass.h tells how a piece is reduced. Several pieces are in flight, of which one packs
// and some cross the network, so that packing, the network and unpacking overlap.
//
// Where an element lies follows from its own tensor (arrangement.h), with a chunk for each node. A piece takes an equal
// part of every chunk, so that all nodes have work:
//
//      [ short tensors | x0 y0 z0       | x1 y1 z1       | x2 y2 z2       ]      3 nodes, after arrangement.h
//        piece 0         1    2    3      1    2    3      1    2    3
//
// In a reduce-scatter a node's chunk is what its ranks are to get, one after the other.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "messages/arrangement.h"
#include "node/slots.h"
#include "nodes/nodes.h"
#include "nodes/nodes_pass.h"

namespace collective {

class AllreduceNodes final : public Operation {
 public:
  // size: ranks of the group. Not for Adasum. Operations of one group are made in the same order on all ranks.
  // digest: of what the operation is, where nothing is agreed on before it runs: different ones do not meet.
  AllreduceNodes(Nodes& nodes, int size, BufferPool& pool, const AllreduceSpec& spec, std::vector<Slot> slots,
                 uint64_t digest);

  // A reduce-scatter: offsets, p+1 of them, are those of the ranks' parts in `in`, in elements; out: this rank's part.
  // rank: this one's in the group.
  static std::unique_ptr<AllreduceNodes> reduce_scatter(Nodes& nodes, int rank, BufferPool& pool,
                                                        const AllreduceSpec& spec, const std::vector<size_t>& offsets,
                                                        const void* in, void* out, uint64_t digest);

  Step step() override;
  std::string describe() const override;

 private:
  AllreduceNodes(Nodes& nodes, int size, BufferPool& pool, const AllreduceSpec& spec, Arrangement made, uint64_t digest,
                 bool scatters = false);
  void cut(const Arrangement& made, bool scatters);

  struct Piece {
    uint64_t turn;
    std::unique_ptr<NodesPass> run;
  };
  Nodes* nodes_;
  std::shared_ptr<SharedMemory> memory_;  // into which messages may still come when it has been given up
  BufferPool* pool_;
  Scaling scaling_;
  Slots slots_;
  size_t element_size_;
  uint64_t digest_;
  std::vector<NodesPass::Load> loads_;  // of all pieces
  uint64_t first_;                      // turn
  size_t started_ = 0;                  // pieces
  std::deque<Piece> in_flight_;
};

}  // namespace collective
