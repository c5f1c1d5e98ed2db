// The kernels of one instruction set, on the vectors of reduce_vectors.h. Included by reduce_kernels_<set>.cc inside
// the set's namespace (hence no include guard and no #include here), after it has defined two element types for
// float16:
//
//   Half          in the order that is best for reductions
//   HalfInOrder   with V = Vec<float>, in order, for conversions
//
// One kernel does most of the work: fold() loads n sources, combines them in registers, finishes, stores. reduce() is
// fold<E, E, Op>, convert() is fold<From, To> of one source.

// Reductions of elements that are wider in registers than in memory take many instructions per byte. (N: see fold_n.)
template <class E, int N>
inline constexpr bool kLong = N != 1 && sizeof(typename E::V) > E::kBytes;

// What one iteration of the loop takes. Four vectors of E: enough loads in flight, and where n is not known, one
// pointer fetch for four loads; with two, float32 was 8 % slower in L2 (AVX2). Long reductions take two, for they run
// out of registers.
template <class E, bool kTwice>
using Turn = std::conditional_t<kTwice, Doubled<E>, Doubled<Doubled<E>>>;

// The elements at `offset` bytes of one source. In a long iteration the processor does not look far enough ahead: of
// identical loops some ran at 50 and some at 15 GB/s, depending only on their address (Zen 5, 64 MB). A prefetch cures
// that and costs nothing there; in the short iterations it gains nothing and costs a tenth in L2.
template <class E, int N>
COLLECTIVE_INLINE typename E::V fetch(const void* src, size_t offset) {
  const char* p = static_cast<const char*>(src) + offset;
  if constexpr (kLong<E, N>)
    for (size_t ahead = 256; ahead < 256 + E::kBytes; ahead += 64) __builtin_prefetch(p + ahead);
  return E::get(p);
}

// Elements [begin, end) of m destinations from those of n sources. M and N are m and n where they are known at compile
// time, else 0.
template <class From, class To, class Op, int N, int M>
static void fold_n(char* const* dsts, int n_dsts, const void* const* srcs, int n_srcs, size_t begin, size_t end,
                   Finish how) {
  using In = Turn<From, kLong<From, N>>;
  using Out = Turn<To, kLong<From, N>>;
  constexpr size_t kIn = From::kBytes / From::kCount, kOut = To::kBytes / To::kCount;
  const int n = N ? N : n_srcs, m = M ? M : n_dsts;
  // Read before the loop: for all the compiler knows, a store might overwrite the pointers.
  char* const dst = dsts[0];
  char* const second = m > 1 ? dsts[1] : nullptr;
  size_t i = begin;
  for (; i + In::kCount <= end; i += In::kCount) {
    auto v = fetch<In, N>(srcs[0], i * kIn);
    for (int k = 1; k < n; k++) v = combine<Op>(v, fetch<In, N>(srcs[k], i * kIn));
    const auto result = finished(v, how);
    Out::put(dst + i * kOut, result);
    if constexpr (M != 1) Out::put(second + i * kOut, result);
    if constexpr (M == 0)
      for (int k = 2; k < m; k++) Out::put(dsts[k] + i * kOut, result);
  }
  if (i == end) return;
  // The rest goes through padded copies: the same instructions, hence the same bits.
  char in[In::kBytes] = {}, out[Out::kBytes];
  typename In::V v{};
  for (int k = 0; k < n; k++) {
    __builtin_memcpy(in, static_cast<const char*>(srcs[k]) + i * kIn, (end - i) * kIn);
    v = k ? combine<Op>(v, In::get(in)) : In::get(in);
  }
  Out::put(out, finished(v, how));
  for (int k = 0; k < m; k++) __builtin_memcpy(dsts[k] + i * kOut, out, (end - i) * kOut);
}

// A known n pays off where the hardware prefetcher tells streams apart by the address of the load instruction, which a
// loop over k reuses: bfloat16 of 64 MB at n = 3, 4 and 8 reads 39, 41 and 38 GB/s here, and 21, 21 and 21 in the loop
// (float32: 41, 40, 36 and 32, 32, 31).
template <class From, class To, class Op, int M>
static void fold_m(char* const* dsts, int m, const void* const* srcs, int n, size_t begin, size_t end, Finish how) {
  switch (n) {
    case 2: return fold_n<From, To, Op, 2, M>(dsts, m, srcs, n, begin, end, how);
    case 3: return fold_n<From, To, Op, 3, M>(dsts, m, srcs, n, begin, end, how);
    case 4: return fold_n<From, To, Op, 4, M>(dsts, m, srcs, n, begin, end, how);
    case 8: return fold_n<From, To, Op, 8, M>(dsts, m, srcs, n, begin, end, how);
    default: return fold_n<From, To, Op, 0, M>(dsts, m, srcs, n, begin, end, how);
  }
}

