#include "engine/group.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <utility>

#include "base/log.h"
#include "engine/operations.h"
#include "engine/staging.h"
#include "messages/pair.h"
#include "messages/topology.h"
#include "node/shared_memory_creation.h"

namespace collective {
namespace {

// Tags of the data communicator. Agreed operations take turns in the first half: they start in the same order on all
// ranks, and messages of one tag stay in order, so a tag may be used again before its last use is over on other ranks.
// On this rank it must be over, for operations post receives ahead: execution is held back when the tags run out.
// Pairs have two tags each, a channel has one of its own. 32767 is the largest tag that every MPI has.
// (Tags of the control communicator are inquiry.cc's and these two.)
constexpr int kMailTag = 1;  // and 2
constexpr int kMemoryTag = 16;
constexpr int kAgreedTags = 8192;
constexpr int kFirstPairTag = kAgreedTags;
constexpr int kFirstChannelTag = kFirstPairTag + 2 * kPairTags;
constexpr uint32_t kMostChannels = 32767 - kFirstChannelTag;

constexpr const char* kJoinWaits = "join: waits for what its user has queued on a device before";

// In a rank's part of the node's memory.
constexpr size_t kDevicesAt = Lane::nbytes(), kMailAt = kDevicesAt + Devices::kHostBytes;

// Of the host's memory, that agreed operations on devices take at a time; the last one may exceed it.
constexpr size_t kMostPageLocked = size_t{256} << 20;

constexpr std::chrono::duration<double> kLongestCreation = std::chrono::hours(1);
constexpr auto kCheckEvery = std::chrono::milliseconds(100);
// The coordinator reports a time-out; a rank that does not even hear from it gives up this much later.
constexpr auto kCoordinatorGrace = std::chrono::seconds(5);
// Between asking the others about a stalled channel and telling what they answered; and for a message to arrive that
// was sent before another one, which went another way.
constexpr auto kAnswerTime = std::chrono::milliseconds(500);

// What is being handled as an Error that names the operation.
[[noreturn]] void throw_for(const std::string& what) {
  try {
    throw;
  } catch (const Error& error) {
    throw Error(error.code, what + ": " + error.what());
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kInternal, what + ": no memory");
  } catch (const std::exception& error) {
    throw Error(ErrorCode::kInternal, what + ": " + error.what());
  }
}

}  // namespace

Group::Group(MPI_Comm comm, const Limits& limits, Timeline& timeline, Finish finish, WaitsFor waits_for,
             const Group* all)
    : control_(Comm::duplicate(comm, all == nullptr ? nullptr : &all->control_)),
      data_(Comm::duplicate(comm, all == nullptr ? nullptr : &all->control_)),
      agreement_(control_.rank(), control_.names(), limits, kMostChannels,
                 std::make_unique<MpiMail>(control_, kMailTag)),
      inquiry_(control_),
      limits_(limits),
      timeline_(&timeline),
      finish_(std::move(finish)),
      waits_for_(std::move(waits_for)),
      devices_(data_, limits.nccl),
      channels_(data_, pool_, kFirstChannelTag) {
  // One rank's setting is enough to switch it off.
  if (size() > 1 && on_all_ranks(comm, limits.shared_memory) && find_topology(comm).local_size == size())
    share_memory();
}

void Group::share_memory() {
  std::string why;
  memory_ = try_share_memory(control_, kMemoryTag, kMailAt + NodeMail::nbytes(size()),
                             std::chrono::ceil<std::chrono::seconds>(std::min(limits_.timeout, kLongestCreation)), why);
  if (memory_) {
    lane_ = std::make_unique<Lane>(*memory_, 0);
    devices_.use(*memory_, kDevicesAt);
    agreement_.use(std::make_unique<NodeMail>(*memory_, kMailAt));
    return;
  }
  static std::atomic<bool> told{false};  // one warning for all process sets: the reason is that of the node
  if (!told.exchange(true) && rank() == 0)
    log_warning("the ranks of this node use MPI messages, which is slower: they cannot share memory: " + why);
}

void Group::submit(std::shared_ptr<Ticket> ticket, NamedSubmission submission) {
  if (submission.mark != nullptr && !submission.mark->reached())
    not_ready_.push_back({std::move(ticket), std::move(submission), Clock::now()});
  else
    submit_ready(std::move(ticket), std::move(submission));
}

