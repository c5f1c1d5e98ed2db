// A bucket of tensors that is reduced again and again: the gradients of an optimizer that become ready together.
//
// Its layout is agreed once, when its channel is opened. Then a run needs no agreement: pack, reduce. The result stays
// in the bucket until it is fetched, so a run never writes into a tensor that its owner may still be using.
//
// Behind the tensors lies one flag per tensor, summed like them: a tensor that this rank does not have counts as
// zeros, and the flag tells afterwards whether any rank had it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine.h"

namespace collective {

class Bucket {
 public:
  // counts: elements by tensor. spec.op is Sum or Average: flags must add up.
  Bucket(std::shared_ptr<Engine> engine, std::string name, uint32_t channel, const AllreduceSpec& spec,
         std::vector<size_t> counts);

  // Starts a run. tensors: by position, null where this rank has none; they stay valid until the ticket is finished.
  // The previous run must have finished.
  std::shared_ptr<Ticket> start(const std::vector<const void*>& tensors);

  // After the run: whether any rank had tensor i, and its result.
  bool present(size_t i) const;
  void fetch(size_t i, void* out) const;

 private:
  struct Storage {
    Buffer flags;   // of this rank, in the tensors' type
    Buffer bucket;  // in the wire's type: tensors, then flags
  };
  std::shared_ptr<Engine> engine_;
  std::string name_;
  uint32_t channel_;
  AllreduceSpec spec_;
  std::vector<size_t> counts_, offsets_;  // elements; offsets_.back() is where the flags begin
  std::shared_ptr<Storage> storage_;
};

}  // namespace collective
