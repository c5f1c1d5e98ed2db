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
#include "engine/tree_mail.h"
#include "world.h"

using namespace collective;

namespace {

// What is on its way to each rank, between nodes and on a node, and how much each has sent and received between nodes.
struct Post {
  explicit Post(int size)
      : letters(static_cast<size_t>(size)), local(letters.size()), counts(letters.size()), nbytes(letters.size()) {}
  std::mutex mutex;
  std::vector<std::deque<Message>> letters, local;
  std::vector<size_t> counts, nbytes;

  std::optional<Message> take(std::deque<Message>& box) {
    const std::lock_guard lock(mutex);
    if (box.empty()) return std::nullopt;
    Message message = std::move(box.front());
    box.pop_front();
    return message;
  }
};

class MemoryLetters final : public Letters {
 public:
  MemoryLetters(std::shared_ptr<Post> post, int rank) : post_(std::move(post)), rank_(static_cast<size_t>(rank)) {}
  void send(std::shared_ptr<const std::string> bytes, int peer) override {
    const std::lock_guard lock(post_->mutex);
    const auto to = static_cast<size_t>(peer);
    post_->letters[to].push_back({static_cast<int>(rank_), *bytes});
    for (const size_t rank : {rank_, to}) {
      ++post_->counts[rank];
      post_->nbytes[rank] += bytes->size();
    }
  }
  std::optional<Message> poll() override { return post_->take(post_->letters[rank_]); }
  bool sent() override { return true; }

 private:
  std::shared_ptr<Post> post_;
  size_t rank_;
};

// In place of the shared memory of a node, whose ranks are [first, first + size).
class MemoryMail final : public Mail {
 public:
  MemoryMail(std::shared_ptr<Post> post, int rank, int first, int size)
      : post_(std::move(post)), rank_(rank), first_(first), size_(size) {}
  void send(std::string bytes) override {
    const std::lock_guard lock(post_->mutex);
    for (int to = 0; to < size_; ++to)
      if ((to == 0) != (rank_ == first_))
        post_->local[static_cast<size_t>(first_ + to)].push_back({rank_ - first_, bytes});
  }
  std::optional<Message> poll() override { return post_->take(post_->local[static_cast<size_t>(rank_)]); }
  bool sent() override { return true; }
  void hang_up() override {}

