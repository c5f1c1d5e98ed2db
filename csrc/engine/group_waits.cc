// What a group waits for: who is late, who has left, and what is told of it.
#include <algorithm>
#include <utility>

#include "base/log.h"
#include "base/stalled.h"
#include "engine/group.h"

namespace collective {
namespace {

constexpr auto kCheckEvery = std::chrono::milliseconds(100);
// How long a message may still take that was sent before another one on another path.
constexpr auto kArrivalTime = std::chrono::milliseconds(500);

}  // namespace

void Group::check_waits(Clock::time_point now) {
  next_check_ = now + kCheckEvery;
  inquiry_.progress(
      [this](const Inquiry::Question& about) -> Inquiry::Known {
        if (about.bucket == Inquiry::kOrder) return {order_.submitted(), order_.described(about.run)};
        const std::vector<uint32_t>& started = plans_.started();
        return {about.bucket < started.size() ? started[about.bucket] : 0, ""};
      },
      doing_, [this](int peer, const Inquiry::Doing& doing) { agreement_.set_doing(peer, doing.text()); });
  for (const int peer : agreement_.take_wanted()) {
    if (peer == rank())
      asks_itself_ = true;
    else
      inquiry_.ask_doing(peer);
  }
  if (asks_itself_)
    if (const auto here = doing_()) {
      agreement_.set_doing(rank(), here->text());
      asks_itself_ = false;
    }
  tell_let_go();
  if (waits_.is_due(now) && !left_) tell_waits(now);
  // Whether the wait goes on; text: for what. A time-out finishes the ticket that `take` gives.
  const auto goes_on = [&](Wait& wait, const auto& text, const auto& take) {
    switch (wait.look(now, limits_)) {
      case Wait::Due::kNothing: return true;
      case Wait::Due::kWarning: log_stalled(label() + "stalled: " + text()); return true;
      case Wait::Due::kTimeout: break;
    }
    refuse(*take(), ErrorCode::kTimeout, text() + ". It did not get there within " + seconds_text(limits_.timeout));
    return false;
  };
  std::erase_if(not_ready_, [&](Pending& pending) {
    return !goes_on(
        pending.wait, [&] { return pending.what() + ": " + pending.waits_text(); }, [&] { return pending.ticket; });
  });
  if (join_.is_held_back() && not_ready_.empty())
    goes_on(join_.wait(), [] { return std::string("join: ") + Join::kWaits; }, [&] { return join_.take(); });
  std::erase_if(asking_, [&](Asking& asking) {
    return !goes_on(
        asking.wait, [] { return std::string("stragglers: waits for rank 0's engine"); },
        [&] { return asking.ticket; });
  });
  const Pending* const oldest = oldest_pending();
  const std::string what = oldest == nullptr ? "" : oldest->what();
  stalls_.look_at_coordinator(oldest == nullptr ? nullptr : &what, oldest == nullptr ? now : oldest->wait.since(), now);
  for (size_t i = 0; i < running_.size();) {
    const Running& running = running_[i];
    const bool lost = running.alone != Clock::time_point{} && now - running.alone >= kArrivalTime;
    if (lost && !running.operation->under_way())
      give_up_on(i, running.peer.value_or(departed_.back().first));
    else
      ++i;
  }
  stalls_.look_at(running_, now, [this](uint64_t turn) { return order_.described(turn); });
  // What waits behind another operation that runs is told by that.
  const bool runs = std::any_of(running_.all().begin(), running_.all().end(), [](const Running& r) { return r.turn; });
  if (Order::Entry* const first = order_.first(); first != nullptr && !runs)
    stalls_.look_at(*first, [this] { return order_.state(); }, now);
}

// Of those that wait for the coordinator's word.
const Group::Pending* Group::oldest_pending() const {
  const Pending* oldest = nullptr;
  for (const auto& [name, pending] : pending_)
    if (!pending.agreed && (oldest == nullptr || pending.wait.since() < oldest->wait.since())) oldest = &pending;
  return oldest;
}

std::vector<int> Group::remaining() const {
  std::vector<int> ranks;
  for (int peer = 0; peer < size(); ++peer)
    if (peer != rank() && !has_left(control_.names().job_rank(peer))) ranks.push_back(peer);
  return ranks;
}

bool Group::has_left(int job_rank) const {
  return std::any_of(departed_.begin(), departed_.end(),
                     [&](const auto& departed) { return control_.names().job_rank(departed.first) == job_rank; });
}

std::vector<Watch::Peer> Group::processes() const {
  std::vector<Watch::Peer> peers;
  const SharedMemory* const memory = memory_ ? &*memory_ : nodes_ ? nodes_->memory.get() : nullptr;
  for (int peer = 0; memory != nullptr && peer < memory->size(); ++peer)
    if (peer != memory->rank())
      peers.push_back({memory->job_ranks()[static_cast<size_t>(peer)], memory->pids()[static_cast<size_t>(peer)]});
  return peers;
}

std::string Group::left_text(int peer) const {
  return control_.names().text_of(peer) +
         " has shut down (its script ended, or it called shutdown()) before it took part";
}

void Group::peer_left(const Decision& decision) {
  if (decision.rank == rank()) return;
  departed_.emplace_back(decision.rank, decision.started);
  if (join_.is_waiting()) refuse(*join_.take(), ErrorCode::kShutdown, "join: " + left_text(decision.rank));
  if (ordered_)
    for (const Order::Entry& entry : order_.take_from(turns_of(decision.started) + 1))
      refuse(*entry.ticket, ErrorCode::kShutdown, entry.what() + ": " + left_text(decision.rank));
  for (size_t i = 0; i < running_.size();) {
    Running& running = running_[i];
    // What a peer sent before it left may arrive after the word that it has left.
    if (running.peer == decision.rank || (running.from_any && all_others_left())) running.alone = Clock::now();
    const auto& of = running.of_bucket;
    if (running.turn && turns_of(decision.started) < *running.turn) {
      give_up_on(i, decision.rank);
      continue;
    }
    if (of && (of->bucket >= decision.started.size() || decision.started[of->bucket] < of->run))
      give_up_on(i, decision.rank);
    else
      ++i;
  }
}

void Group::give_up_on(size_t i, int peer) {
  const std::string text = label() + running_[i].what + ": " + left_text(peer);
  running_.give_up(i, ErrorCode::kShutdown, text);
}

void Group::fail_all(ErrorCode code, const std::string& text) {
  for (const Pending& waiting : not_ready_) finish_(*waiting.ticket, code, text);
  not_ready_.clear();
  for (auto& [name, pending] : pending_) finish_(*pending.ticket, code, text);
  pending_.clear();
  for (const Order::Entry& entry : order_.take_from(0)) finish_(*entry.ticket, code, text);
  running_.give_all_up(code, text);
  if (join_.is_waiting()) finish_(*join_.take(), code, text);
  for (const Asking& asking : std::exchange(asking_, {})) finish_(*asking.ticket, code, text);
  held_back_.clear();
  agreement_.hang_up();
}

std::pair<Clock::time_point, std::string> Group::oldest() const {
  std::pair<Clock::time_point, std::string> oldest{Clock::time_point::max(), ""};
  const auto look_at = [&](Clock::time_point since, const std::string& what) {
    if (since < oldest.first) oldest = {since, label() + what};
  };
  for (const Running& running : running_.all())
    if (!running.tickets.empty()) look_at(running.since, running.what);
  for (const Pending& waiting : not_ready_) look_at(waiting.wait.since(), waiting.what() + ": " + waiting.waits_text());
  for (const auto& [name, pending] : pending_) look_at(pending.wait.since(), pending.what());
  for (const Order::Entry& entry : order_.waiting()) look_at(entry.wait.since, entry.what());
  if (join_.is_waiting()) look_at(join_.wait().since(), "join");
  return oldest;
}

GroupWaits Group::waits() const {
  using Phase = InFlight::Phase;
  GroupWaits waits{
      label(),  identity_, control_.names().job_ranks(), plans_.started(), order_.submitted(), join_.is_waiting(),
      leaving_, {}};
  const auto add = [&](InFlight in_flight) { waits.in_flight.push_back(std::move(in_flight)); };
  const auto turn = [](uint64_t number) { return "turn " + std::to_string(number); };
  for (const Pending& waiting : not_ready_)
    add({"", waiting.what(), waiting.waits_text(), Phase::kNotReady, waiting.wait.since()});
  if (join_.is_waiting())
    add({"join", "join", join_.is_held_back() ? Join::kWaits : "waits for all ranks to join",
         join_.is_held_back() ? Phase::kNotReady : Phase::kSubmitted, join_.wait().since()});
  for (const Asking& asking : asking_)
    add({"", "stragglers", "waits for rank 0's engine", Phase::kAgreed, asking.wait.since()});
  for (const auto& [name, pending] : pending_) {
    InFlight in_flight{pending.what(), pending.what(), "", pending.agreed ? Phase::kAgreed : Phase::kSubmitted,
                       pending.wait.since()};
    if (pending.turn > 0) in_flight.key = turn(in_flight.run = pending.turn);
    add(std::move(in_flight));
  }
  for (const Order::Entry& entry : order_.waiting()) {
    const bool is_first = &entry == &order_.waiting().front();
    InFlight in_flight{turn(entry.turn), entry.what(), is_first ? order_.state() : "", Phase::kSubmitted,
                       entry.wait.since};
    in_flight.run = entry.turn;
    add(std::move(in_flight));
  }
  for (const Running& running : running_.all()) {
    InFlight in_flight{"", running.what, running.operation->describe(), Phase::kRunning, running.since};
    if (running.turn) in_flight.key = turn(in_flight.run = *running.turn);
    if (running.execution && !running.turn) in_flight.key = running.what;
    if (running.peer) in_flight.peer = control_.names().job_rank(*running.peer);
    if (running.of_bucket) {
      in_flight.bucket = running.of_bucket->bucket;
      in_flight.run = running.of_bucket->run;
      in_flight.key = "bucket " + std::to_string(*in_flight.bucket) + " run " + std::to_string(in_flight.run);
    }
    add(std::move(in_flight));
  }
  return waits;
}

std::string Group::describe() const {
  std::string text;
  const auto now = Clock::now();
  for (const InFlight& in_flight : waits().in_flight) {
    const auto age = std::chrono::duration_cast<std::chrono::milliseconds>(now - in_flight.since).count();
    const char* phase = "submitted";
    if (in_flight.phase == InFlight::Phase::kAgreed) phase = "agreed and held back, submitted";
    if (in_flight.phase == InFlight::Phase::kRunning) phase = "runs, started";
    text += "  " + in_flight.what + ": " + phase + " " + std::to_string(age) + " ms ago" +
            (in_flight.state.empty() ? "" : ": " + in_flight.state) + "\n";
  }
  const std::string waiting = agreement_.describe();
  if (!waiting.empty()) text += "  this rank coordinates; not yet submitted everywhere:\n" + waiting;
  return text.empty() || label().empty() ? text : label() + "\n" + text;
}

}  // namespace collective
