// MPI point-to-point, as little of it as the algorithms need.
#pragma once

#include <mpi.h>

#include <list>
#include <optional>
#include <string>
#include <vector>

#include "base/rank_names.h"
#include "base/types.h"

namespace collective {

// One non-blocking transfer. Its memory must outlive it. Move-only; inactive when default-constructed or done.
class Request {
 public:
  Request() = default;
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;
  Request(Request&& other) noexcept;
  Request& operator=(Request&& other) noexcept;
  ~Request();

  // Makes progress; true once the transfer is complete (always true when inactive).
  bool done();

 private:
  friend class Comm;
  friend class Inbox;
  // An active transfer is given up only when the engine fails: a receive is cancelled, so that MPI does not write into
  // memory that is about to be freed (one whose data is already coming is waited for, for up to a second); a send is
  // left to MPI.
  void abandon() noexcept;

  MPI_Request request_ = MPI_REQUEST_NULL;
  bool receives_ = false;
};

struct Message {
  int source;
  std::string bytes;
};

// How long messages are cut into segments, and how many of them are in flight to a peer.
struct Segments {
  size_t nbytes, depth;
};

// Between nodes: short enough to go without a rendezvous, which Open MPI begins above 64 KiB over TCP. There, a
// request to send and its answer queue behind the data of both directions on the one connection of two processes, and
// the link idles meanwhile. Measured, 2 ranks that send to each other over 1 Gbit/s, share of the link: 32 KiB x 16
// 0.95, 60 KiB x 8 and x 16 0.96, 128 KiB x 4 0.61, x 16 0.52, 512 KiB x 4 0.53, 1 MiB x 8 0.59; with two connections
// (btl_tcp_links=2) 0.93 to 0.96 at all lengths. Such messages need no receiver: what is sent to a rank that is late
// waits in its MPI's memory: of buckets at most the first chunk, of a broadcast and the like all of it.
inline constexpr Segments kNetworkSegments{size_t{60} << 10, 16};

// A private duplicate of the caller's communicator, so that our messages never meet the user's.
class Comm {
 public:
  Comm() = default;
  // Collective over `parent`. job: the communicator of all ranks, whose numbers users know; null where it is this one.
  static Comm duplicate(MPI_Comm parent, const Comm* job = nullptr);
  Comm(const Comm&) = delete;
  Comm& operator=(const Comm&) = delete;
  Comm(Comm&& other) noexcept;
  Comm& operator=(Comm&& other) noexcept;
  ~Comm();  // does not free: MPI_Comm_free is collective, so only an orderly shutdown may call release()

  // Collective. Call only when no transfer is active.
  void release();

  int rank() const { return rank_; }
  int size() const { return size_; }
  const RankNames& names() const { return names_; }
  // What precedes messages about the group, in place of the label that its ranks make.
  void set_label(std::string label) { names_.set_label(std::move(label)); }
  // The ranks in the order of rings and chains, in which those of a node follow each other once nodes are known; this
  // rank's place there; and the rank at a place, modulo their number.
  const std::vector<int>& order() const { return order_; }
  int position() const { return position_; }
  int at(int position) const { return order_[static_cast<size_t>((position % size_ + size_) % size_)]; }
  void set_order(std::vector<int> order);
  // Whether its messages cross a network: then they are cut into kNetworkSegments, otherwise into `others`.
  void set_crosses_network() { crosses_network_ = true; }
  Segments segments(Segments others) const { return crosses_network_ ? kNetworkSegments : others; }

  Request isend(const void* data, size_t nbytes, int peer, int tag) const;
  // peer: negative for any.
  Request irecv(void* data, size_t nbytes, int peer, int tag) const;

 private:
  friend class Inbox;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  RankNames names_;
  std::vector<int> order_{0};
  int position_ = 0;
  bool crosses_network_ = false;
};

// Messages of unknown length with one tag, from any rank. Those of one rank come in the order in which it has sent them.
// A long message whose sender stops half way holds up nothing but that sender's later messages.
class Inbox {
 public:
  Inbox(const Comm& comm, int tag) : comm_(&comm), tag_(tag) {}
  // One that has arrived as a whole, if any. Never blocks.
  std::optional<Message> poll();

 private:
  struct Incoming {
    Message message;
    Request request;
  };
  // Starts to receive the next message, if its head has arrived.
  bool receive_next();

  const Comm* comm_;
  int tag_;
  std::list<Incoming> incoming_;  // a list, for the bytes of a message must stay where they are while it is received
};

}  // namespace collective
