// MPI point-to-point, as little of it as the algorithms need.
#pragma once

#include <mpi.h>

#include <list>
#include <optional>
#include <string>

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

  Request isend(const void* data, size_t nbytes, int peer, int tag) const;
  Request irecv(void* data, size_t nbytes, int peer, int tag) const;

 private:
  friend class Inbox;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  RankNames names_;
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
