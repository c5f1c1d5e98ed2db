// The whole engine without Python, for the sanitizers: several threads of each rank submit and wait while others look.
//
//   mpirun -n 2 build/csrc/test_engine_asan [seed]
//   mpirun -n 2 build/csrc/test_engine_tsan [seed]
//
// What MPI's own libraries do is none of the thread sanitizer's business: see TSAN_OPTIONS in tests/test_csrc.py.
#include <algorithm>
#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/trace_lines.h"
#include "engine/bucket.h"
#include "engine/engine.h"
#include "messages/mpi_library.h"
#include "world.h"

using namespace collective;

namespace {

std::shared_ptr<Engine> make_engine(bool shared_memory, double timeout = 60) {
  using Seconds = std::chrono::duration<double>;
  return std::make_shared<Engine>(
      MPI_COMM_WORLD, Limits{1 << 20, Seconds(1000), Seconds(timeout), shared_memory, false}, std::vector<int>{});
}

void wait(const World& world, Engine& engine, const Ticket& ticket, ErrorCode code = ErrorCode::kNone) {
  while (!engine.wait(ticket, 0.1)) continue;
  if (ticket.code != code) fail(world, ticket.name + ": " + ticket.text);
}

std::shared_ptr<Ticket> allreduce(Engine& engine, const std::string& name, const std::vector<float>& in,
                                  std::vector<float>& out, bool caller_waits) {
  Descriptor d;
  d.kind = Kind::kAllreduce;
  d.dtype = d.wire = DType::kFloat32;
  d.shape = {static_cast<int64_t>(in.size())};
  return engine.submit(0, name, NamedSubmission{d, {in.data(), out.data(), in.size()}, 0, {}, true}, caller_waits);
}

// Every thread its own names, in its own order, a few in flight each.
void submit_from(const World& world, Engine& engine, int thread, unsigned seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < 12; ++round) {
    std::vector<std::vector<float>> ins, outs;
    std::vector<std::shared_ptr<Ticket>> tickets;
    std::vector<int> order{0, 1, 2, 3};
    for (int i = 0; i < 4; ++i) {
      const size_t count = std::vector<size_t>{1, 257, 5000, 100'003}[static_cast<size_t>(i)];
      ins.emplace_back(count, static_cast<float>(world.rank + 1 + i));
      outs.emplace_back(count);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (const int i : order)
      tickets.push_back(allreduce(engine, "t" + std::to_string(thread) + "." + std::to_string(i),
                                  ins[static_cast<size_t>(i)], outs[static_cast<size_t>(i)], i % 2 == 0));
    for (const auto& ticket : tickets) wait(world, engine, *ticket);
    const int ranks = world.size * (world.size + 1) / 2;
    for (int i = 0; i < 4; ++i)
      for (const float x : outs[static_cast<size_t>(i)])
        if (x != static_cast<float>(ranks + world.size * i)) fail(world, "wrong sum");
  }
}

void use_buckets(const World& world, const std::shared_ptr<Engine>& engine, DType wire) {
  for (int plan = 0; plan < 3; ++plan) {
    std::vector<BucketLayout> layouts;
    for (const size_t count : {10UL, 30'000UL}) layouts.push_back({DType::kFloat32, wire, {count, 3}, 1, -1});
    const std::string name = "plan" + std::to_string(plan) + name_of(wire);
    const BucketOpening opening =
        open_buckets(engine, 0, name, layouts, {DType::kFloat32, wire, ReduceOp::kSum}, "", "cpu", nullptr);
    wait(world, *engine, *opening.ticket);
    const auto buckets = opening.buckets({});
    for (int run = 0; run < 5; ++run) {
      const std::vector<float> long_one(30'000, static_cast<float>(world.rank + run)), short_one(3, 1.0F);
      std::vector<std::shared_ptr<Ticket>> tickets;
      // The second tensor comes from rank 0 alone.
      for (const auto& bucket : buckets)
        tickets.push_back(
            bucket->start({long_one.data(), world.rank == 0 ? short_one.data() : nullptr},
                          run % 2 == 1 && world.rank == 0 ? std::vector<size_t>{0} : std::vector<size_t>{}));
      for (size_t i = 0; i < buckets.size(); ++i) {
        wait(world, *engine, *tickets[i]);
        std::vector<float> result(30'000), second(3);
        buckets[i]->fetch({result.data(), second.data()});
        if (result[5] != static_cast<float>(world.size * (world.size - 1) / 2 + world.size * run) || second[2] != 1.0F)
          fail(world, "wrong sum in a bucket");
        if (buckets[i]->noted(0) != (run % 2 == 1) || !buckets[i]->present(1)) fail(world, "wrong flags");
      }
    }
  }
}

void test_threads(const World& world) {
  for (const bool shared_memory : {true, false}) {
    const auto engine = make_engine(shared_memory);
    engine->timeline().start();
    std::atomic<bool> over{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
      threads.emplace_back([&, t] { submit_from(world, *engine, t, world.seed + static_cast<unsigned>(t)); });
    threads.emplace_back([&] { use_buckets(world, engine, DType::kFloat32); });
    threads.emplace_back([&] { use_buckets(world, engine, DType::kBFloat16); });
    TraceLines trace(world.rank);
    std::thread onlooker([&] {
      while (!over) {
        if (engine->describe().empty()) fail(world, "describes nothing");
        trace.lines(engine->timeline().take(), 1 << 20);
        engine->timeline().end_step(0);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    });
    for (std::thread& thread : threads) thread.join();
    over = true;
    onlooker.join();
    if (!engine->shutdown()) fail(world, "the engine had failed");
  }
}

void test_join(const World& world) {
  for (const bool shared_memory : {true, false}) {
    const auto engine = make_engine(shared_memory);
    const std::vector<BucketLayout> layouts{{DType::kFloat32, DType::kFloat16, {30'000}, 0, -1}};
    const BucketOpening opening = open_buckets(engine, 0, "plan", layouts,
                                               {DType::kFloat32, DType::kFloat16, ReduceOp::kSum}, "", "cpu", nullptr);
    wait(world, *engine, *opening.ticket);
    const auto buckets = opening.buckets({});
    for (int step = 0; step <= world.rank; ++step) {
      const std::vector<float> ones(30'000, 1.0F);
      std::vector<float> sum(30'000), named(30'000);
      const auto run = buckets[0]->start({ones.data()}, {});
      const auto other = allreduce(*engine, "x", ones, named, false);
      wait(world, *engine, *run);
      wait(world, *engine, *other);
      buckets[0]->fetch({sum.data()});
      const auto here = static_cast<float>(world.size - step);
      if (sum[29'999] != here || named[0] != here) fail(world, "wrong sum after others have joined");
    }
    const auto joined = engine->submit(0, "join", JoinSubmission{}, true);
    wait(world, *engine, *joined);
    engine->shutdown();
  }
}

std::shared_ptr<Ticket> ordered(Engine& engine, size_t group, Kind kind, const std::string& name,
                                const std::vector<float>& in, std::vector<float>& out, int64_t rows = 0) {
  Descriptor d;
  d.kind = kind;
  d.dtype = d.wire = DType::kFloat32;
  d.shape = {rows_differ(kind) ? -1 : static_cast<int64_t>(in.size())};
  NamedSubmission named{d, {in.data(), out.data(), in.size()}, rows, {}, false};
  return engine.submit(group, name, OrderedSubmission{std::move(named)}, false);
}

// One thread's group: calls of some kinds, a few in flight, of which every third is left to take_finished().
void call_in_order(const World& world, Engine& engine, size_t group, std::atomic<int>& reported) {
  const int ranks = world.size * (world.size + 1) / 2;
  for (int round = 0; round < 40; ++round) {
    const std::string name = std::to_string(group) + "." + std::to_string(round);
    const size_t count = std::vector<size_t>{1, 257, 100'003}[static_cast<size_t>(round % 3)];
    const std::vector<float> in(count, static_cast<float>(world.rank + 1)), none;
    std::vector<float> sum(count), all(count * static_cast<size_t>(world.size)), nothing;
    std::vector<std::shared_ptr<Ticket>> tickets{
        ordered(engine, group, Kind::kAllreduce, name + "a", in, sum),
        ordered(engine, group, Kind::kBarrier, name + "b", none, nothing),
        ordered(engine, group, Kind::kAllgather, name + "c", in, all, static_cast<int64_t>(count))};
    if (round % 3 == 0 && engine.report(*tickets[0])) ++reported;
    for (const auto& ticket : tickets) wait(world, engine, *ticket);
    if (sum[0] != static_cast<float>(ranks) || sum[count - 1] != static_cast<float>(ranks)) fail(world, "wrong sum");
    for (int rank = 0; rank < world.size; ++rank)
      if (all[count * static_cast<size_t>(rank)] != static_cast<float>(rank + 1)) fail(world, "a wrong part");
  }
}

void test_order(const World& world) {
  const auto engine = make_engine(true);
  std::vector<size_t> groups;
  for (int i = 0; i < 3; ++i) groups.push_back(engine->add_group(MPI_COMM_WORLD, {true, "a group: ", {}}));
  std::atomic<int> expected{0}, reported{0};
  std::vector<std::thread> threads, listeners;
  for (int i = 0; i < 2; ++i)
    listeners.emplace_back([&] {
      while (const auto ticket = engine->take_finished()) {
        if (!ticket->finished()) fail(world, "reported before it was finished");
        ++reported;
      }
    });
  for (const size_t group : groups)
    threads.emplace_back([&, group] { call_in_order(world, *engine, group, expected); });
  for (std::thread& thread : threads) thread.join();
  if (world.size > 1) {  // rank 0 does something else; the group goes on
    const std::vector<float> in(world.rank == 0 ? 5 : 6);
    std::vector<float> out(6);
    wait(world, *engine, *ordered(*engine, groups[0], Kind::kAllreduce, "wrong", in, out), ErrorCode::kMismatch);
  }
  const std::vector<float> in(300'000, 1.0F);
  std::vector<float> out(300'000);
  const auto last = ordered(*engine, groups[0], Kind::kAllreduce, "last", in, out);
  engine->dismiss_group(groups[0]);  // what was submitted before runs
  wait(world, *engine, *last);
  if (out[299'999] != static_cast<float>(world.size)) fail(world, "wrong sum at the end of a group");
  if (!engine->shutdown()) fail(world, "the engine had failed");
  for (std::thread& listener : listeners) listener.join();
  if (reported != expected) fail(world, "not all tickets were reported");
}

// Rank 0 waits in one thread for what never comes and shuts down in another: everything ends.
void test_a_shutdown_that_gives_up(const World& world) {
  if (world.size == 1) return;
  const auto engine = make_engine(true, 1.0);
  if (world.rank == 0) {
    const auto joined = engine->submit(0, "join", JoinSubmission{}, false);
    std::thread waits([&] {
      while (!engine->wait(*joined, 0.1)) continue;
      if (joined->code != ErrorCode::kTimeout) fail(world, "join: " + joined->text);
    });
    try {
      engine->shutdown();
      fail(world, "a rank was missing, and shutdown() went well");
    } catch (const Error& error) {
      if (error.code != ErrorCode::kTimeout) fail(world, error.what());
    }
    waits.join();
  } else {
    std::this_thread::sleep_for(std::chrono::milliseconds(2500));
    try {
      engine->shutdown();
    } catch (const Error&) {
      return;  // rank 0 has given up
    }
  }
}

// An operation that is given up is not destroyed, nor what it works on: MPI may still write there.
void test_what_is_given_up_is_kept(const World& world) {
  struct Never final : Operation {
    int* over;
    explicit Never(int* over) : over(over) {}
    ~Never() override { *over += 100; }
    Step step() override { return Step::kIdle; }
    std::string describe() const override { return "never"; }
    void give_up() noexcept override { ++*over; }
  };
  int over = 0;
  const auto keep = std::make_shared<int>(1);
  std::vector<std::string> told;
  Timeline timeline;
  const RankNames names;
  WaitTotals totals;
  WaitLog waits(totals);
  {
    RunQueue queue(timeline, names, waits,
                   [&](Ticket& ticket, ErrorCode, const std::string& text) { told.push_back(ticket.name + text); });
    for (const char* name : {"a", "b"}) {
      Running running;
      running.keep = keep;
      running.operation = std::make_unique<Never>(&over);
      running.tickets.push_back(std::make_shared<Ticket>());
      running.tickets[0]->name = name;
      queue.add(std::move(running));
    }
    queue.give_up(0, ErrorCode::kShutdown, ": left");
    if (queue.size() != 1 || told != std::vector<std::string>{"a: left"}) fail(world, "a was not given up alone");
  }
  if (over != 2 || keep.use_count() != 3) fail(world, "what was given up has not been kept");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv,
             {{"threads", test_threads},
              {"join", test_join},
              {"order", test_order},
              {"given up", test_a_shutdown_that_gives_up},
              {"kept", test_what_is_given_up_is_kept}});
}
