#include "engine/group.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <numeric>
#include <utility>

#include "base/log.h"
#include "engine/operations.h"
#include "engine/staging.h"
#include "engine/tree_mail.h"
#include "messages/mpi_library.h"
#include "messages/pair.h"
#include "messages/topology.h"
#include "node/shared_memory_creation.h"

namespace collective {
namespace {

// Tags of the data communicator. Agreed operations take turns in the first half: they start in the same order on all
// ranks, and messages of one tag stay in order, so a tag may be used again before its last use is done on other ranks.
// On this rank it must be done, for operations post receives ahead: execution is held back when the tags run out.
// Pairs have two tags each, a bucket has one of its own. 32767 is the largest tag that every MPI has.
// (Tags of the control communicator are inquiry.cc's and these two.)
constexpr int kMailTag = 1;
constexpr int kMemoryTag = 16;
constexpr int kAgreedTags = 8192;
constexpr int kFirstPairTag = kAgreedTags;
constexpr int kFirstBucketTag = kFirstPairTag + 2 * kPairTags;
constexpr uint32_t kMostBuckets = 32767 - kFirstBucketTag;
// Where operations are matched by their order they have the tags of buckets, of which there are none, and as many more as
// this MPI has: a range of kOrderedTags for each of some kinds of descriptions, so that what differs does not meet.
constexpr int kOrderedTags = 1024;

// In a rank's part of the node's memory.
constexpr size_t kDevicesAt = Lane::nbytes(), kMailAt = kDevicesAt + Devices::kHostBytes;
// Mail, and what is shown of operations that are matched by their order.
constexpr size_t roll_at(int size) { return round_up(NodeMail::nbytes(size), kLineBytes); }
constexpr size_t words_nbytes(int size) { return roll_at(size) + Roll::nbytes(); }

// The page-locked host memory that agreed operations on devices take at a time; the last one may exceed it.
constexpr size_t kMostPageLocked = size_t{256} << 20;

// Whether no rank can end such an operation before all have come to it.
bool needs_all(Kind kind) {
  return kind == Kind::kAllreduce || kind == Kind::kAllgather || kind == Kind::kBarrier ||
         kind == Kind::kReduceScatter || kind == Kind::kAlltoall;
}

constexpr std::chrono::duration<double> kLongestCreation = std::chrono::hours(1);

// The ranks, those of a node one after the other.
std::vector<int> by_node(const std::vector<int>& leaders) {
  std::vector<int> order(leaders.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return leaders[static_cast<size_t>(a)] < leaders[static_cast<size_t>(b)]; });
  return order;
}

// The ranks with the same leader.
std::vector<int> ranks_of_node(const std::vector<int>& leaders, int rank) {
  std::vector<int> ranks;
  for (int peer = 0; peer < static_cast<int>(leaders.size()); ++peer)
    if (leaders[static_cast<size_t>(peer)] == leaders[static_cast<size_t>(rank)]) ranks.push_back(peer);
  return ranks;
}

Limits with_timeout(Limits limits, const GroupOptions& options) {
  if (options.timeout) limits.timeout = *options.timeout;
  return limits;
}

}  // namespace

