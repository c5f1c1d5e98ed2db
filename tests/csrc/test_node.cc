// The operations inside a node (csrc/node) and their shared memory, without Python.
//
// Every result is compared, bit by bit, with that of the plain reduction of all ranks' data in one piece.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "node/allreduce_bucket_node.h"
#include "node/allreduce_node.h"
#include "node/exchange_node.h"
#include "node/reduce_scatter_node.h"
#include "reduce/identity.h"
#include "world.h"

using namespace collective;

namespace {

using Bytes = std::vector<std::byte>;
using Random = std::mt19937;

// Differs by rank, index and operation. Small whole numbers and halves: a product of few stays finite, and a sum rounds
// in float16, so that another order of summation would be seen.
Bytes input(DType dtype, size_t count, int rank, unsigned salt) {
  Bytes bytes(count * size_of(dtype));
  uint32_t state = salt * 2654435761U + static_cast<uint32_t>(rank) * 40503U + 12345U;
  std::vector<double> values(count);
  for (double& value : values) {
    state = state * 1664525U + 1013904223U;
    value = static_cast<double>(static_cast<int32_t>(state >> 20) - 2048) / 3.0;
  }
  const auto whole = [&](auto zero) {
    for (size_t i = 0; i < count; ++i) {
      const auto value = static_cast<decltype(zero)>(static_cast<int64_t>(values[i]));
      std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
    }
  };
  switch (dtype) {
    case DType::kUInt8: whole(uint8_t{}); break;
    case DType::kInt8: whole(int8_t{}); break;
    case DType::kBool:
      for (size_t i = 0; i < count; ++i) bytes[i] = std::byte(values[i] < 0 ? 0 : i % 7);
      break;
    case DType::kUInt16: whole(uint16_t{}); break;
    case DType::kInt16: whole(int16_t{}); break;
    case DType::kInt32: whole(int32_t{}); break;
    case DType::kInt64: whole(int64_t{}); break;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kFloat32:
    case DType::kFloat64: convert(dtype, bytes.data(), DType::kFloat64, values.data(), count); break;
    case DType::kComplex64:
    case DType::kComplex128: {
      const DType part = dtype == DType::kComplex64 ? DType::kFloat32 : DType::kFloat64;
      convert(part, bytes.data(), DType::kFloat64, values.data(), count);
      convert(part, bytes.data() + count * size_of(part), DType::kFloat64, values.data(), count);
      break;
    }
  }
  return bytes;
}

// One all-reduce: its slots (each with its own memory), and what must come out.
struct Case {
  AllreduceSpec spec;
  std::vector<size_t> counts;
  bool in_place = false;
  unsigned salt = 0;
  bool may_be_null = false;

  std::vector<Bytes> ins{}, outs{};
  std::vector<Slot> slots{};

  bool null_in(size_t i, int rank) const {
    return may_be_null && (salt + i * 5 + static_cast<size_t>(rank) * 3) % 4 == 0;
  }
  bool null_out(size_t i) const { return may_be_null && (salt + i) % 3 == 0; }
  Bytes slot_input(size_t i, int rank) const {
    return input(spec.dtype, counts[i], rank, salt + static_cast<unsigned>(i) * 977U);
  }

  void prepare(const World& world) {
    for (size_t i = 0; i < counts.size(); ++i) {
      ins.push_back(slot_input(i, world.rank));
      outs.push_back(in_place ? Bytes{} : Bytes(ins[i].size(), std::byte{0xA5}));
    }
    for (size_t i = 0; i < counts.size(); ++i) {
      std::byte* out = in_place ? ins[i].data() : outs[i].data();
      slots.push_back({null_in(i, world.rank) ? nullptr : ins[i].data(), null_out(i) ? nullptr : out, counts[i]});
    }
  }

