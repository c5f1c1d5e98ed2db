#include "messages/pair.h"

#include <algorithm>

namespace collective {
namespace {
// A greeting is an encoded descriptor, padded to this; a tensor of 400 dimensions fits.
constexpr size_t kGreetingBytes = 4096;
}  // namespace

Pair::Pair(const Comm& comm, int tag, bool sends, int peer, const Descriptor& descriptor, void* data,
           std::vector<std::shared_ptr<bool>> before, std::shared_ptr<bool> over, std::function<void(int)> found)
    : comm_(&comm),
      tag_(tag),
      sends_(sends),
      peer_(peer),
      data_(static_cast<std::byte*>(data)),
      nbytes_(descriptor.count() * size_of(descriptor.dtype)),
      theirs_(kGreetingBytes, '\0'),
      before_(std::move(before)),
      over_(std::move(over)),
      found_(std::move(found)) {
  Writer w;
  w.put(comm.rank());
  w.put_text(descriptor.encode());
  mine_ = w.take();
  if (mine_.size() > kGreetingBytes) throw Error(ErrorCode::kInternal, "a descriptor is too long to send");
  mine_.resize(kGreetingBytes);
}

Pair::~Pair() { *over_ = true; }

bool Pair::may_begin() const {
  return std::all_of(before_.begin(), before_.end(), [](const auto& over) { return *over; });
}

void Pair::compare() {
  const auto text_of = [](const std::string& greeting) {
    Reader r(greeting);
    r.get<int>();
    return r.get_text();
  };
  const std::string mine = text_of(mine_), theirs = text_of(theirs_);
  if (mine != theirs) {
    const int me = comm_->rank();
    std::vector<Variant> variants{{mine, {me}}, {theirs, {peer_}}};
    if (peer_ < me) std::swap(variants[0], variants[1]);
    failure_ = Error(ErrorCode::kMismatch, comm_->names().label() + (sends_ ? "send to " : "recv from ") +
                                               comm_->names().text_of(peer_) + " on " + comm_->names().text_of(me) +
                                               ": " + describe_difference(variants, comm_->names()));
    return;
  }
  exchange_ = sends_ ? std::make_unique<Exchange>(*comm_, tag_, std::vector<Exchange::Send>{{peer_, data_, nbytes_}},
                                                  std::vector<Exchange::Receive>{})
                     : std::make_unique<Exchange>(*comm_, tag_, std::vector<Exchange::Send>{},
                                                  std::vector<Exchange::Receive>{{peer_, data_, nbytes_}});
}

// What the sender sends has the pair's first tag, what the receiver replies the second.
void Pair::reply() {
  greeting_ = comm_->isend(mine_.data(), mine_.size(), peer_, sends_ ? tag_ : tag_ + 1);
  greeted_ = true;
}

Step Pair::step() {
  if (!listens_) {
    if (!may_begin()) return Step::kIdle;
    listens_ = true;
    reply_ = comm_->irecv(theirs_.data(), theirs_.size(), peer_, sends_ ? tag_ + 1 : tag_);
    if (peer_ != kAny) reply();
    return Step::kMoved;
  }
  if (!greeted_) {
    if (!reply_.done()) return Step::kIdle;
    peer_ = Reader(theirs_).get<int>();
    found_(peer_);
    reply();
  }
  if (exchange_ == nullptr) {
    if (!greeting_.done() || !reply_.done()) return Step::kIdle;
    compare();
    return failure_ ? Step::kDone : Step::kMoved;
  }
  return exchange_->step();
}

std::string Pair::describe() const {
  if (!listens_) return "waits for the previous one with this peer and tag";
  if (peer_ == kAny) return "waits for a rank to send";
  if (exchange_ == nullptr)
    return "waits for " + comm_->names().text_of(peer_) + " to " + (sends_ ? "receive" : "send");
  return exchange_->describe();
}

}  // namespace collective