std::string Group::Pending::waits_text() const {
  return std::string(name_of(submission.descriptor.kind)) + " '" + ticket->name +
         "': waits for what its user has queued on device " + std::to_string(submission.mark->device().number());
}

bool Group::submit_what_is_ready() {
  bool moved = false;
  for (size_t i = 0; i < not_ready_.size();) {
    if (!not_ready_[i].submission.mark->reached()) {
      ++i;
      continue;
    }
    Pending ready = std::move(not_ready_[i]);
    not_ready_.erase(not_ready_.begin() + static_cast<std::ptrdiff_t>(i));
    submit_ready(std::move(ready.ticket), std::move(ready.submission));
    moved = true;
  }
  // Not before the results of its buckets have been fetched and used, for the others may want to run them again.
  if (join_ != nullptr && !join_told_ && not_ready_.empty() &&
      std::all_of(join_marks_.begin(), join_marks_.end(), [](const auto& mark) { return mark->reached(); })) {
    join_marks_.clear();
    join_told_ = true;
    agreement_.join();
  }
  return moved;
}

void Group::submit_ready(std::shared_ptr<Ticket> ticket, NamedSubmission submission) {
  const std::string name = ticket->name;
  if (submission.descriptor.kind == Kind::kChannel)
    tell_let_go();  // first, so that new channels can have these numbers
  agreement_.submit(name, submission.descriptor, submission.rows, submission.recurring);
  pending_.emplace(name, Pending{std::move(ticket), std::move(submission), Clock::now()});
}

void Group::tell_let_go() {
  if (leaving_) return;
  for (const uint32_t first : channels_.take_let_go()) agreement_.let_go(first);
}

void Group::submit(std::shared_ptr<Ticket> ticket, ChannelSubmission submission) {
  const uint32_t channel = submission.channel;
  if (const int peer = left_before(channel); peer >= 0)
    refuse(*ticket, ErrorCode::kShutdown, "bucket '" + ticket->name + "': " + left_text(peer));
  else
    start(std::move(ticket), channel, channels_.start(std::move(submission)));
}

// A rank that has left without the channel's next run; -1: none.
int Group::left_before(uint32_t channel) const {
  for (const auto& [peer, started] : departed_)
    if (channel >= started.size() || started[channel] <= channels_.started()[channel]) return peer;
  return -1;
}

void Group::start(std::shared_ptr<Ticket> ticket, uint32_t channel, Channels::Run run) {
  Running running;
  running.what = "bucket '" + ticket->name + "'";
  running.phase = "bucket";
  running.since = Clock::now();
  running.channel = channel;
  running.run = channels_.started()[channel];
  running.keep = std::move(run.keep);
  running.tickets.push_back(std::move(ticket));
  running.operation = std::move(run.operation);
  for (const int peer : joined_) inquiry_.demand(peer, channel, channels_.plan_of(channel), running.run);
  running_.push_back(std::move(running));
}

void Group::submit(std::shared_ptr<Ticket> ticket, PairSubmission submission) {
  for (const auto& [peer, started] : departed_)
    if (peer == submission.peer) {
      refuse(*ticket, ErrorCode::kShutdown, std::string(submission.sends ? "send: " : "recv: ") + left_text(peer));
      return;
    }
  Running running;
  running.peer = submission.peer;
  running.what = (submission.sends ? "send to " : "recv from ") + data_.names().text_of(submission.peer) + ", tag " +
                 std::to_string(submission.tag);
  running.phase = submission.sends ? "send" : "recv";
  running.since = Clock::now();
  running.tickets.push_back(std::move(ticket));
  std::shared_ptr<bool>& last = pair_over_[(submission.peer * kPairTags + submission.tag) * 2 + submission.sends];
  const auto over = std::make_shared<bool>(false);
  const auto make = [&](void* data) {
    return std::make_unique<Pair>(data_, kFirstPairTag + 2 * submission.tag, submission.sends, submission.peer,
                                  submission.descriptor, data, std::exchange(last, over), over);
  };
  running.operation = submission.mark == nullptr ? make(submission.data) : make_staged(submission, make);
  running_.push_back(std::move(running));
}

void Group::submit(std::shared_ptr<Ticket> ticket, JoinSubmission submission) {
  if (!departed_.empty()) {
    refuse(*ticket, ErrorCode::kShutdown, "join: " + left_text(departed_[0].first));
    return;
  }
  join_ = std::move(ticket);
  has_joined_ = true;
  join_told_ = false;
  join_since_ = Clock::now();
  join_warned_ = false;
  join_marks_ = Device::kept_marks();
  join_marks_.insert(join_marks_.end(), submission.marks.begin(), submission.marks.end());
}

