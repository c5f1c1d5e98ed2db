#include "engine/mail.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace collective {

namespace {

// These two pair: whoever looks and sees a published value also sees everything that was done before publish().
void publish(uint64_t* counter, uint64_t value) {
  std::atomic_ref<uint64_t>(*counter).store(value, std::memory_order_release);
}
uint64_t look(const uint64_t* counter) {
  return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(counter)).load(std::memory_order_acquire);
}

}  // namespace

NodeMail::NodeMail(const SharedMemory& memory, size_t offset) {
  if (offset % kLineBytes != 0 || offset + nbytes(memory.size()) > memory.nbytes())
    throw Error(ErrorCode::kInternal,
                "mail at byte " + std::to_string(offset) + " of " + std::to_string(memory.nbytes()));
  const int me = memory.rank();
  const auto counter = [&](int rank, int line) {
    return reinterpret_cast<uint64_t*>(memory.part(rank) + offset + static_cast<size_t>(line) * kLineBytes);
  };
  const auto ring = [&](int rank) {
    return memory.part(rank) + offset + (static_cast<size_t>(memory.size()) + 1) * kLineBytes;
  };
  ring_ = ring(me);
  written_ = counter(me, 0);
  for (int peer = 0; peer < memory.size(); ++peer) {
    if (peer == me || (peer != 0 && me != 0)) continue;
    // Rank 0's line 1 + r is what it has read from r, another rank's line 1 what it has read from rank 0.
    senders_.push_back({peer, counter(peer, 0), counter(me, me == 0 ? 1 + peer : 1), ring(peer), 0, {}});
    read_.push_back(counter(peer, peer == 0 ? 1 + me : 1));
  }
}

void NodeMail::send(std::string bytes) {
  if (read_.empty()) return;
  const auto length = static_cast<uint32_t>(bytes.size());
  std::string framed(sizeof length, '\0');
  std::memcpy(framed.data(), &length, sizeof length);
  outgoing_.push_back(framed + bytes);
  sent();
}

bool NodeMail::sent() {
  while (!outgoing_.empty()) {
    const std::string& first = outgoing_.front();
    if (total_ - freed_ == kRingBytes) {
      freed_ = total_;  // a reader that has hung up counts as having read everything
      for (const uint64_t* read : read_) freed_ = std::min(freed_, look(read));
    }
    const size_t count = std::min(first.size() - at_, static_cast<size_t>(kRingBytes - (total_ - freed_)));
    if (count == 0) return false;
    const size_t begin = total_ % kRingBytes, straight = std::min(count, kRingBytes - begin);
    std::memcpy(ring_ + begin, first.data() + at_, straight);
    std::memcpy(ring_, first.data() + at_ + straight, count - straight);
    total_ += count;
    at_ += count;
    publish(written_, total_);
    if (at_ < first.size()) continue;
    outgoing_.pop_front();
    at_ = 0;
  }
  return true;
}

void NodeMail::hang_up() {
  for (const Sender& sender : senders_) publish(sender.read, UINT64_MAX);  // as far as anybody will ever write
  senders_.clear();
}

std::optional<Message> NodeMail::poll() {
  for (size_t turn = 0; turn < senders_.size(); ++turn, next_ = next_ + 1 < senders_.size() ? next_ + 1 : 0) {
    Sender& sender = senders_[next_];
    const uint64_t written = look(sender.written);
    uint32_t length = 0;
    while (sender.taken < written) {
      if (sender.arrived.size() >= sizeof length) std::memcpy(&length, sender.arrived.data(), sizeof length);
      const size_t wanted = sizeof length + length - sender.arrived.size();
      const size_t begin = sender.taken % kRingBytes;
      const size_t count = std::min({wanted, static_cast<size_t>(written - sender.taken), kRingBytes - begin});
      sender.arrived.append(reinterpret_cast<const char*>(sender.ring) + begin, count);
      sender.taken += count;
      if (sender.arrived.size() < sizeof length) continue;
      std::memcpy(&length, sender.arrived.data(), sizeof length);
      if (sender.arrived.size() < sizeof length + length) continue;
      publish(sender.read, sender.taken);
      sender.arrived.erase(0, sizeof length);
      return Message{sender.rank, std::exchange(sender.arrived, {})};
    }
    publish(sender.read, sender.taken);
  }
  return std::nullopt;
}

}  // namespace collective
