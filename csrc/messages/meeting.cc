#include "messages/meeting.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "base/log.h"
#include "base/rank_names.h"
#include "messages/mpi_call.h"

namespace collective {
namespace {

constexpr int kMeetingTag = 32767;  // the largest that every MPI allows
// Time for the words of those that are there to arrive.
constexpr auto kWordsTime = std::chrono::milliseconds(500);

// Which ranks have come, as far as they have said so.
class Meeting {
 public:
  explicit Meeting(MPI_Comm comm) : comm_(comm) {
    check(MPI_Comm_rank(comm, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(comm, &size_), "MPI_Comm_size");
    here_.resize(static_cast<size_t>(size_));
    here_[static_cast<size_t>(rank_)] = true;
  }
  int rank() const { return rank_; }

  void tell() {
    if (told_) return;
    told_ = true;
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      MPI_Request request = MPI_REQUEST_NULL;
      check(MPI_Isend(nullptr, 0, MPI_BYTE, peer, kMeetingTag, comm_, &request), "MPI_Isend");
      check(MPI_Request_free(&request), "MPI_Request_free");
    }
  }
  // Takes the words that have arrived; returns whether any ever have.
  bool listen() {
    for (int flag = 0;;) {
      MPI_Status status;
      check(MPI_Iprobe(MPI_ANY_SOURCE, kMeetingTag, comm_, &flag, &status), "MPI_Iprobe");
      if (flag == 0) return heard_ > 0;
      take(status.MPI_SOURCE);
    }
  }
  // All are here: receives the words that are still in flight, so that the owner of `comm` sees none of them.
  void end() {
    int told = told_ ? 1 : 0;
    check(MPI_Allreduce(MPI_IN_PLACE, &told, 1, MPI_INT, MPI_SUM, comm_), "MPI_Allreduce");
    while (heard_ < told - (told_ ? 1 : 0)) take(MPI_ANY_SOURCE);
  }
  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int rank = 0; rank < size_; ++rank)
      if (!here_[static_cast<size_t>(rank)]) ranks.push_back(rank);
    return ranks;
  }
  bool is_first() const { return std::find(here_.begin(), here_.end(), true) - here_.begin() == rank_; }

 private:
  void take(int source) {
    MPI_Status status;
    check(MPI_Recv(nullptr, 0, MPI_BYTE, source, kMeetingTag, comm_, &status), "MPI_Recv");
    here_[static_cast<size_t>(status.MPI_SOURCE)] = true;
    ++heard_;
  }

  MPI_Comm comm_;
  int rank_ = 0, size_ = 1, heard_ = 0;
  bool told_ = false;
  std::vector<bool> here_;
};

}  // namespace

void meet(MPI_Comm comm, std::chrono::duration<double> stall_warning, std::chrono::duration<double> timeout) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  Meeting meeting(comm);
  set_log_rank(meeting.rank());
  MPI_Request barrier = MPI_REQUEST_NULL;
  check(MPI_Ibarrier(comm, &barrier), "MPI_Ibarrier");
  std::chrono::duration<double> next_warning = stall_warning;
  for (;;) {
    int over = 0;
    check(MPI_Test(&barrier, &over, MPI_STATUS_IGNORE), "MPI_Test");
    if (over != 0) break;
    const std::chrono::duration<double> waited = Clock::now() - begin;
    if (meeting.listen() || waited >= std::min(stall_warning, timeout)) meeting.tell();
    if (waited >= timeout + kWordsTime)
      throw Error(ErrorCode::kTimeout,
                  "init: " + ranks_text(meeting.missing()) + " did not call it within " + seconds_text(timeout));
    if (waited >= next_warning + kWordsTime) {
      next_warning = 2 * waited;
      if (meeting.is_first())
        log_warning("stalled: init waits for " + ranks_text(meeting.missing()) + " since " + seconds_text(waited));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(waited < kWordsTime ? 50 : 5000));
  }
  meeting.end();
}

}  // namespace collective
