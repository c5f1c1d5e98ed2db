#include "messages/exchange.h"

#include <algorithm>

namespace collective {

Exchange::Exchange(const Comm& comm, int tag, const std::vector<Send>& sends, const std::vector<Receive>& receives)
    : comm_(&comm), tag_(tag), cut_(comm.segments(kSegments)) {
  transfers_.reserve(sends.size() + receives.size());
  for (const Receive& receive : receives)
    add(true, receive.peer, static_cast<std::byte*>(receive.data), receive.nbytes);
  for (const Send& send : sends)
    add(false, send.peer, const_cast<std::byte*>(static_cast<const std::byte*>(send.data)), send.nbytes);
}

void Exchange::add(bool receives, int peer, std::byte* data, size_t nbytes) {
  if (nbytes == 0) return;
  Transfer transfer{receives, peer, data, nbytes, (nbytes + cut_.nbytes - 1) / cut_.nbytes, 0, 0, {}};
  transfer.requests.resize(std::min(transfer.segments, cut_.depth));
  transfers_.push_back(std::move(transfer));
}

Step Exchange::step() {
  bool moved = false;
  bool done = true;
  for (Transfer& t : transfers_) {
    const size_t depth = t.requests.size();
    for (; t.done < t.started && t.requests[t.done % depth].done(); ++t.done) moved = true;
    for (; t.started < t.segments && t.started - t.done < depth; ++t.started, moved = true) {
      const size_t begin = t.started * cut_.nbytes;
      const size_t nbytes = std::min(cut_.nbytes, t.nbytes - begin);
      t.requests[t.started % depth] = t.receives ? comm_->irecv(t.data + begin, nbytes, t.peer, tag_)
                                                 : comm_->isend(t.data + begin, nbytes, t.peer, tag_);
    }
    done &= t.done == t.segments;
  }
  return done ? Step::kDone : moved ? Step::kMoved : Step::kIdle;
}

std::string Exchange::describe() const {
  for (const Transfer& t : transfers_)
    if (t.done < t.segments)
      return "exchange: waits for " + comm_->names().text_of(t.peer) + (t.receives ? " to send" : " to receive") +
             " segment " + std::to_string(t.done) + " of " + std::to_string(t.segments);
  return "exchange: done";
}

}  // namespace collective
