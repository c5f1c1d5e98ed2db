#include "group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "broadcast.h"
#include "log.h"
#include "ring.h"

namespace collective {
namespace {

// Tags of the data communicator. Agreed operations take turns in the first half: they start in the same order on all
// ranks, and messages of one tag stay in order, so a tag may be reused long before its last use is over everywhere.
// Each channel has a tag of its own. 32767 is the largest tag that every MPI has.
constexpr int kAgreedTags = 8192;
constexpr int kMostChannels = 32767 - kAgreedTags;

constexpr auto kCheckEvery = std::chrono::milliseconds(100);
// The coordinator reports a time-out; a rank that does not even hear from it gives up this much later.
constexpr auto kCoordinatorGrace = std::chrono::seconds(5);
// Between asking the others about a stalled channel and telling what they answered.
constexpr auto kAnswerTime = std::chrono::milliseconds(500);

}  // namespace

Group::Group(MPI_Comm comm, const Limits& limits, Finish finish)
    : control_(Comm::duplicate(comm)),
      data_(Comm::duplicate(comm)),
      agreement_(control_, limits),
      inquiry_(control_),
      limits_(limits),
      finish_(std::move(finish)) {}

void Group::submit(std::shared_ptr<Ticket> ticket, NamedSubmission submission) {
  const std::string name = ticket->name;
  agreement_.submit(name, submission.descriptor, submission.rows, submission.recurring);
  pending_.emplace(name, Pending{std::move(ticket), std::move(submission), Clock::now()});
}

void Group::submit(std::shared_ptr<Ticket> ticket, ChannelSubmission submission) {
  if (submission.channel >= started_.size()) started_.resize(submission.channel + 1);
  Running running;
  running.what = "bucket '" + ticket->name + "'";
  running.since = Clock::now();
  running.channel = submission.channel;
  running.run = ++started_[submission.channel];
  running.keep = std::move(submission.keep);
  running.tickets.push_back(std::move(ticket));
  running.operation =
      std::make_unique<Allreduce>(data_, pool_, kAgreedTags + static_cast<int>(submission.channel), submission.spec,
                                  std::move(submission.slots), submission.storage);
  running_.push_back(std::move(running));
}

bool Group::progress() {
  if (leaving_ && !left_ && running_.empty()) {
    left_ = true;
    agreement_.leave(started_);
  }
  bool moved = agreement_.progress(decisions_);
  for (Decision& decision : decisions_) {
    switch (decision.kind) {
      case Decision::Kind::kExecute: execute(decision); break;
      case Decision::Kind::kFail: {
        const auto pending = pending_.find(decision.entries[0].name);
        if (pending == pending_.end())
          throw Error(ErrorCode::kInternal, "told that '" + decision.entries[0].name + "' failed, which is not pending");
        finish_(*pending->second.ticket, decision.code, decision.text);
        pending_.erase(pending);
        break;
      }
      case Decision::Kind::kLeft: peer_left(decision); break;
      case Decision::Kind::kAllLeft: all_left_ = true; break;
    }
  }
  decisions_.clear();
  moved |= step_running();
  const auto now = Clock::now();
  if (now >= next_check_) check_stalls(now);
  return moved;
}

int Group::next_tag() { return static_cast<int>(executions_++ % kAgreedTags); }

void Group::execute(Decision& decision) {
  std::vector<Pending> bucket;
  for (const Decision::Entry& entry : decision.entries) {
    const auto pending = pending_.find(entry.name);
    if (pending == pending_.end())
      throw Error(ErrorCode::kInternal, "asked to execute '" + entry.name + "', which was not submitted here");
    bucket.push_back(std::move(pending->second));
    pending_.erase(pending);
  }
  Pending& first = bucket[0];
  const Descriptor& d = first.submission.descriptor;
  Running running;
  running.since = Clock::now();
  running.what = std::string(name_of(d.kind)) + " '" + first.ticket->name + "'" +
                 (bucket.size() > 1 ? " and " + std::to_string(bucket.size() - 1) + " fused with it" : "");
  for (Pending& pending : bucket) running.tickets.push_back(pending.ticket);
  switch (d.kind) {
    case Kind::kBarrier:
      finish_(*first.ticket, ErrorCode::kNone, {});
      break;
    case Kind::kChannel:
      if (decision.channel + d.count() > kMostChannels)
        throw Error(ErrorCode::kInternal, "more than " + std::to_string(kMostChannels) + " buckets were opened");
      first.ticket->channel = decision.channel;
      finish_(*first.ticket, ErrorCode::kNone, {});
      break;
    case Kind::kBroadcast:
      running.operation = std::make_unique<Broadcast>(data_, next_tag(), d.root, first.submission.data.out,
                                                      d.count() * size_of(d.dtype));
      running_.push_back(std::move(running));
      break;
    case Kind::kAllreduce: execute_allreduce(bucket, std::move(running)); break;
    case Kind::kAllgather: execute_allgather(first, decision.entries[0].rows, std::move(running)); break;
  }
}

void Group::execute_allreduce(std::vector<Pending>& bucket, Running running) {
  const Descriptor& d = bucket[0].submission.descriptor;
  std::vector<Slot> slots;
  for (const Pending& pending : bucket) slots.push_back(pending.submission.data);
  running.operation = std::make_unique<Allreduce>(
      data_, pool_, next_tag(), AllreduceSpec{d.dtype, d.wire, d.op, d.prescale, d.postscale}, std::move(slots));
  running_.push_back(std::move(running));
}

void Group::execute_allgather(Pending& pending, const std::vector<int64_t>& rows, Running running) {
  const Descriptor& d = pending.submission.descriptor;
  size_t row_bytes = size_of(d.dtype);
  for (size_t i = 1; i < d.shape.size(); ++i) row_bytes *= static_cast<size_t>(d.shape[i]);
  std::vector<size_t> offsets{0};
  for (const int64_t count : rows) offsets.push_back(offsets.back() + static_cast<size_t>(count) * row_bytes);
  Ticket& ticket = *pending.ticket;
  ticket.rows = rows;
  ticket.output = Buffer(offsets.back());
  const size_t own = offsets[static_cast<size_t>(rank())];
  const size_t own_bytes = offsets[static_cast<size_t>(rank()) + 1] - own;
  if (own_bytes > 0) std::memcpy(ticket.output.data() + own, pending.submission.data.in, own_bytes);
  if (size() == 1) {
    finish_(ticket, ErrorCode::kNone, {});
    return;
  }
  running.operation =
      std::make_unique<Ring>(data_, pool_, next_tag(), Ring::Phases::kAllgather, ticket.output.data(),
                             ticket.output.data(), std::move(offsets), Arithmetic{DType::kUInt8, ReduceOp::kSum});
  running_.push_back(std::move(running));
}

bool Group::step_running() {
  bool moved = false;
  for (size_t i = 0; i < running_.size();) {
    const Step step = running_[i].operation->step();
    moved |= step != Step::kIdle;
    if (step != Step::kDone) {
      ++i;
      continue;
    }
    const Running finished = std::move(running_[i]);
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
    for (const auto& ticket : finished.tickets) finish_(*ticket, ErrorCode::kNone, {});
  }
  return moved;
}

void Group::check_stalls(Clock::time_point now) {
  next_check_ = now + kCheckEvery;
  inquiry_.progress(started_);
  for (const auto& [name, pending] : pending_)
    if (now - pending.since > limits_.timeout + kCoordinatorGrace)
      throw Error(ErrorCode::kTimeout, std::string(name_of(pending.submission.descriptor.kind)) + " '" + name +
                                           "': rank 0, which coordinates, does not answer");
  // Of the runs that stall, the oldest tells the story; the others wait behind it.
  const auto oldest = std::min_element(running_.begin(), running_.end(),
                                       [](const Running& a, const Running& b) { return a.since < b.since; });
  const auto patience = std::min(limits_.stall_warning, limits_.timeout);
  if (oldest == running_.end() || now - oldest->since < patience) return;
  Running& running = *oldest;
  const auto waited = now - running.since;
  const bool is_channel = running.channel >= 0;
  if (is_channel && !running.asked) {
    running.asked = true;
    inquiry_.ask(static_cast<uint32_t>(running.channel));
  }
  if (is_channel && waited < patience + kAnswerTime) return;
  const auto why = [&] {
    return running.what + ": " +
           (is_channel ? inquiry_.verdict(static_cast<uint32_t>(running.channel), running.run) + "; " : "") +
           running.operation->describe();
  };
  if (waited >= limits_.timeout)
    throw Error(ErrorCode::kTimeout,
                why() + ". It did not finish within " + seconds_text(limits_.timeout));
  if (!running.warned && waited >= limits_.stall_warning) {
    running.warned = true;
    log_warning("stalled: " + why());
  }
}

void Group::peer_left(const Decision& decision) {
  if (decision.rank == rank()) return;
  for (size_t i = 0; i < running_.size();) {
    Running& running = running_[i];
    const auto channel = static_cast<size_t>(running.channel);
    const bool took_part =
        running.channel < 0 || (channel < decision.started.size() && decision.started[channel] >= running.run);
    if (took_part) {
      ++i;
      continue;
    }
    for (const auto& ticket : running.tickets)
      finish_(*ticket, ErrorCode::kShutdown,
              running.what + ": rank " + std::to_string(decision.rank) +
                  " has shut down (its script ended, or it called shutdown()) before it took part");
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void Group::leave() { leaving_ = true; }

void Group::release() {
  data_.release();
  control_.release();
}

void Group::fail_all(ErrorCode code, const std::string& text) {
  for (auto& [name, pending] : pending_) finish_(*pending.ticket, code, text);
  for (const Running& running : running_)
    for (const auto& ticket : running.tickets) finish_(*ticket, code, text);
  pending_.clear();
  running_.clear();
}

std::string Group::describe() const {
  std::string text;
  const auto now = Clock::now();
  const auto age = [&](Clock::time_point since) {
    return std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(now - since).count()) + " ms";
  };
  for (const auto& [name, pending] : pending_)
    text += "  submitted " + age(pending.since) + " ago, not agreed: " +
            name_of(pending.submission.descriptor.kind) + " '" + name + "'\n";
  for (const Running& running : running_)
    text += "  running for " + age(running.since) + ": " + running.what + ": " + running.operation->describe() + "\n";
  const std::string waiting = agreement_.describe();
  if (!waiting.empty()) text += "  this rank coordinates; not yet submitted everywhere:\n" + waiting;
  return text;
}

}  // namespace collective