template <class From, class To, class Op>
static void fold(char* dst, const void* const* srcs, int n, size_t begin, size_t end, Finish how = {1, 1}) {
  return fold_m<From, To, Op, 1>(&dst, 1, srcs, n, begin, end, how);
}

// ---- what is not worth vectors of its own: plain loops over blocks in L1, for the compiler to vectorise ----

inline constexpr size_t kBlock = 512;

// T(x * scale) for integers as reduce.h promises it; every step is defined for every value.
template <class T>
static void scale_integers(char* dst, size_t count, double scale) {
  constexpr T kMin = std::numeric_limits<T>::min(), kMax = std::numeric_limits<T>::max();
  constexpr double limit = static_cast<double>(kMax) + (sizeof(T) < 8 ? 1 : 0);  // 2^63 where T has 64 bits
  constexpr double highest = sizeof(T) < 8 ? kMax : limit - 1024;                // the last double below it
  T block[kBlock];
  for (size_t i = 0; i < count; i += kBlock) {
    const size_t m = count - i < kBlock ? count - i : kBlock;
    __builtin_memcpy(block, dst + i * sizeof(T), m * sizeof(T));
    for (size_t j = 0; j < m; j++) {
      double x = static_cast<double>(block[j]) * scale;
      double y = x != x ? 0 : x < kMin ? kMin : x > highest ? highest : x;
      block[j] = x >= limit ? kMax : static_cast<T>(y);
    }
    __builtin_memcpy(dst + i * sizeof(T), block, m * sizeof(T));
  }
}

// Exact: the floating-point type has so many more bits than T that a rounded quotient cannot reach the next integer.
// Processors divide vectors of floats but not of integers: 64 bits take the scalar instruction.
template <class T>
static void divide_integers(char* dst, const char* src, size_t count, int64_t divisor) {
  using Quotient = std::conditional_t<sizeof(T) <= 2, float, std::conditional_t<sizeof(T) == 4, double, T>>;
  const Quotient d = static_cast<Quotient>(divisor);
  T block[kBlock];
  for (size_t i = 0; i < count; i += kBlock) {
    const size_t m = count - i < kBlock ? count - i : kBlock;
    __builtin_memcpy(block, src + i * sizeof(T), m * sizeof(T));
    for (size_t j = 0; j < m; j++) block[j] = static_cast<T>(static_cast<Quotient>(block[j]) / d);
    __builtin_memcpy(dst + i * sizeof(T), block, m * sizeof(T));
  }
}

template <class T>
static void complex_product(char* dst, const void* const* srcs, int n, size_t count, Finish how) {
  const T s = static_cast<T>(how.scale), d = static_cast<T>(how.divisor);
  T re[kBlock], im[kBlock], pairs[2 * kBlock];
  for (size_t i = 0; i < count; i += kBlock) {
    const size_t m = count - i < kBlock ? count - i : kBlock, at = i * 2 * sizeof(T), nbytes = m * 2 * sizeof(T);
    for (int k = 0; k < n; k++) {
      __builtin_memcpy(pairs, static_cast<const char*>(srcs[k]) + at, nbytes);
      for (size_t j = 0; j < m; j++) {
        T x = pairs[2 * j], y = pairs[2 * j + 1];
        T rx = re[j] * x, iy = im[j] * y, ry = re[j] * y, ix = im[j] * x;  // apart: see COLLECTIVE_NO_CONTRACTION
        re[j] = k ? rx - iy : x;
        im[j] = k ? ry + ix : y;
      }
    }
    for (size_t j = 0; j < m; j++) pairs[2 * j] = re[j] / d * s, pairs[2 * j + 1] = im[j] / d * s;
    __builtin_memcpy(dst + at, pairs, nbytes);
  }
}

// ---- the set's functions ----

template <class F>
static void reduce_floats(ReduceOp op, char* dst, const void* const* srcs, int n, size_t count, Finish how) {
  switch (op) {
    case ReduceOp::kAverage:
    case ReduceOp::kSum: return fold<F, F, Sum>(dst, srcs, n, 0, count, how);
    case ReduceOp::kProduct: return fold<F, F, Product>(dst, srcs, n, 0, count, how);
    case ReduceOp::kMin: return fold<F, F, Min>(dst, srcs, n, 0, count, how);
    case ReduceOp::kMax: return fold<F, F, Max>(dst, srcs, n, 0, count, how);
    case ReduceOp::kAdasum:
    case ReduceOp::kBitAnd:
    case ReduceOp::kBitOr:
    case ReduceOp::kBitXor: return;  // refused by reduce.cc
  }
}

