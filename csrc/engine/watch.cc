#include "engine/watch.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace collective {

Watch::~Watch() {
  for (const Watched& watched : watched_)
    if (watched.fd >= 0) close(watched.fd);
}

void Watch::add(Peer peer) {
  const auto known = [&](const Watched& watched) { return watched.peer.rank == peer.rank; };
  if (std::any_of(watched_.begin(), watched_.end(), known)) return;
  // From Linux 5.3 on, unless a filter of system calls forbids it; then only time-outs tell.
  const auto fd = static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0));
  if (fd >= 0 || errno == ESRCH) watched_.push_back({peer, fd});
}

std::vector<Watch::Peer> Watch::ended() const {
  std::vector<Peer> peers;
  for (const Watched& watched : watched_) {
    pollfd process{watched.fd, POLLIN, 0};
    if (watched.fd < 0 || poll(&process, 1, 0) > 0) peers.push_back(watched.peer);
  }
  return peers;
}

}  // namespace collective