  // Slot i's result in the wire's type.
  Bytes expected(size_t i, int size) const {
    const Scaling scaling = scaling_of(spec, size, Passes::kOnePass);
    std::vector<Bytes> packed;
    std::vector<const void*> sources;
    for (int rank = 0; rank < size; ++rank) {
      packed.emplace_back(counts[i] * size_of(spec.wire));
      if (null_in(i, rank))
        fill_identity(spec.wire, spec.op, packed.back().data(), counts[i]);
      else
        convert(spec.wire, packed.back().data(), spec.dtype, slot_input(i, rank).data(), counts[i], scaling.before);
    }
    for (const Bytes& bytes : packed) sources.push_back(bytes.data());
    Bytes result(packed[0].size());
    reduce_ranks(scaling.arithmetic, result.data(), sources.data(), size, counts[i]);
    return result;
  }

  void check(const World& world) const {
    for (size_t i = 0; i < counts.size(); ++i) {
      const Bytes& target = in_place ? ins[i] : outs[i];
      Bytes wanted = in_place ? slot_input(i, world.rank) : Bytes(target.size(), std::byte{0xA5});
      if (!null_out(i)) convert(spec.dtype, wanted.data(), spec.wire, expected(i, world.size).data(), counts[i]);
      compare(world, target.data(), wanted, i);
    }
  }

  void compare(const World& world, const std::byte* got, const Bytes& wanted, size_t i) const {
    if (wanted.empty() || std::memcmp(got, wanted.data(), wanted.size()) == 0) return;
    size_t at = 0;
    while (got[at] == wanted[at]) ++at;
    fail(world, std::string("wrong result: ") + name_of(spec.op) + " of " + name_of(spec.dtype) + " as " +
                    name_of(spec.wire) + ", slot " + std::to_string(i) + " of " + std::to_string(counts.size()) +
                    " with " + std::to_string(counts[i]) + " elements, salt " + std::to_string(salt) +
                    (in_place ? ", in place" : "") + ": differs at byte " + std::to_string(at));
  }
};

void finish(const World& world, Operation& operation) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const Step step = operation.step();
    if (step == Step::kDone) return;
    if (step == Step::kMoved) continue;
    std::this_thread::yield();
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(60))
      fail(world, "hangs: " + operation.describe());
  }
}

std::vector<AllreduceSpec> all_specs() {
  std::vector<AllreduceSpec> specs;
  for (int d = 0; d < kDTypeCount; ++d)
    for (ReduceOp op : {ReduceOp::kAverage, ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct}) {
      const auto dtype = static_cast<DType>(d);
      const bool is_complex = dtype == DType::kComplex64 || dtype == DType::kComplex128;
      if (is_complex && (op == ReduceOp::kMin || op == ReduceOp::kMax)) continue;
      if (dtype == DType::kBool && op == ReduceOp::kAverage) continue;
      specs.push_back({dtype, dtype, op});
      if (dtype == DType::kFloat32 || dtype == DType::kFloat64)
        for (DType wire : {DType::kFloat16, DType::kBFloat16}) specs.push_back({dtype, wire, op});
      if (dtype == DType::kFloat32 || dtype == DType::kInt32) specs.push_back({dtype, dtype, op, 0.5, 3.0});
    }
  for (DType dtype : {DType::kUInt8, DType::kInt64, DType::kBool})
    for (ReduceOp op : {ReduceOp::kBitAnd, ReduceOp::kBitOr, ReduceOp::kBitXor}) specs.push_back({dtype, dtype, op});
  return specs;
}

// The protocol does not depend on them, and the thread sanitizer takes its time.
std::vector<AllreduceSpec> specs_of(const World& world) {
  if (!world.is_threads) return all_specs();
  return {{DType::kFloat32, DType::kFloat32, ReduceOp::kAverage},
          {DType::kFloat32, DType::kFloat16, ReduceOp::kSum, 0.5, 3.0},
          {DType::kInt16, DType::kInt16, ReduceOp::kAverage}};
}

// Around the limits of slices, blocks, short messages, chunks, tiles, and of the staging areas.
std::vector<size_t> all_counts(const World& world, size_t element_size, bool large) {
  const auto p = static_cast<size_t>(world.size);
  std::vector<size_t> counts{0, 1, p - 1, p, p + 1, 128 / element_size * p + 1, 1000};
  const size_t most_short = (128 << 10) / (p > 1 ? p - 1 : 1);
  std::vector<size_t> edges{16 << 10, most_short / 8, most_short, 256 << 10};
  if (large) edges.insert(edges.end(), {512 << 10, 1 << 20, 3 << 20, 5'000'000, 16 << 20});
  for (const size_t edge : edges)
    for (int off : {-1, 0, 1}) counts.push_back(edge / element_size + static_cast<size_t>(off));
  return counts;
}

