// csrc/reduce against a naive scalar reference, in every instruction set that this processor has. No MPI.
//
//   g++ -std=c++20 -O3 -Wall -Wextra -Icsrc tests/csrc/test_reduce.cc csrc/reduce.cc csrc/reduce_kernels*.cc -o
//   test_reduce
//   ./test_reduce                  exits with 1 and a message at the first difference
//   ./test_reduce --exhaustive     all 2^32 float32 to both 16-bit types as well (minutes)
//
// Every set has to give the reference's bits, so the sets agree among themselves. Only a NaN may be any NaN, because
// which one comes out where two meet is the processor's choice; where just one goes in (convert), the sets must agree
// on its bits too.
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "reduce.h"

using namespace collective;

namespace {

using Bytes = std::vector<unsigned char>;

std::mt19937_64 random_bits(20240607);
std::vector<const char*> sets;
long checks = 0;

void check(bool good, const std::string& what) {
  checks++;
  if (good) return;
  std::printf("FAILED (%s): %s\n", simd_name(), what.c_str());
  std::exit(1);
}

// ---- the reference: one element at a time, float16 and bfloat16 by their definition ----

struct Half {
  uint16_t bits;
  static constexpr int kMantissa = 10, kBias = 15;
};

struct BFloat {
  uint16_t bits;
  static constexpr int kMantissa = 7, kBias = 127;
};

template <class T>
constexpr bool kIs16BitFloat = std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;

template <class T>
constexpr bool kIsReal = kIs16BitFloat<T> || std::is_floating_point_v<T>;

template <class T>
double decode(T x) {
  const int mantissa = x.bits & ((1 << T::kMantissa) - 1), exponent = (x.bits & 0x7fff) >> T::kMantissa;
  double value = exponent == 0 ? std::ldexp(mantissa, 1 - T::kBias - T::kMantissa)
                               : std::ldexp(mantissa + (1 << T::kMantissa), exponent - T::kBias - T::kMantissa);
  if (exponent == 2 * T::kBias + 1) value = mantissa ? NAN : INFINITY;
  return x.bits & 0x8000 ? -value : value;
}

// The multiple of the last place at x that is nearest to x, even in a tie. A carry goes on into the exponent, at last
// to infinity.
template <class T>
T encode(double x) {
  constexpr int infinity = (2 * T::kBias + 1) << T::kMantissa;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {static_cast<uint16_t>(sign | infinity | 1 << (T::kMantissa - 1))};
  if (x == 0 || std::isinf(x)) return {static_cast<uint16_t>(sign | (x == 0 ? 0 : infinity))};
  const int exponent = std::max(std::ilogb(x), 1 - T::kBias);
  if (exponent > T::kBias) return {static_cast<uint16_t>(sign | infinity)};
  const int places = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), T::kMantissa - exponent)));
  return {static_cast<uint16_t>(sign | std::min(infinity, places + ((exponent + T::kBias - 1) << T::kMantissa)))};
}

// What T is computed in, and the way there and back.
template <class T>
using Compute = std::conditional_t<kIs16BitFloat<T>, float, T>;

template <class T>
Compute<T> up(T x) {
  if constexpr (kIs16BitFloat<T>)
    return static_cast<float>(decode(x));
  else
    return x;
}

template <class T, class C>
T down(C x) {
  if constexpr (kIs16BitFloat<T>)
    return encode<T>(static_cast<double>(x));
  else
    return static_cast<T>(x);
}

template <class T>
T wrapped(ReduceOp op, T a, T b) {  // integers modulo 2^bits
  const uint64_t x = static_cast<uint64_t>(a), y = static_cast<uint64_t>(b);
  return static_cast<T>(op == ReduceOp::kProduct ? x * y : x + y);
}

template <class T>
T combine(ReduceOp op, T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (op == ReduceOp::kMin) return std::min(a, b);
    if (op == ReduceOp::kMax) return std::max(a, b);
    return wrapped(op, a, b);
  } else {
    if (op == ReduceOp::kProduct) return a * b;
    if (op == ReduceOp::kSum || op == ReduceOp::kAverage) return a + b;
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<T>::quiet_NaN();
    return (op == ReduceOp::kMin ? a < b : a > b) ? a : b;
  }
}

template <class T>
std::complex<T> combine(ReduceOp op, std::complex<T> a, std::complex<T> b) {
  if (op != ReduceOp::kProduct) return {a.real() + b.real(), a.imag() + b.imag()};
  volatile T products[] = {a.real() * b.real(), a.imag() * b.imag(), a.real() * b.imag(), a.imag() * b.real()};
  return {products[0] - products[1], products[2] + products[3]};  // volatile: not contracted where the build has FMA
}

