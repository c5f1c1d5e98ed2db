// Where this rank's script is, in words, for a rank that waits for it. Only Python can tell: a thread of its own looks,
// because the one that is asked for may be busy, and the engine never waits for Python.
#pragma once

#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>

#include "engine/limits.h"

namespace collective {

class Whereabouts {
 public:
  // The engine's side, which does not block: where the script is, as of just now; nothing: has been asked, ask again. ""
  // where nobody looks.
  std::optional<std::string> look();

  // The side of the thread that looks: blocks until it is asked; false at the end. Then it tells.
  bool wait_for_question();
  void tell(std::string text);
  // Nobody asks any more.
  void end();

 private:
  std::mutex mutex_;
  std::condition_variable asked_;
  bool someone_looks_ = false, is_asked_ = false, is_over_ = false;
  std::string text_;
  Clock::time_point told_{};
};

}  // namespace collective