Group::Group(MPI_Comm comm, const Limits& limits, Timeline& timeline, WaitTotals& waits, Finish finish, DoingHere doing,
             const Group* all, const GroupOptions& options)
    : control_(Comm::duplicate(comm, all == nullptr ? nullptr : &all->control_)),
      data_(Comm::duplicate(comm, all == nullptr ? nullptr : &all->control_)),
      ordered_(options.ordered),
      identity_(options.identity),
      limits_(with_timeout(limits, options)),
      agreement_(control_.rank(), control_.names(), limits_, kMostBuckets),
      inquiry_(control_),
      timeline_(&timeline),
      finish_(std::move(finish)),
      doing_(std::move(doing)),
      devices_(data_, limits.nccl),
      waits_(waits),
      running_(timeline, control_.names(), waits_, finish_),
      plans_(data_, pool_, kFirstBucketTag),
      join_(inquiry_),
      stalls_(control_.rank(), control_.names(), limits_, inquiry_) {
  if (!options.label.empty()) {
    control_.set_label(options.label);
    data_.set_label(options.label);
  }
  if (size() == 1) {
    use_tree(every_rank_alone());
    return;
  }
  const Topology topology = find_topology(comm);
  // One rank's setting is enough to switch it off.
  const bool shares = on_all_ranks(comm, limits.shared_memory);
  if (topology.local_size == size()) {
    if (!shares || !share_memory()) use_tree(every_rank_alone());
    return;
  }
  data_.set_order(by_node(topology.leaders));
  data_.set_crosses_network();
  if (shares)
    nodes_ = find_nodes(comm, topology, all == nullptr ? &control_ : &all->control_, kMemoryTag, creation_time(),
                        words_nbytes);
  if (nodes_ && nodes_->local.size() > 1)
    order_.use(*nodes_->memory, NodesLane::nbytes() + roll_at(nodes_->local.size()),
               ranks_of_node(nodes_->leaders, rank()));
  use_tree(nodes_ ? nodes_->leaders : every_rank_alone());
}

std::vector<int> Group::every_rank_alone() const {
  std::vector<int> leaders(static_cast<size_t>(size()));
  std::iota(leaders.begin(), leaders.end(), 0);
  return leaders;
}

// leaders: by rank, that of the ranks whose memory it shares.
void Group::use_tree(const std::vector<int>& leaders) {
  std::unique_ptr<Mail> node;
  if (nodes_ && nodes_->local.size() > 1) node = std::make_unique<NodeMail>(*nodes_->memory, NodesLane::nbytes());
  if (leaders[static_cast<size_t>(rank())] == rank())
    node = std::make_unique<TreeMail>(rank(), leaders, agreement_.names(),
                                      std::make_unique<MpiLetters>(control_, kMailTag), std::move(node));
  agreement_.use(std::move(node));
}

std::chrono::seconds Group::creation_time() const {
  return std::chrono::ceil<std::chrono::seconds>(std::min(limits_.timeout, kLongestCreation));
}

bool Group::share_memory() {
  std::string why;
  memory_ = try_share_memory(control_, kMemoryTag, kMailAt + words_nbytes(size()), creation_time(), why);
  if (memory_) {
    lane_ = std::make_unique<Lane>(*memory_, 0);
    devices_.use(*memory_, kDevicesAt);
    agreement_.use(std::make_unique<NodeMail>(*memory_, kMailAt));
    order_.use(*memory_, kMailAt + roll_at(size()), ranks_of_node(std::vector<int>(static_cast<size_t>(size())), 0));
    return true;
  }
  static std::atomic<bool> told{false};  // one warning for all process sets: the reason is that of the node
  if (!told.exchange(true) && rank() == 0)
    log_warning("the ranks of this node use MPI messages, which is slower: they cannot share memory: " + why);
  return false;
}

void Group::submit(std::shared_ptr<Ticket> ticket, NamedSubmission submission) {
  if (submission.mark != nullptr && !submission.mark->reached())
    not_ready_.push_back({std::move(ticket), std::move(submission), {}});
  else
    submit_ready(std::move(ticket), std::move(submission));
}

void Group::submit(std::shared_ptr<Ticket> ticket, OrderedSubmission submission) {
  const int peer = left_before_turn(order_.submitted() + 1);
  if (peer < 0 && !leaving_) {
    order_.add(std::move(ticket), std::move(submission));
    return;
  }
  const std::string what = std::string(name_of(submission.named.descriptor.kind)) + " '" + ticket->name + "': ";
  refuse(*ticket, ErrorCode::kShutdown, what + (leaving_ ? "the group was destroyed" : left_text(peer)));
}