bool combine(ReduceOp op, bool a, bool b) { return op == ReduceOp::kMin || op == ReduceOp::kProduct ? a && b : a || b; }

template <class T>
T scaled(T x, double scale) {
  if constexpr (std::is_integral_v<T>) {
    if (scale == 1) return x;
    const double y = std::trunc(static_cast<double>(x) * scale);
    if (std::isnan(y)) return 0;
    if (y >= std::ldexp(1.0, std::numeric_limits<T>::digits)) return std::numeric_limits<T>::max();
    if (y <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
    return static_cast<T>(y);
  } else {
    return x * static_cast<T>(scale);
  }
}

template <class T>
std::complex<T> scaled(std::complex<T> x, double scale) {
  return {x.real() * static_cast<T>(scale), x.imag() * static_cast<T>(scale)};
}

// ---- the reference on arrays, which are bytes here ----

template <class T>
T element(const Bytes& bytes, size_t i) {
  T x;
  std::memcpy(&x, &bytes[i * sizeof(T)], sizeof(T));
  return x;
}

template <>
bool element<bool>(const Bytes& bytes, size_t i) {
  return bytes[i] != 0;
}

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  for (size_t i = 0; i < values.size(); i++) {
    const T x = values[i];
    std::memcpy(&bytes[i * sizeof(T)], &x, sizeof(T));
  }
  return bytes;
}

template <class To, class From>
Bytes converted(const Bytes& src, double scale) {
  std::vector<To> result(src.size() / sizeof(From));
  if constexpr (kIsReal<From> && kIsReal<To>) {
    for (size_t i = 0; i < result.size(); i++) {
      const auto x = up(element<From>(src, i));
      if constexpr (std::is_same_v<From, double> || std::is_same_v<To, double>)
        result[i] = down<To>(static_cast<double>(x) * scale);
      else
        result[i] = down<To>(x * static_cast<float>(scale));
    }
  }
  return bytes_of(result);
}

template <class T>
Bytes reference(ReduceOp op, const std::vector<Bytes>& srcs, size_t count, double scale) {
  std::vector<T> result(count);
  for (size_t i = 0; i < count; i++) {
    auto x = up(element<T>(srcs[0], i));
    for (size_t k = 1; k < srcs.size(); k++) x = combine(op, x, up(element<T>(srcs[k], i)));
    if constexpr (std::is_same_v<T, bool>)
      result[i] = x;
    else
      result[i] = down<T>(scaled(x, scale));
  }
  return bytes_of(result);
}

template <class F>
auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kUInt8: return f(uint8_t{});
    case DType::kInt8: return f(int8_t{});
    case DType::kUInt16: return f(uint16_t{});
    case DType::kInt16: return f(int16_t{});
    case DType::kInt32: return f(int32_t{});
    case DType::kInt64: return f(int64_t{});
    case DType::kFloat16: return f(Half{});
    case DType::kBFloat16: return f(BFloat{});
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kComplex64: return f(std::complex<float>{});
    case DType::kComplex128: return f(std::complex<double>{});
    case DType::kBool: return f(bool{});
  }
  std::abort();
}

bool is_complex(DType dtype) { return dtype == DType::kComplex64 || dtype == DType::kComplex128; }

// The type of the real numbers in `dtype`, or dtype itself.
DType part_of(DType dtype) {
  return dtype == DType::kComplex64 ? DType::kFloat32 : dtype == DType::kComplex128 ? DType::kFloat64 : dtype;
}

// The first element (of part_of) that differs, else -1. A NaN equals any NaN.
long first_difference(DType dtype, const Bytes& a, const Bytes& b) {
  if (a == b) return -1;
  return with_type(part_of(dtype), [&]<class T>(T) -> long {
    for (size_t i = 0; i < a.size() / sizeof(T); i++) {
      if (std::memcmp(&a[i * sizeof(T)], &b[i * sizeof(T)], sizeof(T)) == 0) continue;
      if constexpr (kIs16BitFloat<T>)
        if (std::isnan(decode(element<T>(a, i))) && std::isnan(decode(element<T>(b, i)))) continue;
      if constexpr (std::is_floating_point_v<T>)
        if (std::isnan(element<T>(a, i)) && std::isnan(element<T>(b, i))) continue;
      return static_cast<long>(i);
    }
    return -1;
  });
}