bool Group::progress() {
  if (leaving_) {
    for (const Pending& waiting : not_ready_)
      refuse(*waiting.ticket, ErrorCode::kShutdown, "'" + waiting.ticket->name + "': the runtime was shut down");
    not_ready_.clear();
  }
  if (leaving_ && !left_ && running_.empty()) {
    left_ = true;
    agreement_.leave(channels_.started());
  }
  // MPI wants the context of memory that it sends, and any call may go on with another group's messages.
  std::optional<Device::Current> current;
  if (Device* const own = devices_.messages()) {
    current.emplace(*own);
  } else if (Device* const other = Devices::whose_memory_is_sent()) {
    try {
      current.emplace(*other);
    } catch (const Error&) {
      current.reset();  // it has failed, which its own group tells
    }
  }
  bool moved = submit_what_is_ready();
  moved |= agreement_.progress(decisions_);
  for (Decision& decision : decisions_) {
    switch (decision.kind) {
      case Decision::Kind::kExecute: held_back_.push_back(std::move(decision)); break;
      case Decision::Kind::kFail: {
        const auto pending = pending_.find(decision.entries[0].name);
        if (pending == pending_.end())
          throw Error(ErrorCode::kInternal,
                      "told that '" + decision.entries[0].name + "' failed, which is not pending");
        finish_(*pending->second.ticket, decision.code, decision.text);
        pending_.erase(pending);
        break;
      }
      case Decision::Kind::kLeft: peer_left(decision); break;
      case Decision::Kind::kJoined: peer_joined(decision.rank); break;
      case Decision::Kind::kAllJoined: all_joined(decision.rank); break;
      case Decision::Kind::kAllLeft: all_left_ = true; break;
      case Decision::Kind::kStopped:
        if (decision.rank == rank()) break;
        throw PeerStopped(decision.code, "the engine of " + control_.names().text_of(decision.rank) +
                                             " has stopped: " + decision.text);
      case Decision::Kind::kReleased: channels_.release(decision.channel); break;
    }
  }
  decisions_.clear();
  execute_agreed();
  if (has_joined_) serve_demands();
  moved |= step_running();
  const auto now = Clock::now();
  if (now >= next_check_) check_stalls(now);
  return moved;
}

// What this rank runs for others after it has joined may still be under way when they have let the channel go.
bool Group::channels_are_free(const Decision& decision) const {
  return std::none_of(running_.begin(), running_.end(), [&](const Running& running) {
    return running.channel >= decision.channel && running.channel < int64_t{decision.channel} + decision.channels;
  });
}

bool Group::tag_is_free() const {
  return std::none_of(running_.begin(), running_.end(), [this](const Running& running) {
    return running.agreed && running.number + kAgreedTags < executions_ + kMostParts;
  });
}

// Whether more may be taken: a model that is broadcast tensor by tensor would else be page-locked as a whole.
bool Group::has_page_locked() const {
  size_t nbytes = 0;
  for (const Running& running : running_) nbytes += running.agreed ? running.operation->page_locked() : 0;
  return nbytes < kMostPageLocked;
}

int Group::next_tag() { return static_cast<int>(executions_++ % kAgreedTags); }

void Group::execute_agreed() {
  for (; !held_back_.empty() && tag_is_free() && has_page_locked() && !devices_.is_looking(); held_back_.pop_front()) {
    if (!channels_are_free(held_back_.front())) return;
    if (look_at_devices(held_back_.front())) return;
    execute(held_back_.front());
    devices_.forget_absence();
  }
}

// Whether that has to come first.
bool Group::look_at_devices(const Decision& decision) {
  const Decision::Entry& entry = decision.entries[0];
  const auto pending = pending_.find(entry.name);
  Device* device = nullptr;
  if (pending == pending_.end()) {
    if (entry.encoded.empty() || !devices_.is_wanted_by(Descriptor::decode(entry.encoded))) return false;
  } else {
    const NamedSubmission& submission = pending->second.submission;
    if (!devices_.is_wanted_by(submission.descriptor)) return false;
    if (submission.mark != nullptr) device = &submission.mark->device();
  }
  Running running;
  running.since = Clock::now();
  running.what = "what devices share";
  running.phase = "devices";
  running.agreed = true;
  running.number = executions_;
  running.operation = devices_.look(next_tag(), device);
  running_.push_back(std::move(running));
  return true;
}

