// Conversion and reduction of memory that a device reaches: csrc/reduce/reduce.h in CUDA C++, with the same bits (any
// NaN for a NaN).
//
//   convert_<from>_<to>      to[i] = from[i] * scale of every Piece: pack and unpack of many tensors in one launch
//   reduce_<dtype>_<op>      targets[k][i] = finish(sources[0][i] op sources[1][i] op ...)
//
// Compiled on the machine it runs on, by NVRTC (see __init__.py), without contraction to FMA. No shared memory and no
// barriers, so that a host can run it thread by thread (tests/csrc/kernels_on_host.h).
//
// Memory is the limit. In each turn a thread loads several vectors of 16 bytes before it computes. Neighbours take
// neighbouring vectors, which is why the narrower side of a conversion has vectors of less than 16 bytes: with 16 on
// both, the wider would be strided. Where the pointers do not all reach a vector's alignment together, a turn has
// single elements, which are coalesced as well. `memory traffic:` each source read once, each target written once.
#include "launch.h"

namespace collective {
namespace {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// ---- element types, and what they are computed in ----

struct Half {
  u16 bits;
};
struct BFloat {
  u16 bits;
};
struct Bool {
  u8 byte;
};
template <class T>
struct Complex {
  T re, im;
};

template <class T>
struct Traits {
  using Compute = T;
  static constexpr bool kInteger = true;
};
template <class C>
struct Computed {
  using Compute = C;
  static constexpr bool kInteger = false;
};
template <>
struct Traits<Half> : Computed<float> {};
template <>
struct Traits<BFloat> : Computed<float> {};
template <>
struct Traits<float> : Computed<float> {};
template <>
struct Traits<double> : Computed<double> {};
template <>
struct Traits<Bool> : Computed<bool> {};
template <>
struct Traits<bool> : Computed<bool> {};
template <class T>
struct Traits<Complex<T>> : Computed<Complex<T>> {};

template <class T>
using Compute = typename Traits<T>::Compute;

__device__ inline float up(Half x) {
#ifdef __CUDA_ARCH__
  float result;  // by hand: cuda_fp16.h is not present everywhere that NVRTC is
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  _Float16 half;
  __builtin_memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
#endif
}
__device__ inline float up(BFloat x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
__device__ inline bool up(Bool x) { return x.byte != 0; }
template <class T>
__device__ inline T up(T x) {
  return x;
}

__device__ inline void down(float x, Half& result) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
  const _Float16 half = static_cast<_Float16>(x);
  __builtin_memcpy(&result, &half, sizeof half);
#endif
}
// A NaN is truncated, since rounding could carry into the sign; setting a bit keeps one whose payload is in the lower
// half.
__device__ inline void down(float x, BFloat& result) {
  const u32 bits = __float_as_uint(x);
  result.bits = static_cast<u16>((x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16);
}
__device__ inline void down(bool x, Bool& result) { result.byte = x; }
template <class T>
__device__ inline void down(T x, T& result) {
  result = x;
}
__device__ inline void down(double x, float& result) { result = static_cast<float>(x); }

// float64 to float32 rounded to odd: an inexact result gets a last bit of one, so that the second rounding, to 16 bits,
// sees on which side of a tie it was.
__device__ inline float to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  const bool away = (back > x && x > 0) || (back < x && x < 0);  // the magnitude was rounded up
  return __uint_as_float((__float_as_uint(nearest) - away) | (back != x));
}
__device__ inline void down(double x, Half& result) { down(to_odd(x), result); }
__device__ inline void down(double x, BFloat& result) { down(to_odd(x), result); }

// ---- operators ----

template <class T>
struct Wrapping {  // sums and products of integers, where a signed overflow would be undefined
  using Type = T;
};
template <>
struct Wrapping<u16> {  // promoted to int, 65535 * 65535 would overflow
  using Type = u32;
};
template <>
struct Wrapping<short> : Wrapping<u16> {};
template <>
struct Wrapping<int> : Wrapping<u16> {};
template <>
struct Wrapping<long long> {
  using Type = u64;
};
template <class T>
using Wrap = typename Wrapping<T>::Type;

struct Sum {
  template <class T>
  __device__ static T apply(T x, T y) {
    return static_cast<T>(static_cast<Wrap<T>>(x) + static_cast<Wrap<T>>(y));
  }
  __device__ static bool apply(bool x, bool y) { return x || y; }
};
struct Product {
  template <class T>
  __device__ static T apply(T x, T y) {
    return static_cast<T>(static_cast<Wrap<T>>(x) * static_cast<Wrap<T>>(y));
  }
  template <class T>
  __device__ static Complex<T> apply(Complex<T> x, Complex<T> y) {
    return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
  }
  __device__ static bool apply(bool x, bool y) { return x && y; }
};
struct Min {
  template <class T>
  __device__ static T apply(T x, T y) {
    return x != x || x < y ? x : y;  // a NaN in y fails both and comes through; of +0 and -0, y
  }
};
struct Max {
  template <class T>
  __device__ static T apply(T x, T y) {
    return x != x || x > y ? x : y;
  }
};

// ---- what is done to an element in the end ----

// Correctly rounded, as on the host: the options that the kernels are compiled with do not relax it.
__device__ inline float divided(float x, long long divisor) { return x / static_cast<float>(divisor); }
__device__ inline double divided(double x, long long divisor) { return x / static_cast<double>(divisor); }
__device__ inline bool divided(bool x, long long) { return x; }
template <class T>
__device__ inline Complex<T> divided(Complex<T> x, long long divisor) {
  return {divided(x.re, divisor), divided(x.im, divisor)};
}

__device__ inline float scaled(float x, double scale) { return x * static_cast<float>(scale); }
__device__ inline double scaled(double x, double scale) { return x * scale; }
__device__ inline bool scaled(bool x, double) { return x; }
template <class T>
__device__ inline Complex<T> scaled(Complex<T> x, double scale) {
  return {scaled(x.re, scale), scaled(x.im, scale)};
}
// Integers truncate and saturate; NaN gives 0.
template <class T>
__device__ inline T scaled(T x, double scale) {
  constexpr bool kSigned = static_cast<T>(-1) < 0;
  constexpr T kMax = static_cast<T>(~u64{0} >> (64 - 8 * sizeof(T) + kSigned));
  constexpr T kMin = kSigned ? static_cast<T>(-kMax - 1) : T{0};
  constexpr double kLimit = static_cast<double>(kMax) + (sizeof(T) < 8 ? 1 : 0);  // 2^63 where T has 64 bits
  const double y = static_cast<double>(x) * scale;
  if (y != y) return 0;
  return y >= kLimit ? kMax : y <= static_cast<double>(kMin) ? kMin : static_cast<T>(y);
}

// ---- memory ----

// N neighbouring elements, loaded and stored at once.
template <class T, int N>
struct alignas(N == 1 ? alignof(T) : N * sizeof(T)) Pack {
  T at[N];
};

// Pointers loaded from memory are not known to point to device memory, and would be used by slower instructions.
__device__ inline void assume_global(const void* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#else
  (void)p;
#endif
}

template <class T, int N>
__device__ inline bool aligned(const T* p) {
  return reinterpret_cast<u64>(p) % alignof(Pack<T, N>) == 0;
}

// Elements until `p` is aligned for packs, if it ever is.
template <class T, int N>
__device__ inline u64 until_aligned(const T* p) {
  return (-reinterpret_cast<u64>(p) / sizeof(T)) % N;
}

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }

// Packs of N elements of kSize bytes in a turn: 64 bytes of them, unless they take too many registers.
template <int kSize, int N>
constexpr int kTurn = least(64 / (N * kSize), least(32 / N, 8));

// ---- conversion ----

struct Copy {
  template <class T, int N>
  __device__ static void apply(const Pack<T, N>& in, double, Pack<T, N>& out) {
    out = in;
  }
};
struct Scale {
  template <class From, class To, int N>
  __device__ static void apply(const Pack<From, N>& in, double scale, Pack<To, N>& out) {
#pragma unroll
    for (int e = 0; e < N; e++) convert(in.at[e], scale, out.at[e]);
  }
  template <class From, class To>
  __device__ static void convert(From x, double scale, To& result) {
    down(scaled(up(x), scale), result);
  }
  template <class From>
  __device__ static void convert(From x, double scale, double& result) {
    result = up(x) * scale;
  }
};

// Packs i, i + blockDim.x, ...: kPacks of them.
template <class How, int N, int kPacks, class From, class To>
__device__ inline void convert_turn(const From* from, To* to, u64 i, double scale) {
  const Pack<From, N>* source = reinterpret_cast<const Pack<From, N>*>(from) + i;
  Pack<To, N>* target = reinterpret_cast<Pack<To, N>*>(to) + i;
  Pack<From, N> in[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; j++) in[j] = source[j * blockDim.x];
#pragma unroll
  for (int j = 0; j < kPacks; j++) {
    Pack<To, N> out;
    How::apply(in[j], scale, out);
    target[j * blockDim.x] = out;
  }
}

template <class How, int N, int kPacks, class From, class To>
__device__ inline void convert_packs(const From* from, To* to, u64 packs, double scale) {
  u64 i = threadIdx.x;
#pragma unroll 1
  for (; i + (kPacks - 1) * blockDim.x < packs; i += kPacks * blockDim.x)
    convert_turn<How, N, kPacks>(from, to, i, scale);
#pragma unroll 1
  for (; i < packs; i += blockDim.x) convert_turn<How, N, 1>(from, to, i, scale);
}

// The last piece that begins at this tile or before.
__device__ inline int piece_of(const Launch& launch, u64 tile) {
  int low = 0, high = launch.piece_count - 1;
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (launch.pieces[middle].first_tile <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// kParts: elements of From and To in one of the array's: 2 in a complex number. kPacked: as packs, where they align.
template <class How, class From, class To, int kParts, bool kPacked>
__device__ inline void convert_pieces(const Launch& launch) {
  constexpr int kSize = sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From), N = 16 / kSize;
  constexpr int kSingles = kPacked ? kTurn<kSize, 1> : 2;
  constexpr u64 kTile = kTileBytes / (kSize * kParts);
#pragma unroll 1
  for (u64 tile = blockIdx.x; tile < launch.tile_count; tile += gridDim.x) {
    const Piece& piece = launch.pieces[piece_of(launch, tile)];
    const u64 begin = (tile - piece.first_tile) * kTile;
    const u64 count = (piece.count - begin < kTile ? piece.count - begin : kTile) * kParts;
    const From* from = static_cast<const From*>(piece.from);
    To* to = static_cast<To*>(piece.to) + begin * kParts;
    if (from == nullptr) {
      const To* identity = reinterpret_cast<const To*>(launch.identity);
#pragma unroll 1
      for (u64 i = threadIdx.x; i < count; i += blockDim.x) to[i] = identity[i % kParts];
      continue;
    }
    from += begin * kParts;
    assume_global(from);
    assume_global(to);
    const u64 ahead = until_aligned<To, N>(to);
    const bool together = kPacked && ahead <= count && aligned<From, N>(from + ahead) && aligned<To, N>(to + ahead);
    const u64 head = together ? ahead : count, packs = (count - head) / N, tail = head + packs * N;
    if constexpr (kPacked) convert_packs<How, N, kTurn<kSize, N>>(from + head, to + head, packs, launch.scale);
#pragma unroll 1
    for (int end = 0; end < 2; end++) {
      const u64 begin = end ? tail : 0;
      convert_packs<How, 1, kSingles>(from + begin, to + begin, end ? count - tail : head, launch.scale);
    }
  }
}

template <class T, int kParts = 1>
__device__ inline void convert_same(const Launch& launch) {
  if (launch.scale == 1)
    convert_pieces<Copy, T, T, kParts, true>(launch);
  else
    convert_pieces<Scale, T, T, kParts, !Traits<T>::kInteger>(launch);
}

// ---- reduction ----

// What is applied to an element once it is combined from all sources.
struct Finished {
  template <class T>
  __device__ static T apply(T x, const Launch& launch) {
    if constexpr (Traits<T>::kInteger) {
      if (launch.divisor != 1) x = static_cast<T>(x / launch.divisor);
      if (launch.scale == 1) return x;
    } else {
      if (launch.divisor != 1) x = divided(x, launch.divisor);
    }
    return scaled(x, launch.scale);
  }
};
struct Kept {
  template <class T>
  __device__ static T apply(T x, const Launch&) {
    return x;
  }
};

template <int kPacks, class T, int N>
__device__ inline void load(Compute<T> (&value)[kPacks][N], const void* p, u64 begin, u64 i) {
  const Pack<T, N>* source = reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(p) + begin) + i;
  Pack<T, N> in[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; j++) in[j] = source[j * blockDim.x];
#pragma unroll
  for (int j = 0; j < kPacks; j++)
#pragma unroll
    for (int e = 0; e < N; e++) value[j][e] = up(in[j].at[e]);
}

// Packs i, i + blockDim.x, ... from element `begin` on: kPacks of them.
template <class Op, class Finish, int N, int kPacks, class T>
__device__ inline void reduce_turn(const Launch& launch, u64 begin, u64 i) {
  Compute<T> value[kPacks][N];
  load<kPacks, T, N>(value, launch.sources[0], begin, i);
#pragma unroll(kPacks == 1 ? 4 : 1)  // the last packs, and all of a short array: there loads of several sources overlap
  for (int k = 1; k < launch.source_count; k++) {
    Compute<T> next[kPacks][N];
    load<kPacks, T, N>(next, launch.sources[k], begin, i);
#pragma unroll
    for (int j = 0; j < kPacks; j++)
#pragma unroll
      for (int e = 0; e < N; e++) value[j][e] = Op::apply(value[j][e], next[j][e]);
  }
  Pack<T, N> out[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; j++)
#pragma unroll
    for (int e = 0; e < N; e++) down(Finish::apply(value[j][e], launch), out[j].at[e]);
#pragma unroll 1
  for (int k = 0; k < launch.target_count; k++) {
    Pack<T, N>* target = reinterpret_cast<Pack<T, N>*>(static_cast<T*>(launch.targets[k]) + begin) + i;
#pragma unroll
    for (int j = 0; j < kPacks; j++) target[j * blockDim.x] = out[j];
  }
}

// All blocks together: a block takes kPacks * blockDim.x neighbouring packs at a time.
template <class Op, class Finish, int N, int kPacks, class T>
__device__ inline void reduce_packs(const Launch& launch, u64 begin, u64 packs) {
  const u64 tile = kPacks * blockDim.x;
#pragma unroll 1
  for (u64 i = blockIdx.x * tile + threadIdx.x; i < packs; i += gridDim.x * tile) {
    if (i + (kPacks - 1) * blockDim.x < packs) {
      reduce_turn<Op, Finish, N, kPacks, T>(launch, begin, i);
    } else {
#pragma unroll 1
      for (u64 at = i; at < packs; at += blockDim.x) reduce_turn<Op, Finish, N, 1, T>(launch, begin, at);
    }
  }
}

template <class Op, class Finish, bool kPacked, class T>
__device__ inline void reduce_range(const Launch& launch, u64 count) {
  constexpr int kSize = sizeof(T), N = 16 / kSize;
  constexpr int kSingles = kPacked ? kTurn<kSize, 1> : 2;
  const u64 ahead = until_aligned<T, N>(static_cast<const T*>(launch.targets[0]));
  bool together = kPacked && ahead <= count;
#pragma unroll 1
  for (int k = 0; k < launch.source_count; k++)
    together = together && aligned<T, N>(static_cast<const T*>(launch.sources[k]) + ahead);
#pragma unroll 1
  for (int k = 0; k < launch.target_count; k++)
    together = together && aligned<T, N>(static_cast<const T*>(launch.targets[k]) + ahead);
  const u64 head = together ? ahead : count, packs = (count - head) / N, tail = head + packs * N;
  if constexpr (kPacked) reduce_packs<Op, Finish, N, kTurn<kSize, N>, T>(launch, head, packs);
#pragma unroll 1
  for (int end = 0; end < 2; end++)
    reduce_packs<Op, Finish, 1, kSingles, T>(launch, end ? tail : 0, end ? count - tail : head);
}

template <class T, class Op, int kParts = 1>
__device__ inline void reduce(const Launch& launch) {
  if constexpr (Traits<T>::kInteger) {
    if (launch.divisor == 1 && launch.scale == 1)
      reduce_range<Op, Kept, true, T>(launch, launch.count);
    else  // limited by arithmetic, which is long
      reduce_range<Op, Finished, false, T>(launch, launch.count);
  } else {
    reduce_range<Op, Finished, true, T>(launch, launch.count * kParts);
  }
}

}  // namespace

