// Messages of any length to single ranks, for words about operations rather than their data.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "messages/comm.h"

namespace collective {

// Those of one sender arrive in order. Nothing here blocks.
class Letters {
 public:
  Letters() = default;
  Letters(const Letters&) = delete;
  Letters& operator=(const Letters&) = delete;
  virtual ~Letters() = default;
  virtual void send(std::shared_ptr<const std::string> bytes, int peer) = 0;
  // One that has arrived, if any.
  virtual std::optional<Message> poll() = 0;
  // Goes on with what was sent; true when nothing is left to do.
  virtual bool sent() = 0;
};

// By MPI, with one tag.
class MpiLetters final : public Letters {
 public:
  MpiLetters(const Comm& comm, int tag) : comm_(&comm), tag_(tag), inbox_(comm, tag) {}
  void send(std::shared_ptr<const std::string> bytes, int peer) override;
  std::optional<Message> poll() override { return inbox_.poll(); }
  bool sent() override;

 private:
  struct Outgoing {
    std::shared_ptr<const std::string> bytes;
    Request request;
  };
  const Comm* comm_;
  int tag_;
  Inbox inbox_;
  std::deque<Outgoing> outgoing_;
};

}  // namespace collective