void Group::execute(const Decision& decision) {
  Running running;
  running.since = Clock::now();
  // What the tasks point to: submissions of this rank, or stand-ins when it has joined without submitting.
  const auto held = std::make_shared<std::deque<Pending>>();
  std::vector<Task> bucket;
  for (const Decision::Entry& entry : decision.entries) {
    if (const auto pending = pending_.find(entry.name); pending != pending_.end()) {
      held->push_back(std::move(pending->second));
      pending_.erase(pending);
      running.tickets.push_back(held->back().ticket);
      timeline_->negotiated(entry.name, name_of(held->back().submission.descriptor.kind), held->back().since);
    } else if (!entry.encoded.empty()) {
      held->push_back({std::make_shared<Ticket>(), {Descriptor::decode(entry.encoded), {}, 0, {}, false}, {}});
    } else {
      throw Error(ErrorCode::kInternal, "asked to execute '" + entry.name + "', which was not submitted here");
    }
    const Pending& task = held->back();
    bucket.push_back({task.ticket.get(), &task.submission.descriptor, task.submission.data, &task.submission.splits,
                      &entry.rows, task.submission.mark});
  }
  const Descriptor& d = *bucket[0].descriptor;
  running.phase = name_of(d.kind);
  running.what = std::string(name_of(d.kind)) + " '" + decision.entries[0].name + "'" +
                 (bucket.size() > 1 ? " and " + std::to_string(bucket.size() - 1) + " fused with it" : "");
  running.agreed = true;
  running.number = executions_;
  Device* const device = bucket[0].mark == nullptr ? nullptr : &bucket[0].mark->device();
  try {
    if (d.kind == Kind::kChannel)
      running.operation = channels_.open(decision.channel, d, held->front().ticket, lane_ != nullptr, device,
                                         devices_.messages(), devices_.nccl());
    else if (is_staged(d))
      running.operation = make_staged({data_, pool_, 0, lane_.get()}, [this] { return next_tag(); }, bucket, devices_);
    else
      running.operation = make_operation({data_, pool_, next_tag(), lane_.get()}, bucket);
  } catch (...) {
    throw_for(running.what);
  }
  running.keep = held;
  if (running.operation != nullptr) {
    running_.push_back(std::move(running));
    return;
  }
  for (const auto& ticket : running.tickets) finish_(*ticket, ErrorCode::kNone, {});
}

void Group::peer_joined(int peer) {
  if (peer == rank()) return;
  joined_.push_back(peer);
  // What is under way may have started before this rank knew.
  for (const Running& running : running_)
    if (const auto channel = static_cast<uint32_t>(running.channel); running.channel >= 0)
      inquiry_.demand(peer, channel, channels_.plan_of(channel), running.run);
}

void Group::all_joined(int last) {
  peer_joined(last);  // what this rank had started before it joined itself
  joined_.clear();
  if (join_ == nullptr) return;  // it has failed here: a rank has left
  join_->rows = {last};
  finish_(*std::exchange(join_, nullptr), ErrorCode::kNone, {});
}

void Group::serve_demands() {
  const std::vector<Inquiry::Demand> arrived = inquiry_.take_demands();
  demands_.insert(demands_.end(), arrived.begin(), arrived.end());
  std::erase_if(demands_, [this](const Inquiry::Demand& demand) {
    // A demand may come before this rank knows the channel, or while its memory is being made; and, where another rank
    // has demanded the same, when the channel has gone.
    if (channels_.plan_of(demand.channel) != demand.plan) return channels_.plan_of(demand.channel) > demand.plan;
    if (!channels_.is_open(demand.channel)) return false;
    while (channels_.started()[demand.channel] < demand.run && left_before(demand.channel) < 0) {
      // One after the other, as scripts do it: they have one tag, and one place.
      if (std::any_of(running_.begin(), running_.end(),
                      [&](const Running& running) { return running.channel == demand.channel; }))
        return false;
      auto ticket = std::make_shared<Ticket>();
      ticket->name = "of another rank, after join()";
      start(std::move(ticket), demand.channel, channels_.start_neutral(demand.channel));
    }
    return true;
  });
}

