// All-reduce of one tensor or of many fused into a bucket: pack, reduce, unpack.
//
// Tensors that share a bucket are gathered into it (cast to the wire's type and scaled on the way), reduced as one
// message, and scattered back (cast again). A tensor that goes alone in its own type is reduced where it lies.
//
// Which tensors share a bucket depends on which are ready together, and so on timing. The value of an element must not:
// it is summed in an order that follows from its own tensor alone (arrangement.h). A bucket with storage of its own has
// one layout for ever, and is treated as a single tensor.
//
// short:              fewer than 16 KiB in the wire's type, or Adasum. Long: everything else
// reductions:         short tensors by allreduce_doubling, if they are short together, else by allreduce_direct; then
//                     the long ones by the ring
// steps:              those of the reductions, one after the other
// bytes on the wire:  as in their headers: N floor(log2(p)) per rank each way by doubling, 2(p-1)/p N by the other two
// memory traffic:     a load and a store of each element to pack, and again to unpack, besides the reductions'; none
//                     where a tensor is reduced in place, or lies at its place in the storage already
// limits:             packing is complete before the first message is sent; 1 MiB of the bucket is packed a step
#pragma once

#include <memory>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "base/ranges.h"
#include "messages/comm.h"
#include "reduce/spec.h"

namespace collective {

class Allreduce final : public Operation {
 public:
  // With `storage` (at least the slots' total in the wire's type) the bucket lives there, else in a pooled buffer,
  // unless a single tensor can be reduced where it lies.
  Allreduce(const Comm& comm, BufferPool& pool, int tag, const AllreduceSpec& spec, std::vector<Slot> slots,
            void* storage = nullptr);

  Step step() override;
  std::string describe() const override;

 private:
  // Bytes that one step packs or unpacks: some 50 us of work, so that other operations stay responsive.
  static constexpr size_t kPieceBytes = size_t{1} << 20;

  enum class Phase { kPack, kReduce, kUnpack };
  // Walks all slots, calling `copy(slot, first element, count, bucket position)`; one piece per call; true at the end.
  template <typename Copy>
  bool walk(const Copy& copy);
  void start_reducing();
  bool next_reduction();

  const Comm* comm_;
  BufferPool* pool_;
  int tag_;
  AllreduceSpec spec_;
  Scaling scaling_;
  std::vector<Slot> slots_;    // in the bucket's order, where long tensors are in pieces
  size_t total_ = 0;           // elements
  size_t short_ = 0;           // of these, the leading ones, which are reduced as short tensors
  std::vector<Range> chunks_;  // of the ring, behind them; empty: no ring
  int reductions_ = 0;         // started
  std::byte* bucket_ = nullptr;
  PooledBuffer pooled_;
  const void* reduce_in_;

  Phase phase_ = Phase::kPack;
  size_t slot_ = 0, element_ = 0, position_ = 0;  // of the walk
  std::unique_ptr<Operation> reduction_;
};

}  // namespace collective