// Lets those run whose turn has come, like what has been agreed on by name.
bool Group::start_ordered() {
  bool moved = false;
  while (std::optional<Order::Entry> next = order_.take(control_.names())) {
    moved = true;
    const std::string name = next->ticket->name;
    if (!next->difference.empty()) {
      const std::string text = next->what() + ": " + next->difference;
      if (nodes_) throw Error(ErrorCode::kMismatch, text);  // which the other nodes do not see
      refuse(*next->ticket, ErrorCode::kMismatch, text);
      continue;
    }
    Decision decision(Decision::Kind::kExecute);
    decision.entries.push_back({name, std::move(next->submission.rows), ""});
    pending_.emplace(name, Pending{std::move(next->ticket), std::move(next->submission.named), Wait(next->wait.since),
                                   true, next->turn, next->digest, std::move(next->submission.expected)});
    held_back_.push_back(std::move(decision));
  }
  return moved;
}

std::string Group::Pending::what() const {
  return std::string(name_of(submission.descriptor.kind)) + " '" + ticket->name + "'";
}

size_t Group::Pending::nbytes() const { return submission.data.count * size_of(submission.descriptor.wire); }

std::string Group::Pending::waits_text() const {
  return "waits for what its user has queued on device " + std::to_string(submission.mark->device().number());
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
  if (join_.is_held_back() && not_ready_.empty() && join_.take_ready()) agreement_.join();
  return moved;
}

void Group::submit_ready(std::shared_ptr<Ticket> ticket, NamedSubmission submission) {
  const std::string name = ticket->name;
  if (submission.descriptor.kind == Kind::kBuckets) tell_let_go();  // first, so that new buckets can have these numbers
  agreement_.submit(name, submission.descriptor, submission.rows, submission.recurring);
  pending_.emplace(name, Pending{std::move(ticket), std::move(submission), {}});
}

void Group::tell_let_go() {
  if (leaving_) return;
  for (const uint32_t first : plans_.take_let_go()) agreement_.let_go(first);
}

void Group::submit(std::shared_ptr<Ticket> ticket, BucketSubmission submission) {
  const uint32_t bucket = submission.bucket;
  if (const int peer = left_before(bucket); peer >= 0) {
    refuse(*ticket, ErrorCode::kShutdown, "bucket '" + ticket->name + "': " + left_text(peer));
    return;
  }
  std::shared_ptr<void> keep = submission.run.keep;
  start(std::move(ticket), bucket, plans_.start(bucket, std::move(submission.run)), std::move(keep), true);
}

// A rank that has left without the bucket's next run; -1: none.
int Group::left_before(uint32_t bucket) const {
  for (const auto& [peer, started] : departed_)
    if (bucket >= started.size() || started[bucket] <= plans_.started()[bucket]) return peer;
  return -1;
}

bool Group::all_others_left() const { return departed_.size() + 1 == static_cast<size_t>(size()); }

// A rank that has left without this turn; -1: none.
int Group::left_before_turn(uint64_t turn) const {
  for (const auto& [peer, started] : departed_)
    if (turns_of(started) < turn) return peer;
  return -1;
}

void Group::start(std::shared_ptr<Ticket> ticket, uint32_t bucket, std::unique_ptr<Operation> operation,
                  std::shared_ptr<void> keep, bool is_own) {
  Running running;
  running.what = "bucket '" + ticket->name + "'";
  running.kind = "bucket";
  running.nbytes = plans_.nbytes(bucket);
  running.of_bucket = {bucket, plans_.started()[bucket]};
  if (size() > 1) running.waiting = {plans_.series_of(bucket), plans_.started()[bucket], running.since, is_own};
  running.keep = std::move(keep);
  running.tickets.push_back(std::move(ticket));
  running.operation = std::move(operation);
  join_.demand(running, plans_);
  running_.add(std::move(running));
}