 private:
  std::shared_ptr<Post> post_;
  int rank_, first_, size_;
};

// As on nodes of so many ranks; the last may have fewer.
std::unique_ptr<Mail> make_mail(const std::shared_ptr<Post>& post, const Agreement& agreement, int rank, int size,
                                int per_node) {
  std::vector<int> leaders;
  for (int r = 0; r < size; ++r) leaders.push_back(r - r % per_node);
  const int first = leaders[static_cast<size_t>(rank)], here = std::min(per_node, size - first);
  std::unique_ptr<Mail> node;
  if (here > 1) node = std::make_unique<MemoryMail>(post, rank, first, here);
  if (rank != first) return node;
  return std::make_unique<TreeMail>(rank, leaders, agreement.names(), std::make_unique<MemoryLetters>(post, rank),
                                    std::move(node));
}

int ranks_per_node = 1;

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
        agreement(world.rank, RankNames::of_job(world.size), limits(timeout), kMostBuckets) {
    agreement.use(make_mail(post, agreement, world.rank, world.size, ranks_per_node));
  }

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
  // All are back. From now on each name takes one letter up again, whatever was submitted when the rank joined.
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

// What a round costs at 1,000 ranks: at most 16 letters at any of them, and few bytes for a known name.
void test_cost_at_1000_ranks(const World& world) {
  if (world.rank != 0) return;
  constexpr int kRanks = 1000;
  for (const int per_node : {1, 8, 64}) {
    const auto post = std::make_shared<Post>(kRanks);
    std::vector<std::unique_ptr<Agreement>> ranks;
    for (int rank = 0; rank < kRanks; ++rank) {
      ranks.push_back(std::make_unique<Agreement>(rank, RankNames::of_job(kRanks), limits(), kMostBuckets));
      ranks.back()->use(make_mail(post, *ranks.back(), rank, kRanks, per_node));
    }
    std::mt19937 random(world.seed);
    std::vector<int> order(kRanks);
    for (int rank = 0; rank < kRanks; ++rank) order[static_cast<size_t>(rank)] = rank;
    const auto round = [&] {
      std::fill(post->counts.begin(), post->counts.end(), 0);
      std::fill(post->nbytes.begin(), post->nbytes.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      std::vector<std::vector<Decision>> told(kRanks);
      // Each rank submits in a moment of its own, while some others look for messages.
      for (const int rank : order) {
        ranks[static_cast<size_t>(rank)]->submit("gradient", allreduce_of(100), 0, true);
        for (const int looks : {rank, order[random() % kRanks]})
          ranks[static_cast<size_t>(looks)]->progress(told[static_cast<size_t>(looks)]);
      }
      for (bool moved = true; moved;) {
        moved = false;
        for (int rank = 0; rank < kRanks; ++rank)
          moved |= ranks[static_cast<size_t>(rank)]->progress(told[static_cast<size_t>(rank)]);
      }
      for (const auto& decisions : told)
        if (decisions.size() != 1 || decisions[0].kind != Decision::Kind::kExecute) fail(world, "a rank was not told");
      const size_t most = *std::max_element(post->counts.begin(), post->counts.end());
      if (most > 16) fail(world, std::to_string(most) + " letters at a rank, " + std::to_string(per_node) + " a node");
    };
    round();
    round();
    const size_t most = *std::max_element(post->nbytes.begin(), post->nbytes.end());
    if (most > 800) fail(world, "bytes of a known name at a rank: " + std::to_string(most));
  }
}

// Leaders hold words back until all have come. What makes a rank count differently, a join or an error, must not leave a
// count behind: the next words of that name would wait for kPatience each time.
void test_no_count_is_left_behind(const World& world) {
  if (world.rank != 0) return;
  constexpr int kRanks = 12, kPerNode = 4, kJoins = 7;  // the last rank of the second node
  const auto post = std::make_shared<Post>(kRanks);
  std::vector<std::unique_ptr<Agreement>> ranks;
  std::vector<std::vector<Decision>> told(kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.push_back(std::make_unique<Agreement>(rank, RankNames::of_job(kRanks), limits(), kMostBuckets));
    ranks.back()->use(make_mail(post, *ranks.back(), rank, kRanks, kPerNode));
  }
  const auto look = [&] {
    for (int pass = 0; pass < 10; ++pass)
      for (int rank = 0; rank < kRanks; ++rank)
        ranks[static_cast<size_t>(rank)]->progress(told[static_cast<size_t>(rank)]);
  };
  const auto submit = [&](int rank, int64_t count, bool recurring = true) {
    ranks[static_cast<size_t>(rank)]->submit("x", allreduce_of(count), 0, recurring);
  };
  const auto expect = [&](Decision::Kind kind, const std::string& when) {
    for (auto& decisions : told) {
      if (decisions.empty() || decisions.back().kind != kind) fail(world, "not decided at once: " + when);
      decisions.clear();
    }
  };
  const auto rounds = [&](const std::string& when, int without = -1) {
    for (int round = 0; round < 3; ++round) {
      for (int rank = 0; rank < kRanks; ++rank)
        if (rank != without) submit(rank, 3);
      look();
      expect(Decision::Kind::kExecute, when);
    }
  };
  rounds("at first");
  for (int rank = 0; rank < kRanks; ++rank)
    if (rank != kJoins) submit(rank, 3);
  look();
  ranks[kJoins]->join();
  look();
  expect(Decision::Kind::kExecute, "by the join");
  rounds("after the join", kJoins);
  for (int rank = 0; rank < kRanks; ++rank)
    if (rank != kJoins) ranks[static_cast<size_t>(rank)]->join();
  look();
  expect(Decision::Kind::kAllJoined, "all have joined");
  rounds("after all have joined");
  for (int rank = 0; rank < kRanks; ++rank) submit(rank, rank == kJoins ? 5 : 3);
  look();
  expect(Decision::Kind::kFail, "a mismatch");
  rounds("after a mismatch");
}

}  // namespace

int main(int argc, char** argv) {
  const int size = argc > 2 ? std::atoi(argv[2]) : 4;
  const unsigned seed = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1;
  std::vector<Test> tests;
  for (int per_node = 1; per_node <= size; ++per_node)
    for (const Test& test : std::vector<Test>{{"names in any order", test_any_order},
                                              {"mismatch and refusal", test_mismatch_and_refusal},
                                              {"join", test_join},
                                              {"late, and leaving", test_late_and_leaving},
                                              {"buckets", test_buckets}})
      tests.push_back({test.name + ", " + std::to_string(per_node) + " a node",
                       [per_node, run = test.function](const World& world) {
                         world.barrier();
                         if (world.rank == 0) ranks_per_node = per_node;
                         world.barrier();
                         run(world);
                       }});
  tests.push_back({"no count is left behind", test_no_count_is_left_behind});
  tests.push_back({"cost at 1000 ranks", test_cost_at_1000_ranks});
  run_threads(size, seed, tests);
}