// Every dtype x op x count, in place and not, through one lane.
void test_matrix(const World& world) {
  SharedMemory memory = world.memory(Lane::nbytes());
  Lane lane(memory, 0);
  unsigned salt = world.seed;
  for (const AllreduceSpec& spec : specs_of(world)) {
    const bool large = spec.op == ReduceOp::kAverage && !world.is_threads &&
                       (spec.dtype == DType::kFloat32 || spec.dtype == DType::kInt8);
    for (const size_t count : all_counts(world, size_of(spec.wire), large)) {
      Case test{spec, {count}};
      test.salt = ++salt;
      test.in_place = salt % 2 == 0;
      test.prepare(world);
      AllreduceNode operation(lane, spec, test.slots);
      finish(world, operation);
      test.check(world);
    }
  }
}

std::vector<size_t> odd_counts(Random& random) {
  std::vector<size_t> counts(1 + random() % 40);
  for (size_t& count : counts) count = random() % 5 == 0 ? 0 : random() % (random() % 4 == 0 ? 100'000 : 700);
  return counts;
}

AllreduceSpec any_spec(Random& random) {
  static const std::vector<AllreduceSpec> specs = all_specs();
  return specs[random() % specs.size()];
}

// A bucket and the run in flight in it: slots that are views, copied or missing.
struct BucketRuns {
  Case test;
  SharedMemory memory;
  NodeBucket bucket;
  std::unique_ptr<AllreduceBucketNode> operation;
  int runs_left;

  BucketRuns(const World& world, const AllreduceSpec& spec, std::vector<size_t> counts, int runs)
      : test{spec, std::move(counts)},
        memory(world.memory(NodeBucket::nbytes(spec.wire, total()))),
        bucket(memory, 0, spec.wire, total()),
        runs_left(runs) {}
  size_t total() const {
    size_t total = 0;
    for (const size_t count : test.counts) total += count;
    return total;
  }
  void start(const World& world, unsigned salt) {
    test.salt = salt;
    test.may_be_null = salt % 2 == 0;
    test.ins.clear(), test.outs.clear(), test.slots.clear();
    test.prepare(world);
    size_t offset = 0;
    for (size_t i = 0; i < test.slots.size(); ++i) {
      std::byte* place = bucket.storage() + offset * size_of(test.spec.wire);
      test.slots[i].out = nullptr;
      if (test.spec.wire == test.spec.dtype && test.slots[i].in != nullptr && (salt + i) % 3 != 0) {
        std::memcpy(place, test.slots[i].in, test.ins[i].size());
        test.slots[i].in = place;
      }
      offset += test.counts[i];
    }
    operation = std::make_unique<AllreduceBucketNode>(bucket, test.spec, test.slots);
  }
  void check(const World& world) {
    operation.reset();
    --runs_left;
    size_t offset = 0;
    for (size_t i = 0; i < test.counts.size(); ++i) {
      test.compare(world, bucket.storage() + offset * size_of(test.spec.wire), test.expected(i, world.size), i);
      offset += test.counts[i];
    }
  }
};

// One operation other than all-reduce: what it is given, and what must come out.
struct Movement {
  enum Kind { kBroadcast, kAllgather, kGather, kScatter, kAlltoall, kReduceScatter, kKinds };
  Kind kind;
  int root;
  std::vector<size_t> sizes;  // bytes or elements of each rank's part
  AllreduceSpec spec{};       // of a reduce-scatter
  unsigned salt = 0;
  bool may_have_joined = true;

  Case reduction{};
  Bytes in{}, out{}, wanted{};
  std::vector<int64_t> received{};
  std::unique_ptr<Operation> operation{};

  static Bytes bytes(size_t nbytes, int rank, unsigned salt) { return input(DType::kUInt8, nbytes, rank, salt); }
  static Bytes cut(const Bytes& from, size_t begin, size_t end) {
    return {from.begin() + static_cast<std::ptrdiff_t>(begin), from.begin() + static_cast<std::ptrdiff_t>(end)};
  }
  // Of an alltoall, in rows of 1 to 3 bytes, or of none.
  size_t row_bytes() const { return salt % 4; }
  std::vector<int64_t> splits(int rank) const {
    std::vector<int64_t> splits(sizes.size());
    for (size_t peer = 0; peer < sizes.size(); ++peer)
      if ((salt + static_cast<size_t>(rank) * 3 + peer * 5) % 4 != 0)
        splits[peer] = static_cast<int64_t>(sizes[static_cast<size_t>(rank)] / (1 + (peer + salt) % 3));
    return splits;
  }
  static size_t sum(const std::vector<int64_t>& rows) {
    size_t sum = 0;
    for (const int64_t count : rows) sum += static_cast<size_t>(count);
    return sum;
  }

  void start(const World& world, Lane& lane) {
    const auto self = static_cast<size_t>(world.rank);
    std::vector<size_t> offsets{0};
    for (const size_t size : sizes) offsets.push_back(offsets.back() + size);
    const size_t total = offsets.back();
    const auto unwritten = [](size_t nbytes) { return Bytes(nbytes, std::byte{0xA5}); };
    switch (kind) {
      case kBroadcast: {
        const bool joined = may_have_joined && world.rank != root && (salt + self) % 4 == 0;
        out = world.rank == root ? bytes(total, root, salt) : unwritten(total);
        wanted = joined ? out : bytes(total, root, salt);
        operation = ExchangeNode::broadcast(lane, root, joined ? nullptr : out.data(), total);
        break;
      }
      case kAllgather:
      case kGather: {
        const bool takes = kind == kAllgather || world.rank == root;
        in = bytes(sizes[self], world.rank, salt);
        out = unwritten(takes ? total : 0);
        if (takes)
          for (size_t rank = 0; rank < sizes.size(); ++rank) {
            const Bytes part = bytes(sizes[rank], static_cast<int>(rank), salt);
            wanted.insert(wanted.end(), part.begin(), part.end());
          }
        operation =
            ExchangeNode::gather(lane, kind == kAllgather ? ExchangeNode::kAll : root, in.data(), out.data(), offsets);
        break;
      }
      case kScatter: {
        const Bytes all = bytes(total, root, salt);
        if (world.rank == root) in = all;
        out = unwritten(sizes[self]);
        wanted = cut(all, offsets[self], offsets[self + 1]);
        operation = ExchangeNode::scatter(lane, root, in.data(), out.data(), offsets);
        break;
      }
      case kAlltoall: {
        size_t most = 0;
        for (int rank = 0; rank < world.size; ++rank) {
          const std::vector<int64_t> theirs = splits(rank);
          most = std::max(most, sum(theirs));
          const Bytes all = bytes(sum(theirs) * row_bytes(), rank, salt);
          const size_t begin = sum({theirs.begin(), theirs.begin() + world.rank}) * row_bytes();
          const Bytes part = cut(all, begin, begin + static_cast<size_t>(theirs[self]) * row_bytes());
          wanted.insert(wanted.end(), part.begin(), part.end());
        }
        const std::vector<int64_t> mine = splits(world.rank);
        in = bytes(sum(mine) * row_bytes(), world.rank, salt);
        operation = std::make_unique<AlltoallNode>(lane, in.data(), mine, most, row_bytes(),
                                                   [this, unwritten](const std::vector<int64_t>& rows) {
                                                     received = rows;
                                                     out = unwritten(sum(rows) * row_bytes());
                                                     return out.data();
                                                   });
        break;
      }
      case kReduceScatter: {
        reduction = {spec, {total}, false, salt, true};
        reduction.prepare(world);
        const bool drops = may_have_joined && (salt + self) % 5 == 0;
        out = unwritten(sizes[self] * size_of(spec.dtype));
        wanted = out;
        if (!drops)
          convert(spec.dtype, wanted.data(), spec.wire,
                  reduction.expected(0, world.size).data() + offsets[self] * size_of(spec.wire), sizes[self]);
        operation = std::make_unique<ReduceScatterNode>(lane, spec, offsets, reduction.slots[0].in,
                                                        drops ? nullptr : out.data());
        break;
      }
      case kKinds: break;
    }
  }

  void check(const World& world) const {
    bool right = out == wanted;
    if (kind == kAlltoall)
      for (int rank = 0; rank < world.size; ++rank)
        right &= received[static_cast<size_t>(rank)] == splits(rank)[static_cast<size_t>(world.rank)];
    if (right) return;
    std::string text = "wrong result: movement " + std::to_string(kind) + ", root " + std::to_string(root) + ", salt " +
                       std::to_string(salt) + ", sizes";
    for (const size_t size : sizes) text += " " + std::to_string(size);
    fail(world, text);
  }
};

// How the parts of the ranks may differ, from one size.
std::vector<size_t> part_sizes(const World& world, size_t size, unsigned shape) {
  std::vector<size_t> sizes(static_cast<size_t>(world.size), size);
  for (size_t rank = 0; rank < sizes.size(); ++rank) {
    if (shape % 4 == 1) sizes[rank] = size / (rank + 1);
    if (shape % 4 == 2 && (rank + shape / 4) % 2 == 0) sizes[rank] = 0;
    if (shape % 4 == 3 && rank + 1 < sizes.size()) sizes[rank] = rank;
  }
  return sizes;
}

// Every movement x size x shape, in one lane and several of them in it at a time.
void test_movements(const World& world) {
  SharedMemory memory = world.memory(Lane::nbytes());
  Lane lane(memory, 0);
  // For the sanitizer, one of several chunks: the system takes its time over the shadow of large memory.
  std::vector<size_t> sizes{0, 1, 128, 5000, 300'000};
  if (!world.is_threads) {
    sizes = {0, 1, 2, 127, 128, 129, 5000};
    for (const size_t edge : {64 << 10, 256 << 10, 1 << 20})
      for (const int off : {-1, 0, 1}) sizes.push_back(edge + static_cast<size_t>(off));
  }
  std::vector<std::unique_ptr<Movement>> running;
  unsigned salt = world.seed;
  const auto finish_first = [&] {
    finish(world, *running.front()->operation);
    running.front()->check(world);
    running.erase(running.begin());
  };
  for (const size_t size : sizes)
    for (int kind = 0; kind < Movement::kKinds; ++kind)
      for (unsigned shape = 0; shape < 4; ++shape) {
        running.push_back(std::make_unique<Movement>());
        Movement& movement = *running.back();
        movement.kind = static_cast<Movement::Kind>(kind);
        movement.salt = ++salt;
        movement.root = static_cast<int>(salt % static_cast<unsigned>(world.size));
        movement.sizes = part_sizes(world, size, shape + 4 * (salt % 2));
        const std::vector<AllreduceSpec> specs = specs_of(world);
        movement.spec = specs[salt % specs.size()];
        movement.start(world, lane);
        if (running.size() == 3) finish_first();
      }
  while (!running.empty()) finish_first();
  if (!world.is_threads)  // every type and operator
    for (const AllreduceSpec& spec : all_specs())
      for (const size_t size : {size_t{7}, size_t{30'001}}) {
        Movement movement{Movement::kReduceScatter, 0, part_sizes(world, size, ++salt), spec, salt};
        movement.start(world, lane);
        finish(world, *movement.operation);
        movement.check(world);
      }
}

// What each says it waits for, while a peer does not come.
void test_describe(const World& world) {
  if (world.size == 1) return;
  SharedMemory memory = world.memory(Lane::nbytes());
  Lane lane(memory, 0);
  const int last = world.size - 1;
  const auto expect = [&](Operation& operation, const std::string& text) {
    const auto start = std::chrono::steady_clock::now();
    do {  // at first perhaps for other ranks, which come later
      if (operation.step() == Step::kDone) fail(world, "done without a peer");
      if (std::chrono::steady_clock::now() - start > std::chrono::seconds(10))
        fail(world, "says: " + operation.describe() + "; not: " + text);
      std::this_thread::yield();
    } while (operation.describe().find(text) == std::string::npos);
  };
  for (int kind = 0; kind < Movement::kKinds; ++kind)
    for (const size_t size : {size_t{100}, size_t{world.is_threads ? 400'000U : 2'000'000U}}) {
      Movement movement;
      movement.kind = static_cast<Movement::Kind>(kind);
      movement.root = last;
      movement.salt = 1 + static_cast<unsigned>(world.size) * 4;
      movement.sizes.assign(static_cast<size_t>(world.size), size);
      movement.spec = {DType::kFloat32, DType::kFloat32, ReduceOp::kSum};
      movement.may_have_joined = false;
      movement.start(world, lane);
      // A rank that only sends has to wait when its places are full.
      const bool only_sends = movement.kind == Movement::kGather;
      if (world.rank != last && (!only_sends || size > 100)) {
        expect(*movement.operation,
               "waits for rank " + std::to_string(last) + " to " + (only_sends ? "make room for" : "pack") + " it");
      }
      world.barrier();
      finish(world, *movement.operation);
      movement.check(world);
      world.barrier();
    }
}

// Lanes and buckets all at once, stepped in another order and at another speed on every rank.
void test_flight(const World& world) {
  Random agreed(world.seed + 1), own(world.seed * 31 + static_cast<unsigned>(world.rank));
  SharedMemory memory = world.memory(2 * Lane::nbytes());
  Lane lanes[] = {Lane(memory, 0), Lane(memory, Lane::nbytes())};
  std::vector<std::unique_ptr<BucketRuns>> buckets;
  for (int i = 0; i < 4; ++i)
    buckets.push_back(
        std::make_unique<BucketRuns>(world, any_spec(agreed), odd_counts(agreed), world.is_threads ? 4 : 12));
  struct Flight {
    Case test;
    Movement movement;
    std::unique_ptr<AllreduceNode> allreduce;  // or the movement's
    Operation& operation() const { return allreduce ? *allreduce : *movement.operation; }
  };
  std::vector<std::unique_ptr<Flight>> flights;
  int to_launch = world.is_threads ? 30 : 250;
  unsigned salt = world.seed * 7;
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    bool busy = to_launch > 0;
    if (to_launch > 0 && flights.size() < 8 && own() % 3 != 0) {  // same order of launches, another moment
      auto flight = std::make_unique<Flight>();
      Lane& lane = lanes[agreed() % 2];
      if (agreed() % 2 == 0) {
        flight->test.spec = any_spec(agreed);
        flight->test.counts = odd_counts(agreed);
        flight->test.in_place = agreed() % 2 == 0;
        flight->test.may_be_null = agreed() % 2 == 0;
        flight->test.salt = ++salt;
        flight->test.prepare(world);
        flight->allreduce = std::make_unique<AllreduceNode>(lane, flight->test.spec, flight->test.slots);
      } else {
        Movement& movement = flight->movement;
        movement.kind = static_cast<Movement::Kind>(agreed() % Movement::kKinds);
        movement.root = static_cast<int>(agreed() % static_cast<unsigned>(world.size));
        movement.sizes = part_sizes(world, agreed() % (agreed() % 4 == 0 ? 300'000 : 700), agreed() % 8);
        movement.spec = any_spec(agreed);
        movement.salt = ++salt;
        movement.start(world, lane);
      }
      flights.push_back(std::move(flight));
      --to_launch;
    }
    for (const auto& bucket : buckets) {
      busy |= bucket->runs_left > 0;
      if (bucket->runs_left > 0 && !bucket->operation && own() % 4 == 0)
        bucket->start(world, world.seed + static_cast<unsigned>(bucket->runs_left) * 13U);
      if (bucket->operation && own() % 2 == 0 && bucket->operation->step() == Step::kDone) bucket->check(world);
    }
    busy |= !flights.empty();
    if (!flights.empty()) {
      const size_t i = own() % flights.size();
      if (flights[i]->operation().step() == Step::kDone) {
        flights[i]->allreduce ? flights[i]->test.check(world) : flights[i]->movement.check(world);
        flights.erase(flights.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
    if (!busy) return;
    if (own() % 50 == 0) usleep(own() % 200);
    if (own() % 8 == 0) std::this_thread::yield();
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(120)) {
      std::string text = "hangs:";
      for (const auto& flight : flights) text += "\n  lane: " + flight->operation().describe();
      for (const auto& bucket : buckets)
        if (bucket->operation) text += "\n  bucket: " + bucket->operation->describe();
      fail(world, text);
    }
  }
}

// Thousands in a row, short and long by turns, with several in a lane at a time; the answer in closed form.
void test_back_to_back(const World& world) {
  constexpr size_t kAhead = 4;
  SharedMemory memory = world.memory(Lane::nbytes());
  Lane lane(memory, 0);
  const AllreduceSpec spec{DType::kInt64, DType::kInt64, ReduceOp::kSum};
  std::vector<int64_t> data[kAhead];
  std::unique_ptr<AllreduceNode> operations[kAhead];
  const size_t sizes[] = {1, 7, 100, 1, 40'000, 3, 130'000};
  const size_t repeats = world.is_threads ? 500 : 6000;
  for (size_t n = 0; n < repeats + kAhead; ++n) {
    const size_t i = n % kAhead;
    if (operations[i]) {
      finish(world, *operations[i]);
      const auto p = static_cast<int64_t>(world.size), k = static_cast<int64_t>(n - kAhead);
      for (size_t j = 0; j < data[i].size(); j += std::max<size_t>(1, data[i].size() / 17))
        if (data[i][j] != p * (k + 3 * static_cast<int64_t>(j)) + p * (p - 1) / 2) fail(world, "wrong sum");
      operations[i].reset();
    }
    if (n >= repeats) continue;
    data[i].resize(sizes[n % std::size(sizes)]);
    for (size_t j = 0; j < data[i].size(); ++j) data[i][j] = static_cast<int64_t>(n + 3 * j) + world.rank;
    operations[i] = std::make_unique<AllreduceNode>(
        lane, spec, std::vector<Slot>{{data[i].data(), data[i].data(), data[i].size()}});
  }
}

void test_buckets(const World& world) {
  Random agreed(world.seed + 2);
  const auto run = [&](const AllreduceSpec& spec, const std::vector<size_t>& counts) {
    BucketRuns runs(world, spec, counts, 3);
    while (runs.runs_left > 0) {
      runs.start(world, agreed());
      finish(world, *runs.operation);
      runs.check(world);
    }
  };
  for (const AllreduceSpec& spec : specs_of(world)) {
    std::vector<size_t> counts = odd_counts(agreed);
    if (spec.op == ReduceOp::kAverage && !world.is_threads) counts.push_back(700'001);
    run(spec, counts);
  }
  const AllreduceSpec floats{DType::kFloat32, DType::kFloat32, ReduceOp::kSum};
  for (const size_t count : all_counts(world, sizeof(float), !world.is_threads)) run(floats, {count});
}

// The ways in which there is no memory, and what is said.
void test_no_memory(const World& world) {
  if (world.is_threads) return;
  Comm comm = Comm::duplicate(MPI_COMM_WORLD);
  std::string why;
  // More than there can be: nobody gets it, and everybody is told why.
  if (try_share_memory(comm, 1, size_t{1} << 62, std::chrono::seconds(30), why) || why.rfind("rank 0: ", 0) != 0)
    fail(world, "shared memory without end: " + why);
  // The others do not come: an error that names one.
  if (world.rank == 0 && world.size > 1) try {
      try_share_memory(comm, 2, 4096, std::chrono::seconds(1), why);
      fail(world, "shared memory with a rank that is not there");
    } catch (const Error& error) {
      if (error.code != ErrorCode::kTimeout || std::string(error.what()).find("rank 1") == std::string::npos)
        fail(world, std::string("missing rank: ") + error.what());
    }
  comm.release();
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv,
             {{"no memory", test_no_memory},
              {"matrix", test_matrix},
              {"buckets", test_buckets},
              {"movements", test_movements},
              {"describe", test_describe},
              {"flight", test_flight},
              {"back to back", test_back_to_back}});
}
