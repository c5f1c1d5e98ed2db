// The naive scalar reference for csrc/reduce that test_reduce.cc compares with: one element at a time, float16 and
// bfloat16 by their definition, nothing shared with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "base/types.h"

namespace collective::reference {

using Bytes = std::vector<unsigned char>;

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
    if (op == ReduceOp::kBitAnd) return static_cast<T>(a & b);
    if (op == ReduceOp::kBitOr) return static_cast<T>(a | b);
    if (op == ReduceOp::kBitXor) return static_cast<T>(a ^ b);
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

inline bool combine(ReduceOp op, bool a, bool b) {
  if (op == ReduceOp::kBitXor) return a != b;
  return op == ReduceOp::kMin || op == ReduceOp::kProduct || op == ReduceOp::kBitAnd ? a && b : a || b;
}

// Integers truncate.
template <class T>
T divided(T x, int64_t divisor) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(x / divisor);
  else
    return x / static_cast<T>(divisor);
}

template <class T>
std::complex<T> divided(std::complex<T> x, int64_t divisor) {
  return {x.real() / static_cast<T>(divisor), x.imag() / static_cast<T>(divisor)};
}

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

// ---- on arrays, which are bytes here ----

template <class T>
T element(const Bytes& bytes, size_t i) {
  T x;
  std::memcpy(&x, &bytes[i * sizeof(T)], sizeof(T));
  return x;
}

template <>
inline bool element<bool>(const Bytes& bytes, size_t i) {
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
Bytes reduced(ReduceOp op, const std::vector<Bytes>& srcs, size_t count, double scale, int64_t divisor) {
  std::vector<T> result(count);
  for (size_t i = 0; i < count; i++) {
    auto x = up(element<T>(srcs[0], i));
    for (size_t k = 1; k < srcs.size(); k++) x = combine(op, x, up(element<T>(srcs[k], i)));
    if constexpr (std::is_same_v<T, bool>)
      result[i] = x;
    else
      result[i] = down<T>(scaled(divided(x, divisor), scale));
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

inline bool is_complex(DType dtype) { return dtype == DType::kComplex64 || dtype == DType::kComplex128; }

// The type of the real numbers in `dtype`, or dtype itself.
inline DType part_of(DType dtype) {
  return dtype == DType::kComplex64 ? DType::kFloat32 : dtype == DType::kComplex128 ? DType::kFloat64 : dtype;
}

// The first element (of part_of) that differs, else -1. A NaN equals any NaN.
inline long first_difference(DType dtype, const Bytes& a, const Bytes& b) {
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

}  // namespace collective::reference
