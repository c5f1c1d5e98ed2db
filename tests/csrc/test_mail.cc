// The coordinator's mail through shared memory (csrc/engine/mail), without Python.
//
// Every message says who sent it, its number, and bytes that follow from both, so that one that is lost, out of order,
// cut or mixed with another is seen.
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/mail.h"
#include "node/roll.h"
#include "world.h"

using namespace collective;

namespace {

using Random = std::mt19937;

constexpr uint32_t kLast = 1U << 31;  // flag of the last message of a sender

std::string letter(int sender, uint32_t number, size_t nbytes) {
  std::string text(sizeof number + nbytes, '\0');
  std::memcpy(text.data(), &number, sizeof number);
  for (size_t i = 0; i < nbytes; ++i)
    text[sizeof number + i] = static_cast<char>(i * 7 + number * 13 + static_cast<uint32_t>(sender) * 31 + i / 251);
  return text;
}

// Everybody's letters to rank 0, and rank 0's to all others, both ways at once.
struct Exchange {
  const World& world;
  NodeMail mail;
  std::vector<uint32_t> received;  // by sender
  size_t senders_left;

  Exchange(const World& world, const SharedMemory& memory)
      : world(world),
        mail(memory, 0),
        received(static_cast<size_t>(world.size)),
        senders_left(world.rank == 0 ? static_cast<size_t>(world.size) - 1 : 1) {
    if (world.size == 1) senders_left = 0;
  }

  bool take() {
    const std::optional<Message> message = mail.poll();
    if (!message) return false;
    const auto wrong = [&](const std::string& what) {
      fail(world, "letter " + std::to_string(received[static_cast<size_t>(message->source)]) + " of rank " +
                      std::to_string(message->source) + ": " + what);
    };
    if (world.rank == 0 ? message->source == 0 : message->source != 0) wrong("not for this rank");
    uint32_t number = 0;
    if (message->bytes.size() < sizeof number) wrong("cut");
    std::memcpy(&number, message->bytes.data(), sizeof number);
    uint32_t& expected = received[static_cast<size_t>(message->source)];
    if ((number & ~kLast) != expected) wrong("number " + std::to_string(number & ~kLast));
    if (message->bytes != letter(message->source, number, message->bytes.size() - sizeof number)) wrong("bytes");
    ++expected;
    if ((number & kLast) != 0) --senders_left;
    return true;
  }

