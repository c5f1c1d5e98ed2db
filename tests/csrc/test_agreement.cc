// The agreement by name (csrc/engine/agreement, coordinator) over mail in memory, without MPI: threads as ranks.
//
//   build/csrc/test_agreement threads 4 [seed]
//   build/csrc/test_agreement_tsan threads 4 [seed]
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "engine/agreement.h"
#include "world.h"

using namespace collective;

namespace {

// The boxes of all ranks, and how many letters went through them.
struct Post {
  explicit Post(int size) : boxes(static_cast<size_t>(size)) {}
  std::mutex mutex;
  std::vector<std::deque<Message>> boxes;
  size_t letters = 0, nbytes = 0;
};

class MemoryMail final : public Mail {
 public:
  MemoryMail(std::shared_ptr<Post> post, int rank) : post_(std::move(post)), rank_(rank) {}
  void send(std::string bytes) override {
    const std::lock_guard lock(post_->mutex);
    const size_t begin = rank_ == 0 ? 1 : 0, end = rank_ == 0 ? post_->boxes.size() : 1;
    for (size_t to = begin; to < end; ++to) {
      post_->boxes[to].push_back({rank_, bytes});
      ++post_->letters;
      post_->nbytes += bytes.size();
    }
  }
  std::optional<Message> poll() override {
    const std::lock_guard lock(post_->mutex);
    auto& box = post_->boxes[static_cast<size_t>(rank_)];
    if (box.empty()) return std::nullopt;
    Message message = std::move(box.front());
    box.pop_front();
    return message;
  }
  bool sent() override { return true; }
  void hang_up() override {}

 private:
  std::shared_ptr<Post> post_;
  int rank_;
};

constexpr uint32_t kMostBuckets = 100;

Limits limits(double timeout = 30) {
  using Seconds = std::chrono::duration<double>;
  return {1 << 16, Seconds(1000), Seconds(timeout), false, false};
}

// One rank's end, with what it has been told.
struct Member {
  const World& world;
  std::shared_ptr<Post> post;
  Agreement agreement;
  std::vector<Decision> told;

  Member(const World& world, double timeout = 30)
      : world(world),
        post(shared_post(world)),
        agreement(world.rank, RankNames::of_job(world.size), limits(timeout), kMostBuckets,
                  std::make_unique<MemoryMail>(post, world.rank)) {}

  static std::shared_ptr<Post> shared_post(const World& world) {
    static std::shared_ptr<Post> latest;
    if (world.rank == 0) latest = std::make_shared<Post>(world.size);
    world.barrier();
    std::shared_ptr<Post> mine = latest;
    world.barrier();
    return mine;
  }

