// How a rank talks to the coordinator, rank 0: it sends messages to rank 0, and rank 0 sends each message to all others.
// Messages of one sender arrive in order. On one node they go through its memory (below), otherwise along a tree of nodes
// (tree_mail.h).
#pragma once

#include <atomic>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "messages/comm.h"
#include "node/shared_memory.h"

namespace collective {

class Mail {
 public:
  Mail() = default;
  Mail(const Mail&) = delete;
  Mail& operator=(const Mail&) = delete;
  virtual ~Mail() = default;

  // From rank 0 to all others, from another rank to rank 0. Never blocks.
  virtual void send(std::string bytes) = 0;
  // A message that has arrived, if any. Never blocks.
  virtual std::optional<Message> poll() = 0;
  // Goes on with what was sent; true when nothing is left to do.
  virtual bool sent() = 0;
  // This rank reads no more, and no rank waits until it has read.
  virtual void hang_up() = 0;
  // Where this rank passes on the coordinator's messages: sends one of its own to all who get them from here, because it
  // will pass on nothing any more.
  virtual void tell_below(const std::string& bytes) { (void)bytes; }
  // Whether anything was passed on since the last call, so that more may follow soon.
  virtual bool take_moved() { return false; }
  // The ranks that have submitted this name have been told about it: what they say of it now is about its next use.
  virtual void decided(const std::string& name) { (void)name; }
  // All ranks have been told that all have joined.
  virtual void all_joined() {}
};

// Through the shared memory of a node. Every rank has a ring of bytes in its part, which it alone writes; a message is
// its length and its bytes, in pieces where the ring is full. The ring of rank 0 is read by all others, that of another
// rank by rank 0. Readers tell in their own part how far they are:
//
//     part of rank 0:   written | read from 1 | read from 2 | ...   ring ==> ranks 1, 2, ...
//     part of rank 1:   written | read from 0                       ring ==> rank 0
//
// cost:   one line that changes hands for a short message, and one for its counter. A blocking all-reduce of 1 KiB at
//         2 ranks takes 4.4 us, by MPI messages 5.7; at 4 ranks on 2 cores 20, by messages 38.
class NodeMail final : public Mail {
 public:
  // What it takes of each part.
  static constexpr size_t nbytes(int size) { return (static_cast<size_t>(size) + 1) * kLineBytes + kRingBytes; }
  // The mail at `offset` (of whole lines) of every part. The memory must outlive it, and serve nothing else there.
  NodeMail(const SharedMemory& memory, size_t offset);
  ~NodeMail() override { hang_up(); }
  void send(std::string bytes) override;
  std::optional<Message> poll() override;
  bool sent() override;
  void hang_up() override;

 private:
  static constexpr size_t kRingBytes = size_t{16} << 10;

  // Of one that this rank hears.
  struct Sender {
    int rank;
    uint64_t* written;
    uint64_t* read;  // ours
    const std::byte* ring;
    uint64_t taken = 0;   // == *read
    std::string arrived;  // of a message that is not complete
  };

  std::vector<Sender> senders_;
  size_t next_ = 0;  // the sender to look at first
  std::byte* ring_;
  uint64_t* written_;
  std::vector<const uint64_t*> read_;  // how far each reader of this rank's ring has read
  uint64_t total_ = 0;                 // == *written_
  uint64_t freed_ = 0;                 // all of them have read at least this far
  std::deque<std::string> outgoing_;   // with their lengths
  size_t at_ = 0;                      // bytes of the first that are written
};

}  // namespace collective
