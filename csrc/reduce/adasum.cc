#include "reduce/adasum.h"

#include <algorithm>
#include <array>
#include <string>

#include "reduce/reduce.h"

namespace collective {
namespace {

struct Dots {
  double ab = 0, aa = 0, bb = 0;
};

template <typename T>
void add_dots(const T* a, const T* b, size_t count, Dots& dots) {
  for (size_t i = 0; i < count; ++i) {
    const auto x = static_cast<double>(a[i]);
    const auto y = static_cast<double>(b[i]);
    dots.ab += x * y;
    dots.aa += x * x;
    dots.bb += y * y;
  }
}

struct Weights {
  double a, b;
};

Weights weights_of(const Dots& dots) {
  // A zero vector has nothing in common with anything: the other one is the sum.
  return {dots.aa == 0 ? 1.0 : 1.0 - dots.ab / (2 * dots.aa), dots.bb == 0 ? 1.0 : 1.0 - dots.ab / (2 * dots.bb)};
}

template <typename T>
void combine(T* dst, const T* a, const T* b, size_t count, const Weights& weights) {
  for (size_t i = 0; i < count; ++i)
    dst[i] = static_cast<T>(weights.a * static_cast<double>(a[i]) + weights.b * static_cast<double>(b[i]));
}

template <typename T>
void adasum_native(void* dst, const void* a, const void* b, size_t count) {
  Dots dots;
  add_dots(static_cast<const T*>(a), static_cast<const T*>(b), count, dots);
  combine(static_cast<T*>(dst), static_cast<const T*>(a), static_cast<const T*>(b), count, weights_of(dots));
}

// Sixteen-bit types, through blocks of float32.
void adasum_half(DType dtype, void* dst, const void* a, const void* b, size_t count) {
  constexpr size_t kBlock = 2048;
  std::array<float, kBlock> x;
  std::array<float, kBlock> y;
  const auto for_blocks = [&](auto&& use) {
    for (size_t first = 0; first < count; first += kBlock) {
      const size_t n = std::min(kBlock, count - first);
      convert(DType::kFloat32, x.data(), dtype, static_cast<const std::byte*>(a) + first * 2, n);
      convert(DType::kFloat32, y.data(), dtype, static_cast<const std::byte*>(b) + first * 2, n);
      use(first, n);
    }
  };
  Dots dots;
  for_blocks([&](size_t, size_t n) { add_dots(x.data(), y.data(), n, dots); });
  const Weights weights = weights_of(dots);
  for_blocks([&](size_t first, size_t n) {
    combine(x.data(), x.data(), y.data(), n, weights);
    convert(dtype, static_cast<std::byte*>(dst) + first * 2, DType::kFloat32, x.data(), n);
  });
}

}  // namespace

void adasum(DType dtype, void* dst, const void* a, const void* b, size_t count) {
  if (dtype == DType::kFloat32)
    adasum_native<float>(dst, a, b, count);
  else if (dtype == DType::kFloat64)
    adasum_native<double>(dst, a, b, count);
  else if (dtype == DType::kFloat16 || dtype == DType::kBFloat16)
    adasum_half(dtype, dst, a, b, count);
  else
    throw Error(ErrorCode::kInternal, std::string("Adasum of ") + name_of(dtype));
}

}  // namespace collective
