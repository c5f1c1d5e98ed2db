// The kernels of collective/kernels, run by the host thread by thread, against csrc/reduce. No MPI, no device.
//
//   build/csrc/test_kernels         exits with 1 and a message at the first difference
//
// Every result has the bits of csrc/reduce, except that any NaN equals any NaN, and memory around it is left alone.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels_on_host.h"
// After what it needs.
#include "kernels.cu"
#include "node/slices.h"
#include "reduce/reduce.h"
#include "reduce_reference.h"
#include "sample_elements.h"

using namespace collective;
using namespace collective::reference;

namespace {

using Kernel = void (*)(Launch);

long checks = 0;

void check(bool good, const std::string& what) {
  checks++;
  if (good) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

size_t random_below(size_t end) { return random_bits() % end; }

// By its name, as a driver finds it.
Kernel kernel(const std::string& name) {
  void* const found = dlsym(RTLD_DEFAULT, name.c_str());
  check(found != nullptr, "no kernel is called " + name);
  return reinterpret_cast<Kernel>(found);
}

void run(Kernel kernel, const Launch& launch) {
  constexpr unsigned shapes[][2] = {{1, 1}, {1, 32}, {3, 7}, {5, 64}, {2, kThreads}};
  const auto& [grid, block] = shapes[random_below(std::size(shapes))];
  collective_run(kernel, &launch, grid, block);
}

// A copy of bytes that starts `offset` bytes after a multiple of 16, between margins.
struct Area {
  static constexpr size_t kMargin = 32;
  Area(const Bytes& bytes, size_t offset) : all(bytes.size() + offset + 2 * kMargin, 0xa5), begin(kMargin + offset) {
    std::copy(bytes.begin(), bytes.end(), all.begin() + static_cast<long>(begin));
  }
  unsigned char* data() { return all.data() + begin; }
  Bytes bytes() const { return Bytes(all.begin() + static_cast<long>(begin), all.end() - kMargin); }
  bool margins_are_intact() const {
    const auto intact = [](unsigned char byte) { return byte == 0xa5; };
    return std::all_of(all.begin(), all.begin() + static_cast<long>(begin), intact) &&
           std::all_of(all.end() - kMargin, all.end(), intact);
  }
  Bytes all;
  size_t begin;
};

// ---- reductions ----

struct Case {
  Arithmetic arithmetic;
  int sources;
  size_t count;
  size_t offset;  // of all memory, in elements
  bool together;  // else a random further one for each
  bool in_place;
};

void test_reduce(const Case& c) {
  const auto [dtype, op, scale, divisor] = c.arithmetic;
  const size_t size = size_of(dtype);
  const bool wild = random_below(2) == 0;
  std::vector<Bytes> values;
  std::vector<Area> sources, own;
  const auto offset = [&] { return size * (c.offset + (c.together ? 0 : random_below(16))); };
  for (int k = 0; k < c.sources; k++) {
    values.push_back(random_bytes(dtype, c.count, wild));
    sources.emplace_back(values[k], offset());
  }
  const int targets = c.in_place ? 1 + static_cast<int>(random_below(c.sources)) : 1 + static_cast<int>(c.count % 4);
  for (int k = 0; k < targets; k++) own.emplace_back(Bytes(c.count * size), offset());

  Launch launch{};
  launch.scale = scale, launch.divisor = divisor, launch.count = c.count;
  launch.source_count = c.sources, launch.target_count = targets;
  std::vector<const void*> pointers;
  for (int k = 0; k < c.sources; k++) pointers.push_back(launch.sources[k] = sources[k].data());
  std::vector<Area>& into = c.in_place ? sources : own;
  for (int k = 0; k < targets; k++) launch.targets[k] = into[k].data();
  Bytes expected(c.count * size);
  reduce_ranks(c.arithmetic, expected.data(), pointers.data(), c.sources, c.count);

  std::string name = std::string("reduce_") + name_of(dtype) + "_" + name_of(op);
  for (char& letter : name) letter = static_cast<char>(std::tolower(letter));
  run(kernel(name), launch);

  const std::string what = name + " of " + std::to_string(c.sources) + " count=" + std::to_string(c.count) +
                           " scale=" + std::to_string(scale) + " divisor=" + std::to_string(divisor) +
                           " offset=" + std::to_string(c.offset) + (c.together ? " together" : "") +
                           (c.in_place ? " in place" : "") + (wild ? " wild" : "");
  for (int k = 0; k < targets; k++) {
    const long at = first_difference(dtype, into[k].bytes(), expected);
    check(at < 0, what + ": target " + std::to_string(k) + " differs at " + std::to_string(at));
    check(into[k].margins_are_intact(), what + ": written beside target " + std::to_string(k));
  }
  for (int k = c.in_place ? targets : 0; k < c.sources; k++)
    check(sources[k].bytes() == values[k], what + ": a source was changed");
}

Arithmetic any_arithmetic(DType dtype, ReduceOp op, int n) {
  const double scales[] = {1, 1, 1.0 / 3, -2.5, 1e30, std::numeric_limits<double>::quiet_NaN()};
  const int64_t divisors[] = {1, 1, n, 3, 300, int64_t{1} << 31, int64_t{1} << 40};
  Arithmetic result{dtype, op};
  if (dtype == DType::kBool) return result;
  result.scale = scales[random_below(std::size(scales))];
  result.divisor = divisors[random_below(std::size(divisors))];
  return result;
}

void test_reductions() {
  for (int d = 0; d < kDTypeCount; d++) {
    const DType dtype = static_cast<DType>(d);
    for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct}) {
      if (is_complex(dtype) && (op == ReduceOp::kMin || op == ReduceOp::kMax)) continue;
      for (int n : {1, 2, 3, 4, 5, 8, kMostRanks}) {
        const auto test = [&](size_t count, size_t offset, bool together) {
          for (bool in_place : {false, true})
            test_reduce({any_arithmetic(dtype, op, n), n, count, offset, together, in_place});
        };
        for (size_t count = 0; count <= 70; count++) test(count, random_below(16), random_below(3) != 0);
        for (size_t offset = 0; offset < 16; offset++)
          for (size_t count : {1, 33, 1030}) test(count, offset, true), test(count, offset, false);
        for (size_t count : {4095, 4096, 4103, 9001}) test(count, random_below(16), true);
      }
      test_reduce({{dtype, op}, 2, 100000, 0, true, false});
    }
  }
}

