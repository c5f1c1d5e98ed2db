// One rank sends to one other. The two tell each other what they expect before any data moves, so a mismatch is an
// error on both, and nobody else is involved.
//
//   sender    -- descriptor --> receiver
//   sender   <-- descriptor --  receiver      equal: data follows; different: both fail
//   sender    ---- data ----->  receiver
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "base/descriptor.h"
#include "base/operation.h"
#include "messages/comm.h"
#include "messages/exchange.h"

namespace collective {

class Pair final : public Operation {
 public:
  // tag and tag + 1 are this pair's. `before`: the operation before this one with the same peer, direction and tag is
  // over; set by that one. `over` is set by this one. They keep messages of one tag in order.
  Pair(const Comm& comm, int tag, bool sends, int peer, const Descriptor& descriptor, void* data,
       std::shared_ptr<bool> before, std::shared_ptr<bool> over);
  ~Pair() override;

  Step step() override;
  std::string describe() const override;
  bool under_way() const override { return exchange_ != nullptr; }
  const std::optional<Error>& failure() const override { return failure_; }

 private:
  void compare();

  const Comm* comm_;
  int tag_;
  bool sends_;
  int peer_;
  std::byte* data_;
  size_t nbytes_;
  std::string mine_, theirs_;
  std::shared_ptr<bool> before_, over_;
  bool greeted_ = false;
  Request greeting_, reply_;
  std::unique_ptr<Exchange> exchange_;
  std::optional<Error> failure_;
};

}  // namespace collective
