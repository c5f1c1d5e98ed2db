// csrc/reduce against a naive scalar reference, in every instruction set that this processor has. No MPI.
//
//   build/csrc/test_reduce                  exits with 1 and a message at the first difference
//   build/csrc/test_reduce --exhaustive     all 2^32 float32 to both 16-bit types as well (minutes)
//
// Every set has to give the reference's bits, so the sets agree among themselves. Only a NaN may be any NaN, because
// which one comes out where two meet is the processor's choice; where just one goes in (convert), the sets must agree
// on its bits too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "reduce/reduce.h"
#include "reduce_reference.h"
#include "sample_elements.h"

using namespace collective;
using namespace collective::reference;

namespace {

std::vector<const char*> sets;
long checks = 0;

void check(bool good, const std::string& what) {
  checks++;
  if (good) return;
  std::printf("FAILED (%s): %s\n", simd_name(), what.c_str());
  std::exit(1);
}

// A copy of bytes that starts `offset` bytes after an allocation does, and ends where it ends (for the address
// sanitizer).
struct Placed {
  Placed(const Bytes& bytes, size_t offset) : all(offset + bytes.size()), offset(offset) {
    std::copy(bytes.begin(), bytes.end(), all.begin() + static_cast<long>(offset));
  }
  unsigned char* data() { return all.data() + offset; }
  Bytes bytes() const { return Bytes(all.begin() + static_cast<long>(offset), all.end()); }
  Bytes all;
  size_t offset;
};

// ---- the tests ----

const size_t kCounts[] = {0, 1, 3, 7, 8, 15, 16, 17, 31, 33, 1000, 4099};

void test_reduce(DType dtype, ReduceOp op, int n, size_t count, double scale, int64_t divisor, bool wild) {
  std::vector<Bytes> values;
  for (int k = 0; k < n; k++) values.push_back(random_bytes(dtype, count, wild));
  const Bytes expected = with_type(dtype, [&]<class T>(T) { return reduced<T>(op, values, count, scale, divisor); });
  const std::string what = std::string(name_of(dtype)) + " " + name_of(op) + " n=" + std::to_string(n) +
                           " count=" + std::to_string(count) + " scale=" + std::to_string(scale) +
                           " divisor=" + std::to_string(divisor) + (wild ? " wild" : "");
  for (const char* set : sets) {
    force_simd(set);
    for (size_t offset : {0, 1, 6}) {
      for (int in_place : {-1, 0, n / 2, n - 1}) {
        std::vector<Placed> srcs;
        for (int k = 0; k < n; k++) srcs.emplace_back(values[k], offset * (k + 1) % 64);
        Placed own(Bytes(count * size_of(dtype), 0xa5), offset ? offset + 2 : 0);
        Placed& dst = in_place < 0 ? own : srcs[in_place];
        std::vector<const void*> pointers;
        for (Placed& src : srcs) pointers.push_back(src.data());
        reduce(dtype, op, dst.data(), pointers.data(), n, count, scale, divisor);
        const long at = first_difference(dtype, dst.bytes(), expected);
        check(at < 0, what + " offset=" + std::to_string(offset) + " in_place=" + std::to_string(in_place) +
                          ": differs at " + std::to_string(at));
        for (int k = 0; k < n; k++)
          check(k == in_place || srcs[k].bytes() == values[k], what + ": a source was changed");
      }
      for (bool in_place : {false, true}) {
        const int m = in_place ? n : static_cast<int>(count % 4) + 1;
        std::vector<Placed> srcs, own;
        std::vector<const void*> from;
        std::vector<void*> to;
        for (int k = 0; k < n; k++) srcs.emplace_back(values[k], offset * (k + 1) % 64);
        for (int k = 0; k < m; k++) own.emplace_back(Bytes(count * size_of(dtype), 0xa5), offset ? offset + k : 0);
        for (int k = 0; k < n; k++) from.push_back(srcs[k].data());
        for (int k = 0; k < m; k++) to.push_back((in_place ? srcs : own)[k].data());
        reduce_to_many(dtype, op, to.data(), m, from.data(), n, count, scale, divisor);
        for (int k = 0; k < m; k++) {
          const long at = first_difference(dtype, (in_place ? srcs : own)[k].bytes(), expected);
          check(at < 0, what + " to many: destination " + std::to_string(k) + " differs at " + std::to_string(at));
        }
        for (int k = 0; k < n; k++)
          check(in_place || srcs[k].bytes() == values[k], what + " to many: a source was changed");
      }
    }
  }
}

void test_reductions() {
  for (int d = 0; d < kDTypeCount; d++) {
    const DType dtype = static_cast<DType>(d);
    for (ReduceOp op : {ReduceOp::kAverage, ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct}) {
      if (is_complex(dtype) && (op == ReduceOp::kMin || op == ReduceOp::kMax)) continue;
      for (int n : {1, 2, 3, 4, 5, 8, 9}) {
        for (size_t count : kCounts) {
          test_reduce(dtype, op, n, count, 1, 1, false);
          test_reduce(dtype, op, n, count, 1, 1, true);
          if (dtype == DType::kBool) continue;
          test_reduce(dtype, op, n, count, 1.0 / 3, 1, false);
          test_reduce(dtype, op, n, count, 1, 7, false);
          test_reduce(dtype, op, n, count, -2.5, 3, true);
        }
      }
    }
  }
  for (DType dtype :
       {DType::kUInt8, DType::kInt8, DType::kUInt16, DType::kInt16, DType::kInt32, DType::kInt64, DType::kBool})
    for (ReduceOp op : {ReduceOp::kBitAnd, ReduceOp::kBitOr, ReduceOp::kBitXor})
      for (int n : {1, 2, 3, 9})
        for (size_t count : kCounts) test_reduce(dtype, op, n, count, 1, 1, true);
  for (DType dtype : {DType::kUInt8, DType::kInt8, DType::kUInt16, DType::kInt16, DType::kInt32, DType::kInt64})
    for (double scale : {0.0, 0.999, 1e30, -1e30, double(INFINITY), double(NAN)})
      test_reduce(dtype, ReduceOp::kSum, 1, 1000, scale, 1, true);
}

// src converted in every set, from buffers at odd addresses, in place too where the sizes allow it.
void test_convert(DType to, DType from, const Bytes& src, double scale) {
  const size_t count = src.size() / size_of(from);
  const Bytes expected = with_type(from, [&]<class From>(From) {
    return with_type(to, [&]<class To>(To) { return converted<To, From>(src, scale); });
  });
  Bytes first;
  for (const char* set : sets) {
    force_simd(set);
    for (size_t offset : {0, 3}) {
      Placed source(src, offset), own(Bytes(count * size_of(to), 0xa5), offset);
      for (bool in_place : {false, true}) {
        if (in_place && size_of(to) != size_of(from)) continue;
        Placed& dst = in_place ? source : own;
        convert(to, dst.data(), from, source.data(), count, scale);
        const std::string what = std::string(name_of(from)) + " to " + name_of(to) + " count=" + std::to_string(count) +
                                 " scale=" + std::to_string(scale);
        const long at = first_difference(to, dst.bytes(), expected);
        check(at < 0, what + ": differs at " + std::to_string(at));
        if (first.empty()) first = dst.bytes();
        check(first == dst.bytes(), what + ": the sets give different NaNs");
      }
    }
  }
}

void test_conversions() {
  const DType floats[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};
  Bytes all(0x20000);  // every 16-bit pattern
  for (int bits = 0; bits < 0x10000; bits++) std::memcpy(&all[2 * static_cast<size_t>(bits)], &bits, 2);
  for (DType to : floats) {
    for (DType from : floats) {
      if (to == from) continue;
      for (double scale : {1.0, 0.5, 1.0 / 3, 1e10, -1e-9}) {
        if (size_of(from) == 2) test_convert(to, from, all, scale);
        for (size_t count : kCounts)
          for (bool wild : {false, true}) test_convert(to, from, random_bytes(from, count, wild), scale);
      }
      test_convert(to, from, random_bytes(from, 500000, true), 1);
    }
    if (size_of(to) != 2) continue;
    test_convert(to, DType::kFloat32, to == DType::kFloat16 ? ties<Half, float>() : ties<BFloat, float>(), 1);
    test_convert(to, DType::kFloat64, to == DType::kFloat16 ? ties<Half, double>() : ties<BFloat, double>(), 1);
  }
  for (int d = 0; d < kDTypeCount; d++) {  // the same type twice
    const DType dtype = static_cast<DType>(d);
    const Bytes src = random_bytes(dtype, 1000, true);
    Bytes dst(src.size());
    convert(dtype, dst.data(), dtype, src.data(), 1000);
    const Bytes copy = dtype == DType::kBool ? reduced<bool>(ReduceOp::kSum, {src}, 1000, 1, 1) : src;
    check(dst == copy, std::string("copy of ") + name_of(dtype));
    if (dtype == DType::kBool) continue;
    convert(dtype, dst.data(), dtype, src.data(), 1000, 0.3);
    const Bytes expected =
        with_type(dtype, [&]<class T>(T) { return reduced<T>(ReduceOp::kSum, {src}, 1000, 0.3, 1); });
    check(first_difference(dtype, dst, expected) < 0, std::string("scaling of ") + name_of(dtype));
  }
}

void test_divisions() {
  const int64_t divisors[] = {1,   2,   3,     7,     10,        100,      127,      128,      255,
                              256, 300, 32767, 65536, INT32_MAX, 1L << 31, 1L << 40, INT64_MAX};
  for (DType dtype : {DType::kUInt8, DType::kInt8, DType::kUInt16, DType::kInt16, DType::kInt32, DType::kInt64}) {
    with_type(dtype, [&]<class T>(T) {
      if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
        std::vector<T> values;
        for (int i = 0; i < 0x10000; i++)
          values.push_back(static_cast<T>(sizeof(T) <= 2 ? i : random_bits() >> (i % 64)));
        for (int64_t divisor : divisors) {  // multiples and their neighbours
          for (int i = -2; i <= 2; i++) values.push_back(static_cast<T>(static_cast<uint64_t>(divisor) * (i % 2) + i));
          values.push_back(std::numeric_limits<T>::max()), values.push_back(std::numeric_limits<T>::min());
        }
        const Bytes src = bytes_of(values);
        for (int64_t divisor : divisors) {
          std::vector<T> expected;
          for (T x : values) expected.push_back(static_cast<T>(x / divisor));
          for (const char* set : sets) {
            force_simd(set);
            Placed source(src, 1), dst(Bytes(src.size()), 3);
            divide(dtype, dst.data(), source.data(), values.size(), divisor);
            check(dst.bytes() == bytes_of(expected), std::string(name_of(dtype)) + " by " + std::to_string(divisor));
            divide(dtype, source.data(), source.data(), values.size(), divisor);
            check(source.bytes() == bytes_of(expected),
                  std::string(name_of(dtype)) + " in place by " + std::to_string(divisor));
          }
        }
      }
    });
  }
}

