// All-reduce of one tensor or of many fused into a bucket: pack, reduce, unpack.
//
// Tensors that share a bucket are gathered into it (cast to the wire's type and scaled on the way), reduced as one
// message, and scattered back (cast again). A tensor that goes alone in its own type is reduced where it lies.
#pragma once

#include <memory>
#include <vector>

#include "arithmetic.h"
#include "buffer.h"
#include "comm.h"
#include "operation.h"

namespace collective {

// What all ranks agree on.
struct AllreduceSpec {
  DType dtype;  // of the tensors
  DType wire;   // of the bucket and of the messages: dtype, or float16/bfloat16 for float32/float64 tensors
  ReduceOp op;
  double prescale = 1.0, postscale = 1.0;
};

// One tensor. `in` may be null: this rank contributes the identity, zero for a sum. `out` may be null: nothing is
// unpacked. They may be equal.
struct Slot {
  const void* in;
  void* out;
  size_t count;
};

// How a spec's factors are applied at p ranks: once to each input, and once to the finished result.
struct Scaling {
  double before;
  Arithmetic arithmetic;
};
// kOnePass: the inputs of all ranks are combined in registers, at once. kSteps: partial sums have the wire's type.
enum class Passes { kOnePass, kSteps };
Scaling scaling_of(const AllreduceSpec& spec, int size, Passes passes);

// Reduces `in` to `out` (count elements of arithmetic.dtype; may be equal) by the algorithm that suits their length.
std::unique_ptr<Operation> make_reduction(const Comm& comm, BufferPool& pool, int tag, const void* in, void* out,
                                          size_t count, const Arithmetic& arithmetic);

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
  void start_reduction();

  const Comm* comm_;
  BufferPool* pool_;
  int tag_;
  AllreduceSpec spec_;
  Scaling scaling_;
  std::vector<Slot> slots_;
  size_t total_ = 0;  // elements
  std::byte* bucket_ = nullptr;
  PooledBuffer pooled_;
  const void* reduce_in_;

  Phase phase_ = Phase::kPack;
  size_t slot_ = 0, element_ = 0, position_ = 0;  // of the walk
  std::unique_ptr<Operation> reduction_;
};

}  // namespace collective