template <class T>
static void fold_integers(ReduceOp op, char* dst, const void* const* srcs, int n, size_t begin, size_t end) {
  using Signed = Plain<T>;
  using Modular = Plain<std::make_unsigned_t<T>>;  // wraps where a signed overflow would be undefined
  switch (op) {
    case ReduceOp::kAverage:
    case ReduceOp::kSum: return fold<Modular, Modular, Sum>(dst, srcs, n, begin, end);
    case ReduceOp::kProduct: return fold<Modular, Modular, Product>(dst, srcs, n, begin, end);
    case ReduceOp::kMin: return fold<Signed, Signed, Min>(dst, srcs, n, begin, end);
    case ReduceOp::kMax: return fold<Signed, Signed, Max>(dst, srcs, n, begin, end);
    case ReduceOp::kBitAnd: return fold<Modular, Modular, And>(dst, srcs, n, begin, end);
    case ReduceOp::kBitOr: return fold<Modular, Modular, Or>(dst, srcs, n, begin, end);
    case ReduceOp::kBitXor: return fold<Modular, Modular, Xor>(dst, srcs, n, begin, end);
    case ReduceOp::kAdasum: return;  // refused by reduce.cc
  }
}

template <class T>
static void reduce_integers(ReduceOp op, char* dst, const void* const* srcs, int n, size_t count, double scale) {
  if (scale == 1) return fold_integers<T>(op, dst, srcs, n, 0, count);
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t end = count - begin < kBlock ? count : begin + kBlock;
    fold_integers<T>(op, dst, srcs, n, begin, end);
    scale_integers<T>(dst + begin * sizeof(T), end - begin, scale);
  }
}

static void reduce_bools(ReduceOp op, char* dst, const void* const* srcs, int n, size_t count) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAverage:
    case ReduceOp::kMax:
    case ReduceOp::kBitOr: return fold<Bool, Bool, Or>(dst, srcs, n, 0, count);
    case ReduceOp::kProduct:
    case ReduceOp::kMin:
    case ReduceOp::kBitAnd: return fold<Bool, Bool, And>(dst, srcs, n, 0, count);
    case ReduceOp::kBitXor: return fold<Bool, Bool, Xor>(dst, srcs, n, 0, count);
    case ReduceOp::kAdasum: return;  // refused by reduce.cc
  }
}

// A sum of complex numbers is the sum of twice as many real ones.
template <class T>
static void reduce_complex(ReduceOp op, char* dst, const void* const* srcs, int n, size_t count, Finish how) {
  if (op == ReduceOp::kProduct) return complex_product<T>(dst, srcs, n, count, how);
  return fold<Plain<T>, Plain<T>, Sum>(dst, srcs, n, 0, 2 * count, how);
}

static void reduce(DType dtype, ReduceOp op, void* to, const void* const* srcs, int n, size_t count, double scale,
                   int64_t divisor) {
  char* dst = static_cast<char*>(to);
  const Finish how{scale, static_cast<double>(divisor)};
  switch (dtype) {
    case DType::kUInt8: return reduce_integers<uint8_t>(op, dst, srcs, n, count, scale);
    case DType::kInt8: return reduce_integers<int8_t>(op, dst, srcs, n, count, scale);
    case DType::kUInt16: return reduce_integers<uint16_t>(op, dst, srcs, n, count, scale);
    case DType::kInt16: return reduce_integers<int16_t>(op, dst, srcs, n, count, scale);
    case DType::kInt32: return reduce_integers<int32_t>(op, dst, srcs, n, count, scale);
    case DType::kInt64: return reduce_integers<int64_t>(op, dst, srcs, n, count, scale);
    case DType::kFloat16: return reduce_floats<Half>(op, dst, srcs, n, count, how);
    case DType::kBFloat16: return reduce_floats<EvenOdd<BFloatCodec>>(op, dst, srcs, n, count, how);
    case DType::kFloat32: return reduce_floats<Plain<float>>(op, dst, srcs, n, count, how);
    case DType::kFloat64: return reduce_floats<Plain<double>>(op, dst, srcs, n, count, how);
    case DType::kComplex64: return reduce_complex<float>(op, dst, srcs, n, count, how);
    case DType::kComplex128: return reduce_complex<double>(op, dst, srcs, n, count, how);
    case DType::kBool: return reduce_bools(op, dst, srcs, n, count);
  }
}

template <class F>
static bool sum_floats_to_many(char* const* dsts, int m, const void* const* srcs, int n, size_t count, Finish how) {
  m == 2 ? fold_m<F, F, Sum, 2>(dsts, m, srcs, n, 0, count, how)
         : fold_m<F, F, Sum, 0>(dsts, m, srcs, n, 0, count, how);
  return true;
}

