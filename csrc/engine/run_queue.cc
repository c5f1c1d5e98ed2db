#include "engine/run_queue.h"

#include <algorithm>
#include <new>
#include <utility>

namespace collective {

void throw_for(const std::string& what) {
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

RunQueue::~RunQueue() {
  while (!running_.empty()) keep_for_ever(running_.size() - 1);
}

bool RunQueue::step() {
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
    if (finished.waiting)
      waits_->note(*finished.waiting, Clock::now(), finished.of_bucket ? finished.name() : finished.kind);
    const std::optional<Error>& failure = finished.operation->failure();
    if (timeline_->is_on()) record(finished);
    for (const auto& ticket : finished.tickets)
      finish_(*ticket, failure ? failure->code : ErrorCode::kNone, failure ? failure->what() : "");
  }
  return moved;
}

void RunQueue::record(const Running& finished) {
  Timeline::Event event{Timeline::Event::Phase::kRun, finished.kind};
  event.number = finished.of_bucket ? finished.of_bucket->run : finished.execution.value_or(0);
  event.nbytes = finished.nbytes;
  event.parts = finished.tickets.size();
  event.begin = finished.since;
  event.group = names_->label();
  for (const auto& ticket : finished.tickets) {
    event.name = ticket->name;
    timeline_->record(event);
    ++event.part;
  }
}

std::vector<std::shared_ptr<Ticket>> RunQueue::keep_for_ever(size_t i) {
  auto* const gone = new Running(std::move(running_[i]));  // never deleted
  running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
  gone->operation->give_up();
  return std::exchange(gone->tickets, {});
}

void RunQueue::give_up(size_t i, ErrorCode code, const std::string& text) {
  for (const auto& ticket : keep_for_ever(i)) {
    ticket->given_up = true;
    finish_(*ticket, code, text);
  }
}

void RunQueue::give_all_up(ErrorCode code, const std::string& text) {
  while (!running_.empty()) give_up(running_.size() - 1, code, text);
}

Running* RunQueue::oldest() {
  const auto oldest = std::min_element(running_.begin(), running_.end(),
                                       [](const Running& a, const Running& b) { return a.since < b.since; });
  return oldest == running_.end() ? nullptr : &*oldest;
}

bool RunQueue::uses_buckets(uint32_t first, uint32_t count) const {
  return std::any_of(running_.begin(), running_.end(), [&](const Running& running) {
    return running.of_bucket && running.of_bucket->bucket >= first && running.of_bucket->bucket - first < count;
  });
}

bool RunQueue::is_before(uint64_t execution) const {
  return std::any_of(running_.begin(), running_.end(),
                     [&](const Running& running) { return running.execution && *running.execution < execution; });
}

size_t RunQueue::page_locked() const {
  size_t nbytes = 0;
  for (const Running& running : running_) nbytes += running.execution ? running.operation->page_locked() : 0;
  return nbytes;
}

}  // namespace collective
