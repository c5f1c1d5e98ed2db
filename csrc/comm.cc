#include "comm.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <limits>
#include <map>
#include <numeric>
#include <system_error>
#include <thread>
#include <utility>

#include "log.h"

namespace collective {
namespace {

void check(int status, const char* call) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(status, text, &length);
  throw Error(ErrorCode::kInternal, std::string(call) + " failed: " + std::string(text, length));
}

bool finalized() {
  int flag = 0;
  MPI_Finalized(&flag);
  return flag != 0;
}

int to_int(size_t nbytes) {
  // The algorithms send segments; a message this long would be a bug of ours.
  if (nbytes > static_cast<size_t>(std::numeric_limits<int>::max()))
    throw Error(ErrorCode::kInternal, "a message of " + std::to_string(nbytes) + " bytes was not segmented");
  return static_cast<int>(nbytes);
}

// "0-4, 7"; ranks: increasing.
std::string numbers_text(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    if (i > 0) text += ", ";
    text += std::to_string(ranks[i]);
    if (end - i > 1) text += (end - i > 2 ? "-" : ", ") + std::to_string(ranks[end - 1]);
    i = end;
  }
  return text;
}

}  // namespace

Request::Request(Request&& other) noexcept
    : request_(std::exchange(other.request_, MPI_REQUEST_NULL)), receives_(other.receives_) {}

Request& Request::operator=(Request&& other) noexcept {
  if (this != &other) {
    abandon();
    request_ = std::exchange(other.request_, MPI_REQUEST_NULL);
    receives_ = other.receives_;
  }
  return *this;
}

Request::~Request() { abandon(); }

bool Request::done() {
  if (request_ == MPI_REQUEST_NULL) return true;
  int flag = 0;
  check(MPI_Test(&request_, &flag, MPI_STATUS_IGNORE), "MPI_Test");
  return flag != 0;
}

void Request::abandon() noexcept {
  if (request_ == MPI_REQUEST_NULL || finalized()) return;
  if (!receives_) {
    MPI_Request_free(&request_);
    return;
  }
  MPI_Cancel(&request_);
  // A receive that was matched cannot be cancelled and ends when its data is there: wait for it a little,
  // rather than for ever on a peer that died half way.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  int flag = 0;
  while (flag == 0 && std::chrono::steady_clock::now() < deadline)
    if (MPI_Test(&request_, &flag, MPI_STATUS_IGNORE) != MPI_SUCCESS) return;
}