template <class F>
void check_throws(ErrorCode code, const char* what, F f) {
  try {
    f();
  } catch (const Error& error) {
    return check(error.code == code, std::string(what) + ": wrong code, " + error.what());
  }
  check(false, std::string(what) + ": no error");
}

void test_errors() {
  char dst[16] = {}, src[16] = {};
  const void* srcs[] = {src, src};
  for (DType dtype : {DType::kComplex64, DType::kComplex128})
    for (ReduceOp op : {ReduceOp::kMin, ReduceOp::kMax})
      check_throws(ErrorCode::kInvalid, "complex Min", [&] { reduce(dtype, op, dst, srcs, 2, 1); });
  check_throws(ErrorCode::kInternal, "Adasum", [&] { reduce(DType::kFloat32, ReduceOp::kAdasum, dst, srcs, 2, 1); });
  check_throws(ErrorCode::kInternal, "n = 0", [&] { reduce(DType::kFloat32, ReduceOp::kSum, dst, srcs, 0, 1); });
  check_throws(ErrorCode::kInvalid, "bool scale", [&] { reduce(DType::kBool, ReduceOp::kSum, dst, srcs, 2, 1, 0.5); });
  check_throws(ErrorCode::kInvalid, "bool divisor",
               [&] { reduce(DType::kBool, ReduceOp::kSum, dst, srcs, 2, 1, 1, 2); });
  check_throws(ErrorCode::kInvalid, "divisor 0", [&] { reduce(DType::kInt32, ReduceOp::kSum, dst, srcs, 2, 1, 1, 0); });
  check_throws(ErrorCode::kInternal, "pair", [&] { convert(DType::kFloat32, dst, DType::kInt32, src, 1); });
  check_throws(ErrorCode::kInvalid, "divide", [&] { divide(DType::kFloat32, dst, src, 1, 2); });
  check_throws(ErrorCode::kInvalid, "divide bool", [&] { divide(DType::kBool, dst, src, 1, 2); });
  check_throws(ErrorCode::kInvalid, "divide by 0", [&] { divide(DType::kInt32, dst, src, 1, 0); });
  check_throws(ErrorCode::kInvalid, "set", [] { force_simd("abacus"); });
}