bool Group::step_running() {
  bool moved = false;
  for (size_t i = 0; i < running_.size();) {
    Step step{};
    try {
      step = running_[i].operation->step();
    } catch (...) {
      throw_for(running_[i].what);
    }
    moved |= step != Step::kIdle;
    if (step != Step::kDone) {
      ++i;
      continue;
    }
    const Running finished = std::move(running_[i]);
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
    const std::optional<Error>& failure = finished.operation->failure();
    for (const auto& ticket : finished.tickets) {
      timeline_->ran(ticket->name, finished.phase, finished.since);
      finish_(*ticket, failure ? failure->code : ErrorCode::kNone, failure ? failure->what() : "");
    }
  }
  return moved;
}

void Group::check_stalls(Clock::time_point now) {
  next_check_ = now + kCheckEvery;
  inquiry_.progress(channels_.started(), waits_for_);
  tell_let_go();
  std::erase_if(not_ready_, [&](Pending& waiting) {
    const auto waited = now - waiting.since;
    if (waited >= limits_.timeout) {
      refuse(*waiting.ticket, ErrorCode::kTimeout,
             waiting.waits_text() + ". It did not get there within " + seconds_text(limits_.timeout));
      return true;
    }
    if (!waiting.warned && waited >= limits_.stall_warning) {
      waiting.warned = true;
      log_warning(label() + "stalled: " + waiting.waits_text());
    }
    return false;
  });
  if (join_ != nullptr && !join_told_ && not_ready_.empty()) {
    if (now - join_since_ >= limits_.timeout) {
      join_marks_.clear();
      refuse(*std::exchange(join_, nullptr), ErrorCode::kTimeout,
             kJoinWaits + (". It did not get there within " + seconds_text(limits_.timeout)));
    } else if (!join_warned_ && now - join_since_ >= limits_.stall_warning) {
      join_warned_ = true;
      log_warning(label() + "stalled: " + kJoinWaits);
    }
  }
  check_coordinator(now);
  for (size_t i = 0; i < running_.size();) {
    const Running& running = running_[i];
    const bool lost = running.alone != Clock::time_point{} && now - running.alone >= kAnswerTime;
    if (lost && !running.operation->under_way())
      give_up_on(i, running.peer);
    else
      ++i;
  }
  // Of the runs that stall, the oldest tells the story; the others wait behind it.
  const auto oldest = std::min_element(running_.begin(), running_.end(),
                                       [](const Running& a, const Running& b) { return a.since < b.since; });
  const auto patience = std::min(limits_.stall_warning, limits_.timeout);
  if (oldest == running_.end() || now - oldest->since < patience) return;
  Running& running = *oldest;
  const auto waited = now - running.since;
  const bool is_channel = running.channel >= 0;
  if (is_channel && running.asked == Clock::time_point{}) {
    running.asked = now;
    inquiry_.ask(static_cast<uint32_t>(running.channel));
  }
  if (is_channel && now < running.asked + kAnswerTime) return;
  const auto why = [&] {
    return running.what + ": " +
           (is_channel ? inquiry_.verdict(static_cast<uint32_t>(running.channel), running.run) + "; " : "") +
           running.operation->describe();
  };
  if (waited >= limits_.timeout)
    throw Error(ErrorCode::kTimeout, why() + ". It did not finish within " + seconds_text(limits_.timeout));
  if (!running.warned && waited >= limits_.stall_warning) {
    running.warned = true;
    log_warning(label() + "stalled: " + why());
  }
}

// Whether it answers, while something waits for its word. It is what warns of ranks that are late, so who else would?
void Group::check_coordinator(Clock::time_point now) {
  const auto oldest = std::min_element(pending_.begin(), pending_.end(),
                                       [](const auto& a, const auto& b) { return a.second.since < b.second.since; });
  const auto patience = std::min(limits_.stall_warning, limits_.timeout);
  if (rank() == 0 || oldest == pending_.end() || now - oldest->second.since < patience) {
    coordinator_asked_ = {};
    coordinator_warned_ = false;
    return;
  }
  const auto& [name, pending] = *oldest;
  if (coordinator_asked_ == Clock::time_point{} || (inquiry_.is_present() && now - coordinator_asked_ >= patience)) {
    coordinator_asked_ = now;
    coordinator_warned_ = false;
    inquiry_.ask_presence(0);
  }
  const bool silent = !inquiry_.is_present() && now - coordinator_asked_ >= kAnswerTime;
  const auto text = [&, &name = name, &pending = pending] {
    return std::string(name_of(pending.submission.descriptor.kind)) + " '" + name +
           "': " + control_.names().text_of(0) + ", which coordinates, does not answer";
  };
  const auto waited = now - pending.since;
  if (waited > limits_.timeout + kCoordinatorGrace || (silent && waited > limits_.timeout))
    throw Error(ErrorCode::kTimeout, text() + ". It did not within " + seconds_text(limits_.timeout));
  if (!silent || coordinator_warned_ || waited < limits_.stall_warning) return;
  coordinator_warned_ = true;
  log_warning(label() + "stalled: " + text());
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
  for (int peer = 0; memory_ && peer < size(); ++peer)
    if (peer != rank()) peers.push_back({control_.names().job_rank(peer), memory_->pids()[static_cast<size_t>(peer)]});
  return peers;
}