  // Until the rank has been told `count` things, and that all ranks have.
  void wait_for(size_t count) {
    const auto end = Clock::now() + std::chrono::seconds(60);
    while (told.size() < count) {
      if (Clock::now() > end) fail(world, "was told " + std::to_string(told.size()) + " of " + std::to_string(count));
      if (!agreement.progress(told)) std::this_thread::yield();
    }
  }
  size_t told_entries() const {
    size_t count = 0;
    for (const Decision& decision : told) count += decision.entries.size();
    return count;
  }
  void wait_for_entries(size_t count) {
    while (told_entries() < count) wait_for(told.size() + 1);
  }
  void expect(bool holds, const std::string& what) const {
    if (!holds) fail(world, what);
  }
};

Descriptor allreduce_of(int64_t count, DType dtype = DType::kFloat32) {
  Descriptor d;
  d.kind = Kind::kAllreduce;
  d.dtype = d.wire = dtype;
  d.shape = {count};
  return d;
}

std::string text_of(const std::vector<Decision>& told) {
  std::string text;
  for (const Decision& decision : told) {
    text += std::to_string(static_cast<int>(decision.kind)) + ":";
    for (const Decision::Entry& entry : decision.entries) text += entry.name + ",";
    text += ";";
  }
  return text;
}

// What all ranks were told must be the same: compared by way of a table of all.
void compare(const Member& member) {
  static std::vector<std::string> texts;
  const World& world = member.world;
  if (world.rank == 0) texts.assign(static_cast<size_t>(world.size), "");
  world.barrier();
  texts[static_cast<size_t>(world.rank)] = text_of(member.told);
  world.barrier();
  member.expect(texts[0] == texts[static_cast<size_t>(world.rank)], "ranks were told different things");
  world.barrier();
}

void test_any_order(const World& world) {
  Member member(world);
  std::mt19937 random(world.seed + static_cast<unsigned>(world.rank));
  std::vector<int> order(200);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  for (int round = 0; round < 3; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    const size_t before = member.told_entries();
    for (const int i : order) {
      member.agreement.submit("x" + std::to_string(i), allreduce_of(1 + i * 50), 0, true);
      if (random() % 4 == 0) member.agreement.progress(member.told);
    }
    member.wait_for_entries(before + order.size());
  }
  compare(member);
  std::map<std::string, int> executed;
  for (const Decision& decision : member.told) {
    member.expect(decision.kind == Decision::Kind::kExecute, "something else than an execution");
    size_t nbytes = 0;
    for (const Decision::Entry& entry : decision.entries) {
      ++executed[entry.name];
      nbytes += static_cast<size_t>(1 + std::stoi(entry.name.substr(1)) * 50) * 4;
    }
    member.expect(decision.entries.size() == 1 || nbytes <= limits().fusion_threshold, "too much is fused");
  }
  for (const auto& [name, times] : executed) member.expect(times == 3, name + " was not executed three times");
}

void test_mismatch_and_refusal(const World& world) {
  Member member(world);
  const bool differs = world.rank == world.size - 1;
  member.agreement.submit("good", allreduce_of(4), 0, true);
  member.agreement.submit("bad", allreduce_of(differs ? 5 : 4), 0, true);
  Descriptor refusal = allreduce_of(4);
  if (differs) {
    refusal = {};
    refusal.kind = Kind::kRefusal;
    refusal.layout = "its call was wrong";
  }
  member.agreement.submit("refused", refusal, 0, false);
  member.wait_for_entries(3);
  for (const Decision& decision : member.told) {
    const std::string& name = decision.entries[0].name;
    if (name == "good" || (name == "bad" && world.size == 1)) {
      member.expect(decision.kind == Decision::Kind::kExecute, name + " failed");
      continue;
    }
    member.expect(decision.kind == Decision::Kind::kFail && decision.code == ErrorCode::kMismatch, name + " went on");
    const std::string told = name == "bad" ? "shape differs" : "its call was wrong";
    member.expect(decision.text.find(told) != std::string::npos, "wrong text: " + decision.text);
  }
}

void test_join(const World& world) {
  Member member(world);
  const int last = world.size - 1;
  if (world.rank == last) member.agreement.join();
  world.barrier();
  for (int i = 0; i < 5 && world.rank != last; ++i)
    member.agreement.submit("x" + std::to_string(i), allreduce_of(1 << 20), 0, true);
  if (world.size > 1) member.wait_for_entries(5);
  if (world.rank != last) member.agreement.join();
  while (member.told.empty() || member.told.back().kind != Decision::Kind::kAllJoined)
    member.wait_for(member.told.size() + 1);
  for (const Decision& decision : member.told)
    for (const Decision::Entry& entry : decision.entries) {
      const bool stands_in = world.rank == last;
      member.expect(stands_in == !entry.encoded.empty(), "descriptors are for ranks that have joined");
      if (stands_in)
        member.expect(Descriptor::decode(entry.encoded).shape == std::vector<int64_t>{1 << 20}, "wrong descriptor");
    }
  // All are back.
  member.agreement.submit("after", allreduce_of(3), 0, true);
  member.wait_for(member.told.size() + 1);
  member.expect(member.told.back().kind == Decision::Kind::kExecute, "the name after join() failed");
}

void test_late_and_leaving(const World& world) {
  if (world.size == 1) return;
  Member member(world, 0.3);
  const int late = world.size - 1;
  if (world.rank != late) {
    member.agreement.submit("late", allreduce_of(2), 0, true);
    member.wait_for(1);
    const Decision& decision = member.told[0];
    member.expect(decision.kind == Decision::Kind::kFail && decision.code == ErrorCode::kTimeout, "no time-out");
    const std::string told = "rank " + std::to_string(late) + " did not submit it within";
    member.expect(decision.text.find(told) != std::string::npos, "wrong text: " + decision.text);
  }
  // The late submission fails by itself, so that the next call finds its counterparts.
  std::atomic<bool>* const over = [] {
    static std::atomic<bool> flag;
    return &flag;
  }();
  if (world.rank == 0) *over = false;
  world.barrier();
  if (world.rank == late) {
    member.agreement.submit("late", allreduce_of(2), 0, true);
    member.wait_for(1);
    member.expect(member.told[0].code == ErrorCode::kTimeout, "a late submission did not fail");
    *over = true;
  } else {
    while (!*over) member.agreement.progress(member.told);
  }
  world.barrier();
  member.agreement.submit("late", allreduce_of(2), 0, true);
  member.wait_for(2);
  member.expect(member.told[1].kind == Decision::Kind::kExecute, "the next call did not find its counterparts");
  world.barrier();
  if (world.rank == late)
    member.agreement.leave({7});
  else
    member.agreement.submit("never", allreduce_of(2), 0, true);
  const auto has = [&](Decision::Kind kind) {
    return std::any_of(member.told.begin(), member.told.end(), [&](const Decision& d) { return d.kind == kind; });
  };
  while (!has(Decision::Kind::kLeft) || (world.rank != late && !has(Decision::Kind::kFail)))
    member.wait_for(member.told.size() + 1);
  for (const Decision& decision : member.told)
    if (decision.kind == Decision::Kind::kLeft && decision.rank == late)
      member.expect(decision.started == std::vector<uint32_t>{7}, "wrong word of leaving");
  if (world.rank != late) member.agreement.leave({});
  while (!has(Decision::Kind::kAllLeft)) member.wait_for(member.told.size() + 1);
}

void test_buckets(const World& world) {
  Member member(world);
  const auto open = [&](const std::string& name, size_t count) {
    Descriptor d;
    d.kind = Kind::kBuckets;
    d.buckets.assign(count, {DType::kFloat32, DType::kFloat32, 10, 2, false});
    member.agreement.submit(name, d, 0, false);
    const size_t before = member.told_entries();
    member.wait_for_entries(before + 1);
    return member.told.back();
  };
  member.expect(open("a", 30).bucket == 0, "a");
  member.expect(open("b", 50).bucket == 30, "b");
  const Decision none = open("too many", 21);
  member.expect(none.kind == Decision::Kind::kFail && none.code == ErrorCode::kInvalid, "no room, and no error");
  member.agreement.let_go(0);
  while (member.told.back().kind != Decision::Kind::kReleased) member.wait_for(member.told.size() + 1);
  member.expect(open("c", 20).bucket == 0, "c did not get the numbers of a");
  member.expect(open("d", 20).bucket == 80, "d");
  compare(member);
}

// What a round costs at the coordinator: one letter from every rank, one to every rank, and 5 bytes for a known name.
void test_cost_at_1000_ranks(const World& world) {
  if (world.rank != 0) return;
  constexpr int kRanks = 1000;
  const auto post = std::make_shared<Post>(kRanks);
  std::vector<std::unique_ptr<Agreement>> ranks;
  for (int rank = 0; rank < kRanks; ++rank)
    ranks.push_back(std::make_unique<Agreement>(rank, RankNames::of_job(kRanks), limits(), kMostBuckets,
                                                std::make_unique<MemoryMail>(post, rank)));
  std::vector<Decision> told;
  const auto round = [&] {
    post->letters = post->nbytes = 0;
    for (auto& rank : ranks) rank->submit("gradient", allreduce_of(100), 0, true);
    for (int rank = kRanks - 1; rank >= 0; --rank) ranks[static_cast<size_t>(rank)]->progress(told);
    told.clear();
    for (auto& rank : ranks) rank->progress(told);
    if (told.size() != kRanks - 1) fail(world, "not all ranks were told");
    if (post->letters != 2 * (kRanks - 1)) fail(world, "letters: " + std::to_string(post->letters));
  };
  round();
  round();
  if (post->nbytes > 40 * kRanks) fail(world, "bytes of a known name: " + std::to_string(post->nbytes));
}

}  // namespace

int main(int argc, char** argv) {
  const int size = argc > 2 ? std::atoi(argv[2]) : 4;
  const unsigned seed = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1;
  run_threads(size, seed,
              {{"names in any order", test_any_order},
               {"mismatch and refusal", test_mismatch_and_refusal},
               {"join", test_join},
               {"late, and leaving", test_late_and_leaving},
               {"buckets", test_buckets},
               {"cost at 1000 ranks", test_cost_at_1000_ranks}});
}