static bool sum_to_many(DType dtype, void* const* to, int m, const void* const* srcs, int n, size_t count, double scale,
                        int64_t divisor) {
  char* const* dsts = reinterpret_cast<char* const*>(to);
  const Finish how{scale, static_cast<double>(divisor)};
  switch (dtype) {
    case DType::kFloat16: return sum_floats_to_many<Half>(dsts, m, srcs, n, count, how);
    case DType::kBFloat16: return sum_floats_to_many<EvenOdd<BFloatCodec>>(dsts, m, srcs, n, count, how);
    case DType::kFloat32: return sum_floats_to_many<Plain<float>>(dsts, m, srcs, n, count, how);
    case DType::kFloat64: return sum_floats_to_many<Plain<double>>(dsts, m, srcs, n, count, how);
    default: return false;
  }
}

template <class From, class To>
static void cast(char* dst, const void* src, size_t count, double scale) {
  fold_n<From, To, Sum, 1, 1>(&dst, 1, &src, 1, 0, count, {scale, 1});
}

// Between float64 and a 16-bit type, by way of a block of float32.
template <class To>
static void cast_from_double(char* dst, const char* src, size_t count, double scale) {
  float block[kBlock];
  char* middle = reinterpret_cast<char*>(block);
  for (size_t i = 0; i < count; i += kBlock) {
    const size_t m = count - i < kBlock ? count - i : kBlock;
    cast<Plain<double>, DoubleToOddFloat>(middle, src + i * 8, m, scale);
    cast<Plain<float>, To>(dst + i * 2, middle, m, 1);
  }
}

template <class From>
static void cast_to_double(char* dst, const char* src, size_t count, double scale) {
  float block[kBlock];
  char* middle = reinterpret_cast<char*>(block);
  for (size_t i = 0; i < count; i += kBlock) {
    const size_t m = count - i < kBlock ? count - i : kBlock;
    cast<From, Plain<float>>(middle, src + i * 2, m, 1);
    cast<FloatAsDouble, Plain<double>>(dst + i * 8, middle, m, scale);
  }
}

static constexpr int pair(DType dst_type, DType src_type) {
  return static_cast<int>(dst_type) * kDTypeCount + static_cast<int>(src_type);
}

static void convert(DType dst_type, void* to, DType src_type, const void* from, size_t count, double scale) {
  using BFloat = InOrder<BFloatCodec>;
  using Half = HalfInOrder;
  using Float = Plain<float>;
  using Double = Plain<double>;
  constexpr DType f16 = DType::kFloat16, bf16 = DType::kBFloat16, f32 = DType::kFloat32, f64 = DType::kFloat64;
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  switch (pair(dst_type, src_type)) {
    case pair(f16, bf16): return cast<BFloat, Half>(dst, src, count, scale);
    case pair(f16, f32): return cast<Float, Half>(dst, src, count, scale);
    case pair(f16, f64): return cast_from_double<Half>(dst, src, count, scale);
    case pair(bf16, f16): return cast<Half, BFloat>(dst, src, count, scale);
    case pair(bf16, f32): return cast<Float, BFloat>(dst, src, count, scale);
    case pair(bf16, f64): return cast_from_double<BFloat>(dst, src, count, scale);
    case pair(f32, f16): return cast<Half, Float>(dst, src, count, scale);
    case pair(f32, bf16): return cast<BFloat, Float>(dst, src, count, scale);
    case pair(f32, f64): return cast<Double, FloatAsDouble>(dst, src, count, scale);
    case pair(f64, f16): return cast_to_double<Half>(dst, src, count, scale);
    case pair(f64, bf16): return cast_to_double<BFloat>(dst, src, count, scale);
    case pair(f64, f32): return cast<FloatAsDouble, Double>(dst, src, count, scale);
  }
}

static void divide(DType dtype, void* to, const void* from, size_t count, int64_t divisor) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  switch (dtype) {
    case DType::kUInt8: return divide_integers<uint8_t>(dst, src, count, divisor);
    case DType::kInt8: return divide_integers<int8_t>(dst, src, count, divisor);
    case DType::kUInt16: return divide_integers<uint16_t>(dst, src, count, divisor);
    case DType::kInt16: return divide_integers<int16_t>(dst, src, count, divisor);
    case DType::kInt32: return divide_integers<int32_t>(dst, src, count, divisor);
    case DType::kInt64: return divide_integers<int64_t>(dst, src, count, divisor);
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kFloat32:
    case DType::kFloat64:
    case DType::kComplex64:
    case DType::kComplex128:
    case DType::kBool: return;  // refused by reduce.cc
  }
}
