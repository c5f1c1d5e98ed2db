// Whether the processes of this node's other ranks are alive. A rank that is killed says nothing, and not every launcher
// ends its job then: without this the others would learn of it from a time-out.
#pragma once

#include <sys/types.h>

#include <vector>

namespace collective {

class Watch {
 public:
  Watch() = default;
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch();

  struct Peer {
    int rank;  // in the job
    pid_t pid;
  };
  // pid: as this process sees it. A rank that is already watched is not added again.
  void add(Peer peer);
  // Those whose processes have ended.
  std::vector<Peer> ended() const;

 private:
  struct Watched {
    Peer peer;
    int fd;  // of the process; -1: it had ended before
  };
  std::vector<Watched> watched_;
};

}  // namespace collective
