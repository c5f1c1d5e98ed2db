// Elements for the tests that compare reductions: random ones of every type, and those that are hard to round.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "reduce_reference.h"

namespace collective::reference {

inline std::mt19937_64 random_bits(20240607);

// Values near one, or (`wild`) any bit pattern, with zeros, infinities, NaNs, denormals and extremes among them.
inline Bytes random_bytes(DType dtype, size_t count, bool wild) {
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
        if (wild && bits % 5 == 0) x = T{static_cast<uint16_t>(bits & 0x8000)};  // a zero
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

template <class T, class Wide>
Bytes ties() {  // every T, every midpoint of two neighbours, and the values next to either: in Wide
  std::vector<Wide> values;
  for (int bits = 0; bits < 0x10000; bits++) {
    const double x = decode(T{static_cast<uint16_t>(bits)}), y = decode(T{static_cast<uint16_t>(bits + 1)});
    for (double z : {x, x / 2 + y / 2})
      for (double toward : {double(-INFINITY), z, double(INFINITY)})
        values.push_back(std::nextafter(static_cast<Wide>(z), static_cast<Wide>(toward)));
  }
  return bytes_of(values);
}

}  // namespace collective::reference