// ---- conversions ----

struct Converted {
  Area from, to;
  size_t count;
  bool in_place, identity;
};

// In as few launches as possible.
void test_convert(DType to, DType from, std::vector<Converted>& all, double scale) {
  const unsigned char identity[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  const std::string name = std::string("convert_") + name_of(from) + "_" + name_of(to);
  Launch launch{};
  launch.scale = scale, launch.divisor = 1;
  std::memcpy(launch.identity, identity, sizeof identity);
  std::vector<Bytes> expected;
  for (Converted& one : all) {
    Bytes& result = expected.emplace_back(one.count * size_of(to));
    if (one.identity)
      for (size_t i = 0; i < result.size(); i++) result[i] = identity[i % size_of(to)];
    else
      convert(to, result.data(), from, one.from.data(), one.count, scale);
    if (launch.piece_count == kMostPieces) {
      run(kernel(name), launch);
      launch.piece_count = 0, launch.tile_count = 0;
    }
    add_piece(launch, one.identity ? nullptr : one.from.data(), (one.in_place ? one.from : one.to).data(), one.count,
              std::max(size_of(from), size_of(to)));
  }
  run(kernel(name), launch);
  for (size_t i = 0; i < all.size(); i++) {
    Converted& one = all[i];
    const Area& target = one.in_place ? one.from : one.to;
    const std::string what = name + " count=" + std::to_string(one.count) + " scale=" + std::to_string(scale);
    const long at = first_difference(to, target.bytes(), expected[i]);
    check(at < 0, what + ": differs at " + std::to_string(at));
    check(to != from || scale != 1 || target.bytes() == expected[i], what + ": not a copy");
    check(target.margins_are_intact(), what + ": written beside it");
  }
}

void test_convert(DType to, DType from) {
  const auto piece = [&](const Bytes& bytes, size_t here, size_t there, bool identity = false) {
    const size_t count = bytes.size() / size_of(from);
    return Converted{Area(bytes, here * size_of(from)), Area(Bytes(count * size_of(to)), there * size_of(to)), count,
                     size_of(from) == size_of(to) && random_below(4) == 0, identity};
  };
  for (double scale : {1.0, 1.0 / 3, 1e10, -1e-9}) {
    if (to == DType::kBool && scale != 1) continue;
    std::vector<Converted> all;
    for (size_t count = 0; count <= 70; count++)
      for (bool wild : {false, true})
        all.push_back(piece(random_bytes(from, count, wild), random_below(16), random_below(16), count % 9 == 0));
    test_convert(to, from, all, scale);
    all.clear();
    for (size_t here = 0; here < 16; here++)
      for (size_t there = 0; there < 16; there++)
        for (size_t count : {1, 31, 1030}) all.push_back(piece(random_bytes(from, count, true), here, there));
    test_convert(to, from, all, scale);
    all.clear();
    for (size_t count : {100000, 4096, 9001}) all.push_back(piece(random_bytes(from, count, true), 3, 3));
    test_convert(to, from, all, scale);
    if (size_of(from) == 2) {
      Bytes every(0x20000);
      for (int bits = 0; bits < 0x10000; bits++) std::memcpy(&every[2 * static_cast<size_t>(bits)], &bits, 2);
      all.assign(1, piece(every, 0, 0));
      test_convert(to, from, all, scale);
    }
  }
  std::vector<Converted> hard;
  if (to == DType::kFloat16 && from == DType::kFloat32) hard.push_back(piece(ties<reference::Half, float>(), 0, 0));
  if (to == DType::kFloat16 && from == DType::kFloat64) hard.push_back(piece(ties<reference::Half, double>(), 0, 0));
  if (to == DType::kBFloat16 && from == DType::kFloat32) hard.push_back(piece(ties<reference::BFloat, float>(), 0, 0));
  if (to == DType::kBFloat16 && from == DType::kFloat64) hard.push_back(piece(ties<reference::BFloat, double>(), 0, 0));
  test_convert(to, from, hard, 1);
}

void test_conversions() {
  for (int d = 0; d < kDTypeCount; d++) test_convert(static_cast<DType>(d), static_cast<DType>(d));
  const DType floats[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};
  for (DType to : floats)
    for (DType from : floats)
      if (to != from) test_convert(to, from);
}

}  // namespace

int main() {
  test_conversions();
  test_reductions();
  std::printf("%ld checks passed\n", checks);
}
