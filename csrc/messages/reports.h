// A report of fixed size from every rank to every other: how ranks find out whether all of them can do something. All
// see the same reports, so all come to the same verdict.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/codec.h"
#include "messages/comm.h"

namespace collective {

// Report: trivially copyable, with a text `failure` (an array of char), empty where all is well.
template <typename Report>
class Reports {
 public:
  Reports(const Comm& comm, int tag)
      : comm_(&comm), tag_(tag), all_(static_cast<size_t>(comm.size())), sends_(all_.size()), receives_(all_.size()) {
    static_assert(std::is_trivially_copyable_v<Report>);
  }

  // This rank's report; may be changed between one exchange and the next.
  Report& own() { return own_; }
  // Runs `work`, unless this rank has failed already; what that throws is reported to the others.
  template <typename Work>
  void attempt(const Work& work) {
    if (own_.failure[0] != '\0') return;
    try {
      work();
    } catch (const std::runtime_error& error) {
      fail(error.what());
    }
  }
  void fail(const std::string& why) {
    const std::string_view text = clipped(why, sizeof own_.failure - 1);
    own_.failure[text.copy(own_.failure, text.size())] = '\0';
  }

  void exchange() {
    next_ = 0;
    for (int peer = 0; peer < comm_->size(); ++peer) {
      const auto i = static_cast<size_t>(peer);
      if (peer == comm_->rank()) {
        all_[i] = own_;
        continue;
      }
      receives_[i] = comm_->irecv(&all_[i], sizeof(Report), peer, tag_);
      sends_[i] = comm_->isend(&own_, sizeof(Report), peer, tag_);
    }
  }
  bool exchanged() {
    for (; next_ < receives_.size(); ++next_)
      if (!receives_[next_].done() || !sends_[next_].done()) return false;
    return true;
  }
  // While exchanged() is false: the rank that is missing.
  int missing() const { return comm_->names().job_rank(static_cast<int>(next_)); }

  // By rank.
  const std::vector<Report>& all() const { return all_; }
  // The first failure and which rank's it is; empty if there is none.
  std::string failure() const {
    for (size_t i = 0; i < all_.size(); ++i)
      if (all_[i].failure[0] != '\0') return comm_->names().text_of(static_cast<int>(i)) + ": " + all_[i].failure;
    return {};
  }

 private:
  const Comm* comm_;
  int tag_;
  Report own_{};
  std::vector<Report> all_;
  std::vector<Request> sends_, receives_;
  size_t next_ = 0;  // the first peer whose transfers are not known to be complete
};

}  // namespace collective
