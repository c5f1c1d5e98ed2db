#include "engine/engine.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "base/float_mode.h"
#include "base/log.h"
#include "base/stalled.h"
#include "engine/backoff.h"
#include "messages/mpi_library.h"

namespace collective {
namespace {

constexpr auto kIdlePoll = std::chrono::milliseconds(100);

// Kind and payload.
std::pair<const char*, size_t> counted(const NamedSubmission& named) {
  const bool has_data = named.data.in != nullptr || named.data.out != nullptr;
  return {name_of(named.descriptor.kind), has_data ? named.data.count * size_of(named.descriptor.dtype) : 0};
}
std::pair<const char*, size_t> counted(const OrderedSubmission& ordered) { return counted(ordered.named); }
std::pair<const char*, size_t> counted(const BucketSubmission& run) { return {"bucket", run.nbytes}; }
std::pair<const char*, size_t> counted(const PairSubmission& pair) {
  return {pair.sends ? "send" : "recv", pair.descriptor.count() * size_of(pair.descriptor.dtype)};
}
std::pair<const char*, size_t> counted(const JoinSubmission&) { return {"join", 0}; }
std::pair<const char*, size_t> counted(const LedgerSubmission&) { return {"stragglers", 0}; }

}  // namespace

// Exclusive use of the groups while other threads may be driving: these make way at their next step.
class Engine::Claim {
 public:
  explicit Claim(Engine& engine) : engine_(engine), granted_(true) {
    ++engine_.claims_;
    engine_.driving_.lock();
  }
  Claim(Engine& engine, std::chrono::milliseconds patience) : engine_(engine) {
    ++engine_.claims_;
    // By the system's clock: the thread sanitizer of GCC 12 does not see a lock that is taken by the steady one.
    granted_ = engine_.driving_.try_lock_until(std::chrono::system_clock::now() + patience);
  }
  bool granted() const { return granted_; }
  ~Claim() {
    if (granted_) engine_.driving_.unlock();
    {
      const std::lock_guard lock(engine_.mutex_);
      --engine_.claims_;
    }
    engine_.wake_.notify_all();
    engine_.finished_.notify_all();
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;

 private:
  Engine& engine_;
  bool granted_;
};

Engine::Engine(MPI_Comm comm, const Limits& limits, const std::vector<int>& cores)
    : topology_((require_mpi_threads(), find_topology(comm))),
      limits_(limits),
      has_core_(topology_.local_size <= static_cast<int>(std::thread::hardware_concurrency())) {
  set_log_rank(topology_.rank);
  limits_.nccl = on_all_ranks(comm, limits.nccl);
  if (limits.nccl && !limits_.nccl) log_warning("NCCL is not used: COLLECTIVE_NCCL=1 is not set on all ranks");
  groups_.push_back(make_group(comm, {}));
  for (const Watch::Peer& peer : groups_.front()->processes()) watch_.add(peer);
  limits_.nccl = false;  // of other groups, see nccl.h
  thread_ = std::thread([this] { run(); });
  if (!cores.empty()) bind_thread(cores);
}

Engine::~Engine() {
  end_stall_reports();
  {
    const std::lock_guard lock(mutex_);
    stop_thread_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Engine::bind_thread(const std::vector<int>& cores) {
  const auto local = static_cast<size_t>(topology_.local_rank);
  cpu_set_t set;
  CPU_ZERO(&set);
  if (local < cores.size()) CPU_SET(static_cast<size_t>(cores[local]), &set);
  if (local >= cores.size() || pthread_setaffinity_np(thread_.native_handle(), sizeof set, &set) != 0)
    log_warning("the engine's thread is not bound: no such core, or no core for local rank " + std::to_string(local));
}

bool Engine::shares_memory() {
  const Claim claim(*this);
  return groups_.front()->shares_memory();
}

std::string Engine::device_way() {
  const Claim claim(*this);
  return groups_.front()->device_way();
}

std::unique_ptr<Group> Engine::make_group(MPI_Comm comm, const GroupOptions& options) {
  return std::make_unique<Group>(
      comm, limits_, timeline_, waits_,
      [this](Ticket& ticket, ErrorCode code, const std::string& text) { finish(ticket, code, text); },
      [this] { return doing(); }, groups_.empty() ? nullptr : groups_.front().get(), options);
}

size_t Engine::add_group(MPI_Comm comm, const GroupOptions& options) {
  auto group = make_group(comm, options);  // before the claim: it waits for the other ranks
  const Claim claim(*this);
  for (const Watch::Peer& peer : group->processes()) watch_.add(peer);
  groups_.push_back(std::move(group));
  return groups_.size() - 1;
}

void Engine::remove_group(size_t number) {
  const Claim claim(*this);
  Group& group = *groups_.at(number);
  if (!failed()) {
    group.leave();
    const auto give_up = end_of_patience();
    drive([&] { return group.over() || failed() || Clock::now() >= give_up; });
  }
  if (failed()) {
    const std::lock_guard lock(mutex_);
    throw *failure_;
  }
  if (!group.over()) throw Error(ErrorCode::kTimeout, group.label() + "a rank does not leave it: " + group.describe());
  group.release();
  forget(groups_[number]);
}

void Engine::forget(std::unique_ptr<Group>& group) {
  if (group->ledger() != nullptr) pages_.push_back(group->ledger()->page());
  group.reset();
}

std::optional<std::vector<LedgerPage>> Engine::ledgers(std::chrono::milliseconds patience) {
  const Claim claim(*this, patience);
  if (!claim.granted()) return std::nullopt;
  std::vector<LedgerPage> pages = pages_;
  for (const auto& group : groups_)
    if (group && group->ledger() != nullptr) pages.push_back(group->ledger()->page());
  return pages;
}

std::vector<std::shared_ptr<Ticket>> Engine::ask_ledgers() {
  std::vector<size_t> numbers;
  uint64_t question = 0;
  {
    const Claim claim(*this);
    question = ++questions_;
    for (size_t number = 0; number < groups_.size(); ++number)
      if (groups_[number] && !groups_[number]->is_dismissed()) numbers.push_back(number);
  }
  std::vector<std::shared_ptr<Ticket>> tickets;
  for (const size_t number : numbers)
    tickets.push_back(submit(number, "stragglers." + std::to_string(question), LedgerSubmission{}, false));
  return tickets;
}

void Engine::dismiss_group(size_t number) {
  const Claim claim(*this);
  if (groups_.at(number) == nullptr) return;
  take_submissions();  // those before this
  groups_[number]->dismiss();
}

// How long to wait for other ranks to leave: one whose engine has failed does not announce it.
Clock::time_point Engine::end_of_patience() const {
  const auto patience = std::min<std::chrono::duration<double>>(limits_.timeout, std::chrono::hours(24));
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(patience);
}

std::shared_ptr<Ticket> Engine::submit(size_t group, std::string name, Submission work, bool caller_waits) {
  auto ticket = std::make_shared<Ticket>();
  ticket->name = std::move(name);
  std::tie(ticket->kind, ticket->nbytes) = std::visit([](const auto& one) { return counted(one); }, work);
  ticket->group = group;
  ticket->is_question = std::holds_alternative<LedgerSubmission>(work);
  {
    const std::lock_guard lock(mutex_);
    if (failure_) throw *failure_;
    if (closed_) throw Error(ErrorCode::kShutdown, "'" + ticket->name + "': the runtime was shut down");
    if (!in_flight_.emplace(std::pair(group, ticket->name), ticket).second)
      throw Error(
          ErrorCode::kDuplicateName,
          "rank " + std::to_string(topology_.rank) + ": " + ticket->kind + " '" + ticket->name +
              "': an operation of this name is still in flight; wait for it first, or give this one another name");
    ticket->since = Clock::now();
    tally_.submitted(ticket->since);
    queue_.push_back({ticket, std::move(work)});
    queued_.store(queue_.size(), std::memory_order_release);
  }
  if (!caller_waits) wake_.notify_all();
  return ticket;
}

bool Engine::wait(const Ticket& ticket, double seconds) {
  if (ticket.finished()) return true;
  Clock::time_point begin;
  {
    const std::lock_guard lock(mutex_);
    begin = Clock::now();
    ++drivers_waiting_;
    tally_.wait_begins(begin);
  }
  const auto deadline = begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  if (claims_.load() == 0 && driving_.try_lock()) {
    // Looked at under driving_: shutdown() has it to the end, and nothing may be driven after.
    if (!closed_)
      drive(
          [&] { return ticket.finished() || claims_.load(std::memory_order_relaxed) > 0 || Clock::now() >= deadline; },
          true);
    driving_.unlock();
    {
      const std::lock_guard lock(mutex_);
      --drivers_waiting_;
      tally_.wait_ends();
    }
    if (busy_.load(std::memory_order_relaxed) || queued_.load(std::memory_order_relaxed) > 0) wake_.notify_all();
  } else {
    std::unique_lock lock(mutex_);
    --drivers_waiting_;
    ++waiting_;
    wake_.notify_all();  // the thread may have gone to sleep just now, to keep out of our way
    finished_.wait_until(lock, deadline, [&] { return ticket.finished(); });
    --waiting_;
    tally_.wait_ends();
  }
  return ticket.finished();
}

std::shared_ptr<Ticket> Engine::take_finished() {
  std::unique_lock lock(mutex_);
  reported_.wait(lock, [this] { return !reports_.empty() || no_more_reports_; });
  if (reports_.empty()) return nullptr;
  std::shared_ptr<Ticket> ticket = std::move(reports_.front());
  reports_.pop_front();
  return ticket;
}

bool Engine::report(Ticket& ticket) {
  const std::lock_guard lock(mutex_);
  if (ticket.finished()) return false;
  ticket.reported = true;
  return true;
}

bool Engine::shutdown() {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return !failure_;
    closed_ = true;
    ++drivers_waiting_;
  }
  bool released = false;
  ++claims_;
  driving_.lock();
  const auto over = [this] {
    return std::all_of(groups_.begin(), groups_.end(), [](const auto& group) { return !group || group->over(); });
  };
  if (!failed()) {
    for (const auto& group : groups_)
      if (group) group->leave();
    const auto give_up = end_of_patience();
    const auto since = Clock::now();
    auto warned = since;
    drive([&] {
      warn_of_remaining(since, warned);
      return over() || Clock::now() >= give_up;
    });
  }
  const std::string missing = failed() || over() ? "" : groups_.front()->located(groups_.front()->remaining());
  {
    const std::lock_guard lock(mutex_);
    stop_thread_ = true;
    --drivers_waiting_;
  }
  wake_.notify_all();
  if (!failed() && over()) {
    for (const auto& group : groups_)
      if (group) group->release();
    released = true;
  } else {
    // Nothing will be driven any more, so whatever is in flight must end now.
    fail_everything(ErrorCode::kTimeout, "the runtime was shut down while this was in flight, and a rank was missing");
  }
  driving_.unlock();
  --claims_;
  {
    const std::lock_guard lock(mutex_);
    no_more_reports_ = true;
  }
  reported_.notify_all();
  whereabouts_.end();
  thread_.join();
  end_stall_reports();
  if (!missing.empty())
    throw Error(ErrorCode::kTimeout,
                "shutdown: " + missing + " did not end or call shutdown() within " + seconds_text(limits_.timeout));
  return released;
}

// After 1, 2, 4, ... times the interval; only the first of the waiting ranks warns.
void Engine::warn_of_remaining(Clock::time_point since, Clock::time_point& warned) const {
  const auto now = Clock::now();
  if (now - warned < (warned - since) + limits_.stall_warning) return;
  warned = now;
  const std::vector<int> remaining = groups_.front()->remaining();
  for (int rank = 0; rank < topology_.rank; ++rank)
    if (std::find(remaining.begin(), remaining.end(), rank) == remaining.end()) return;
  if (!remaining.empty())
    log_warning("stalled: shutdown waits for " + groups_.front()->located(remaining) + " to end or call it since " +
                seconds_text(now - since));
}

void Engine::run() {
  // The default slack of 50 us would double the short sleeps.
  prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
  std::unique_lock lock(mutex_);
  while (!stop_thread_) {
    if (failure_) {
      wake_.wait(lock, [this] { return stop_thread_; });
      break;
    }
    wake_.wait_for(lock, kIdlePoll, [this] {
      return stop_thread_ || (drivers_waiting_ == 0 && claims_.load() == 0 &&
                              (busy_.load(std::memory_order_relaxed) || !queue_.empty()));
    });
    if (stop_thread_ || drivers_waiting_ > 0 || claims_.load() > 0) continue;
    lock.unlock();
    if (driving_.try_lock()) {
      // Once closed, it is shutdown() that drives.
      drive([this] {
        return closed_ || claims_.load(std::memory_order_relaxed) > 0 ||
               (queued_.load(std::memory_order_relaxed) == 0 && !any_busy());
      });
      driving_.unlock();
    }
    lock.lock();
  }
}

template <typename Enough>
void Engine::drive(const Enough& enough, bool by_caller) {
  const FloatMode mode;
  Backoff backoff(has_core_, topology_.local_size < topology_.size, by_caller);
  for (;;) {
    bool moved = false;
    try {
      moved = progress();
    } catch (const PeerStopped& error) {
      stop_with(error.code, error.what(), true);
      return;
    } catch (const Error& error) {
      stop_with(error.code, error.what(), false);
      return;
    } catch (const std::exception& error) {
      stop_with(ErrorCode::kInternal, error.what(), false);
      return;
    }
    busy_.store(any_busy(), std::memory_order_relaxed);
    if (enough()) return;
    if (moved) {
      backoff.reset();
      continue;
    }
    const auto pause = backoff.pause();
    if (pause.count() == 0) continue;
    std::unique_lock lock(mutex_);
    wake_.wait_for(lock, pause, [this] { return !queue_.empty() || stop_thread_; });
  }
}

std::optional<Inquiry::Doing> Engine::doing() {
  bool waits = false;
  {
    const std::lock_guard lock(mutex_);
    waits = waiting_ > 0 || drivers_waiting_ > 0;
  }
  if (waits) {
    std::pair<Clock::time_point, std::string> oldest{Clock::time_point::max(), ""};
    for (const auto& group : groups_)
      if (group) oldest = std::min(oldest, group->oldest());
    if (!oldest.second.empty()) return Inquiry::Doing{oldest.second, ""};
  }
  std::optional<std::string> at = whereabouts_.look();
  if (!at) return std::nullopt;
  return Inquiry::Doing{"", std::move(*at)};
}

bool Engine::any_busy() const {
  return std::any_of(groups_.begin(), groups_.end(), [](const auto& group) { return group && group->busy(); });
}

bool Engine::failed() {
  const std::lock_guard lock(mutex_);
  return failure_.has_value();
}

bool Engine::progress() {
  const bool took = queued_.load(std::memory_order_acquire) > 0;
  if (took) take_submissions();
  bool moved = took;
  if (const auto now = Clock::now(); now >= next_look_) {
    next_look_ = now + kIdlePoll;
    look_for_deaths();
  }
  for (auto& group : groups_) {
    if (!group) continue;
    try {
      moved |= group->progress();
      if (group->is_dismissed() && group->over()) {
        group->release();
        forget(group);
        continue;
      }
    } catch (const PeerStopped&) {
      throw;
    } catch (const Error& error) {
      throw Error(error.code, group->label() + error.what());
    } catch (const std::exception& error) {
      throw Error(ErrorCode::kInternal, group->label() + error.what());
    }
  }
  return moved;
}

// Finds processes that have ended without the word that their rank leaves. That word may have arrived and not have been
// read yet, so a process counts as dead only at the second look.
void Engine::look_for_deaths() {
  std::vector<int> ended;
  for (const Watch::Peer& peer : watch_.ended()) {
    if (groups_.front()->has_left(peer.rank)) continue;
    if (std::find(ended_.begin(), ended_.end(), peer.rank) != ended_.end())
      throw Error(ErrorCode::kInternal,
                  "rank " + std::to_string(peer.rank) + " (process " + std::to_string(peer.pid) + ") has died");
    ended.push_back(peer.rank);
  }
  ended_ = std::move(ended);
}

void Engine::take_submissions() {
  std::vector<Work> work;
  {
    const std::lock_guard lock(mutex_);
    work.swap(queue_);
    queued_.store(0, std::memory_order_relaxed);
  }
  for (Work& item : work)
    std::visit(
        [&](auto& submission) {
          Group* group = groups_[item.ticket->group].get();
          if (group != nullptr)
            group->submit(std::move(item.ticket), std::move(submission));
          else
            finish(*item.ticket, ErrorCode::kShutdown, "'" + item.ticket->name + "': its process set was removed");
        },
        item.submission);
}

void Engine::finish(Ticket& ticket, ErrorCode code, const std::string& text) {
  const std::lock_guard lock(mutex_);
  const bool first = in_flight_.erase({ticket.group, ticket.name}) > 0;
  if (first) tally_.finished(ticket, code);
  ticket.code = code;
  ticket.text = text;
  ticket.done.store(true, std::memory_order_release);
  if (waiting_ > 0) finished_.notify_all();
  if (!ticket.reported || !first) return;
  reports_.push_back(ticket.shared_from_this());
  reported_.notify_one();
}

void Engine::stop_with(ErrorCode code, const std::string& text, bool is_told) noexcept {
  if (!is_told) log_error("the engine stops: " + text);
  try {
    if (!is_told) groups_.front()->tell_stopped(code, text);
    groups_.front()->flush();
  } catch (const std::exception& error) {  // MPI may be what has failed
    log_warning(std::string("the other ranks could not be told: ") + error.what());
  }
  {
    const std::lock_guard lock(mutex_);
    failure_ = Error(code, "the engine has stopped: " + text);
  }
  fail_everything(code, text);
  busy_.store(false, std::memory_order_relaxed);
}

void Engine::fail_everything(ErrorCode code, const std::string& text) {
  std::vector<Work> work;
  {
    const std::lock_guard lock(mutex_);
    work.swap(queue_);
    queued_.store(0, std::memory_order_relaxed);
  }
  for (const Work& item : work) finish(*item.ticket, code, text);
  for (const auto& group : groups_)
    if (group) group->fail_all(code, text);
  // Tickets that were in neither place when the error came.
  std::map<std::pair<size_t, std::string>, std::shared_ptr<Ticket>> lost;
  {
    const std::lock_guard lock(mutex_);
    lost = in_flight_;
  }
  for (const auto& [key, ticket] : lost) finish(*ticket, code, text);
}

std::optional<RankWaits> Engine::waits(std::chrono::milliseconds patience) {
  const auto is_waited_for = [this] {
    const std::lock_guard lock(mutex_);
    return waiting_ > 0 || drivers_waiting_ > 0;
  };
  RankWaits waits{is_waited_for(), closed_, {}};
  const Claim claim(*this, patience);  // sends a caller that drives out of wait() for a moment
  if (!claim.granted()) return closed_ ? std::optional(waits) : std::nullopt;  // shutdown() makes no way
  for (const auto& group : groups_)
    if (group) waits.groups.push_back(group->waits());
  waits.is_waited_for |= is_waited_for();
  return waits;
}

void Engine::report_stalls() {
  if (!reports_stalls_.exchange(true))
    set_told_of_stalls([this](const std::string& text) { stall_reports_.put(text); });
}

void Engine::end_stall_reports() {
  if (reports_stalls_.exchange(false)) set_told_of_stalls(nullptr);
  stall_reports_.end();
}

Statistics Engine::statistics() {
  const std::lock_guard lock(mutex_);
  Statistics all = tally_.read();
  all.state = failure_ ? failure_->what() : closed_ ? "shut down" : "running";
  const auto oldest = std::min_element(in_flight_.begin(), in_flight_.end(),
                                       [](const auto& a, const auto& b) { return a.second->since < b.second->since; });
  if (oldest == in_flight_.end()) return all;
  const Ticket& ticket = *oldest->second;
  const std::chrono::duration<double> age = Clock::now() - ticket.since;
  all.oldest = {ticket.name, ticket.kind, age.count()};
  return all;
}

std::string Engine::describe() {
  std::string text =
      "collective: rank " + std::to_string(topology_.rank) + " of " + std::to_string(topology_.size) + "\n";
  const Claim claim(*this, std::chrono::seconds(2));
  if (!claim.granted()) return text + "  the driver is inside MPI or a long copy and does not answer\n";
  std::string state;
  for (const auto& group : groups_)
    if (group) state += group->describe();
  return text + (state.empty() ? "  nothing in flight\n" : state);
}

}  // namespace collective