// Values near one, or (`wild`) any bit pattern, with zeros, infinities, NaNs, denormals and extremes among them.
Bytes random_bytes(DType dtype, size_t count, bool wild) {
  Bytes bytes(count * size_of(dtype));
  with_type(part_of(dtype), [&]<class T>(T) {
    for (size_t i = 0; i < bytes.size() / sizeof(T); i++) {
      uint64_t bits = random_bits();
      const double value =
          std::ldexp(static_cast<double>(bits >> 40) / (1 << 24) + 0.5, static_cast<int>(bits % 7) - 3);
      const double signed_value = bits & 128 ? -value : value;
      T x{};
      if constexpr (std::is_same_v<T, bool>) {
        bytes[i] = static_cast<unsigned char>(bits & 1 ? 0 : wild ? bits >> 8 : 1);
        continue;
      } else if constexpr (std::is_integral_v<T>) {
        const T specials[] = {0, 1, std::numeric_limits<T>::max(), std::numeric_limits<T>::min(), static_cast<T>(-1)};
        x = wild && bits % 3 == 0 ? specials[(bits >> 8) % 5] : static_cast<T>(bits >> 8);
      } else if constexpr (kIs16BitFloat<T>) {
        x = wild ? T{static_cast<uint16_t>(bits >> 8)} : encode<T>(signed_value);
      } else if constexpr (std::is_floating_point_v<T>) {
        using Limits = std::numeric_limits<T>;
        const T specials[] = {
            0, Limits::infinity(), Limits::quiet_NaN(), Limits::denorm_min(), Limits::max(), Limits::min(), 1};
        x = static_cast<T>(signed_value);
        if (wild && bits % 3 == 0) x = bits & 256 ? -specials[(bits >> 10) % 7] : specials[(bits >> 10) % 7];
        if (wild && bits % 3 == 1) bits = random_bits(), std::memcpy(&x, &bits, sizeof x);
      }
      std::memcpy(&bytes[i * sizeof(T)], &x, sizeof x);
    }
  });
  return bytes;
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

void test_reduce(DType dtype, ReduceOp op, int n, size_t count, double scale, bool wild) {
  std::vector<Bytes> values;
  for (int k = 0; k < n; k++) values.push_back(random_bytes(dtype, count, wild));
  const Bytes expected = with_type(dtype, [&]<class T>(T) { return reference<T>(op, values, count, scale); });
  const std::string what = std::string(name_of(dtype)) + " " + name_of(op) + " n=" + std::to_string(n) +
                           " count=" + std::to_string(count) + " scale=" + std::to_string(scale) +
                           (wild ? " wild" : "");
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
        reduce(dtype, op, dst.data(), pointers.data(), n, count, scale);
        const long at = first_difference(dtype, dst.bytes(), expected);
        check(at < 0, what + " offset=" + std::to_string(offset) + " in_place=" + std::to_string(in_place) +
                          ": differs at " + std::to_string(at));
        for (int k = 0; k < n; k++)
          check(k == in_place || srcs[k].bytes() == values[k], what + ": a source was changed");
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
          test_reduce(dtype, op, n, count, 1, false);
          test_reduce(dtype, op, n, count, 1, true);
          if (dtype == DType::kBool) continue;
          test_reduce(dtype, op, n, count, 1.0 / 3, false);
          test_reduce(dtype, op, n, count, -2.5, true);
        }
      }
    }
  }
  for (DType dtype : {DType::kUInt8, DType::kInt8, DType::kUInt16, DType::kInt16, DType::kInt32, DType::kInt64})
    for (double scale : {0.0, 0.999, 1e30, -1e30, double(INFINITY), double(NAN)})
      test_reduce(dtype, ReduceOp::kSum, 1, 1000, scale, true);
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

template <class T, class Wide>
Bytes ties() {  // every T, every middle between two neighbours, and what lies next to either: in Wide
  std::vector<Wide> values;
  for (int bits = 0; bits < 0x10000; bits++) {
    const double x = decode(T{static_cast<uint16_t>(bits)}), y = decode(T{static_cast<uint16_t>(bits + 1)});
    for (double z : {x, x / 2 + y / 2})
      for (double toward : {double(-INFINITY), z, double(INFINITY)})
        values.push_back(std::nextafter(static_cast<Wide>(z), static_cast<Wide>(toward)));
  }
  return bytes_of(values);
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
    const Bytes copy = dtype == DType::kBool ? reference<bool>(ReduceOp::kSum, {src}, 1000, 1) : src;
    check(dst == copy, std::string("copy of ") + name_of(dtype));
    if (dtype == DType::kBool) continue;
    convert(dtype, dst.data(), dtype, src.data(), 1000, 0.3);
    const Bytes expected = with_type(dtype, [&]<class T>(T) { return reference<T>(ReduceOp::kSum, {src}, 1000, 0.3); });
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
