#include "engine/agreement.h"

#include <algorithm>
#include <thread>

namespace collective {
namespace {

// How long an engine that stops waits until its last word is on its way.
constexpr auto kLastWord = std::chrono::milliseconds(500);

}  // namespace

Agreement::Agreement(int rank, const RankNames& names, const Limits& limits, uint32_t most_buckets) : rank_(rank) {
  if (rank == 0) coordinator_.emplace(names, limits, most_buckets);
}

void Agreement::submit(const std::string& name, const Descriptor& descriptor, int64_t rows, bool recurring) {
  std::string encoded = descriptor.encode();
  if (const uint32_t* const id = names_.find(name, encoded); id != nullptr) {
    words_.put(Word::kId);
    words_.put(*id);
  } else {
    words_.put(Word::kFull);
    words_.put_text(name);
    words_.put_text(encoded);
    words_.put(rows);
    // An id stands for the descriptor alone: rows that differ must be told every time.
    words_.put(recurring && !rows_differ(descriptor.kind));
  }
  mine_.insert_or_assign(name, std::move(encoded));
}

void Agreement::join() { words_.put(Word::kJoin); }

void Agreement::let_go(uint32_t bucket) {
  words_.put(Word::kLetGo);
  words_.put(bucket);
}

void Agreement::leave(const std::vector<uint32_t>& started) {
  words_.put(Word::kLeave);
  words_.put_list(started);
}

void Agreement::tell_waits(const std::string& records) {
  words_.put(Word::kWaits);
  words_.put_text(records);
}

void Agreement::stop(ErrorCode code, const std::string& text) {
  Writer decision;
  write_stopped(decision, rank_, code, text);
  if (coordinator_) {
    mail_->send(decision.take());
    return;
  }
  mail_->tell_below(decision.take());
  Writer word;
  word.put(Word::kStop);
  word.put(code);
  word.put_text(text);
  mail_->send(word.take());
}

void Agreement::flush() {
  const auto give_up = Clock::now() + kLastWord;
  while (!mail_->sent() && Clock::now() < give_up) std::this_thread::yield();
}

bool Agreement::progress(std::vector<Decision>& decisions) {
  bool moved = false;
  if (!words_.empty()) {
    moved = true;
    if (coordinator_)
      coordinator_->take(rank_, words_.take());
    else
      mail_->send(words_.take());
  }
  while (const auto message = mail_->poll()) {
    moved = true;
    if (coordinator_)
      coordinator_->take(message->source, message->bytes);
    else
      take_decisions(message->bytes, decisions);
  }
  if (coordinator_) {
    if (const std::string decided = coordinator_->decide(Clock::now()); !decided.empty()) {
      mail_->send(decided);
      take_decisions(decided, decisions);
      moved = true;
    }
  }
  mail_->sent();
  return mail_->take_moved() || moved;
}

void Agreement::take_decisions(const std::string& bytes, std::vector<Decision>& decisions) {
  Reader r(bytes);
  while (!r.empty()) {
    Decision decision{r.get<Decision::Kind>()};
    switch (decision.kind) {
      case Decision::Kind::kExecute: {
        decision.bucket = r.get<uint32_t>();
        decision.buckets = r.get<uint32_t>();
        decision.entries.resize(r.get<uint32_t>());
        for (Decision::Entry& entry : decision.entries) {
          const auto form = r.get<NameForm>();
          entry.name = form == NameForm::kId ? names_.at(r.get<uint32_t>()).name : r.get_text();
          if (form == NameForm::kWithDescriptor) entry.encoded = r.get_text();
          entry.rows = r.get_list<int64_t>();
          mail_->decided(entry.name);
          const auto mine = mine_.find(entry.name);
          if (mine == mine_.end()) continue;  // this rank has joined
          entry.encoded.clear();
          if (form == NameForm::kNewId) names_.add(entry.name, mine->second);
          mine_.erase(mine);
        }
        break;
      }
      case Decision::Kind::kFail: {
        decision.entries.push_back({r.get_text(), {}, {}});
        const auto targets = r.get_list<int>();
        decision.code = r.get<ErrorCode>();
        decision.text = r.get_text();
        if (targets.size() > 1) mail_->decided(decision.entries[0].name);  // else it may be about one that was late
        if (std::find(targets.begin(), targets.end(), rank_) == targets.end()) continue;
        mine_.erase(decision.entries[0].name);
        break;
      }
      case Decision::Kind::kLeft:
        decision.rank = r.get<int>();
        decision.started = r.get_list<uint32_t>();
        break;
      case Decision::Kind::kJoined: decision.rank = r.get<int>(); break;
      case Decision::Kind::kAllJoined:
        decision.rank = r.get<int>();
        mail_->all_joined();
        break;
      case Decision::Kind::kAllLeft: break;
      case Decision::Kind::kStopped:
        decision.rank = r.get<int>();
        decision.code = r.get<ErrorCode>();
        decision.text = r.get_text();
        break;
      case Decision::Kind::kLedger: decision.text = r.get_text(); break;
      case Decision::Kind::kReleased: decision.bucket = r.get<uint32_t>(); break;
    }
    decisions.push_back(std::move(decision));
  }
}

}  // namespace collective
