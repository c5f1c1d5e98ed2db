#include "reduce/adasum.h"

#include <algorithm>
#include <array>
#include <string>

#include "reduce/reduce.h"

namespace collective {

Adasum::Adasum(DType dtype, void* dst, const void* a, const void* b, size_t count)
    : dtype_(dtype),
      dst_(static_cast<std::byte*>(dst)),
      a_(static_cast<const std::byte*>(a)),
      b_(static_cast<const std::byte*>(b)),
      count_(count) {
  if (dtype != DType::kFloat32 && dtype != DType::kFloat64 && dtype != DType::kFloat16 && dtype != DType::kBFloat16)
    throw Error(ErrorCode::kInternal, std::string("Adasum of ") + name_of(dtype));
}

template <typename T>
void Adasum::add_dots(const T* a, const T* b, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const auto x = static_cast<double>(a[i]);
    const auto y = static_cast<double>(b[i]);
    dots_.ab += x * y;
    dots_.aa += x * x;
    dots_.bb += y * y;
  }
}

template <typename T>
void Adasum::combine(T* dst, const T* a, const T* b, size_t count) const {
  for (size_t i = 0; i < count; ++i)
    dst[i] = static_cast<T>(weight_a_ * static_cast<double>(a[i]) + weight_b_ * static_cast<double>(b[i]));
}

template <typename Use>
void Adasum::for_blocks(size_t begin, size_t end, bool stores, const Use& use) {
  const auto native = [&](auto type) {
    using T = decltype(type);
    use(reinterpret_cast<T*>(dst_) + begin, reinterpret_cast<const T*>(a_) + begin,
        reinterpret_cast<const T*>(b_) + begin, end - begin);
  };
  if (dtype_ == DType::kFloat32) return native(float{});
  if (dtype_ == DType::kFloat64) return native(double{});
  // Sixteen-bit types, through blocks of float32.
  constexpr size_t kBlock = 2048;
  std::array<float, kBlock> x;
  std::array<float, kBlock> y;
  for (size_t first = begin; first < end; first += kBlock) {
    const size_t n = std::min(kBlock, end - first);
    convert(DType::kFloat32, x.data(), dtype_, a_ + first * 2, n);
    convert(DType::kFloat32, y.data(), dtype_, b_ + first * 2, n);
    use(x.data(), x.data(), y.data(), n);
    if (stores) convert(dtype_, dst_ + first * 2, DType::kFloat32, x.data(), n);
  }
}

bool Adasum::step() {
  const size_t end = std::min(count_, position_ + kPieceBytes / size_of(dtype_));
  if (!combining_) {
    for_blocks(position_, end, false, [this](auto*, const auto* a, const auto* b, size_t n) { add_dots(a, b, n); });
  } else {
    for_blocks(position_, end, true,
               [this](auto* dst, const auto* a, const auto* b, size_t n) { combine(dst, a, b, n); });
  }
  position_ = end;
  if (position_ < count_) return false;
  if (combining_) return true;
  combining_ = true;
  position_ = 0;
  // A zero vector has nothing in common with anything: the other one is the sum.
  if (dots_.aa != 0) weight_a_ = 1.0 - dots_.ab / (2 * dots_.aa);
  if (dots_.bb != 0) weight_b_ = 1.0 - dots_.ab / (2 * dots_.bb);
  return count_ == 0;
}

}  // namespace collective
