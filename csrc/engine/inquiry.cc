#include "engine/inquiry.h"

#include <algorithm>
#include <map>

#include "base/codec.h"

namespace collective {
namespace {
constexpr int kQuestionTag = 3;
constexpr int kAnswerTag = 4;
constexpr int kDemandTag = 5;
constexpr uint32_t kNoBucket = UINT32_MAX;   // in a question that is about presence alone
constexpr uint32_t kDoing = UINT32_MAX - 2;  // in one that is about what a rank does
constexpr size_t kLongestText = 320;
// How long it may take to find out where a script is: one that does not let other threads of Python run is not told.
constexpr auto kLooking = std::chrono::milliseconds(300);

std::shared_ptr<const std::string> letter(Writer w) { return std::make_shared<const std::string>(w.take()); }

Writer writer_of(const Inquiry::Question& question) {
  Writer w;
  w.put(question.bucket);
  w.put(question.run);
  return w;
}

Inquiry::Question read_question(Reader& r) {
  const auto bucket = r.get<uint32_t>();
  return {bucket, r.get<uint64_t>()};
}

}  // namespace

Inquiry::Inquiry(const Comm& comm)
    : comm_(&comm), asked_of_(comm, kQuestionTag), told_(comm, kAnswerTag), demanded_(comm, kDemandTag) {}

void Inquiry::ask(const Question& question) {
  asked_ = question;
  answers_.assign(static_cast<size_t>(comm_->size()), std::nullopt);
  const auto asks = letter(writer_of(question));
  for (int peer = 0; peer < comm_->size(); ++peer)
    if (peer != comm_->rank()) asked_of_.send(asks, peer);
  awaited_ += static_cast<size_t>(comm_->size()) - 1;
}

void Inquiry::ask_presence(int peer) {
  present_ = false;
  asked_of_.send(letter(writer_of({kNoBucket, 0})), peer);
  ++awaited_;
}

void Inquiry::ask_doing(int peer) {
  asked_of_.send(letter(writer_of({kDoing, 0})), peer);
  ++awaited_;
}

std::string Inquiry::Doing::text() const {
  if (!waits_for.empty()) return "waits itself, for " + waits_for;
  return at.empty() ? "" : "its script is at " + at;
}

void Inquiry::answer(const Asked& asked, const Known& known, const Doing& doing) {
  Writer w = writer_of(asked.question);
  w.put(known.started);
  w.put_text(known.description);
  w.put_text(clipped(doing.waits_for, kLongestText));
  w.put_text(clipped(doing.at, kLongestText));
  told_.send(letter(std::move(w)), asked.by);
}

void Inquiry::progress(const std::function<Known(const Question&)>& known,
                       const std::function<std::optional<Doing>()>& doing,
                       const std::function<void(int peer, const Doing&)>& told) {
  if (comm_->size() == 1) return;
  while (auto message = asked_of_.poll()) {
    Reader r(message->bytes);
    unanswered_.push_back({read_question(r), message->source, Clock::now()});
  }
  std::erase_if(unanswered_, [&](const Asked& asked) {
    if (asked.question.bucket == kNoBucket) {
      answer(asked, {0, ""}, {});
      return true;
    }
    std::optional<Doing> now = doing();
    if (!now && Clock::now() - asked.since < kLooking) return false;
    answer(asked, asked.question.bucket == kDoing ? Known{0, ""} : known(asked.question), now ? *now : Doing{});
    return true;
  });
  while (auto message = told_.poll()) {
    Reader r(message->bytes);
    const Question question = read_question(r);
    --awaited_;
    Answer answer;
    answer.started = r.get<uint64_t>();
    answer.description = r.get_text();
    answer.doing.waits_for = r.get_text();
    answer.doing.at = r.get_text();
    if (question.bucket == kNoBucket) present_ = true;
    if (question.bucket == kDoing) told(message->source, answer.doing);
    if (question.bucket == asked_.bucket && question.run == asked_.run && !answers_.empty())
      answers_[static_cast<size_t>(message->source)] = std::move(answer);
  }
  for (MpiLetters* letters : {&asked_of_, &told_, &demanded_}) letters->sent();
}

void Inquiry::demand(int peer, uint32_t bucket, uint64_t plan, uint32_t run) {
  Writer w;
  w.put(Demand{plan, bucket, run});
  demanded_.send(letter(std::move(w)), peer);
}

std::vector<Inquiry::Demand> Inquiry::take_demands() {
  std::vector<Demand> demands;
  while (auto message = demanded_.poll()) demands.push_back(Reader(message->bytes).get<Demand>());
  return demands;
}

const Inquiry::Answer* Inquiry::answer_of(int peer, const Question& question) const {
  if (question.bucket != asked_.bucket || question.run != asked_.run || answers_.empty()) return nullptr;
  const auto& answer = answers_[static_cast<size_t>(peer)];
  return answer ? &*answer : nullptr;
}

std::string Inquiry::verdict(const Question& question) const {
  std::vector<int> silent;
  std::map<std::pair<bool, std::string>, std::vector<int>> behind;  // by whether they wait themselves, and what they do
  for (int peer = 0; peer < comm_->size(); ++peer) {
    if (peer == comm_->rank()) continue;
    const Answer* const answer = answer_of(peer, question);
    if (answer == nullptr)
      silent.push_back(peer);
    else if (answer->started < question.run && !answer->doing.waits_for.empty())
      behind[{true, answer->doing.waits_for}].push_back(peer);
    else if (answer->started < question.run)
      behind[{false, answer->doing.at}].push_back(peer);
  }
  const std::string it = question.bucket == kOrder ? "it" : "run " + std::to_string(question.run);
  std::string text;
  const auto tell = [&](const std::string& more) { text += (text.empty() ? "" : "; ") + more; };
  for (const auto& [doing, ranks] : behind) {
    const auto& [waits, what] = doing;
    const bool one = ranks.size() == 1;
    if (waits)
      tell(comm_->names().located(ranks) + (one ? " has" : " have") + " not reached " + it +
           (one ? ": it waits itself, for " : ": they wait themselves, for ") + what);
    else
      tell(comm_->names().located(ranks) + " did not start " + it +
           (what.empty() ? "" : (one ? ": its script is at " : ": their scripts are at ") + what));
  }
  if (!silent.empty()) tell(comm_->names().located(silent) + " did not answer");
  return text.empty() ? "all ranks have started it" : text;
}

std::string Inquiry::difference(const Question& question, const std::string& description) const {
  std::map<std::string, std::vector<int>> ranks;  // by description
  ranks[description].push_back(comm_->rank());
  for (int peer = 0; peer < comm_->size(); ++peer)
    if (const Answer* const answer = answer_of(peer, question); answer != nullptr && !answer->description.empty())
      ranks[answer->description].push_back(peer);
  if (ranks.size() == 1) return "";
  std::vector<Variant> variants;
  for (auto& [encoded, who] : ranks) {
    std::sort(who.begin(), who.end());
    variants.push_back({encoded, who});
  }
  std::sort(variants.begin(), variants.end(), [](const Variant& a, const Variant& b) { return a.ranks < b.ranks; });
  return describe_difference(variants, comm_->names());
}

}  // namespace collective
