#include "messages/letters.h"

#include <utility>

namespace collective {

void MpiLetters::send(std::shared_ptr<const std::string> bytes, int peer) {
  Request request = comm_->isend(bytes->data(), bytes->size(), peer, tag_);
  outgoing_.push_back({std::move(bytes), std::move(request)});
}

bool MpiLetters::sent() {
  while (!outgoing_.empty() && outgoing_.front().request.done()) outgoing_.pop_front();
  return outgoing_.empty();
}

}  // namespace collective
