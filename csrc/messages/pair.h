// One rank sends to one other. The two tell each other what they expect before any data moves, so that a mismatch is an
// error on both, and no other rank is involved.
//
//   sender    -- descriptor --> receiver    } both at once
//   sender   <-- descriptor --  receiver    } equal: data follows; different: both fail
//   sender    ---- data ----->  receiver
//
// steps:              2
// bytes on the wire:  4 KiB each way, to which a descriptor is padded; then N from the sender to the receiver
// memory traffic:     none: sent from and received into the caller's memory
// limits:             no data moves until both have called, however short it is; of two with the same peer, direction
//                     and tag the second starts when the first has ended; a receive from any rank replies to the first
//                     descriptor that comes, and other receives of its tag wait for it; segments as in exchange.h
// source:             MPI_Send and MPI_Recv of the MPI standard, which check only that the message fits
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/descriptor.h"
#include "base/operation.h"
#include "messages/comm.h"
#include "messages/exchange.h"

namespace collective {

class Pair final : public Operation {
 public:
  static constexpr int kAny = -1;
  // tag and tag + 1 belong to this pair. peer: kAny to receive from whoever sends first; `found` then learns who it is.
  // Each of `before` becomes true when a previous operation that might get this one's messages has ended (one with the
  // same peer, direction and tag), `over` when this one has. They keep messages of one tag in order.
  Pair(const Comm& comm, int tag, bool sends, int peer, const Descriptor& descriptor, void* data,
       std::vector<std::shared_ptr<bool>> before, std::shared_ptr<bool> over, std::function<void(int)> found);
  ~Pair() override;

  Step step() override;
  std::string describe() const override;
  bool under_way() const override { return exchange_ != nullptr; }
  void give_up() noexcept override { *over_ = true; }
  const std::optional<Error>& failure() const override { return failure_; }

 private:
  bool may_begin() const;
  void reply();
  void compare();

  const Comm* comm_;
  int tag_;
  bool sends_;
  int peer_;
  std::byte* data_;
  size_t nbytes_;
  std::string mine_, theirs_;
  std::vector<std::shared_ptr<bool>> before_;
  std::shared_ptr<bool> over_;
  std::function<void(int)> found_;
  bool listens_ = false, greeted_ = false;
  Request greeting_, reply_;
  std::unique_ptr<Exchange> exchange_;
  std::optional<Error> failure_;
};

}  // namespace collective
