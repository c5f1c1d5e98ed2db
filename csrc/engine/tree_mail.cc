#include "engine/tree_mail.h"

#include <algorithm>
#include <utility>

namespace collective {
namespace {

// In place of a list of ranks: all that the sender speaks for.
constexpr uint32_t kAllBelow = UINT32_MAX;

}  // namespace

TreeMail::TreeMail(int rank, const std::vector<int>& leaders, const NameTable& names, std::unique_ptr<Letters> letters,
                   std::unique_ptr<Mail> members)
    : rank_(rank), names_(&names), letters_(std::move(letters)), local_(std::move(members)) {
  std::vector<int> nodes;  // their leaders, in order
  std::vector<std::vector<int>> ranks;
  for (int r = 0; r < static_cast<int>(leaders.size()); ++r) {
    const int leader = leaders[static_cast<size_t>(r)];
    if (leader == r) {
      nodes.push_back(r);
      ranks.emplace_back();
    }
    const auto node = static_cast<size_t>(std::find(nodes.begin(), nodes.end(), leader) - nodes.begin());
    ranks[node].push_back(r);
  }
  for (int r = 0; r < static_cast<int>(leaders.size()); ++r)
    if (leaders[static_cast<size_t>(r)] == rank_) members_.push_back(r);
  // Node i has those from kArity i + 1 on below it. From the last one, each adds all its ranks to those of the one above.
  for (size_t node = nodes.size(); node-- > 0;) {
    if (nodes[node] == rank_) {
      ranks_ = ranks[node].size();
      for (size_t child = kArity * node + 1; child <= kArity * node + kArity && child < nodes.size(); ++child)
        children_.push_back({nodes[child], ranks[child]});
      if (node > 0) parent_ = nodes[(node - 1) / kArity];
    }
    if (node > 0) {
      auto& above = ranks[(node - 1) / kArity];
      above.insert(above.end(), ranks[node].begin(), ranks[node].end());
    }
  }
}

void TreeMail::send(std::string bytes) {
  if (is_root())
    tell_below(bytes);
  else
    take_words({rank_}, bytes);
}

void TreeMail::tell_below(const std::string& bytes) {
  const auto shared = std::make_shared<const std::string>(bytes);
  for (const Child& child : children_) letters_->send(shared, child.leader);
  if (local_ != nullptr) local_->send(bytes);
}

void TreeMail::take_words(const std::vector<int>& sources, std::string_view words) {
  moved_ = true;
  if (is_root()) {
    for (const int source : sources) arrived_.push_back({source, std::string(words)});
    return;
  }
  std::string name;
  for (Reader r(words); !r.empty();) {
    const std::string_view begin = words.substr(words.size() - r.remaining());
    const auto kind = r.get<Word>();
    uint32_t id = 0;
    read_word(r, kind, id, name);
    if (kind == Word::kId) name = names_->at(id).name;
    const std::string_view word = begin.substr(0, begin.size() - r.remaining());
    if (!is_submission(kind)) {
      if (kind == Word::kJoin) joined_ += sources.size();
      if (kind != Word::kWaits)
        for (auto& [before, held] : held_) send_up(held);
      pass_on(sources, word);
      continue;
    }
    const auto found = held_.try_emplace(name).first;
    Held& held = found->second;
    if (held.variants.empty()) held.since = Clock::now();
    auto variant =
        std::find_if(held.variants.begin(), held.variants.end(), [&](const Variant& v) { return v.word == word; });
    if (variant == held.variants.end()) variant = held.variants.insert(variant, {std::string(word), {}});
    variant->sources.insert(variant->sources.end(), sources.begin(), sources.end());
    held.ranks += sources.size();
    if (held.ranks + joined_ < ranks_) continue;
    send_up(held);
  }
}

void TreeMail::decided(const std::string& name) {
  const auto found = held_.find(name);
  if (found == held_.end()) return;
  Held& held = found->second;
  held.ranks = 0;  // but for what has not gone up yet, of a rank that was late or has joined
  for (const Variant& variant : held.variants) held.ranks += variant.sources.size();
  if (held.ranks == 0) held_.erase(found);
}

void TreeMail::pass_on(const std::vector<int>& sources, std::string_view word) {
  if (sources.size() == ranks_)
    up_.put(kAllBelow);
  else
    up_.put_list(sources);
  up_.put_text(word);
}

void TreeMail::send_up(Held& held) {
  for (const Variant& variant : held.variants) pass_on(variant.sources, variant.word);
  held.variants.clear();
}

void TreeMail::take_batch(const Child& child, const std::string& bytes) {
  for (Reader r(bytes); !r.empty();) {
    const auto count = r.get<uint32_t>();
    std::vector<int> sources;
    if (count == kAllBelow) {
      sources = child.below;
    } else {
      sources.resize(count);
      for (int& source : sources) source = r.get<int>();
    }
    take_words(sources, r.get_text());
  }
}

std::optional<Message> TreeMail::poll() {
  while (const auto letter = letters_->poll()) {
    if (letter->source == parent_) {
      tell_below(letter->bytes);
      return Message{0, letter->bytes};
    }
    for (const Child& child : children_)
      if (child.leader == letter->source) take_batch(child, letter->bytes);
  }
  while (local_ != nullptr) {
    const auto words = local_->poll();
    if (!words) break;
    take_words({members_[static_cast<size_t>(words->source)]}, words->bytes);
  }
  if (!arrived_.empty()) {
    Message message = std::move(arrived_.front());
    arrived_.pop_front();
    return message;
  }
  flush();
  return std::nullopt;
}

// Sends what is complete, and what has waited long.
void TreeMail::flush() {
  if (const auto now = Clock::now(); now >= next_look_ && !held_.empty()) {
    next_look_ = now + kPatience / 4;
    for (auto& [name, held] : held_)
      if (!held.variants.empty() && now - held.since >= kPatience) send_up(held);
  }
  if (!up_.empty()) letters_->send(std::make_shared<const std::string>(up_.take()), parent_);
}

bool TreeMail::sent() {
  if (!is_root()) flush();
  const bool all = letters_->sent();
  return (local_ == nullptr || local_->sent()) && all && up_.empty() && arrived_.empty();
}

void TreeMail::hang_up() {
  if (local_ != nullptr) local_->hang_up();
}

}  // namespace collective
