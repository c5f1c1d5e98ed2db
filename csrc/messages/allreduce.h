// All-reduce of one tensor or of many fused into a bucket: pack, reduce, unpack.
//
// Tensors that share a bucket are gathered into it (cast to the wire's type and scaled on the way), reduced as one
// message, and scattered back (cast again). A tensor that goes alone in its own type is reduced where it lies.
//
// Which tensors share a bucket depends on which are ready together, so on time. What an element is must not: its sum is
// made in an order that follows from its own tensor alone. Short tensors are added as allreduce_doubling does it, however
// many are sent together; long ones are cut into a chunk for every rank each, and the ring's chunks are those of all:
//
//      [ short tensors | x0 y0 z0 | x1 y1 z1 | x2 y2 z2 ]        p = 3; x0 = chunk 0 of the long tensor x
//
// A bucket with storage of its own has one layout for ever, and is cut as a whole.
#pragma once

#include <memory>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
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
  // Walks all slots, `copy(slot, first element, count, bucket position)`, a piece per call; true at the end.
  template <typename Copy>
  bool walk(const Copy& copy);
  void arrange(std::vector<Slot> slots);
  bool is_short(size_t count) const;
  void start_reducing();
  bool next_reduction();

  const Comm* comm_;
  BufferPool* pool_;
  int tag_;
  AllreduceSpec spec_;
  Scaling scaling_;
  std::vector<Slot> slots_;     // in the bucket's order, where long tensors are in pieces
  size_t total_ = 0;            // elements
  size_t short_ = 0;            // of them, those in front that are added as a short message is
  std::vector<size_t> chunks_;  // offsets of the ring's behind them; none: there is no ring
  int reductions_ = 0;          // started
  std::byte* bucket_ = nullptr;
  PooledBuffer pooled_;
  const void* reduce_in_;

  Phase phase_ = Phase::kPack;
  size_t slot_ = 0, element_ = 0, position_ = 0;  // of the walk
  std::unique_ptr<Operation> reduction_;
};

}  // namespace collective
