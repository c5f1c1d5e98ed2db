#include "engine/inquiry.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "base/codec.h"

namespace collective {
namespace {
constexpr int kQuestionTag = 3;
constexpr int kAnswerTag = 4;
constexpr int kDemandTag = 5;
constexpr uint32_t kNoBucket = UINT32_MAX;  // in a question that is about presence alone

template <typename T>
std::shared_ptr<const std::string> letter(const T& value) {
  return std::make_shared<const std::string>(reinterpret_cast<const char*>(&value), sizeof value);
}
}  // namespace

Inquiry::Inquiry(const Comm& comm)
    : comm_(&comm), asked_of_(comm, kQuestionTag), told_(comm, kAnswerTag), demanded_(comm, kDemandTag) {}

void Inquiry::ask(uint32_t bucket) {
  asked_ = bucket;
  answers_.assign(static_cast<size_t>(comm_->size()), std::nullopt);
  for (int peer = 0; peer < comm_->size(); ++peer)
    if (peer != comm_->rank()) asked_of_.send(letter(Question{bucket}), peer);
}

void Inquiry::ask_presence(int peer) {
  present_ = false;
  asked_of_.send(letter(Question{kNoBucket}), peer);
}

void Inquiry::progress(const std::vector<uint32_t>& started, const std::function<std::string()>& waits_for) {
  if (comm_->size() == 1) return;
  while (auto message = asked_of_.poll()) {
    Question question;
    std::memcpy(&question, message->bytes.data(), sizeof question);
    const uint32_t count = question.bucket < started.size() ? started[question.bucket] : 0;
    Answer answer{question.bucket, count, ""};
    if (question.bucket != kNoBucket)
      clipped(waits_for(), sizeof answer.waits_for - 1).copy(answer.waits_for, sizeof answer.waits_for);
    told_.send(letter(answer), message->source);
  }
  while (auto message = told_.poll()) {
    Answer answer;
    std::memcpy(&answer, message->bytes.data(), sizeof answer);
    if (answer.bucket == kNoBucket) present_ = true;
    if (answer.bucket == asked_ && !answers_.empty()) answers_[static_cast<size_t>(message->source)] = answer;
  }
  for (MpiLetters* letters : {&asked_of_, &told_, &demanded_}) letters->sent();
}

void Inquiry::demand(int peer, uint32_t bucket, uint64_t plan, uint32_t run) {
  demanded_.send(letter(Demand{plan, bucket, run}), peer);
}

std::vector<Inquiry::Demand> Inquiry::take_demands() {
  std::vector<Demand> demands;
  while (auto message = demanded_.poll()) {
    demands.emplace_back();
    std::memcpy(&demands.back(), message->bytes.data(), sizeof(Demand));
  }
  return demands;
}

std::string Inquiry::verdict(uint32_t bucket, uint32_t run) const {
  std::vector<int> silent, behind;
  std::map<std::string, std::vector<int>> held_up;  // by what they wait for
  for (int peer = 0; peer < comm_->size(); ++peer) {
    if (peer == comm_->rank()) continue;
    const auto& answer = bucket == asked_ && !answers_.empty() ? answers_[static_cast<size_t>(peer)] : std::nullopt;
    if (!answer.has_value())
      silent.push_back(peer);
    else if (answer->started < run)
      (answer->waits_for[0] == '\0' ? behind : held_up[answer->waits_for]).push_back(peer);
  }
  std::string text;
  const auto tell = [&](const std::string& more) { text += (text.empty() ? "" : "; ") + more; };
  if (!behind.empty()) tell(comm_->names().located(behind) + " did not start run " + std::to_string(run));
  for (const auto& [what, ranks] : held_up) {
    const bool one = ranks.size() == 1;
    tell(comm_->names().located(ranks) + (one ? " has" : " have") + " not reached run " + std::to_string(run) +
         (one ? ": it waits itself, for " : ": they wait themselves, for ") + what);
  }
  if (!silent.empty()) tell(comm_->names().located(silent) + " did not answer");
  return text.empty() ? "all ranks have started it" : text;
}

}  // namespace collective