// Every float32 to both 16-bit types, in blocks.
void test_exhaustively() {
  constexpr uint64_t block = 1 << 20;
  for (uint64_t start = 0; start < uint64_t{1} << 32; start += block) {
    Bytes src(block * 4);
    for (uint64_t i = 0; i < block; i++) {
      const uint32_t bits = static_cast<uint32_t>(start + i);
      std::memcpy(&src[i * 4], &bits, 4);
    }
    test_convert(DType::kFloat16, DType::kFloat32, src, 1);
    test_convert(DType::kBFloat16, DType::kFloat32, src, 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::printf("picked: %s; tested:", simd_name());
  const std::string picked = simd_name();
  for (const char* set : {"avx512", "avx2", "portable"}) {
    try {
      force_simd(set);
      sets.push_back(set);
      std::printf(" %s", set);
    } catch (const Error& error) {
      check(error.code == ErrorCode::kInvalid, error.what());
    }
  }
  std::printf("\n");
  force_simd(nullptr);
  check(picked == simd_name() && picked == sets[0], "the best set is picked");
  test_errors();
  test_divisions();
  test_conversions();
  test_reductions();
  if (argc > 1 && std::strcmp(argv[1], "--exhaustive") == 0) test_exhaustively();
  std::printf("%ld checks passed\n", checks);
}