void Group::submit(std::shared_ptr<Ticket> ticket, PairSubmission submission) {
  const bool from_any = submission.peer == Pair::kAny;
  if (from_any && all_others_left()) {
    refuse(*ticket, ErrorCode::kShutdown, "recv from any rank: all other ranks have shut down");
    return;
  }
  for (const auto& [peer, started] : departed_)
    if (peer == submission.peer) {
      refuse(*ticket, ErrorCode::kShutdown, std::string(submission.sends ? "send: " : "recv: ") + left_text(peer));
      return;
    }
  Running running;
  if (from_any)
    running.from_any = true;
  else
    running.peer = submission.peer;
  if (!submission.sends && !from_any) ticket->rows = {submission.peer};
  running.what = (submission.sends ? "send to " : "recv from ") +
                 (from_any ? "any rank" : data_.names().text_of(submission.peer)) + ", tag " +
                 std::to_string(submission.tag);
  running.kind = submission.sends ? "send" : "recv";
  running.nbytes = submission.descriptor.count() * size_of(submission.descriptor.dtype);
  const auto over = std::make_shared<bool>(false);
  std::vector<std::shared_ptr<bool>> before;
  const auto follow = [&](int peer) {
    const auto last = pair_over_.find((peer * kPairTags + submission.tag) * 2 + submission.sends);
    if (last != pair_over_.end() && !*last->second) before.push_back(last->second);
  };
  if (!submission.sends) follow(Pair::kAny);
  if (from_any)
    for (int peer = 0; peer < size(); ++peer) follow(peer);
  else
    follow(submission.peer);
  pair_over_[(submission.peer * kPairTags + submission.tag) * 2 + submission.sends] = over;
  const auto found = [ticket = ticket.get()](int peer) { ticket->rows = {peer}; };
  running.tickets.push_back(std::move(ticket));
  const auto make = [&](void* data) {
    return std::make_unique<Pair>(data_, kFirstPairTag + 2 * submission.tag, submission.sends, submission.peer,
                                  submission.descriptor, data, std::move(before), over, found);
  };
  running.operation = submission.mark == nullptr ? make(submission.data) : make_staged(submission, make);
  running_.add(std::move(running));
}

void Group::submit(std::shared_ptr<Ticket> ticket, JoinSubmission submission) {
  if (!departed_.empty())
    refuse(*ticket, ErrorCode::kShutdown, "join: " + left_text(departed_[0].first));
  else
    join_.begin(std::move(ticket), std::move(submission));
}

void Group::submit(std::shared_ptr<Ticket> ticket, LedgerSubmission) {
  if (leaving_) {
    refuse(*ticket, ErrorCode::kShutdown, "the group was destroyed");
    return;
  }
  agreement_.ask_ledger();
  asking_.push_back({std::move(ticket), {}});
}

// What the coordinator is to know of how long this rank has waited.
void Group::tell_waits(Clock::time_point now) {
  if (!waits_.empty()) agreement_.tell_waits(waits_.take(now));
}

bool Group::progress() {
  if (leaving_) {
    for (const Pending& waiting : not_ready_)
      refuse(*waiting.ticket, ErrorCode::kShutdown, "'" + waiting.ticket->name + "': the runtime was shut down");
    not_ready_.clear();
  }
  // Operations that are matched by their order have their turns first: the other ranks count on them. And questions are
  // answered first, so that no letter is under way when the communicators go.
  const bool ordered_is_done = order_.first() == nullptr && held_back_.empty();
  if (leaving_ && !left_ && running_.empty() && (!ordered_ || ordered_is_done) && inquiry_.is_answered()) {
    left_ = true;
    tell_waits(Clock::now());
    agreement_.leave(ordered_ ? as_words(order_.taken()) : plans_.started());
  }
  // MPI wants the context of memory that it sends, and any call may go on with another group's messages.
  std::optional<Device::Current> current;
  if (Device* const own = devices_.messages()) {
    current.emplace(*own);
  } else if (Device* const other = Devices::whose_memory_is_sent()) {
    try {
      current.emplace(*other);
    } catch (const Error&) {
      current.reset();  // it has failed, which its own group will report
    }
  }
  bool moved = submit_what_is_ready();
  moved |= start_ordered();
  moved |= agreement_.progress(decisions_);
  for (Decision& decision : decisions_) carry_out(decision);
  decisions_.clear();
  execute_agreed();
  start_demanded();
  moved |= running_.step();
  if (const auto now = Clock::now(); now >= next_check_) check_waits(now);
  return moved;
}

