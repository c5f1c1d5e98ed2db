// Any pattern of point-to-point transfers, all at once: the basis of alltoall, gather, scatter, send and recv.
//
// Each transfer is cut into segments; per peer and direction a few are in flight, in order. Transfers with different
// peers do not wait for each other.
//
//   gather to 0, p = 3:     1 -> 0    2 -> 0          segments:   [ done | in flight x 4 | not started ]
//
// steps:              1, with all peers at once
// bytes on the wire:  those of the transfers, each directly and once; an empty one sends no message
// memory traffic:     none: sent from and received into the caller's memory
// limits:             segments of 1 MiB, 4 in flight per peer and direction, or kNetworkSegments; nothing spreads the
//                     load, so a root with p-1 transfers is only as fast as its own link
// source:             MPI_Isend and MPI_Irecv of the MPI standard, whose messages of one tag and pair keep their order
#pragma once

#include <vector>

#include "base/operation.h"
#include "messages/comm.h"

namespace collective {

class Exchange final : public Operation {
 public:
  struct Send {
    int peer;
    const void* data;
    size_t nbytes;
  };
  struct Receive {
    int peer;
    void* data;
    size_t nbytes;
  };
  // At most one send and one receive per peer; none with this rank itself. Lengths match the peer's.
  Exchange(const Comm& comm, int tag, const std::vector<Send>& sends, const std::vector<Receive>& receives);

  Step step() override;
  std::string describe() const override;

 private:
  // Large enough that MPI's rendezvous costs little, small enough for an int and for several peers at once.
  static constexpr Segments kSegments{size_t{1} << 20, 4};

  struct Transfer {
    bool receives;
    int peer;
    std::byte* data;
    size_t nbytes;
    size_t segments, started = 0, done = 0;
    std::vector<Request> requests;
  };
  void add(bool receives, int peer, std::byte* data, size_t nbytes);

  const Comm* comm_;
  int tag_;
  Segments cut_;
  std::vector<Transfer> transfers_;
};

}  // namespace collective
