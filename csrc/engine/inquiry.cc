#include "engine/inquiry.h"

#include <algorithm>
#include <map>

#include "base/codec.h"

namespace collective {
namespace {
constexpr int kQuestionTag = 3;
constexpr int kAnswerTag = 4;
constexpr int kDemandTag = 5;
constexpr uint32_t kNoBucket = UINT32_MAX;  // in a question that is about presence alone
constexpr size_t kLongestWait = 160;

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
}

bool Inquiry::is_answered() const {
  for (int peer = 0; peer < static_cast<int>(answers_.size()); ++peer)
    if (peer != comm_->rank() && !answers_[static_cast<size_t>(peer)]) return false;
  return true;
}

void Inquiry::ask_presence(int peer) {
  present_ = false;
  asked_of_.send(letter(writer_of({kNoBucket, 0})), peer);
}

void Inquiry::progress(const std::function<Known(const Question&)>& known,
                       const std::function<std::string()>& waits_for) {
  if (comm_->size() == 1) return;
  while (auto message = asked_of_.poll()) {
    Reader r(message->bytes);
    const Question question = read_question(r);
    const bool about_presence = question.bucket == kNoBucket;
    const Known answer = about_presence ? Known{0, ""} : known(question);
    Writer w = writer_of(question);
    w.put(answer.started);
    w.put_text(answer.description);
    w.put_text(about_presence ? "" : clipped(waits_for(), kLongestWait));
    told_.send(letter(std::move(w)), message->source);
  }
  while (auto message = told_.poll()) {
    Reader r(message->bytes);
    const Question question = read_question(r);
    if (question.bucket == kNoBucket) present_ = true;
    if (question.bucket != asked_.bucket || question.run != asked_.run || answers_.empty()) continue;
    const auto started = r.get<uint64_t>();
    std::string description = r.get_text();
    answers_[static_cast<size_t>(message->source)] = Answer{started, std::move(description), r.get_text()};
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
  std::vector<int> silent, behind;
  std::map<std::string, std::vector<int>> held_up;  // by what they wait for
  for (int peer = 0; peer < comm_->size(); ++peer) {
    if (peer == comm_->rank()) continue;
    const Answer* const answer = answer_of(peer, question);
    if (answer == nullptr)
      silent.push_back(peer);
    else if (answer->started < question.run)
      (answer->waits_for.empty() ? behind : held_up[answer->waits_for]).push_back(peer);
  }
  const std::string it = question.bucket == kOrder ? "it" : "run " + std::to_string(question.run);
  std::string text;
  const auto tell = [&](const std::string& more) { text += (text.empty() ? "" : "; ") + more; };
  if (!behind.empty()) tell(comm_->names().located(behind) + " did not start " + it);
  for (const auto& [what, ranks] : held_up) {
    const bool one = ranks.size() == 1;
    tell(comm_->names().located(ranks) + (one ? " has" : " have") + " not reached " + it +
         (one ? ": it waits itself, for " : ": they wait themselves, for ") + what);
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