void Group::carry_out(Decision& decision) {
  switch (decision.kind) {
    case Decision::Kind::kExecute:
      for (const Decision::Entry& entry : decision.entries)
        if (const auto pending = pending_.find(entry.name); pending != pending_.end()) pending->second.agreed = true;
      held_back_.push_back(std::move(decision));
      break;
    case Decision::Kind::kFail: {
      const auto pending = pending_.find(decision.entries[0].name);
      if (pending == pending_.end())
        throw Error(ErrorCode::kInternal, "told that '" + decision.entries[0].name + "' failed, which is not pending");
      finish_(*pending->second.ticket, decision.code, decision.text);
      pending_.erase(pending);
      break;
    }
    case Decision::Kind::kLeft: peer_left(decision); break;
    case Decision::Kind::kJoined:
      if (decision.rank != rank()) join_.add(decision.rank, running_, plans_);
      break;
    case Decision::Kind::kAllJoined: all_joined(decision.rank); break;
    case Decision::Kind::kAllLeft: all_left_ = true; break;
    case Decision::Kind::kStopped:
      if (decision.rank == rank()) break;
      throw PeerStopped(decision.code,
                        "the engine of " + control_.names().text_of(decision.rank) + " has stopped: " + decision.text);
    case Decision::Kind::kLedger:
      for (const Asking& asking : std::exchange(asking_, {})) finish_(*asking.ticket, ErrorCode::kNone, decision.text);
      break;
    case Decision::Kind::kReleased: plans_.release(decision.bucket); break;
  }
}

Place Group::place(int tag, uint64_t digest) {
  return {data_, pool_, tag, lane_.get(), nodes_ ? &*nodes_ : nullptr, digest, !ordered_};
}

// digest: of the description, where operations are matched by their order.
int Group::next_tag(uint64_t digest) {
  const auto execution = executions_++;
  if (!ordered_) return static_cast<int>(execution % kAgreedTags);
  static const int kinds = (highest_tag() - kFirstBucketTag) / kOrderedTags;
  return kFirstBucketTag + static_cast<int>(execution % kOrderedTags) +
         kOrderedTags * static_cast<int>(digest % static_cast<uint64_t>(kinds));
}

void Group::execute_agreed() {
  for (; !held_back_.empty(); held_back_.pop_front()) {
    const Decision& next = held_back_.front();
    if (ordered_ && refuse_if_left(next)) continue;
    const uint64_t tags = ordered_ ? kOrderedTags : kAgreedTags;
    if (running_.is_before(executions_ + kMostParts - std::min<uint64_t>(executions_ + kMostParts, tags)))
      return;  // the tags that it needs are still in use
    // Otherwise a model that is broadcast tensor by tensor would be page-locked as a whole.
    if (running_.page_locked() >= kMostPageLocked || devices_.is_looking()) return;
    // What this rank runs for others after it has joined may still be in flight when they have let the buckets go.
    if (running_.uses_buckets(next.bucket, next.buckets)) return;
    if (look_at_devices(next)) return;
    execute(next);
    devices_.forget_absence();
  }
}

// Whether a rank has left without the operation, which then fails: nothing was agreed on before.
bool Group::refuse_if_left(const Decision& decision) {
  const auto pending = pending_.find(decision.entries[0].name);
  const int peer = left_before_turn(pending->second.turn);
  if (peer < 0) return false;
  refuse(*pending->second.ticket, ErrorCode::kShutdown, pending->second.what() + ": " + left_text(peer));
  pending_.erase(pending);
  return true;
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
  running.what = "what devices share";
  running.kind = "devices";
  if (ordered_) running.turn = pending->second.turn;
  running.execution = executions_;
  running.operation = devices_.look(next_tag(0), device);
  running_.add(std::move(running));
  return true;
}

void Group::record_wait(const Pending& pending, size_t number_of_tensors) {
  Timeline::Event event{Timeline::Event::Phase::kWait, name_of(pending.submission.descriptor.kind)};
  event.name = pending.ticket->name;
  event.group = label();
  event.number = executions_;
  event.nbytes = pending.nbytes();
  event.parts = number_of_tensors;
  event.begin = pending.wait.since();
  timeline_->record(std::move(event));
}