std::string Group::left_text(int peer) const {
  return control_.names().text_of(peer) +
         " has shut down (its script ended, or it called shutdown()) before it took part";
}

void Group::drop(Running running, ErrorCode code, const std::string& text) {
  running.operation.reset();
  for (const auto& ticket : running.tickets) finish_(*ticket, code, text);
}

void Group::peer_left(const Decision& decision) {
  if (decision.rank == rank()) return;
  departed_.emplace_back(decision.rank, decision.started);
  if (join_ != nullptr)
    refuse(*std::exchange(join_, nullptr), ErrorCode::kShutdown, "join: " + left_text(decision.rank));
  for (size_t i = 0; i < running_.size();) {
    Running& running = running_[i];
    const auto channel = static_cast<size_t>(running.channel);
    // What a peer has sent before it left may come after the word that it has.
    if (running.peer == decision.rank) running.alone = Clock::now();
    if (running.channel >= 0 && (channel >= decision.started.size() || decision.started[channel] < running.run))
      give_up_on(i, decision.rank);
    else
      ++i;
  }
}

void Group::give_up_on(size_t i, int peer) {
  Running gone = std::move(running_[i]);
  running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
  const std::string text = label() + gone.what + ": " + left_text(peer);
  drop(std::move(gone), ErrorCode::kShutdown, text);
}

void Group::leave() { leaving_ = true; }

void Group::release() {
  devices_.release();
  data_.release();
  control_.release();
}

void Group::fail_all(ErrorCode code, const std::string& text) {
  for (const Pending& waiting : not_ready_) finish_(*waiting.ticket, code, text);
  not_ready_.clear();
  for (auto& [name, pending] : pending_) finish_(*pending.ticket, code, text);
  for (Running& running : running_) drop(std::move(running), code, text);
  if (join_ != nullptr) finish_(*join_, code, text);
  join_ = nullptr;
  pending_.clear();
  running_.clear();
  held_back_.clear();
  hang_up();
}

std::pair<Clock::time_point, std::string> Group::oldest() const {
  std::pair<Clock::time_point, std::string> oldest{Clock::time_point::max(), ""};
  const auto look_at = [&](Clock::time_point since, const std::string& what) {
    if (since < oldest.first) oldest = {since, label() + what};
  };
  for (const Running& running : running_)
    if (!running.tickets.empty()) look_at(running.since, running.what);
  for (const Pending& waiting : not_ready_) look_at(waiting.since, waiting.waits_text());
  for (const auto& [name, pending] : pending_)
    look_at(pending.since, std::string(name_of(pending.submission.descriptor.kind)) + " '" + name + "'");
  if (join_ != nullptr) look_at(join_since_, "join");
  return oldest;
}

std::string Group::describe() const {
  std::string text;
  const auto now = Clock::now();
  const auto age = [&](Clock::time_point since) {
    return std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(now - since).count()) + " ms";
  };
  for (const Pending& waiting : not_ready_)
    text += "  submitted " + age(waiting.since) + " ago: " + waiting.waits_text() + "\n";
  if (join_ != nullptr && !join_told_) text += std::string("  ") + kJoinWaits + "\n";
  for (const auto& [name, pending] : pending_)
    text += "  submitted " + age(pending.since) + " ago, not agreed: " + name_of(pending.submission.descriptor.kind) +
            " '" + name + "'\n";
  for (const Running& running : running_)
    text += "  running for " + age(running.since) + ": " + running.what + ": " + running.operation->describe() + "\n";
  const std::string waiting = agreement_.describe();
  if (!waiting.empty()) text += "  this rank coordinates; not yet submitted everywhere:\n" + waiting;
  return text.empty() || label().empty() ? text : label() + "\n" + text;
}

}  // namespace collective