// ---- the kernels ----

#define COLLECTIVE_KERNEL(name, ...) \
  extern "C" __global__ void __launch_bounds__(kThreads, 3) name(const Launch launch) { __VA_ARGS__(launch); }

#define COLLECTIVE_SAME(name, ...) COLLECTIVE_KERNEL(convert_##name##_##name, convert_same<__VA_ARGS__>)
COLLECTIVE_SAME(uint8, u8)
COLLECTIVE_SAME(int8, signed char)
COLLECTIVE_SAME(uint16, u16)
COLLECTIVE_SAME(int16, short)
COLLECTIVE_SAME(int32, int)
COLLECTIVE_SAME(int64, long long)
COLLECTIVE_SAME(float16, Half)
COLLECTIVE_SAME(bfloat16, BFloat)
COLLECTIVE_SAME(float32, float)
COLLECTIVE_SAME(float64, double)
COLLECTIVE_SAME(complex64, float, 2)
COLLECTIVE_SAME(complex128, double, 2)
COLLECTIVE_KERNEL(convert_bool_bool, convert_pieces<Scale, Bool, Bool, 1, true>)

#define COLLECTIVE_CONVERT(from, to, From, To) \
  COLLECTIVE_KERNEL(convert_##from##_##to, convert_pieces<Scale, From, To, 1, true>)
COLLECTIVE_CONVERT(float16, bfloat16, Half, BFloat)
COLLECTIVE_CONVERT(float16, float32, Half, float)
COLLECTIVE_CONVERT(float16, float64, Half, double)
COLLECTIVE_CONVERT(bfloat16, float16, BFloat, Half)
COLLECTIVE_CONVERT(bfloat16, float32, BFloat, float)
COLLECTIVE_CONVERT(bfloat16, float64, BFloat, double)
COLLECTIVE_CONVERT(float32, float16, float, Half)
COLLECTIVE_CONVERT(float32, bfloat16, float, BFloat)
COLLECTIVE_CONVERT(float32, float64, float, double)
COLLECTIVE_CONVERT(float64, float16, double, Half)
COLLECTIVE_CONVERT(float64, bfloat16, double, BFloat)
COLLECTIVE_CONVERT(float64, float32, double, float)

#define COLLECTIVE_REDUCE(name, T)                               \
  COLLECTIVE_KERNEL(reduce_##name##_sum, reduce<T, Sum>)         \
  COLLECTIVE_KERNEL(reduce_##name##_product, reduce<T, Product>) \
  COLLECTIVE_KERNEL(reduce_##name##_min, reduce<T, Min>)         \
  COLLECTIVE_KERNEL(reduce_##name##_max, reduce<T, Max>)
COLLECTIVE_REDUCE(uint8, u8)
COLLECTIVE_REDUCE(int8, signed char)
COLLECTIVE_REDUCE(uint16, u16)
COLLECTIVE_REDUCE(int16, short)
COLLECTIVE_REDUCE(int32, int)
COLLECTIVE_REDUCE(int64, long long)
COLLECTIVE_REDUCE(float16, Half)
COLLECTIVE_REDUCE(bfloat16, BFloat)
COLLECTIVE_REDUCE(float32, float)
COLLECTIVE_REDUCE(float64, double)

// A sum of complex numbers is the sum of twice as many real ones. They have no order.
COLLECTIVE_KERNEL(reduce_complex64_sum, reduce<float, Sum, 2>)
COLLECTIVE_KERNEL(reduce_complex64_product, reduce<Complex<float>, Product>)
COLLECTIVE_KERNEL(reduce_complex128_sum, reduce<double, Sum, 2>)
COLLECTIVE_KERNEL(reduce_complex128_product, reduce<Complex<double>, Product>)

COLLECTIVE_KERNEL(reduce_bool_sum, reduce<Bool, Sum>)
COLLECTIVE_KERNEL(reduce_bool_product, reduce<Bool, Product>)
COLLECTIVE_KERNEL(reduce_bool_min, reduce<Bool, Product>)
COLLECTIVE_KERNEL(reduce_bool_max, reduce<Bool, Sum>)

}  // namespace collective