void Group::execute(const Decision& decision) {
  Running running;
  // What the tasks point to: submissions of this rank, or stand-ins when it has joined without submitting.
  const auto held = std::make_shared<std::deque<Pending>>();
  std::vector<Task> fused;
  Waiting waiting{Series::kOperations, ++decided_, {}, true};
  for (const Decision::Entry& entry : decision.entries) {
    if (const auto pending = pending_.find(entry.name); pending != pending_.end()) {
      held->push_back(std::move(pending->second));
      pending_.erase(pending);
      running.tickets.push_back(held->back().ticket);
      if (timeline_->is_on()) record_wait(held->back(), decision.entries.size());
      waiting.begin = std::max(waiting.begin, held->back().wait.since());
    } else if (!entry.encoded.empty()) {
      waiting.is_own = false;
      held->push_back({std::make_shared<Ticket>(), {Descriptor::decode(entry.encoded), {}, 0, {}, false}, {}});
    } else {
      throw Error(ErrorCode::kInternal, "asked to execute '" + entry.name + "', which was not submitted here");
    }
    const Pending& task = held->back();
    running.nbytes += task.nbytes();
    fused.push_back({task.ticket.get(), &task.submission.descriptor, task.submission.data, &task.submission.splits,
                     &entry.rows, task.submission.mark, &task.expected});
  }
  const Descriptor& d = *fused[0].descriptor;
  running.kind = name_of(d.kind);
  running.what = std::string(name_of(d.kind)) + " '" + decision.entries[0].name + "'" +
                 (fused.size() > 1 ? " and " + std::to_string(fused.size() - 1) + " fused with it" : "");
  running.execution = executions_;
  if (size() > 1) {
    // Where nothing has been agreed on, the ranks meet in the operation.
    if (!ordered_ || lane_ != nullptr)
      waits_.note(waiting, running.since, held->front().submission.recurring ? running.name() : running.kind);
    else if (needs_all(d.kind))
      running.waiting = waiting;
  }
  const uint64_t digest = held->front().digest;
  if (ordered_) running.turn = held->front().turn;
  Device* const device = fused[0].mark == nullptr ? nullptr : &fused[0].mark->device();
  try {
    if (d.kind == Kind::kBuckets)
      running.operation = plans_.open(decision.bucket, d, *held->front().ticket, lane_ != nullptr, device, devices_,
                                      nodes_ ? &*nodes_ : nullptr);
    else if (is_staged(d))
      running.operation = make_staged(place(0, digest), [&] { return next_tag(digest); }, fused, devices_);
    else
      running.operation = make_operation(place(next_tag(digest), digest), fused);
  } catch (...) {
    throw_for(running.what);
  }
  running.keep = held;
  if (running.operation != nullptr) {
    running_.add(std::move(running));
    return;
  }
  for (const auto& ticket : running.tickets) finish_(*ticket, ErrorCode::kNone, {});
}

void Group::all_joined(int last) {
  if (last != rank()) join_.add(last, running_, plans_);  // what this rank had started before it joined itself
  join_.clear();
  if (!join_.is_waiting()) return;  // it has failed here: a rank has left
  const std::shared_ptr<Ticket> ticket = join_.take();
  ticket->rows = {last};
  finish_(*ticket, ErrorCode::kNone, {});
}

void Group::start_demanded() {
  const auto has_left = [this](uint32_t bucket) { return left_before(bucket) >= 0; };
  while (const auto bucket = join_.next_demanded(running_, plans_, has_left)) {
    auto ticket = std::make_shared<Ticket>();
    ticket->name = "of another rank, after join()";
    std::shared_ptr<void> keep;
    auto operation = plans_.start_neutrally(*bucket, keep);
    start(std::move(ticket), *bucket, std::move(operation), std::move(keep), false);
  }
}

void Group::leave() { leaving_ = true; }

void Group::release() {
  devices_.release();
  if (nodes_) {
    nodes_->local.release();
    nodes_->cross.release();
  }
  data_.release();
  control_.release();
}

}  // namespace collective
