// Broadcast down a tree, segment by segment: a rank forwards a segment as soon as it has it.
//
// Short messages take a binomial tree (depth log2(p): latency decides); long ones, from 64 KiB on, a chain through all
// ranks, in which every link carries each byte once and segments follow each other (bandwidth decides):
//
//   binomial, p = 8, root 0:   0 -> 4, 2, 1    4 -> 6, 5    6 -> 7    2 -> 3
//   chain,    p = 4, root 2:   2 -> 3 -> 0 -> 1
//
// Both go through the ranks of a node one after the other (Comm::order()), so that in the chain each byte enters a node
// once.
//
// steps:              ceil(log2(p)), or p - 2 + segments
// bytes on the wire:  N per link: N received per rank but the root; N sent per rank but the last in the chain, up to
//                     N ceil(log2(p)), by the root, in the tree
// memory traffic:     none: received in place, and sent on from there
// limits:             segments of 128 KiB, 4 in flight per link, or kNetworkSegments. On a node a message from 64 to 128
//                     KiB is one segment, so in its chain nothing overlaps
// source:             tree: Thakur, Rabenseifner, Gropp, Optimization of collective communication operations in MPICH,
//                     2005; chain: the pipeline of Open MPI's coll/base
#pragma once

#include <algorithm>
#include <vector>

#include "base/operation.h"
#include "messages/comm.h"

namespace collective {

class Broadcast final : public Operation {
 public:
  // data: nbytes bytes, read on root, written on the others.
  Broadcast(const Comm& comm, int tag, int root, void* data, size_t nbytes);

  Step step() override;
  std::string describe() const override;

 private:
  static constexpr Segments kSegments{size_t{128} << 10, 4};

  struct Child {
    int rank;
    size_t started = 0, done = 0;  // segments
    std::vector<Request> sends;
  };
  size_t begin(size_t segment) const { return segment * cut_.nbytes; }
  size_t length(size_t segment) const { return std::min(cut_.nbytes, nbytes_ - begin(segment)); }

  const Comm* comm_;
  int tag_;
  std::byte* data_;
  size_t nbytes_;
  Segments cut_;
  size_t segments_;
  int parent_ = -1;  // -1: this is the root
  size_t posted_ = 0, received_ = 0;
  std::vector<Request> receives_;
  std::vector<Child> children_;
};

}  // namespace collective