Comm Comm::duplicate(MPI_Comm parent, const Comm* job) {
  Comm result;
  check(MPI_Comm_dup(parent, &result.comm_), "MPI_Comm_dup");
  check(MPI_Comm_set_errhandler(result.comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check(MPI_Comm_rank(result.comm_, &result.rank_), "MPI_Comm_rank");
  check(MPI_Comm_size(result.comm_, &result.size_), "MPI_Comm_size");
  std::vector<int> own(static_cast<size_t>(result.size_));
  std::iota(own.begin(), own.end(), 0);
  result.job_ranks_ = own;
  if (job == nullptr) return result;
  MPI_Group mine = MPI_GROUP_NULL, all = MPI_GROUP_NULL;
  check(MPI_Comm_group(result.comm_, &mine), "MPI_Comm_group");
  check(MPI_Comm_group(job->comm_, &all), "MPI_Comm_group");
  check(MPI_Group_translate_ranks(mine, result.size_, own.data(), all, result.job_ranks_.data()),
        "MPI_Group_translate_ranks");
  check(MPI_Group_free(&mine), "MPI_Group_free");
  check(MPI_Group_free(&all), "MPI_Group_free");
  result.label_ = "process set [" + numbers_text(result.job_ranks_) + "]: ";
  return result;
}

std::string Comm::text_of(const std::vector<int>& ranks) const {
  std::vector<int> numbers;
  for (const int rank : ranks) numbers.push_back(job_rank(rank));
  std::sort(numbers.begin(), numbers.end());
  return ranks_text(numbers);
}

std::string ranks_text(const std::vector<int>& ranks) {
  return (ranks.size() == 1 ? "rank " : "ranks ") + numbers_text(ranks);
}

Comm::Comm(Comm&& other) noexcept
    : comm_(std::exchange(other.comm_, MPI_COMM_NULL)),
      rank_(other.rank_),
      size_(other.size_),
      job_ranks_(std::move(other.job_ranks_)),
      label_(std::move(other.label_)) {}

Comm& Comm::operator=(Comm&& other) noexcept {
  comm_ = std::exchange(other.comm_, MPI_COMM_NULL);
  rank_ = other.rank_;
  size_ = other.size_;
  job_ranks_ = std::move(other.job_ranks_);
  label_ = std::move(other.label_);
  return *this;
}

Comm::~Comm() = default;

void Comm::release() {
  if (comm_ != MPI_COMM_NULL && !finalized()) check(MPI_Comm_free(&comm_), "MPI_Comm_free");
}

Request Comm::isend(const void* data, size_t nbytes, int peer, int tag) const {
  Request result;
  check(MPI_Isend(data, to_int(nbytes), MPI_BYTE, peer, tag, comm_, &result.request_), "MPI_Isend");
  return result;
}

Request Comm::irecv(void* data, size_t nbytes, int peer, int tag) const {
  Request result;
  result.receives_ = true;
  check(MPI_Irecv(data, to_int(nbytes), MPI_BYTE, peer, tag, comm_, &result.request_), "MPI_Irecv");
  return result;
}

std::optional<Message> Comm::poll(int tag) const {
  int flag = 0;
  MPI_Message handle;
  MPI_Status status;
  check(MPI_Improbe(MPI_ANY_SOURCE, tag, comm_, &flag, &handle, &status), "MPI_Improbe");
  if (flag == 0) return std::nullopt;
  int nbytes = 0;
  check(MPI_Get_count(&status, MPI_BYTE, &nbytes), "MPI_Get_count");
  Message message{status.MPI_SOURCE, std::string(static_cast<size_t>(nbytes), '\0')};
  check(MPI_Mrecv(message.bytes.data(), nbytes, MPI_BYTE, &handle, MPI_STATUS_IGNORE), "MPI_Mrecv");
  return message;
}

Topology find_topology(MPI_Comm comm) {
  Topology t{};
  check(MPI_Comm_rank(comm, &t.rank), "MPI_Comm_rank");
  check(MPI_Comm_size(comm, &t.size), "MPI_Comm_size");
  MPI_Comm local = MPI_COMM_NULL;
  check(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, t.rank, MPI_INFO_NULL, &local), "MPI_Comm_split_type");
  check(MPI_Comm_rank(local, &t.local_rank), "MPI_Comm_rank");
  check(MPI_Comm_size(local, &t.local_size), "MPI_Comm_size");
  int leader = t.rank;  // a node is named by its lowest rank
  check(MPI_Bcast(&leader, 1, MPI_INT, 0, local), "MPI_Bcast");
  check(MPI_Comm_free(&local), "MPI_Comm_free");

  struct Place {
    int leader, local_rank;
  };
  const Place mine{leader, t.local_rank};
  std::vector<Place> places(static_cast<size_t>(t.size));
  check(MPI_Allgather(&mine, 2, MPI_INT, places.data(), 2, MPI_INT, comm), "MPI_Allgather");
  std::map<int, int> node_sizes;
  for (const Place& place : places) {
    ++node_sizes[place.leader];
    if (place.local_rank != t.local_rank) continue;
    ++t.cross_size;
    if (place.leader < leader) ++t.cross_rank;
  }
  t.homogeneous = true;
  for (const auto& [node, ranks] : node_sizes) t.homogeneous &= ranks == t.local_size;
  return t;
}

namespace {

constexpr int kMeetingTag = 32767;  // the greatest that every MPI has
// For the words of those who are there to arrive.
constexpr auto kWordsTime = std::chrono::milliseconds(500);

// Who has come, as far as they have said so.
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
  // Takes the words that have arrived; whether there were any, ever.
  bool listen() {
    for (int flag = 0;;) {
      MPI_Status status;
      check(MPI_Iprobe(MPI_ANY_SOURCE, kMeetingTag, comm_, &flag, &status), "MPI_Iprobe");
      if (flag == 0) return heard_ > 0;
      take(status.MPI_SOURCE);
    }
  }
  // All are here: takes the words that are still on their way, so that the owner of `comm` meets none.
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

bool on_all_ranks(MPI_Comm comm, bool flag) {
  int all = flag ? 1 : 0;
  check(MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, comm), "MPI_Allreduce");
  return all == 1;
}

void require_mpi_threads() {
  int flag = 0;
  MPI_Initialized(&flag);
  if (flag == 0 || finalized())
    throw Error(ErrorCode::kInvalid, flag == 0 ? "MPI is not initialised" : "MPI is already finalised");
  int provided = MPI_THREAD_SINGLE;
  check(MPI_Query_thread(&provided), "MPI_Query_thread");
  if (provided != MPI_THREAD_MULTIPLE)
    throw Error(ErrorCode::kInvalid,
                "MPI was initialised without MPI_THREAD_MULTIPLE, which the background engine needs. Let mpi4py "
                "initialise MPI (its default asks for it), or call MPI_Init_thread with MPI_THREAD_MULTIPLE.");
}

std::string built_for_mpi() {
#if defined(OMPI_MAJOR_VERSION)
  return "Open MPI " + std::to_string(OMPI_MAJOR_VERSION) + "." + std::to_string(OMPI_MINOR_VERSION) + "." +
         std::to_string(OMPI_RELEASE_VERSION);
#elif defined(I_MPI_VERSION)
  return std::string("Intel MPI ") + I_MPI_VERSION;
#elif defined(MPICH_VERSION)
  return std::string("MPICH ") + MPICH_VERSION;  // also Cray MPICH, MVAPICH; Intel MPI has the same ABI
#else
  return "MPI " + std::to_string(MPI_VERSION) + "." + std::to_string(MPI_SUBVERSION);
#endif
}

std::string running_mpi() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  check(MPI_Get_library_version(text, &length), "MPI_Get_library_version");
  return {text, static_cast<size_t>(length)};
}

std::string running_mpi_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&MPI_Get_library_version), &info) == 0 || info.dli_fname == nullptr)
    return "unknown file";
  // A run path relative to this library comes with its "..".
  const std::filesystem::path found = info.dli_fname;
  std::error_code failed;
  const std::filesystem::path directory = std::filesystem::canonical(found.parent_path(), failed);
  return failed ? found.string() : (directory / found.filename()).string();
}

}  // namespace collective