  void run(uint32_t count, const std::function<size_t()>& next_size, const std::function<bool()>& reads_now) {
    const auto start = std::chrono::steady_clock::now();
    uint32_t number = 0;
    while (number < count || !mail.sent() || senders_left > 0) {
      if (number < count) {
        mail.send(letter(world.rank, number + 1 == count ? number | kLast : number, next_size()));
        ++number;
      }
      if (!reads_now() || !take()) std::this_thread::yield();
      if (std::chrono::steady_clock::now() - start > std::chrono::seconds(60))
        fail(world, "hangs: " + std::to_string(number) + " of " + std::to_string(count) + " letters sent, " +
                        std::to_string(senders_left) + " ranks to be heard");
    }
    if (take()) fail(world, "a letter after the last");
  }
};

// All lengths around those of the ring and its end, both ways at once, read at a random pace.
void test_lengths(const World& world) {
  const SharedMemory memory = world.memory(NodeMail::nbytes(world.size));
  Exchange exchange(world, memory);
  Random own(world.seed * 31 + static_cast<unsigned>(world.rank));
  exchange.run(
      world.is_threads ? 400 : 3000,
      [&]() -> size_t {
        switch (own() % 4) {
          case 0: return own() % 40'000;
          case 1: return (16 << 10) - 16 + own() % 32;
          default: return own() % 300;
        }
      },
      [&] { return own() % 3 != 0; });
}

// Many times the ring's size is sent before the first message is read.
void test_flood(const World& world) {
  const SharedMemory memory = world.memory(NodeMail::nbytes(world.size));
  Exchange exchange(world, memory);
  const auto start = std::chrono::steady_clock::now();
  exchange.run(
      700, [] { return size_t{500}; },
      [&] { return std::chrono::steady_clock::now() - start > std::chrono::milliseconds(50); });
}

// One message there and one back, as with an operation that all ranks wait for.
void test_ping_pong(const World& world) {
  const SharedMemory memory = world.memory(NodeMail::nbytes(world.size));
  Exchange exchange(world, memory);
  const uint32_t rounds = world.is_threads ? 2000 : 20'000;
  for (uint32_t round = 0; round < rounds; ++round) {
    const auto heard = [&] {
      for (int rank = 0; rank < world.size; ++rank)
        if ((rank == 0) != (world.rank == 0) && exchange.received[static_cast<size_t>(rank)] <= round) return false;
      return true;
    };
    if (world.rank != 0) exchange.mail.send(letter(world.rank, round, 60));
    while (!heard()) {
      exchange.mail.sent();
      if (!exchange.take()) std::this_thread::yield();
    }
    if (world.rank == 0) exchange.mail.send(letter(0, round, 100));
  }
  while (!exchange.mail.sent()) std::this_thread::yield();
}

// The last rank hangs up, once by saying so and once by ending, in the middle of what it is sent: nobody waits for it,
// and the others get everything.
void test_hang_up(const World& world) {
  const int last = world.size - 1;
  if (last == 0) return;
  for (const bool by_word : {true, false}) {
    const SharedMemory memory = world.memory(NodeMail::nbytes(world.size));
    constexpr uint32_t kCount = 300;
    const auto size = [] { return size_t{1000}; };
    if (world.rank == last) {
      Exchange exchange(world, memory);
      while (exchange.received[0] < kCount / 3)
        if (!exchange.take()) std::this_thread::yield();
      if (by_word) {
        exchange.mail.hang_up();
        if (exchange.mail.poll()) fail(world, "reads after it has hung up");
        for (uint32_t number = 0; number < kCount; ++number)  // it may still write
          exchange.mail.send(letter(last, number + 1 == kCount ? number | kLast : number, size()));
        while (!exchange.mail.sent()) std::this_thread::yield();
      }
    } else {
      Exchange exchange(world, memory);
      if (world.rank == 0 && !by_word) --exchange.senders_left;
      exchange.run(kCount, size, [] { return true; });
    }
    world.barrier();
  }
}

// Ranks show their turns at their own pace, and all see of each turn what all have shown: now and then one differs.
void test_roll(const World& world) {
  const SharedMemory memory = world.memory(Roll::nbytes());
  Roll roll(memory, 0);
  const uint64_t turns = world.is_threads ? 2000 : 20'000;
  const auto description = [](int rank, uint64_t turn) {
    return std::string(turn % 50, 'a') + std::to_string(rank) + "." + std::to_string(turn);
  };
  for (uint64_t turn = 1; turn <= turns; ++turn) {
    const auto odd = static_cast<int>(turn % 11);  // the rank that differs, if there is one of this number
    roll.show(turn + (odd == world.rank ? 1 : 0), static_cast<int64_t>(turn) * 10 + world.rank,
              description(world.rank, turn));
    while (!roll.all_shown()) std::this_thread::yield();
    if (roll.all_alike() != (odd >= world.size || world.size == 1)) fail(world, "a wrong verdict on a turn");
    const std::vector<int64_t> rows = roll.rows();
    const std::vector<std::string> descriptions = roll.descriptions();
    for (int rank = 0; rank < world.size; ++rank) {
      const auto i = static_cast<size_t>(rank);
      if (rows[i] != static_cast<int64_t>(turn) * 10 + rank) fail(world, "rows of another turn");
      if (descriptions[i] != description(rank, turn)) fail(world, "a description of another turn: " + descriptions[i]);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv,
             {{"lengths", test_lengths},
              {"flood", test_flood},
              {"ping-pong", test_ping_pong},
              {"hang up", test_hang_up},
              {"roll", test_roll}});
}
