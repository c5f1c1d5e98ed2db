#include "messages/comm.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>
#include <utility>

#include "messages/mpi_call.h"

namespace collective {
namespace {

int to_int(size_t nbytes) {
  // The algorithms send segments; a message this long would be a bug of ours.
  if (nbytes > static_cast<size_t>(std::numeric_limits<int>::max()))
    throw Error(ErrorCode::kInternal, "a message of " + std::to_string(nbytes) + " bytes was not segmented");
  return static_cast<int>(nbytes);
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
  if (request_ == MPI_REQUEST_NULL || mpi_is_finalized()) return;
  if (!receives_) {
    MPI_Request_free(&request_);
    return;
  }
  MPI_Cancel(&request_);
  // A receive that has been matched cannot be cancelled, and completes when its data has arrived: wait for that
  // briefly, but not for ever on a peer that died half way.
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
  result.order_.resize(static_cast<size_t>(result.size_));
  std::iota(result.order_.begin(), result.order_.end(), 0);
  result.position_ = result.rank_;
  if (job == nullptr) {
    result.names_ = RankNames::of_job(result.size_);
    return result;
  }
  std::vector<int> own(static_cast<size_t>(result.size_)), job_ranks(own.size());
  std::iota(own.begin(), own.end(), 0);
  MPI_Group mine = MPI_GROUP_NULL, all = MPI_GROUP_NULL;
  check(MPI_Comm_group(result.comm_, &mine), "MPI_Comm_group");
  check(MPI_Comm_group(job->comm_, &all), "MPI_Comm_group");
  check(MPI_Group_translate_ranks(mine, result.size_, own.data(), all, job_ranks.data()), "MPI_Group_translate_ranks");
  check(MPI_Group_free(&mine), "MPI_Group_free");
  check(MPI_Group_free(&all), "MPI_Group_free");
  result.names_ = RankNames::of_process_set(std::move(job_ranks));
  return result;
}

Comm::Comm(Comm&& other) noexcept
    : comm_(std::exchange(other.comm_, MPI_COMM_NULL)),
      rank_(other.rank_),
      size_(other.size_),
      names_(std::move(other.names_)),
      order_(std::move(other.order_)),
      position_(other.position_),
      crosses_network_(other.crosses_network_) {}

Comm& Comm::operator=(Comm&& other) noexcept {
  comm_ = std::exchange(other.comm_, MPI_COMM_NULL);
  rank_ = other.rank_;
  size_ = other.size_;
  names_ = std::move(other.names_);
  order_ = std::move(other.order_);
  position_ = other.position_;
  crosses_network_ = other.crosses_network_;
  return *this;
}

Comm::~Comm() = default;

void Comm::release() {
  if (comm_ != MPI_COMM_NULL && !mpi_is_finalized()) check(MPI_Comm_free(&comm_), "MPI_Comm_free");
}

void Comm::set_order(std::vector<int> order) {
  order_ = std::move(order);
  position_ = static_cast<int>(std::find(order_.begin(), order_.end(), rank_) - order_.begin());
}

Request Comm::isend(const void* data, size_t nbytes, int peer, int tag) const {
  Request result;
  check(MPI_Isend(data, to_int(nbytes), MPI_BYTE, peer, tag, comm_, &result.request_), "MPI_Isend");
  return result;
}

Request Comm::irecv(void* data, size_t nbytes, int peer, int tag) const {
  Request result;
  result.receives_ = true;
  const int source = peer < 0 ? MPI_ANY_SOURCE : peer;
  check(MPI_Irecv(data, to_int(nbytes), MPI_BYTE, source, tag, comm_, &result.request_), "MPI_Irecv");
  return result;
}

bool Inbox::receive_next() {
  int flag = 0;
  MPI_Message handle;
  MPI_Status status;
  check(MPI_Improbe(MPI_ANY_SOURCE, tag_, comm_->comm_, &flag, &handle, &status), "MPI_Improbe");
  if (flag == 0) return false;
  int nbytes = 0;
  check(MPI_Get_count(&status, MPI_BYTE, &nbytes), "MPI_Get_count");
  Incoming& next = incoming_.emplace_back();
  next.message = {status.MPI_SOURCE, std::string(static_cast<size_t>(nbytes), '\0')};
  next.request.receives_ = true;
  check(MPI_Imrecv(next.message.bytes.data(), nbytes, MPI_BYTE, &handle, &next.request.request_), "MPI_Imrecv");
  return true;
}

std::optional<Message> Inbox::poll() {
  if (comm_->size() == 1) return std::nullopt;
  while (receive_next()) continue;
  for (auto it = incoming_.begin(); it != incoming_.end(); ++it) {
    const int source = it->message.source;
    const bool is_first =
        std::none_of(incoming_.begin(), it, [&](const Incoming& before) { return before.message.source == source; });
    if (!is_first || !it->request.done()) continue;
    Message message = std::move(it->message);
    incoming_.erase(it);
    return message;
  }
  return std::nullopt;
}

}  // namespace collective
