#include "messages/alltoall.h"

#include <cstring>

namespace collective {

Alltoall::Alltoall(const Comm& comm, int tag, const void* in, std::vector<int64_t> splits, size_t row_bytes,
                   Allocate allocate)
    : comm_(&comm),
      tag_(tag),
      in_(static_cast<const std::byte*>(in)),
      row_bytes_(row_bytes),
      splits_(std::move(splits)),
      received_(splits_.size()),
      allocate_(std::move(allocate)) {
  std::vector<Exchange::Send> sends;
  std::vector<Exchange::Receive> receives;
  for (int peer = 0; peer < comm.size(); ++peer) {
    const auto i = static_cast<size_t>(peer);
    if (peer == comm.rank()) {
      received_[i] = splits_[i];
      continue;
    }
    sends.push_back({peer, &splits_[i], sizeof splits_[i]});
    receives.push_back({peer, &received_[i], sizeof received_[i]});
  }
  exchange_ = std::make_unique<Exchange>(comm, tag, sends, receives);
}

void Alltoall::start_rows() {
  counting_ = false;
  auto* out = static_cast<std::byte*>(allocate_(received_));
  std::vector<Exchange::Send> sends;
  std::vector<Exchange::Receive> receives;
  size_t from = 0;
  size_t to = 0;
  for (int peer = 0; peer < comm_->size(); ++peer) {
    const auto i = static_cast<size_t>(peer);
    const size_t sent = static_cast<size_t>(splits_[i]) * row_bytes_;
    const size_t received = static_cast<size_t>(received_[i]) * row_bytes_;
    if (peer != comm_->rank()) {
      sends.push_back({peer, in_ + from, sent});
      receives.push_back({peer, out + to, received});
    } else if (sent > 0) {
      std::memcpy(out + to, in_ + from, sent);
    }
    from += sent;
    to += received;
  }
  exchange_ = std::make_unique<Exchange>(*comm_, tag_, sends, receives);
}

Step Alltoall::step() {
  const Step step = exchange_->step();
  if (step != Step::kDone || !counting_) return step;
  start_rows();
  return Step::kMoved;
}

std::string Alltoall::describe() const {
  return std::string("alltoall, ") + (counting_ ? "row counts: " : "rows: ") + exchange_->describe();
}

}  // namespace collective
