// Recursive doubling for short messages, and for Adasum, which needs whole tensors: after log2(p) exchanges every rank
// has the whole result.
//
//   rank   0     1     2     3        p = 4: exchange with the rank whose number differs in one bit
//          a <-> b     c <-> d        distance 1
//          ab    ab    cd    cd
//          ab <------> cd             distance 2 (and 1 with 3)
//          abcd  abcd  abcd  abcd
//
// When p is not a power of two, the first 2(p - 2^k) ranks fold in pairs before and unfold after: the even one
// hands its data to the odd one above it and gets the result back.
// Both partners combine the same two operands in the same order (lower ranks first), so all ranks hold the same bits.
//
// steps:              floor(log2(p)), plus 2 when p is not a power of two
// bytes on the wire:  N floor(log2(p)) per rank each way; in a pair the odd rank has N more, the even one only N
// memory traffic:     2 loads + 1 store of N per exchange (Adasum: 4 + 1); first a copy of N, unless in place
// limits:             more bytes than the ring from about 3 ranks: for messages that latency dominates
// source:             Thakur, Rabenseifner, Gropp, Optimization of collective communication operations in MPICH, 2005
#pragma once

#include <memory>
#include <optional>

#include "base/buffer.h"
#include "base/operation.h"
#include "messages/comm.h"
#include "messages/exchange.h"
#include "reduce/adasum.h"
#include "reduce/arithmetic.h"

namespace collective {

class AllreduceDoubling final : public Operation {
 public:
  // `in` and `out` hold count elements and may be equal.
  AllreduceDoubling(const Comm& comm, BufferPool& pool, int tag, const void* in, void* out, size_t count,
                    const Arithmetic& arithmetic);

  Step step() override;
  std::string describe() const override;

 private:
  enum class Phase { kCopy, kFold, kExchange, kUnfold, kDone };
  bool folds() const { return comm_->rank() < 2 * extra_; }  // takes part in a pair
  int partner() const;                                       // in this phase
  void copy(size_t most);                                    // from in to out; at the end it starts
  void start();                                              // posts what this phase needs
  bool combine(const void* a, const void* b, bool last);     // into out_, piece by piece; true at the end
  void finish();                                             // when what this phase needs has arrived

  const Comm* comm_;
  int tag_;
  const std::byte* in_;
  std::byte* out_;
  size_t count_, nbytes_;
  Arithmetic arithmetic_;
  int power_;  // the largest power of two that is at most p
  int extra_;  // p - power_
  Phase phase_ = Phase::kCopy;
  int distance_ = 1;
  size_t copied_ = 0;                   // bytes
  std::optional<Adasum> adasum_;        // under way
  size_t scaled_ = 0;                   // elements of its result
  PooledBuffer scratch_;                // before what receives into it
  Request send_, receive_;              // of a short message
  std::unique_ptr<Exchange> exchange_;  // of a long one
};

}  // namespace collective
