// An operation in flight. Nothing here blocks: the engine keeps several operations and steps them in turn, so two
// ranks that meet operations in a different order cannot deadlock, and packing, reducing and sending of different
// operations overlap.
#pragma once

#include <optional>
#include <string>

#include "base/types.h"

namespace collective {

enum class Step {
  kIdle,   // waits for a peer
  kMoved,  // did some work and has more to do
  kDone,   // complete; not to be stepped again
};

class Operation {
 public:
  Operation() = default;
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;
  virtual ~Operation() = default;

  // Does a bounded amount of work (about a segment's), then returns.
  virtual Step step() = 0;
  // What it waits for, for a person who diagnoses a hang.
  virtual std::string describe() const = 0;
  // Whether the peer of a send or receive has started, so that the operation will complete.
  virtual bool under_way() const { return true; }
  // Bytes of page-locked host memory that it holds.
  virtual size_t page_locked() const { return 0; }
  // It will not be stepped again, although it is not done, and is kept for the life of the process: MPI, a device or
  // another rank may still work on what it has started. Stops what would hold up others.
  virtual void give_up() noexcept {}
  // Once done: why it failed, for the few operations that can fail while the engine goes on.
  virtual const std::optional<Error>& failure() const {
    static const std::optional<Error> none;
    return none;
  }
};

}  // namespace collective
